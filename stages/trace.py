"""Reading a trace: ours, the oracle's, a foreign directory of APRT files, or one in memory."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import xxhash

from stages import aprt, disk, manifest
from stages.architecture import Architecture, Key, Stage
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.manifest import Changed, DType, FileEntry, Manifest


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a foreign trace does not say of itself and the user must: the model and the tokens.

    Attributes:
        config: the model's configuration as plain data (``Config.to_json``).
        dims: axis letter -> size, T among them.
        tokens, positions: one each.
    """

    config: dict[str, Any]
    dims: Mapping[str, int]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]


class Trace:
    """An opened trace. Nothing is read before ``read``.

    Attributes:
        path: its directory; of a trace in memory, its name.
        manifest: None for a foreign trace and one in memory.
        entries: (stage, layer) -> FileEntry, in computation order.
        config: the model's configuration as plain data.
        tokens, positions: of the manifest, or as the user gave them.
        steps: how many rows each call of the engine computed.
        changed: rows of the key/value cache that a later call read otherwise.
        dtype: the model's dtype; None where a foreign trace does not say.
        arch: the architecture.
    """

    def __init__(
        self,
        path: Path,
        found: Manifest | None,
        entries: Mapping[Key, FileEntry],
        config: dict[str, Any],
        tokens: tuple[int, ...],
        positions: tuple[int, ...],
    ) -> None:
        self.path = path
        self.manifest = found
        self.config = config
        self.tokens = tokens
        self.positions = positions
        self.dtype: str | None = found.dtype if found else None
        self.steps: tuple[int, ...] = found.steps if found else (len(tokens),)
        # Without cache stages in the trace, attention is replayed from what went into the cache.
        arch = ARCHITECTURES[config["architecture"]]
        self.arch: Architecture = arch.with_cache({stage for stage, _ in entries})
        names = self.arch.names
        order = sorted(
            entries, key=lambda key: (math.inf if key[1] is None else key[1], names.index(key[0]))
        )
        self.entries: dict[Key, FileEntry] = {key: entries[key] for key in order}

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def changed(self) -> tuple[Changed, ...]:
        return (self.manifest and self.manifest.changed) or ()

    def step_of(self, row: int) -> int:
        """The call of the engine, from 0, that computed a row."""
        return int(np.searchsorted(np.cumsum(self.steps), row, "right"))

    def row(self, stage: str) -> Stage:
        return self.arch.stage[stage]

    def rows_of(self, stage: str, layer: int | None) -> int:
        """How many rows, the last ones of the sequence, are held of a stage."""
        entry = self.entries[stage, layer]
        axis = self.row(stage).row_axis
        return entry.shape[entry.axes.index(axis)] if axis in entry.axes else 1

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        """One stage in the shape of its entry; float32 from APRT, else its own dtype.

        Raises:
            KeyError: the trace has no such stage.
            UserError: the file is missing, damaged, or not what the manifest says.
        """
        return read_file(self.path, self.entries[stage, layer])

    def read_rows(self, stage: str, layer: int | None) -> np.ndarray:
        """One stage in the axes of the stage table: with a T axis, though it may be of one row."""
        value, row = self.read(stage, layer), self.row(stage)
        if len(value.shape) == len(row.axes):
            return value
        return np.expand_dims(value, row.axes.index(row.row_axis))

    def to_json(self) -> dict[str, Any]:
        """What there is, as plain data."""
        return {
            "name": str(self.path),
            "architecture": self.arch.name,
            "dtype": self.dtype,
            "tokens": list(self.tokens),
            "positions": list(self.positions),
            "stages": [
                {"stage": stage, "layer": layer, "shape": list(entry.shape), "dtype": entry.dtype}
                for (stage, layer), entry in self.entries.items()
            ],
        }

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.path}: {self.arch.name}, {self.dtype or 'foreign'}, "
            f"{len(self.tokens)} tokens, {len(self.entries)} stages>"
        )


class MemoryTrace(Trace):
    """A trace that never was on disk; everything that works on a ``Trace`` works on it.

    Arguments:
        values: {(stage, layer): array in the axes of the stage table}, without a batch axis.
            ``lm_head`` may lack its T axis.
        positions: None is from 0 on.
        steps: None is one call.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        tokens: tuple[int, ...],
        dtype: str,
        values: Mapping[Key, np.ndarray],
        positions: tuple[int, ...] | None = None,
        steps: tuple[int, ...] | None = None,
    ) -> None:
        arch = ARCHITECTURES[config["architecture"]].cached
        entries = {
            (stage, layer): new_entry(arch.stage[stage], layer, value.shape, len(tokens))
            for (stage, layer), value in values.items()
        }
        given = tuple(range(len(tokens))) if positions is None else positions
        super().__init__(Path(name), None, entries, config, tokens, given)
        self.dtype = dtype
        self.steps = steps or self.steps
        self.values = values

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        return self.values[stage, layer]


def new_entry(
    row: Stage,
    layer: int | None,
    shape: tuple[int, ...],
    length: int,
    path: str = "",
    dtype: DType = "float32",
    start: int | None = None,
) -> FileEntry:
    """An entry without a hash, of ``shape`` with or without the axis of the rows, which are the
    last ones of ``length``."""
    axes = row.stored_axes("all" if len(shape) == len(row.axes) else "last")
    rows = shape[axes.index(row.row_axis)] if row.row_axis in axes else 1
    return FileEntry(
        path=path,
        stage=row.name,
        layer=layer,
        axes=axes,
        shape=shape,
        dtype=dtype,
        xxh3="",
        rows=None if rows == length else rows,
        start=start,
    )


def read_file(root: Path, entry: FileEntry) -> np.ndarray:
    """One stage of a directory; see ``Trace.read``."""
    path = root / entry.path
    if entry.start is not None:
        array = _read_part(path, entry, entry.start)
    elif path.suffix == ".safetensors":
        array = _read_safetensors(path, entry)
    else:
        array = aprt.read(path, entry.layer)
    if array.size != math.prod(entry.shape):
        raise UserError(
            f"{path}: {array.size} values, but {' x '.join(entry.axes)} is "
            f"{' x '.join(map(str, entry.shape))}"
        )
    if entry.xxh3 and tensor_hash(array) != entry.xxh3:
        raise UserError(f"{path}: content does not match the manifest; the file was changed")
    if array.dtype == np.float32 and not _holds(entry.dtype, array):
        raise UserError(f"{path}: has values that {entry.dtype} of the manifest does not have")
    return array.reshape(entry.shape)


def _read_part(path: Path, entry: FileEntry, start: int) -> np.ndarray:
    """A stage that lies in a file with others: of ``stages.onefile``."""
    dtype = numpy_dtype(entry.dtype)
    end = start + dtype.itemsize * math.prod(entry.shape)
    try:
        data = disk.mapped(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) < end:
        raise UserError(f"{path}: cut short; {entry.stage} would end after {end} bytes")
    return data[start:end].view(dtype)


def _read_safetensors(path: Path, entry: FileEntry) -> np.ndarray:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            array = file.get_tensor(entry.stage)
    except (OSError, safetensors.SafetensorError, AttributeError) as error:  # the last: float8
        raise UserError(
            f"{path}: not a whole safetensors file with {entry.stage!r}: {error}"
        ) from None
    if (array.dtype.name, array.shape) != (entry.dtype, entry.shape):
        raise UserError(
            f"{path}: holds {array.dtype} {list(array.shape)}, but the manifest says "
            f"{entry.dtype} {list(entry.shape)}"
        )
    return array


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
    from stages.foreign import open_foreign  # which knows this module

    return open_foreign(path, layout)


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
        e for k, e in trace.entries.items() if not trace.row(k[0]).kind.masked and k[0] != first
    ]
    wider = [e for e in telling if e.dtype == "float32" and dtype in ("bfloat16", "float16")]
    holds = (_holds(dtype, trace.read(e.stage, e.layer).ravel()[:65536]) for e in wider)
    if telling and not any(holds):
        raise UserError(
            f"{trace.path}: computed in {dtype}, says {manifest.NAME}, but most stages are "
            f"{counted.most_common(1)[0][0]}"
        )


def _holds(dtype: str, values: np.ndarray) -> bool:
    """Whether float32 values are all of a narrower dtype."""
    if dtype == "bfloat16":
        return not np.ascontiguousarray(values).reshape(-1).view(np.uint16)[::2].any()
    if dtype != "float16":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        back = values.astype(np.float16).astype(np.float32)
    return np.array_equal(back, values, equal_nan=True)


def tensor_hash(array: np.ndarray) -> str:
    """XXH3-64 of a C-contiguous array's bytes."""
    raw = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return xxhash.xxh3_64_hexdigest(raw)


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a dtype name of a manifest, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def coarsest_dtype(values: np.ndarray) -> str:
    """The name of the coarsest float dtype that holds all of these values exactly."""
    values = values[np.isfinite(values)]
    for name in ("bfloat16", "float16"):
        with np.errstate(over="ignore", invalid="ignore"):
            back = values.astype(numpy_dtype(name)).astype(values.dtype)
        if values.size and np.array_equal(back, values):
            return name
    return "float32" if values.dtype.itemsize <= 4 else "float64"
