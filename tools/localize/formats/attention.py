"""What attention computes that no rounding of its operands describes: keys and values that are read
before the cache rounds them, caches at a scale that has to be read off, a sum kept in float16.

A ``case`` is a ``StageReplay``.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from qwen_jax.models.ops import split_heads
from stages import roundings
from stages.architecture import SCORES
from tools.localize.formats import arithmetic


def _as_array(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float64)


def unrounded(case: Any, base: Any, first: bool) -> Array | None:
    """Keys and values of a row's own call as they are, those of earlier calls in the format
    ``base``; with ``first`` unrounded in the first call alone."""
    plain, rounded = case.in_format(None), case.in_format(base)
    put: Array | None = None  # k or v before the cache
    if stored := {"k_cache", "v_cache"} & {*case.stage.inputs}:
        cache = case.other(*stored).last(None)
        if not cache.replayable:
            return None
        put = cache.in_format(None).exact
    start, _ = case.bounds
    own = np.arange(case.pos.mask.shape[-1]) >= start
    own = jnp.asarray(own & (start == 0) if first else own)[None, None]
    if case.stage.kind is SCORES:
        return jnp.where(own, plain.run(None, put), rounded.exact)
    weights = case.inputs[0]
    return plain.run(weights * own, put) + rounded.run(weights * ~own)


def at_a_scale(dtype: Any, case: Any) -> Array | None:
    """A cache in an 8-bit float at a constant scale, one for all or one for each head. The scale is
    read off: values of one power of two have few steps."""
    plain = np.asarray(case.in_format(None).exact, np.float32)
    dump = np.asarray(case.dump, np.float32)
    found = np.empty_like(plain)
    for head in range(plain.shape[2]):
        scale = _scale_of(plain[:, :, head], dump[:, :, head], dtype)
        if scale is None:
            return None
        found[:, :, head] = _scaled(plain[:, :, head], scale, dtype)
    return _as_array(found)


def _scaled(x: np.ndarray, scale: np.float32, dtype: Any) -> np.ndarray:
    return roundings.saturated(x / scale, dtype) * scale


# Of values that are whole numbers of steps: how far from one rounding to float32 leaves them, and
# how many have to be.
OFF_STEP, ON_STEP = 1e-4, 0.98


def _scale_of(x: np.ndarray, dump: np.ndarray, dtype: Any) -> np.float32 | None:
    values = np.abs(dump[(dump != 0) & np.isfinite(dump)])
    if not values.size:
        return None
    info = ml_dtypes.finfo(dtype)
    steps = 2 ** (info.nmant + 1)
    tried = []
    for step in range(steps // 2, steps):  # that of the largest
        scale = values.max() / np.float32(step)
        part = np.frexp(values / scale)[0] * steps
        on = np.abs(part - np.rint(part)) < OFF_STEP * steps
        if on.mean() >= ON_STEP:
            tried += [scale * np.float32(2.0**power) for power in range(-18, 12)]
    largest = values.max() / float(info.max)
    tried = [scale for scale in tried if scale >= largest * (1 - 1e-5)]
    off = [np.square(_scaled(x, scale, dtype) - dump).sum() for scale in tried]
    return tried[int(np.argmin(off))] if tried else None


def _flash_operands(case: Any) -> tuple[Any, np.ndarray] | None:
    """The scores' replay, and the cached v of each query head, where neither was dumped."""
    scored = case.other("attn_scores")
    if case.value("attn_softmax") is not None or not scored.replayable:
        return None
    v = case.inputs[1]
    v = roundings.f16(np.asarray(v if v.ndim == 4 else split_heads(case.config, v)[2])[0])
    return scored, np.repeat(v, case.config.num_attention_heads // v.shape[1], 1)


# A score's last bit decides, now and then, to which of two float16 values a running sum goes. It
# may be far larger than what is left of it at the end.
FLIP = 2.0**-13


def flash_flips(case: Any) -> Array:
    found = _flash_operands(case)
    if found is None:
        return jnp.zeros(())
    scored, v = found
    return _as_array(FLIP * _softmaxed(_unmasked(case, scored.exact), np.abs(v))).reshape(
        case.dump.shape
    )


def flash_rows(case: Any) -> Array | None:
    found = _flash_operands(case)
    if found is None:
        return None
    scored, v = found
    scores = [_unmasked(case, scored.exact)]
    loop = arithmetic.sum_in_f16(scores[0].astype(np.float32), v)
    if scored.format is not None and 0 in scored.format.operands:
        others = {place: f for place, f in scored.format.operands.items() if place != 0}
        alone = replace(scored.format, operands=others)
        scores.append(_unmasked(case, scored.in_format(alone).exact))
    ways = [loop, *(_softmaxed(score, v) for score in scores)]
    dump = np.asarray(case.dump).reshape(loop.shape)
    off = np.stack([np.square(way - dump).sum((1, 2)) for way in ways])
    nearest = off.argmin(0)
    if not (off[0] < off[1:].min(0)).any():
        return None  # no row was summed so: a cache in float16, no more
    found = np.stack(ways)[nearest, np.arange(len(nearest))]
    return _as_array(found.reshape(case.dump.shape))


def _unmasked(case: Any, scores: Array) -> np.ndarray:
    """[N, T, S] scores of the stage's rows, -inf where masked."""
    return np.where(np.asarray(case.pos.mask), np.asarray(scores)[0, :, -case.rows :], -np.inf)


def _softmaxed(scores: np.ndarray, v: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v.astype(np.float64))
