"""Turn what another tool has left on disk into a trace: ``files DIR --map NAME --model M ...``.

A map, a TOML file, says which of the tool's names is which stage. Ours: ``transformers-debugger``
(model_addition_debugger), ``vllm-hidden-states`` (extract_hidden_states), ``sglang-passes``
(--debug-tensor-dump-output-folder) and ``sglang-dumper`` (its dumper with non_intrusive_mode all).
No pickle is run: of PyTorch's files those are read that hold nothing but tensors and plain data.
"""

import argparse
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qwen_jax import arguments, cli
from qwen_jax.weights import open_model
from stages.architecture import Architecture
from stages.errors import UserError
from stages.writer import replaceable
from tools.collect import core
from tools.collect.command import PROG, add_common, counts, show
from tools.collect.recorder import Recorder, to_numpy

MAPS = Path(__file__).parent / "maps"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The stage that tensors hold whose whole name matches ``match``.

    Attributes:
        match: a regular expression; its group "layer" is the layer, "path" a module's.
        stage: a stage, or several: the first that the architecture has; "" where ``side`` tells.
        side: of the module at "path": "in" or "out".
        shift: added to the layer: what enters a layer is the output of the one before. Before the
            first layer it is the embedding, and without a layer the last one is meant.
        halves: stages that lie side by side in it, each as wide as the others.
        call: added to the number of the call in whose file it lies.
        hidden: it is [T, ids, D], the inputs of the layers that --hidden-ids names.
    """

    match: str
    stage: str = ""
    side: str = ""
    shift: int = 0
    halves: tuple[str, ...] = ()
    call: int = 0
    hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class Map:
    """How the files of one engine are named and keyed.

    Attributes:
        engine: what made them.
        files: a pattern of their paths below DIR: its group "call" is the number of the call, its
            group "name" the name of what is in it. Without that the file's own keys are the names.
        key: the key under which a file has its value, if it is named by its path.
        positions, tokens: names of these, where files have them.
        rules: the first that fits a name counts.
    """

    engine: str
    files: str
    rules: tuple[Rule, ...]
    key: str = ""
    positions: str = ""
    tokens: str = ""


def read_map(given: str) -> Map:
    """A map of ours by its name, or a file.

    Raises:
        UserError: no such map, or it is not one.
    """
    path = MAPS / f"{given}.toml"
    if not re.fullmatch(r"[\w-]+", given) or not path.exists():
        path = Path(given)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        rules = tuple(
            Rule(**{**rule, "halves": tuple(rule.get("halves", ()))}) for rule in data.pop("rules")
        )
        found = Map(**data, rules=rules)
        for pattern in (found.files, found.positions, found.tokens, *(r.match for r in rules)):
            re.compile(pattern)
    except FileNotFoundError:
        names = ", ".join(sorted(each.stem for each in MAPS.glob("*.toml")))
        raise UserError(f"--map {given}: neither a file nor one of {names}") from None
    except (OSError, ValueError, TypeError, KeyError, re.error) as error:
        raise UserError(f"--map {given}: not a map: {error}") from None
    return found


def tensors(directory: Path, how: Map) -> Iterator[tuple[int, str, Any]]:
    """(call, name, value) of everything in the files that a map names.

    Raises:
        UserError: a file that cannot be read without running what is in it.
    """
    for path in sorted(each for each in directory.rglob("*") if each.is_file()):
        match = re.fullmatch(how.files, path.relative_to(directory).as_posix())
        if not match:
            continue
        groups = match.groupdict()
        for key, value in _content(path):
            if how.key and key != how.key and not key.startswith(how.key + "."):
                continue
            name = groups.get("name")
            rest = key.removeprefix(how.key) if how.key else ""
            yield int(groups.get("call") or 0), key if name is None else name + rest, value


def _content(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 -- it is no dict
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
        return
    import torch

    try:
        yield from _flat("", torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # pickle's, zipfile's, torch's
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: not a file of tensors alone, so it is not loaded: {why}"
        ) from None


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors in dictionaries and lists, by their path: a.0, a.1."""
    if hasattr(value, "detach"):
        yield name, value
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, inner in items:
        yield from _flat(f"{name}.{key}" if name else str(key), inner)


class Reader:
    """The tensors of some calls, handed to a recorder by the rules of a map."""

    def __init__(self, recorder: Recorder, how: Map, ids: Sequence[int]) -> None:
        self.recorder, self.how, self.ids = recorder, how, ids
        self.positions: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.found: dict[int, list[tuple[Rule, re.Match[str], Any]]] = {}
        self.passed = 0  # values that no rule is about

    def read(self, directory: Path) -> None:
        """Raises:
        UserError: nothing there fits the map.
        """
        if not directory.is_dir():
            raise UserError(f"no such directory: {directory}")
        for call, name, value in tensors(directory, self.how):
            if self.how.positions and re.fullmatch(self.how.positions, name):
                self.positions[call] = to_numpy(value).astype(int).ravel().tolist()
            elif self.how.tokens and re.fullmatch(self.how.tokens, name):
                self.tokens[call] = to_numpy(value).astype(int).ravel().tolist()
            else:
                self._sort(call, name, value)
        if not self.found:
            raise UserError(f"{directory}: holds nothing that the map knows; is it the right one?")

    def _sort(self, call: int, name: str, value: Any) -> None:
        for rule in self.how.rules:
            if match := re.fullmatch(rule.match, name):
                self.found.setdefault(call + rule.call, []).append((rule, match, value))
                return
        self.passed += 1

    def record(self, calls: Sequence[int], steps: Sequence[Sequence[int]]) -> None:
        """Hand on the calls, each with the positions that it computed."""
        for call, positions in zip(calls, steps, strict=True):
            self.recorder.begin(positions)
            for rule, match, value in self.found.get(call, []):
                self._record(rule, match, value)

    def _record(self, rule: Rule, match: re.Match[str], value: Any) -> None:
        groups = match.groupdict()
        if rule.side:
            self.recorder.tap(groups["path"], rule.side, value)
        elif rule.hidden:
            self._hidden(to_numpy(value))
        else:
            layer = int(groups["layer"]) if groups.get("layer") else None
            names = rule.halves or (rule.stage,)
            parts = np.split(to_numpy(value), len(names), -1) if rule.halves else [value]
            for name, part in zip(names, parts, strict=True):
                self._named(name, layer, rule.shift, part)

    def _named(self, names: str, layer: int | None, shift: int, value: Any) -> None:
        arch, layers = self.recorder.arch, self.recorder.config.num_hidden_layers
        stage = _first(names, arch)
        scope = arch.stage[stage].scope
        if scope == "layer":
            layer = (layers if layer is None else layer) + shift
            if layer < 0:  # what enters the first layer
                stage, layer = arch.first.name, 0
        self.recorder.named(0 if scope == "start" else layer, stage, value)

    def _hidden(self, value: np.ndarray) -> None:
        if value.ndim != 3 or value.shape[1] != len(self.ids):
            raise UserError(
                f"--hidden-ids names {len(self.ids)} layers, but the file has {list(value.shape)}; "
                "give the engine's eagle_aux_hidden_state_layer_ids"
            )
        for place, number in enumerate(self.ids):
            output = self.recorder.arch.layer_output.name
            self._named(output, number, -1, value[:, place])


def _first(names: str, arch: Architecture) -> str:
    for name in names.split():
        if name in arch.stage:
            return name
    raise UserError(f"--map: {names!r} is no stage of {arch.name}")


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as 0,3-5."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,3-5")
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(found)


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog=PROG, description=__doc__)
    result.prog += " files"
    add = result.add_argument
    add("directory", type=Path, metavar="DIR", help="where the files lie")
    add("--map", required=True, metavar="NAME|FILE", help="what the files' names mean")
    add("--model", metavar="DIR|FILE.gguf", help="the model that was run")
    add_common(result)
    add("--steps", type=counts, metavar="16,1,1", help="rows of each call, if the files do not say")
    add("--calls", type=numbers, metavar="LIST", help="of several requests, the calls of this one")
    add("--hidden-ids", type=numbers, default=(), metavar="LIST", help="of vllm-hidden-states")
    return result


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    replaceable(args.out, args.overwrite)
    how = read_map(args.map)
    model, prompt = open_model(args.model), arguments.prompt_of(args)
    tokens = prompt.read(model)
    recorder = Recorder(model, args.stages, args.layers)
    reader = Reader(recorder, how, args.hidden_ids)
    reader.read(args.directory)
    calls = args.calls or sorted(call for call in reader.found if call >= 0)
    steps = _steps(reader, calls, args.steps, prompt.positions(tokens))
    _check_tokens(reader, calls, tokens)
    reader.record(calls, steps)
    found = recorder.finish(
        args.out,
        tokens,
        core.describe_files(how.engine, args.map),
        weights={},  # who wrote these files does not say what was multiplied by
        overwrite=args.overwrite,
    )
    data = found.to_json() | {"passed_over": reader.passed}
    show(cli.report(args.json, data), data, found)
    return 0


def _steps(
    reader: Reader, calls: Sequence[int], given: Sequence[int] | None, positions: Sequence[int]
) -> list[list[int]]:
    """The positions that each call computed.

    Raises:
        UserError: they cannot be told, or there are not as many as tokens.
    """
    if all(call in reader.positions for call in calls):
        steps = [reader.positions[call] for call in calls]
    else:
        counts = given or ((len(positions),) if len(calls) == 1 else ())
        if len(counts) != len(calls):
            raise UserError(f"the files hold {len(calls)} calls; --steps says the rows of each")
        ends = np.cumsum(counts)
        steps = [list(positions[end - n : end]) for n, end in zip(counts, ends, strict=True)]
    if (total := sum(map(len, steps))) != len(positions):
        raise UserError(
            f"calls {', '.join(map(str, calls))} computed {total} rows, but there are "
            f"{len(positions)} tokens; --calls chooses those of one request"
        )
    return steps


def _check_tokens(reader: Reader, calls: Sequence[int], tokens: Sequence[int]) -> None:
    """What the files say of the tokens must be what is given."""
    if calls and all(call in reader.tokens for call in calls):
        theirs = [token for call in calls for token in reader.tokens[call]]
        if theirs != list(tokens):
            raise UserError(
                f"the files are of {len(theirs)} other tokens ({theirs[:3]}, ...) than are given "
                f"({list(tokens[:3])}, ...)"
            )
