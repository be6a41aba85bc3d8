"""The files of a trace: what a manifest says of a stage's file, and the stage read from it."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import xxhash

from stages import aprt, disk
from stages.architecture import Stage
from stages.errors import UserError
from stages.manifest import DType, FileEntry


def new_entry(
    stage: Stage,
    layer: int | None,
    shape: tuple[int, ...],
    length: int,
    path: str = "",
    dtype: DType = "float32",
    start: int | None = None,
) -> FileEntry:
    """An entry without a hash, of ``shape`` with or without the axis of the rows, which are the
    last ones of ``length``."""
    axes = stage.stored_axes("all" if len(shape) == len(stage.axes) else "last")
    rows = shape[axes.index(stage.row_axis)] if stage.row_axis in axes else 1
    return FileEntry(
        path=path,
        stage=stage.name,
        layer=layer,
        axes=axes,
        shape=shape,
        dtype=dtype,
        xxh3="",
        rows=None if rows == length else rows,
        start=start,
    )


def read_file(root: Path, entry: FileEntry) -> np.ndarray:
    """One stage of a directory; see ``trace.Trace.read``."""
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
    if array.dtype == np.float32 and not holds(entry.dtype, array):
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


def holds(dtype: str, values: np.ndarray) -> bool:
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
