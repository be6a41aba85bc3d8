"""Keys and values that one call computes and later calls read: in which number formats they are
kept, and where.

The cache holds what attention reads *back*: values that went through the format, in the model's
dtype. That gives the numbers of an engine which keeps the codes, in more memory. It is as long as
the whole sequence from the start, so that every call of a length is one program; in layers with a
sliding window it is as long as the window, and slides.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qwen_jax.config import Config
from qwen_jax.forward import Parameters, run_stages
from qwen_jax.models import FUNCTIONS, StageFunction
from qwen_jax.models.ops import Positional, rounded, wide
from stages.architecture import CACHE, LAYER_INPUT, Stage
from stages.numbers import OFFERED_CACHES

START = "start"  # the row at which a call begins, where a cache does not slide

Format = Callable[[Array], Array]  # [..., H] in the compute dtype -> what is read back, in it


def _float(dtype: Any) -> Format:
    return lambda x: rounded(x, dtype)


def _float8(dtype: Any) -> Format:
    """The largest finite value where x is beyond it, as engines' casts do. The scale is 1."""
    most = float(jnp.finfo(dtype).max)

    def kept(x: Array) -> Array:
        return lax.clamp(np.asarray(-most, x.dtype), x, np.asarray(most, x.dtype)).astype(dtype)

    return lambda x: kept(x).astype(x.dtype)


def _over(x: Array, number: float) -> Array:
    """x / number. Without the barrier a compiler makes a product of it, a last bit off."""
    return x / lax.optimization_barrier(np.full(x.shape, number, x.dtype))


def _inverse(x: Array) -> Array:
    """1 / x, and 0 for 0."""
    zero = x == 0
    return lax.select(zero, jnp.zeros_like(x), 1 / lax.select(zero, jnp.ones_like(x), x))


def _nearest(x: Array) -> Array:
    return lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)


def _blocks(x: Array, kept: Format) -> Array:
    """``kept`` of every block of 32, along a head."""
    return kept(x.reshape(*x.shape[:-1], -1, OFFERED_CACHES["q8_0"])).reshape(x.shape)


def _largest(x: Array) -> Array:
    return lax.reduce_max(lax.abs(x), axes=(x.ndim - 1,))[..., None]


def _q8_0(x: Array) -> Array:
    """ggml's ``quantize_row_q8_0_ref``: the codes of the scale before it is rounded to float16."""
    scale = _over(_largest(x), 127)
    return _nearest(x * _inverse(scale)) * rounded(scale, jnp.float16)


def _q4_0(x: Array) -> Array:
    """ggml's ``quantize_row_q4_0_ref``: the first value of the largest magnitude has code -8."""
    first = lax.argmax(lax.abs(x), x.ndim - 1, jnp.int32)[..., None]
    here = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == first
    value = lax.reduce_sum(lax.select(here, x, jnp.zeros_like(x)), axes=(x.ndim - 1,))[..., None]
    scale = value / np.asarray(-8, x.dtype)
    shifted = lax.floor(x * _inverse(scale) + np.asarray(8.5, x.dtype))
    codes = lax.clamp(np.asarray(0, x.dtype), shifted, np.asarray(15, x.dtype))
    return (codes - np.asarray(8, x.dtype)) * rounded(scale, jnp.float16)


def _int8(x: Array) -> Array:
    """Symmetric, one float32 scale for each token and head."""
    scale = _over(_largest(x), 127)
    return _nearest(x * _inverse(scale)) * scale


FORMATS: dict[str, Format] = {
    "float64": _float(jnp.float64),
    "float32": _float(jnp.float32),
    "bfloat16": _float(jnp.bfloat16),
    "float16": _float(jnp.float16),
    "float8_e4m3fn": _float8(jnp.float8_e4m3fn),
    "float8_e5m2": _float8(jnp.float8_e5m2),
    "q8_0": lambda x: _blocks(x, _q8_0),
    "q4_0": lambda x: _blocks(x, _q4_0),
    "int8": _int8,
}


def run_cached(
    stages: Sequence[Stage],
    config: Config,
    parameters: Parameters,
    pos: Positional,
    given: Mapping[str, Array],
    dtype: Any,
    functions: Mapping[str, StageFunction] | None = None,
    *,
    format: str,
) -> dict[str, Array]:
    """``run_stages`` for the rows of one call, with a cache.

    ``given`` has, beside what the rows read, the cache of the calls before under its stages' own
    names, [B, S, K, H], and under ``START`` the row at which this call is written into it. Without
    ``START`` the cache slides: this call's rows are put behind it.

    Returns the stages, those of the cache with this call's rows alone: one row is little to keep
    or to fetch. The whole of it, as later calls read it, is under ``whole(name)``.
    """
    functions = FUNCTIONS[config.architecture] if functions is None else functions

    def through(name: str) -> StageFunction:
        def function(config: Config, pos: Positional, x: Array) -> Array:
            kept = FORMATS[format](wide(functions[name](config, pos, x))).astype(dtype)
            if START not in given:
                return lax.concatenate([given[name], kept], 1)
            zero = np.int32(0)
            return lax.dynamic_update_slice(given[name], kept, (zero, given[START], zero, zero))

        return function

    caches = [stage.name for stage in stages if stage.kind is CACHE]
    changed = {name: through(name) for name in caches}
    found = run_stages(stages, config, parameters, pos, given, dtype, {**functions, **changed})
    for name in caches:
        held, count = found[name], given[LAYER_INPUT].shape[1]
        first = given[START] if START in given else np.int32(held.shape[1] - count)
        found |= {whole(name): held, name: lax.dynamic_slice_in_dim(held, first, count, 1)}
    return found


def whole(name: str) -> str:
    """Under which name ``run_cached`` returns all of a cache."""
    return f"whole {name}"


@cache
def cached_in(format: str) -> Callable[..., dict[str, Array]]:
    """``run_cached`` in one format: always the same function, so that it is compiled once."""
    return partial(run_cached, format=format)


class KeyValueCache:
    """The cache of all layers, between the calls of one sequence or of a batch.

    Arguments:
        length: of the sequence.
        put: places the zeros that a cache begins with, [B, S, K, H], on the devices.
    """

    def __init__(
        self,
        config: Config,
        dtype: np.dtype,
        batch: int,
        length: int,
        put: Callable[[Stage, np.ndarray], Array],
    ) -> None:
        self.config, self.length = config, length
        self.stages = config.arch.cache
        window = config.sliding_window or length
        # Before a call it holds what the call's first row still sees: not that row itself.
        self.kept = {False: length, True: window - 1}
        self.slides = {False: False, True: window - 1 < length}
        if not self.slides[True]:
            self.kept[True] = length
        heads, size = config.num_key_value_heads, config.head_dim
        self.layers: list[dict[str, Array]] = [
            {
                stage.name: put(stage, np.zeros((batch, self.kept[sliding], heads, size), dtype))
                for stage in self.stages
            }
            for sliding in config.sliding_layers
        ]

    def columns(self, sliding: bool, first: int, end: int) -> tuple[int, int]:
        """The key positions, from and to, that the call of rows ``first`` to ``end`` reads: the
        first may be below zero, the last beyond what there is."""
        if self.slides[sliding]:
            return first - self.kept[sliding], end
        return 0, self.length

    def mask(self, sliding: bool, whole: np.ndarray, first: int, end: int) -> np.ndarray:
        """The part of the sequence's mask [B, T, S] that one call uses."""
        low, high = self.columns(sliding, first, end)
        seen = whole[:, first:end, max(low, 0) : high]
        return np.pad(seen, ((0, 0), (0, 0), (max(-low, 0), 0)))

    def given(self, layer: int, start: Array) -> dict[str, Array]:
        """What ``run_cached`` is given of a layer."""
        if self.slides[self.config.sliding_layers[layer]]:
            return self.layers[layer]
        return self.layers[layer] | {START: start}

    def keep(self, layer: int, values: Mapping[str, Array]) -> None:
        """Take over what a call returned."""
        kept = self.kept[self.config.sliding_layers[layer]]
        found = {stage.name: values[whole(stage.name)] for stage in self.stages}
        if self.slides[self.config.sliding_layers[layer]]:
            found = {name: value[:, value.shape[1] - kept :] for name, value in found.items()}
        self.layers[layer] = found

    def of_calls(
        self, stage: Stage, layer: int | None, value: np.ndarray, first: int, count: int
    ) -> np.ndarray:
        """What calls of ``count`` rows each have computed of a stage, with a batch axis, from row
        ``first`` on, as part of the whole sequence's: of scores the columns up to the last row, and
        zeros where a call had none yet."""
        if layer is None or stage.row_axis == "S" or "S" not in stage.axes:
            return value
        rows = value.shape[-2]
        found = np.zeros((*value.shape[:-1], first + rows), value.dtype)
        for start in range(0, rows, count):
            end = first + start + count
            low, _ = self.columns(self.config.sliding_layers[layer], end - count, end)
            some = value[..., start : start + count, max(-low, 0) : end - low]
            found[..., start : start + count, max(low, 0) : end] = some
        return found
