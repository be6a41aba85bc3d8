"""What a trace will need, before it runs. Imports neither jax nor torch."""

import math

import numpy as np

from qwen_jax.weights import Weights, head_name, layer_names
from stages.table import END_STAGES, LAYER_STAGES, stage_shape
from stages.trace import numpy_dtype

PROCESS = 270 << 20  # Python, JAX and compiled programs: what the demo model takes on the CPU
TORCH = 400 << 20  # PyTorch and transformers: what the demo model takes with the oracle
HEAD_BLOCK = 128 << 20  # bytes of the head, in the compute dtype, that are applied at once


def host_dtype(stored: np.dtype, dtype: np.dtype) -> np.dtype:
    """The dtype in which weights come into memory: a narrower one than the model computes in is
    widened on the way, for which reading leaves the time."""
    return dtype if stored.itemsize < dtype.itemsize else stored


def peak_memory(model: Weights, length: int, dtype: str, logits: str) -> int:
    """Bytes of resident memory of the JAX engine on the CPU, about: the weights of two layers, one
    of them cast where the program has to, and stages: of the layer that computes and of the one
    before, some that wait for the disk, and what lies between them."""
    computes = numpy_dtype(dtype)
    wide = max(4, computes.itemsize)
    layer = 0
    for name in layer_names(0).values():
        host = host_dtype(model.dtype(name), computes)
        layer += math.prod(model.shapes[name]) * (2 * host.itemsize + wide * (host != computes))
    dims = model.config.dims(length)
    stages = sum(math.prod(stage_shape(s, dims, logits)) for s in LAYER_STAGES) * wide
    head = math.prod(stage_shape(END_STAGES[-1], dims, logits)) * wide
    block = min(HEAD_BLOCK, math.prod(model.shapes[head_name(model.config)]) * wide)
    return PROCESS + max(layer + 7 * stages // 2, 3 * block + 2 * head)


def whole_memory(model: Weights, length: int, dtype: str, logits: str) -> int:
    """The same of the oracle, about: PyTorch and transformers, the whole model as it is stored and,
    in another dtype, as it is computed, and the stages of a layer."""
    computes = numpy_dtype(dtype)
    weights = 0
    for name, shape in model.shapes.items():
        stored = model.dtype(name)
        cast = computes.itemsize if stored != computes else 0
        weights += math.prod(shape) * (stored.itemsize + cast)
    dims = model.config.dims(length)
    stages = sum(math.prod(stage_shape(s, dims, logits)) for s in LAYER_STAGES) * 4
    return TORCH + weights + 2 * stages
