"""``stages.safetensors``: all stages of a trace in one file, named ``layer-3/ffn_up``, ``lm_head``.

The layout follows from the shapes, so every stage has its place before anything is computed. The
header is written when all are there: until then no reader of safetensors takes the file for whole.
Format: 8 bytes little-endian length of a JSON header, {name: {dtype, shape, data_offsets}}, padded
with blanks; then the tensors without gaps (https://github.com/huggingface/safetensors#format).
"""

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
import safetensors

from stages.architecture import Key
from stages.errors import UserError
from stages.files import numpy_dtype
from stages.manifest import DType, FileEntry

NAME = "stages.safetensors"
DTYPES: dict[DType, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}
ALIGNED = 64  # bytes; the tensors begin at a multiple


def lay_out(entries: Iterable[FileEntry]) -> tuple[bytes, dict[Key, int]]:
    """The header, and where in the file each stage's bytes begin."""
    told, offsets, end = {}, {}, 0
    # The widest first: so each is aligned to its own size.
    for entry in sorted(entries, key=lambda entry: -numpy_dtype(entry.dtype).itemsize):
        begin, end = end, end + numpy_dtype(entry.dtype).itemsize * math.prod(entry.shape)
        name = entry.stage if entry.layer is None else f"layer-{entry.layer}/{entry.stage}"
        shape = list(entry.shape)
        told[name] = {"dtype": DTYPES[entry.dtype], "shape": shape, "data_offsets": [begin, end]}
        offsets[entry.stage, entry.layer] = begin
    text = msgspec.json.encode(told)
    text += b" " * (-(8 + len(text)) % ALIGNED)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: len(head) + offset for key, offset in offsets.items()}


def read_layout(path: Path) -> dict[str, tuple[DType, int, int]]:
    """Tensor name -> (dtype, number of values, where in the file its bytes begin).

    Raises:
        UserError: not a whole file, or a dtype that no stage has.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the library's own checks: of the header, and that all bytes are there
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            told = msgspec.json.decode(file.read(size))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    known = {short: dtype for dtype, short in DTYPES.items()}
    found = {}
    for name, tensor in told.items():
        if name == "__metadata__":
            continue
        if tensor["dtype"] not in known:
            raise UserError(
                f"{path}: {name} is in {tensor['dtype']}; a stage is in one of {', '.join(known)}"
            )
        count = math.prod(tensor["shape"])
        found[name] = known[tensor["dtype"]], count, 8 + size + tensor["data_offsets"][0]
    return found
