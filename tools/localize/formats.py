"""Which number format a lowered product really ran in, by trying: quantise the inputs in each
known way and see which of them reproduces the dump."""

from collections.abc import Callable, Iterator
from functools import partial

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from tools.localize.stage_replay import StageReplay

Rounding = Callable[[Array], np.ndarray]

CLEAR = 3.0  # bits that a format must bring back to be believed


def _blocks(x: Array, width: int) -> np.ndarray:
    """Round to 8 bits in blocks along the last axis, with one scale per block, as Q8_0 does."""
    values = np.asarray(x)
    grid = values.reshape(*values.shape[:-1], -1, width)
    scale = np.abs(grid).max(-1, keepdims=True) / 127
    steps = np.round(np.divide(grid, scale, out=np.zeros_like(grid), where=scale > 0))
    return (steps * scale).reshape(values.shape)


def _as(dtype: type) -> Rounding:
    return lambda x: np.asarray(x).astype(dtype).astype(np.float64)


def _formats(width: int) -> Iterator[tuple[str, str, Rounding]]:
    """(precision class, what it says, rounding of an input whose last axis is ``width``)."""
    for block in (32, 64, 128, 256, width):
        if width % block == 0:
            says = "per row" if block == width else f"in blocks of {block}"
            yield "8-bit", f"8 bits {says}", partial(_blocks, width=block)
    yield "bf16", "bfloat16", _as(ml_dtypes.bfloat16)
    yield "tf32/f16", "float16", _as(np.float16)


def detect(case: StageReplay) -> tuple[str, str] | None:
    """(precision class, description) of the format that a linear stage's input was rounded to, or
    None where none of the known ones explains its error."""
    if not case.stage.linear or not case.replayable:
        return None
    x = case.inputs[0]
    base = case.scored(case.exact)
    best = None
    for name, says, rounded in _formats(x.shape[-1]):
        score = case.scored(case.run(jnp.asarray(rounded(x))))
        if score > base + CLEAR and (best is None or score > best[0]):
            best = (score, name, f"inputs rounded to {says}")
    return None if best is None else best[1:]
