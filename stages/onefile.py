"""``stages.safetensors``: all stages of a trace in one file, named ``layer-3/ffn_up``, ``lm_head``.

The layout follows from the shapes, so every stage has its place before anything is computed. The
header is written when all are there: until then no reader of safetensors takes the file for whole.
Format: 8 bytes little-endian length of a JSON header, {name: {dtype, shape, data_offsets}}, padded
with blanks; then the tensors without gaps (https://github.com/huggingface/safetensors#format).
"""

import math
from collections.abc import Iterable

import msgspec

from stages.architecture import Key
from stages.manifest import FileEntry
from stages.trace import numpy_dtype

NAME = "stages.safetensors"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
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
