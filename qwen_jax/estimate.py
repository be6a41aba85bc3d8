"""What a trace will need, before it runs. Imports neither jax nor torch."""

import math

import numpy as np

from qwen_jax.config import Config
from qwen_jax.weights.base import Weights
from stages.files import numpy_dtype

PROCESS = 270 << 20  # Python, JAX and compiled programs: what the demo model takes on the CPU
TORCH = 400 << 20  # PyTorch and transformers: what the demo model takes with the oracle
HEAD_BLOCK = 128 << 20  # bytes of the head, in the compute dtype, that are applied at once


def host_dtype(stored: np.dtype, dtype: np.dtype) -> np.dtype:
    """The dtype in which weights come into memory: a narrower one than the model computes in is
    widened on the way, for which reading leaves the time."""
    return dtype if stored.itemsize < dtype.itemsize else stored


def head_tensor(config: Config) -> str:
    """The tensor of the output projection."""
    return config.tensor_names("end")[config.arch.head.parameters[0]]


def peak_memory(model: Weights, length: int, dtype: str, logits: str, kept: bool = False) -> int:
    """Bytes of resident memory of the JAX engine on the CPU, about: the weights of two layers, one
    of them cast where the program has to, and stages: of the layer that computes and of the one
    before, some that wait for the disk, and what lies between them. ``kept``: the weights of all
    layers, for the calls after the first."""
    computes = numpy_dtype(dtype)
    wide = max(4, computes.itemsize)
    layer = 0
    for name in model.config.tensor_names("layer", 0).values():
        host = host_dtype(model.dtype(name), computes)
        layer += math.prod(model.shapes[name]) * (2 * host.itemsize + wide * (host != computes))
    dims = model.config.dims(length)
    head = math.prod(model.config.arch.head.shape(dims, logits)) * wide
    block = min(HEAD_BLOCK, math.prod(model.shapes[head_tensor(model.config)]) * wide)
    stages = _layer_values(model, length) * wide
    if kept:
        weights = (
            math.prod(shape) * host_dtype(model.dtype(name), computes).itemsize
            for name, shape in model.shapes.items()
        )
        return PROCESS + sum(weights) + layer // 2 + 7 * stages // 2
    return PROCESS + max(layer + 7 * stages // 2, 3 * block + 2 * head)


def whole_memory(model: Weights, length: int, dtype: str, logits: str, kept: bool = False) -> int:
    """Peak memory in bytes, about, of the oracle's trace: PyTorch and transformers, the whole model
    as stored and, where it computes in another dtype, once more in that, and a layer's stages."""
    computes = numpy_dtype(dtype)
    weights = 0
    for name, shape in model.shapes.items():
        stored = model.dtype(name)
        cast = computes.itemsize if stored != computes else 0
        weights += math.prod(shape) * (stored.itemsize + cast)
    return TORCH + weights + 2 * 4 * _layer_values(model, length)


def _layer_values(model: Weights, length: int) -> int:
    """The number of values in the stages of one layer."""
    dims = model.config.dims(length)
    return sum(math.prod(stage.shape(dims)) for stage in model.config.arch.layer_stages)
