"""What is damaged, the command that then reads it, and when its answer is right."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from qwen_jax import trace
from qwen_jax.prompt import load_tokenizer
from qwen_jax.weights import open_model
from stages.errors import UserError
from tests import ggml, tiny
from tools import convert, diff
from tools.localize import __main__ as localize

TOKENS = "5,3,9,1,0,7,2"


@dataclass(frozen=True)
class Subject:
    """Something on disk that is damaged in a copy.

    Attributes:
        main, arguments: the command; ``{}`` stands for the damaged copy.
        path: the undamaged one.
        right: (undamaged, copy, what ``--json`` said) -> why an exit with 0 was wrong, else "".
        weight: how often it is drawn.
    """

    name: str
    main: Callable[[list[str]], int]
    arguments: tuple[str, ...]
    path: Path
    right: Callable[[Path, Path, dict[str, Any]], str]
    weight: int = 4


def make(folder: Path) -> list[Subject]:
    """Write all of them below ``folder``."""
    model = tiny.write_checkpoint(folder / "model")
    sharded = tiny.write_checkpoint(folder / "sharded", shards=3)
    one = folder / "gguf"
    one.mkdir()
    raw = tiny.hf_config()
    into = ggml.writer(one / "m.gguf", raw)
    ggml.add_tensors(into, raw, tiny.random_tensors(raw), "F32")
    ggml.finish(into)
    convert.main([str(model), str(folder / "orbax"), "--to", "orbax"])
    given = ["--model", str(model), "--tokens", TOKENS]
    traces = {}
    for name, more in {"aprt": [], "safetensors": ["--format=safetensors"]}.items():
        traces[name] = folder / name
        asked = [*given, *more, "--logits=all", "--layers=0-1", "--out", str(traces[name])]
        trace.main(asked)
    foreign = _without_manifest(traces["aprt"], folder / "foreign")
    steps = _in_calls(traces["aprt"], folder / "steps")
    against = str(traces["aprt"])
    dry = ("--dry-run", "--json={json}")
    result = [
        Subject(f"trace, {name}", diff.main, ("{}", against, "--json={json}"), path, _same_rows, 8)
        for name, path in traces.items()
    ]
    result += [
        Subject(name, diff.main, ("{}", against, *given, "--json={json}"), path, _close)
        for name, path in {"dump": foreign, "dump of calls": steps}.items()
    ]
    result += [
        Subject(
            "trace, localize",
            localize.main,
            ("{}", "--model", str(model), "--harm", "none", "--json={json}"),
            traces["aprt"],
            _clean,
            1,
        ),
    ]
    models = {"Hugging Face": model, "shards": sharded, "GGUF": one, "orbax": folder / "orbax"}
    for name, path in models.items():
        file = "{}/m.gguf" if name == "GGUF" else "{}"
        asked = ("--model", file, "--tokens", TOKENS, *dry)
        result.append(Subject(name, trace.main, asked, path, _same_weights))
    asked = ("--model", "{}", "--prompt", "the cat sat", *dry)
    result.append(Subject("tokenizer", trace.main, asked, _tokenizer(model, folder), _same_tokens))
    return result


def _tokenizer(model: Path, folder: Path) -> Path:
    """The model with little else that could be damaged."""
    path = tiny.write_checkpoint(folder / "tokenizer")
    assert path != model
    return path


def _without_manifest(traced: Path, into: Path) -> Path:
    for file in sorted(traced.rglob("*.bin")):
        target = into / file.relative_to(traced)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return into


def _in_calls(traced: Path, into: Path) -> Path:
    """The last layer's outputs as a dump of two calls: 4 rows, then 3."""
    count = len(TOKENS.split(","))
    for name in ("embedding", "attn_norm", "ffn_up", "post_ffn_residual"):
        for file in sorted(traced.glob(f"layer-*/{name}.bin")):
            data = file.read_bytes()
            values = np.frombuffer(data[12:], "<f4").reshape(count, -1)
            for step, rows in enumerate((values[:4], values[4:])):
                target = into / f"step-{step:04d}" / file.relative_to(traced)
                target.parent.mkdir(parents=True, exist_ok=True)
                size = rows.size.to_bytes(4, "little")
                target.write_bytes(data[:8] + size + rows.tobytes())
    return into


# --- when an exit with 0 is right


def _same_rows(good: Path, copy: Path, told: dict[str, Any]) -> str:
    """A whole trace has hashes: what agrees is bit for bit what was written."""
    if told["verdict"] != "agree" or told["tolerance"] != 1e-5:
        return f"{told['verdict']} at {told['tolerance']}"
    wrong = [row for row in told["rows"] if not row["identical"]]
    return f"{wrong[0]['stage']} was changed, and agrees" if wrong else ""


def _close(good: Path, copy: Path, told: dict[str, Any]) -> str:
    """A dump has none: what agrees is close to what was written, as NumPy sees it."""
    named = {(row["stage"], row["layer"]) for row in told["rows"]}
    stages: dict[tuple[str, int | None], list[Path]] = {}
    for file in sorted(good.rglob("*.bin")):  # of a dump of calls in their order
        layer = next((int(p[6:]) for p in file.parts if p.startswith("layer-")), None)
        stages.setdefault((file.stem, layer), []).append(file)
    for key, files in stages.items():
        others = [copy / file.relative_to(good) for file in files]
        if key not in named or not all(other.is_file() for other in others):
            continue
        x, y = (
            np.frombuffer(b"".join(file.read_bytes()[12:] for file in each), "<f4")
            for each in (others, files)
        )
        if x.shape != y.shape:
            return f"{key} has another size, and agrees"
        if key[0] in ("attn_scores", "attn_softmax"):
            continue  # masked values are no part of it
        x, y = x.astype(np.float64), y.astype(np.float64)
        with np.errstate(all="ignore"):
            apart = np.linalg.norm(x - y) / np.linalg.norm(y)
        if not apart <= 1.01e-5:
            return f"{key} is {apart:.1e} off, and agrees"
    return ""


def _clean(good: Path, copy: Path, told: dict[str, Any]) -> str:
    return "" if told["verdict"] in ("clean", "precision") and not told["faults"] else str(told)


def _same_weights(good: Path, copy: Path, told: dict[str, Any]) -> str:
    """What we read is what the form's own library reads; orbax's own files have no damage."""
    spec = copy / "m.gguf" if (good / "m.gguf").exists() else copy
    try:
        model = open_model(str(spec))
        ours = {name: model.read(name) for name in model.shapes}
    except UserError:
        return ""  # found out when the rows are read
    if any(copy.glob("*.safetensors")):
        theirs = {}
        for file in copy.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as opened:
                theirs |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    elif spec != copy:
        import gguf

        reader = gguf.GGUFReader(spec)
        theirs = {
            name: next(t.data for t in reader.tensors if t.name == p.gguf_name(layer))
            for name, (p, layer) in model.config.arch.tensors(
                model.config.num_hidden_layers, model.config.tie_word_embeddings
            ).items()
        }
    else:
        whole = open_model(str(good))
        theirs = {name: whole.read(name) for name in whole.shapes}
    for name, array in ours.items():
        if array.tobytes() != np.ascontiguousarray(theirs[name]).tobytes():
            return f"{name} is read otherwise than its library does"
    return ""


def _same_tokens(good: Path, copy: Path, told: dict[str, Any]) -> str:
    tokenizer = load_tokenizer(open_model(str(copy)))
    expected = tokenizer.encode("the cat sat").ids if tokenizer else None
    return "" if told["tokens"] == expected else f"{told['tokens']}, not {expected}"


def reading(text: str) -> dict[str, Any]:
    """What ``--json`` wrote."""
    return json.loads(text) if text else {}
