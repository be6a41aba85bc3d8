"""What a trace will need, before it runs. Imports neither jax nor torch."""

import math

from qwen_jax.weights import Weights, head_name, layer_names
from stages.table import END_STAGES, LAYER_STAGES, stage_shape
from stages.trace import numpy_dtype

PROCESS = 270 << 20  # Python, JAX and compiled programs: what the demo model takes on the CPU
HEAD_BLOCK = 128 << 20  # bytes of the head, in the compute dtype, that are applied at once


def peak_memory(model: Weights, length: int, dtype: str, logits: str) -> int:
    """Bytes of resident memory of the JAX engine, about: two layers' weights as they are stored,
    one cast to the compute dtype, and the stages of two layers."""
    wide = max(4, numpy_dtype(dtype).itemsize)
    names = layer_names(0).values()
    stored = sum(math.prod(model.shapes[n]) * model.dtype(n).itemsize for n in names)
    cast = sum(math.prod(model.shapes[n]) * wide for n in names)
    dims = model.config.dims(length)
    stages = sum(math.prod(stage_shape(s, dims, logits)) for s in LAYER_STAGES) * wide
    head = math.prod(stage_shape(END_STAGES[-1], dims, logits)) * wide
    block = min(HEAD_BLOCK, math.prod(model.shapes[head_name(model.config)]) * wide)
    return PROCESS + max(2 * stored + cast + 2 * stages, 3 * block + 2 * head)
