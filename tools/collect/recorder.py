"""What is recorded of an engine, call by call, and the trace that it becomes.

    recorder = Recorder("path/to/model")
    recorder.begin(range(16))                                            # each call of the engine
    recorder.tap("model.layers.0.mlp.gate_proj", "out", x)               # by Hugging Face's names
    recorder.named(0, "q_post_rope", q)                                  # by ours
    recorder.finish("dump", tokens, {"name": "my-engine", "version": "1.0"})

Values may be of NumPy, PyTorch, JAX or anything that NumPy takes. They are copied, for an engine
uses its memory again, and are all in memory until ``finish``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages import places
from stages.architecture import Key, Stage, axis_size
from stages.entry import Entry
from stages.errors import UserError
from stages.manifest import DTYPES, Cache, Changed, DType, Format, Manifest, Model, WeightEntry
from stages.rows import put
from stages.selection import parse_layers, parse_stages
from stages.steps import changed_rows
from stages.version import NAME, version
from stages.writer import TraceWriter

SCHEMA: Literal[1] = 1  # of ``--json``
NOT_SEEN = "the engine did not show it"


class StageOfLayers(Entry, frozen=True):
    """What was recorded of a stage: in which layers, [null] of a whole-model stage."""

    stage: str
    axes: list[str]
    shape: list[int]
    layers: list[int | None]


class CollectResult(Entry, frozen=True):
    """``tools.collect --json``.

    Attributes:
        producer: what the manifest says of the engine.
        steps: rows of each call.
        absent: stages that the engine does not show, and why.
        weights: what ``tools.localize --model`` should be; null where the engine has its own.
        next_token: the likeliest after the last position. Of ``files`` neither is known.
        passed_over: of ``files``, what the map has no use for.
    """

    schema: Literal[1]
    engine: str
    producer: dict[str, Any]
    architecture: str
    model: str
    out: str
    dtype: str
    cache: str | None
    tokens: list[int]
    positions: list[int]
    steps: list[int]
    stages: list[StageOfLayers]
    absent: dict[str, str]
    cache_changed: list[Changed]
    files: int
    bytes: int
    weights: str | UnsetType | None = UNSET
    next_token: int | UnsetType = UNSET
    passed_over: list[str] | UnsetType = UNSET


@dataclass(frozen=True)
class Collected:
    """What ``finish`` has written.

    Attributes:
        manifest: of the trace.
        absent: stage -> why it, or some of its layers, is not there.
        changed: rows of the cache that changed.
        bytes: of all files.
        judged_by: what ``tools.localize --model`` should be; None without weights to judge by.
        next_token: the likeliest after the last, where an engine was run.
    """

    path: Path
    manifest: Manifest
    absent: dict[str, str]
    changed: tuple[Changed, ...]
    bytes: int
    judged_by: str | None = None
    next_token: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        made = self.manifest
        stages: dict[str, StageOfLayers] = {}
        for entry in made.files:
            layers = stages[entry.stage].layers if entry.stage in stages else []
            stages[entry.stage] = StageOfLayers(
                entry.stage, list(entry.axes), list(entry.shape), [*layers, entry.layer]
            )
        found = CollectResult(
            schema=SCHEMA,
            engine=made.producer["name"],
            producer=made.producer,
            architecture=made.architecture,
            model=made.model.name,
            out=str(self.path),
            dtype=made.dtype,
            cache=made.cache,
            tokens=list(made.tokens),
            positions=list(made.positions),
            steps=list(made.steps),
            stages=list(stages.values()),
            absent=self.absent,
            cache_changed=list(self.changed),
            files=len(made.files),
            bytes=self.bytes,
        )
        if self.next_token is not None:
            ran = {"weights": self.judged_by, "next_token": self.next_token}
            found = msgspec.structs.replace(found, **ran)
        return msgspec.to_builtins(found)


class Call(NamedTuple):
    """The rows that one call gave of a stage."""

    end: int  # rows of the sequence up to the end of the call
    value: np.ndarray


class Recorder:
    """Records one sequence.

    Arguments:
        model: of ``qwen_jax.open_model``, or what it takes.
        stages, layers: what to record, as ``--stages`` and ``--layers``.
        biased: the modules of q, k and v add their bias themselves.

    Raises:
        UserError: no such model, stage or layer.
    """

    def __init__(
        self,
        model: Weights | str | Path | None,
        stages: str = "all",
        layers: str = "all",
        biased: bool = True,
    ) -> None:
        self.model = model if isinstance(model, Weights) else open_model(model)
        self.config = self.model.config
        self.arch = self.config.arch
        self.stages = parse_stages(stages, self.arch)
        self.layers = parse_layers(layers, self.config.num_hidden_layers)
        self.biased = biased
        self.steps: list[int] = []
        self.positions: list[int] = []
        self.changed: dict[tuple[int, str, int], Changed] = {}
        self._calls: dict[Key, list[Call]] = {}
        self._parts: dict[Key, dict[str, np.ndarray]] = {}  # of this call, until it is over
        self._partly: dict[Key, str] = {}  # what was seen of three
        self._caches: dict[tuple[int, str], np.ndarray] = {}

    def begin(self, positions: Iterable[int]) -> None:
        """A call of the engine begins; it computes the rows at these positions."""
        self._join()
        given = [int(position) for position in positions]
        self.steps.append(len(given))
        self.positions.extend(given)

    def want(self, stage: str, layer: int | None) -> bool:
        """Whether a stage was asked for."""
        return stage in self.stages and (layer is None or layer in self.layers)

    def tap(self, path: str, side: str, value: Any) -> None:
        """What enters ("in") or leaves ("out") the module at a Hugging Face path, such as
        ``model.layers.3.self_attn.o_proj``. What is no stage is passed over."""
        if place := places.place(self.arch, path, side):
            stage, before = place.stage, self.arch.stage[place.stage].inputs[0]
            if place.part and not self.biased and places.parts(self.arch, before):
                stage = before  # the product alone
            self.named(place.layer, stage, value, place.part)

    def named(self, layer: int | None, stage: str, value: Any, part: str = "") -> None:
        """A stage's rows of this call, in the stage's axes, with or without batch axes
        of 1; its last rows, where it has fewer than the call. ``part`` is the last name of one of
        the modules of q, k and v, where the three that stand side by side come one by one; the last
        one given counts.

        Raises:
            UserError: no such stage, another shape, or given twice in one call.
        """
        if not self.steps:
            raise UserError("a stage was recorded before begin() told of a call")
        row = self.arch.stage.get(stage)
        if row is None:
            raise UserError(f"{stage!r} is no stage of {self.arch.name}")
        if not self.want(stage, layer):
            return
        array = to_numpy(value)
        if not array.size:
            return  # a call whose rows nobody asked for
        if part:
            self._side_by_side(row, layer, array, part)
        else:
            self._keep(row, layer, self._rows(row, layer, array))

    def cached(self, layer: int, cache: str, value: Any) -> None:
        """What attention reads back from the "K" or "V" cache, [S, K, H]: all rows so far. A row is
        written once; one that is not what it was is noted in ``changed``."""
        array = to_numpy(value)
        before = self._caches.get((layer, cache))
        self._caches[layer, cache] = array
        if before is not None:
            name, step = cast(Cache, cache), len(self.steps) - 1
            for row, bits in changed_rows(before, array[: len(before)]):
                found = Changed(layer=layer, cache=name, row=row, step=step, bits=bits)
                self.changed.setdefault((layer, cache, row), found)

    def _side_by_side(self, stage: Stage, layer: int | None, value: np.ndarray, part: str) -> None:
        widths = places.parts(self.arch, stage.name)
        if part not in widths:
            raise UserError(f"{part!r} is no part of {stage.name}: expected {', '.join(widths)}")
        width = axis_size(widths[part], self.config.dims(1))
        if value.size % width:
            raise UserError(
                f"{part} of {stage.name} of layer {layer}: {list(value.shape)} was recorded, "
                f"expected rows of {width}"
            )
        self._parts.setdefault((stage.name, layer), {})[part] = value.reshape(-1, width)

    def _join(self) -> None:
        """The call is over: what of it stands side by side becomes one."""
        for (name, layer), found in self._parts.items():
            order = list(places.parts(self.arch, name))
            if found.keys() == set(order):
                stage = self.arch.stage[name]
                whole = np.concatenate([found[part] for part in order], -1)
                self._keep(stage, layer, self._rows(stage, layer, whole))
            else:
                self._partly[name, layer] = ", ".join(found)
        self._parts.clear()

    def _keep(self, stage: Stage, layer: int | None, value: np.ndarray) -> None:
        calls = self._calls.setdefault((stage.name, layer), [])
        if calls and calls[-1].end == len(self.positions):
            raise UserError(f"{stage.name} of layer {layer} was recorded twice in one call")
        calls.append(Call(len(self.positions), value))

    def _rows(self, stage: Stage, layer: int | None, value: np.ndarray) -> np.ndarray:
        """A value in the axes of the table; keys that are no rows yet are cut off.

        Raises:
            UserError: its shape is another.
        """
        dims = self.config.dims(len(self.positions))
        sizes = [-1 if axis == "T" else axis_size(axis, dims) for axis in stage.axes]
        try:
            if stage.heads_lead:
                if value.shape[-1] < sizes[-1]:
                    raise ValueError
                value = value.reshape(sizes[0], -1, value.shape[-1])[..., : sizes[-1]]
            found = value.reshape(sizes)
            if found.shape[stage.axes.index("T")] > self.steps[-1]:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{stage.name} of layer {layer}: {list(value.shape)} was recorded in a call of "
                f"{self.steps[-1]} rows; expected {' x '.join(stage.axes)}: "
                f"{' x '.join(map(str, stage.shape({**dims, 'T': self.steps[-1]})))}"
            ) from None
        return found

    def finish(
        self,
        out: str | Path,
        tokens: Sequence[int],
        producer: Mapping[str, Any],
        *,
        cache: str | None = None,
        dtype: str | None = None,
        weights: Mapping[str, WeightEntry] | None = None,
        why: Mapping[str, str] | None = None,
        format: str | None = None,
        overwrite: bool = False,
    ) -> Collected:
        """Write the whole sequence as a trace with a manifest.

        Arguments:
            producer: the engine: "name", "version", and what else there is to say of it.
            cache: the format of its key/value cache; None where it has none.
            dtype: what it computes in; None is what its stages have.
            weights: hashes of the tensors that it multiplies by; None: those of the model.
            why: stage -> why it is not there.
            format: "aprt" (float32) or "safetensors" (as the values are).

        Raises:
            UserError: nothing was recorded, tokens that are not one for each row, or a directory
                that cannot be used.
        """
        self._join()
        whole, absent = self._whole(dict(why or {}))
        if not whole:
            raise UserError("the engine showed nothing that is a stage; is it the model's engine?")
        if len(tokens) != len(self.positions):
            raise UserError(f"{len(tokens)} tokens, but {len(self.positions)} rows were computed")
        if weights is None:
            weights = {name: self.model.hash(name) for name in self.model.shapes}
        head = whole.get((self.arch.head.name, None))
        last = head is not None and len(head) == 1 < len(tokens)
        if head is not None and last:
            whole[self.arch.head.name, None] = head[0]
        dtype = dtype or _commonest(whole.values())
        told = {"versions": {NAME: version()}} | dict(producer)
        told |= {"absent": absent} if absent else {}
        changed = tuple(self.changed.values())
        header = Manifest(
            architecture=self.arch.name,
            format=cast(Format, format or ("safetensors" if dtype == "float64" else "aprt")),
            dtype=cast(DType, dtype),
            logits="last" if last else "all",
            tokens=tuple(int(token) for token in tokens),
            positions=tuple(self.positions),
            steps=tuple(self.steps),
            cache=cache,
            changed=changed or UNSET,
            model=Model(name=self.model.name, config=self.config.to_json(), weights={}),
            producer=told,
            files=(),
        )
        values = {key: whole[key] for key in self._order() if key in whole}
        planned = {key: (value.shape, str(value.dtype)) for key, value in values.items()}
        with TraceWriter(Path(out), header, weights, planned, overwrite) as writer:
            for (stage, layer), value in values.items():
                writer.add(stage, layer, value)
            found = writer.finish()
        return Collected(Path(out), found, absent, changed, writer.bytes)

    def _order(self) -> list[Key]:
        layers = self.config.num_hidden_layers
        return [(stage.name, n) for stage, n in self.arch.computation_order(layers)]

    def _whole(self, why: dict[str, str]) -> tuple[dict[Key, np.ndarray], dict[str, str]]:
        """Every stage over all calls, and of what is asked for but not there: stage -> why."""
        whole: dict[Key, np.ndarray] = {}
        missing: dict[str, list[int | None]] = {}
        reasons: dict[str, str] = {}
        for stage, layer in self._order():
            if not self.want(stage, layer):
                continue
            calls = self._calls.get((stage, layer))
            if calls and calls[-1].end == len(self.positions):
                whole[stage, layer] = joined(self.arch.stage[stage], calls)
                continue
            missing.setdefault(stage, []).append(layer)
            if calls:
                reasons[stage] = "the last call did not give it"
            elif (stage, layer) in self._partly:
                reasons[stage] = f"only {self._partly[stage, layer]} of it was seen"
        absent = {}
        for stage, layers in missing.items():
            some = len(layers) < len(self.layers) and None not in layers
            where = f"layers {', '.join(map(str, layers))}: " if some else ""
            absent[stage] = where + (why.get(stage) or reasons.get(stage) or NOT_SEEN)
        return whole, absent


def joined(stage: Stage, calls: Sequence[Call]) -> np.ndarray:
    """The rows of all calls along T: the last run without a gap, for a trace's rows are the last
    ones of its sequence. Keys that came later are zeros in earlier rows: they are masked there, no
    part of the computation."""
    along, start, run = stage.axes.index("T"), calls[-1].end, list[Call]()
    for call in reversed(calls):
        if call.end != start:
            break  # rows in between were not computed
        run.append(call)
        start -= call.value.shape[along]
    shape = [*calls[-1].value.shape]
    shape[along] = calls[-1].end - start
    whole = np.zeros(shape, np.result_type(*(call.value for call in run)))
    for call in run:
        put(stage, whole, call.value, call.end - call.value.shape[along] - start)
    return whole


def to_numpy(value: Any) -> np.ndarray:
    """A copy of a value, as it is if its dtype is one of a trace, else as float32."""
    if hasattr(value, "detach"):  # PyTorch's
        import torch

        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            import ml_dtypes

            value = value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        else:
            value = value.numpy()
    array = np.array(value)
    return array if array.dtype.name in DTYPES else array.astype(np.float32)


def _commonest(values: Iterable[np.ndarray]) -> str:
    names = [value.dtype.name for value in values]
    return max(DTYPES, key=names.count)
