"""APRT, the one-tensor file: ``APRT``, u32 layer, u32 count, then float32 values, little-endian.

Byte-compatible with the engine of the story in docs/story.md. A file knows neither its shape nor
its dtype, stage or tokens: those come from ``manifest.json``, or from the user.
"""

import struct
from pathlib import Path

import numpy as np

from stages import disk
from stages.errors import UserError

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF  # the layer field of a stage that belongs to no layer
HEADER = struct.Struct("<4sII")
MOST = 0xFFFFFFFF  # values that the header can count


def header(layer: int | None, count: int) -> bytes:
    """What comes before ``count`` values."""
    return HEADER.pack(MAGIC, WHOLE_MODEL if layer is None else layer, count)


def payload(array: np.ndarray) -> np.ndarray:
    """The values as they are stored: little-endian float32 in C order.

    float16 and bfloat16 widen exactly and float32 is copied bit for bit, NaN payloads included.
    """
    return np.asarray(array, "<f4", order="C")


def check(dtype: str, count: int) -> None:
    """Raises UserError for what float32 cannot hold, or more values than the header can count."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"APRT holds float32, not {dtype}; use --format safetensors")
    if count > MOST:
        raise UserError(f"APRT counts to {MOST} values, not {count}; use --format safetensors")


def read(path: Path, layer: int | None) -> np.ndarray:
    """The values of one file, flat, after checking that the file is whole and of ``layer``.

    Raises:
        UserError: unreadable, bad magic, a header cut short, another layer, or a byte count that
            does not match the value count.
    """
    try:
        data = disk.mapped(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if bytes(data[:4]) != MAGIC:
        raise UserError(f"{path}: not an APRT file; it starts with {bytes(data[:4])!r}")
    if data.size < HEADER.size:
        raise UserError(f"{path}: cut short; {data.size} bytes of a header of {HEADER.size}")
    _, found, count = HEADER.unpack(bytes(data[: HEADER.size]))
    expected = WHOLE_MODEL if layer is None else layer
    if found != expected:
        raise UserError(f"{path}: the header says layer {_say(found)}, expected {_say(expected)}")
    if data.size != HEADER.size + 4 * count:
        raise UserError(
            f"{path}: the header promises {count} values, {HEADER.size + 4 * count} bytes; the "
            f"file has {data.size} bytes"
        )
    return data[HEADER.size :].view("<f4")


def _say(layer: int) -> str:
    return "'whole model'" if layer == WHOLE_MODEL else str(layer)
