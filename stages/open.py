"""Opening a trace directory: ours and the oracle's by their manifest, a dump of another program by
its files' names and sizes and the user's word, a ``Layout``."""

import math
from collections import Counter
from pathlib import Path

from stages import manifest, steps
from stages.architectures import ARCHITECTURES
from stages.dump import Found, may_be_last_rows, stage_of, stages_in
from stages.errors import UserError
from stages.files import holds
from stages.manifest import FileEntry
from stages.trace import Layout, Trace


def open_trace(path: Path, layout: Layout | None = None) -> Trace:
    """Open a trace directory. ``layout`` is needed, and used, only without a manifest.

    Raises:
        UserError: no such directory, an unfinished trace, or nothing that is a trace.
    """
    if not path.is_dir():
        raise UserError(f"no such trace directory: {path}")
    if (path / manifest.PARTIAL).exists():
        raise UserError(
            f"{path}: an interrupted trace ({manifest.PARTIAL} is there); the command that began "
            "it goes on with --resume, or begins again with --overwrite"
        )
    if (path / manifest.NAME).exists():
        return _open_whole(path)
    return _open_dump(path, layout)


def _open_whole(path: Path) -> Trace:
    found = manifest.read(path)
    entries = {(entry.stage, entry.layer): entry for entry in found.files}
    files = dict.fromkeys(entry.path for entry in found.files)
    if absent := [file for file in files if not (path / file).is_file()]:
        raise UserError(
            f"{path}: {absent[0]} is in {manifest.NAME} but not there ({len(absent)} of "
            f"{len(files)} files); copy the whole directory or trace again"
        )
    vocabulary = found.model.config.get("vocab_size")
    if vocabulary and not all(0 <= token < vocabulary for token in found.tokens):
        raise UserError(f"{path}: {manifest.NAME} has token ids outside the vocabulary")
    trace = Trace(path, found, entries, found.model.config, found.tokens, found.positions)
    _check_dtype(trace, found.dtype)
    return trace


def _check_dtype(trace: Trace, dtype: str) -> None:
    """What the model is said to compute in decides what is judged as rounding. It is what most
    stages have; or a narrower one, from an engine that shows wider copies of its values.

    Raises:
        UserError: it is neither.
    """
    counted = Counter(str(entry.dtype) for entry in trace.entries.values())
    if not counted or counted[dtype] == max(counted.values()):
        return
    first = trace.arch.first.name  # has the weights' format
    telling = [
        e
        for k, e in trace.entries.items()
        if not trace.arch.stage[k[0]].kind.masked and k[0] != first
    ]
    wider = [e for e in telling if e.dtype == "float32" and dtype in ("bfloat16", "float16")]
    fitting = (holds(dtype, trace.read(e.stage, e.layer).ravel()[:65536]) for e in wider)
    if telling and not any(fitting):
        raise UserError(
            f"{trace.path}: computed in {dtype}, says {manifest.NAME}, but most stages are "
            f"{counted.most_common(1)[0][0]}"
        )


def _open_dump(path: Path, layout: Layout | None) -> Trace:
    """Open a directory without a manifest.

    Raises:
        UserError: nothing in it is a stage, or it does not fit the layout.
    """
    calls = steps.directories(path)
    known = ARCHITECTURES if layout is None else [layout.config["architecture"]]
    if not any(stages_in(each, name) for each in [path, *calls] for name in known):
        if (first := path / "sequence-0").is_dir():
            raise UserError(f"{path}: a batch of traces; give one of them, such as {first}")
        raise UserError(
            f"{path}: no trace: neither {manifest.NAME} nor layer-<N>/<stage>.bin files"
        )
    if layout is None:
        raise UserError(
            f"{path}: has no {manifest.NAME}, so its axes are unknown; "
            "add --model and --tokens (or --prompt)"
        )
    files = stages_in(path, layout.config["architecture"])
    if not calls:
        entries = {key: _entry(path, found, *key, layout) for key, found in files.items()}
        return Trace(path, None, entries, dict(layout.config), layout.tokens, layout.positions)
    if files:
        beside = next(iter(files.values())).path.relative_to(path)
        raise UserError(
            f"{path}: {beside} beside {calls[0].name}/ may be of all calls or of one; take one of "
            "the two away"
        )
    return steps.StepsTrace(path, calls, layout)


def _entry(root: Path, found: Found, name: str, layer: int | None, layout: Layout) -> FileEntry:
    stage, length = stage_of(found, name, layer, layout.config), layout.dims["T"]
    rows, left = divmod(found.count, math.prod(stage.shape(layout.dims, rows=1)))
    few = 1 <= rows < length and may_be_last_rows(layer, layout.config)
    if left or not (rows == length or few):
        whole = " x ".join(map(str, stage.shape(layout.dims)))
        raise UserError(
            f"{found.path}: {found.count} values, but {' x '.join(stage.axes)} is {whole}; are its "
            f"{length} --tokens right?"
        )
    shape = stage.shape(layout.dims, "last" if stage.last and rows == 1 else "all", rows)
    return found.entry(root, stage, layer, shape, length)
