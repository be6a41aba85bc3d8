"""Mistake of which constant: an eps, a theta, a factor, a window, a position."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax import rope
from stages import numbers, roundings
from tools.localize.mistakes import cache_rows
from tools.localize.mistakes.operands import (
    attention_scale,
    key_distance,
    masked_softmax,
    rope_table,
)
from tools.localize.mistakes.registry import NORMS, ROPES, Candidates, Edit, mistake, simple
from tools.localize.stage_case import StageReplay

simple("embedding_scaled_sqrt_d", "embedding multiplied by sqrt(D), as Gemma does", "embedding",
       lambda case: case.exact * np.sqrt(case.config.hidden_size))  # fmt: skip


@mistake("eps {} instead of the model's", NORMS, joined="number", near=True)
def norm_eps(case: StageReplay) -> Candidates:
    for eps in (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-4, 1e-7):
        if eps != case.config.rms_norm_eps:
            yield f"{eps:g}", case.run(config=replace(case.config, rms_norm_eps=eps))
    # 0 would divide by zero in a row of zeros; the smallest normal number does not
    yield "0", case.run(config=replace(case.config, rms_norm_eps=1e-300))


@mistake("soft-capped at {}, as Gemma 2 does", "lm_head attn_scores", near=True)
def softcap(case: StageReplay) -> Candidates:
    for cap in (30.0, 50.0, 20.0, 15.0, 100.0):
        yield f"{cap:g}", cap * jnp.tanh(case.exact / cap)


@mistake("RoPE with theta {}", ROPES, joined="number", near=True)
def rope_theta(case: StageReplay) -> Candidates:
    for theta in (10000.0, 1e6, 5e5, 1e5, 1e7):
        if theta != case.config.rope_theta:
            yield f"{theta:g}", case.run(pos=rope_table(case, case.positions, rope_theta=theta))


@mistake("RoPE positions off by {}", ROPES)
def rope_position_off_by_one(case: StageReplay) -> Candidates:
    first = int(case.replay.positions[0, 0])  # some count from 0 wherever they begin
    for step in dict.fromkeys((1, -1, -first or 1)):
        yield f"{step:+d}", case.run(pos=rope_table(case, case.positions + step))


simple("rope_sign", "RoPE turns the other way", ROPES,
       lambda case: case.run(pos=case.pos.replace(sin=-case.pos.sin)))  # fmt: skip


@mistake("RoPE frequencies theta^(-{}) instead of theta^(-2i/H)", ROPES)
def rope_frequency_step(case: StageReplay) -> Candidates:
    index = np.arange(case.config.head_dim // 2)
    for says, exponent in (("i/H", 1.0), ("4i/H", 4.0)):
        frequency = case.config.rope_theta ** (-exponent * index / case.config.head_dim)
        angle = case.positions[..., None] * frequency
        yield says, case.run(pos=case.pos.replace(cos=jnp.cos(angle), sin=jnp.sin(angle)))


simple("rope_twice", "rotated twice", ROPES,
       lambda case: case.run(pos=rope_table(case, 2 * case.positions)))  # fmt: skip


@mistake("every position rotated as position {}", ROPES)
def rope_position_constant(case: StageReplay) -> Candidates:
    last = case.positions[0, -1]
    first = case.positions[0, 0]
    for place in (last, 1, last + 1, first, first - 1):  # of decoded tokens, that of the first
        yield str(place), case.run(pos=rope_table(case, np.full_like(case.positions, place)))


@mistake("RoPE positions {}", ROPES)
def rope_scaled(case: StageReplay) -> Candidates:
    for factor in (1 / 2, 1 / 4, 1 / 8, 2, 4, 8):
        cos, sin = case.cos_sin(case.config, case.positions * factor)
        yield (
            f"divided by {1 / factor:g}" if factor < 1 else f"multiplied by {factor}",
            case.run(pos=case.pos.replace(cos=jnp.asarray(cos), sin=jnp.asarray(sin))),
        )


@mistake("YaRN not applied{}", ROPES, near=True)
def rope_yarn_missing(case: StageReplay) -> Candidates:
    if case.config.yarn is not None:
        yield "", case.run(pos=rope_table(case, case.positions, yarn=None))
        plain = replace(case.config.yarn, attention_factor=1.0)
        yield " to the magnitude", case.run(pos=rope_table(case, case.positions, yarn=plain))


@mistake(
    "RoPE positions off by {}, as if padding or a cached prefix were not counted",
    ROPES,
)
def positions_not_shifted(case: StageReplay) -> Candidates:
    for step in _offsets(case):
        yield f"{step:+d}", case.run(pos=rope_table(case, case.positions + step))


def _offsets(case: StageReplay) -> list[int]:
    """By how many positions the dump's angles are off, if all by as many."""
    (a, b), (c, d) = (jnp.split(jnp.asarray(x), 2, -1) for x in (case.exact, case.dump))
    finite = jnp.isfinite(c) & jnp.isfinite(d)
    turn = jnp.where(finite, (c + 1j * d) * (a - 1j * b), 0).sum((0, 1, 2))
    frequency, _ = rope.inverse_frequencies(case.config)
    longest = case.config.max_position_embeddings
    steps = np.arange(-min(longest, 4096), min(longest, 4096) + 1)
    phase = np.exp(-1j * steps[:, None] * frequency.astype(np.float64))
    best = int(steps[(phase @ np.asarray(turn)).real.argmax()])
    return [best] if best else []


@mistake("YaRN's factor on cos and sin applied twice", ROPES, near=True)
def rope_mscale_twice(case: StageReplay) -> Candidates:
    _, factor = rope.inverse_frequencies(case.config)
    if factor != 1:
        yield "", case.exact * factor


@mistake("YaRN's stretching of positions applied twice", ROPES, near=True)
def rope_factor_twice(case: StageReplay) -> Candidates:
    if case.config.yarn is not None:
        _, magnitude = rope.inverse_frequencies(case.config)
        twice = replace(
            case.config.yarn, factor=case.config.yarn.factor**2, attention_factor=magnitude
        )
        yield "", case.run(pos=rope_table(case, case.positions, yarn=twice))


simple("scale_hidden", "scaled by 1/sqrt(D) instead of 1/sqrt(H)", "attn_scores",
       lambda case: case.exact / attention_scale(case) * case.config.hidden_size**-0.5)  # fmt: skip


simple("scale_head", "scaled by 1/H instead of 1/sqrt(H)", "attn_scores",
       lambda case: case.exact * attention_scale(case))  # fmt: skip


simple("scale_twice", "scale applied twice", "attn_softmax",
       lambda case: case.run(case.inputs[0] * attention_scale(case)))  # fmt: skip


@mistake("sliding window of {} positions", "attn_softmax")
def mask_windowed(case: StageReplay) -> Candidates:
    seen = int(np.median((np.asarray(case.dump)[0, :, -1] > 0).sum(-1)))
    for window in dict.fromkeys((seen, seen - 1, seen + 1, case.config.sliding_window or seen)):
        if window >= 1:
            allowed = (key_distance(case) >= 0) & (key_distance(case) < window)
            yield str(window), masked_softmax(case, allowed)


simple("mask_window_missing", "the layer's sliding window not applied", "attn_softmax",
       lambda case: (masked_softmax(case, key_distance(case) >= 0)
                     if case.sliding else None))  # fmt: skip


simple("softmax_base_2", "powers of 2 instead of e", "attn_softmax",
       lambda case: case.run(case.inputs[0] * np.log(2)))  # fmt: skip


@mistake("softmax at temperature {}", "attn_softmax", near=True)
def softmax_temperature(case: StageReplay) -> Candidates:
    # log p is linear in the scores: its slope within rows is 1 / temperature
    kept = np.asarray(case.pos.mask)[:, None] & (np.asarray(case.dump) > 1e-4)
    scores = np.where(kept, np.asarray(case.inputs[0]), 0.0)
    logs = np.log(np.where(kept, np.asarray(case.dump), 1.0))
    count = np.maximum(kept.sum(-1, keepdims=True), 1)
    x = np.where(kept, scores - scores.sum(-1, keepdims=True) / count, 0.0)
    y = np.where(kept, logs - logs.sum(-1, keepdims=True) / count, 0.0)
    if (x * x).sum() > 0 and (x * y).sum() > 0:
        slope = float((x * y).sum() / (x * x).sum())
        yield Edit(f"{1 / slope:.4g}", case.run(case.inputs[0] * slope), 1)


def _numbers(dtype: Any) -> np.ndarray:
    """Every finite number of an 8-bit float, rising."""
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


@mistake("the cache's scale {} not applied on reading", "k_cache v_cache")
def cache_scale_lost(case: StageReplay) -> Candidates:
    """Divided by a scale, rounded to an 8-bit float, and not multiplied again: every number of the
    dump bounds the scale, as it must have been nearest."""
    x, dump = (
        np.asarray(v, np.float64).ravel()
        for v in (cache_rows.kept(case)[:, -case.rows :], case.dump)
    )
    for format in (f for f in numbers.used(numbers.CACHE) if f.keeps == "cache"):
        name, dtype = format.name, format.dtype
        grid = _numbers(dtype)
        at = np.searchsorted(grid, dump).clip(1, len(grid) - 2)
        inside = (grid[at] == dump) & (dump != 0) & (x != 0)
        if inside.sum() < len(dump) / 2:
            continue
        middle = (grid[1:] + grid[:-1]) / 2
        at, x_in = at[inside], x[inside]
        ends = np.stack([middle[at - 1] / x_in, middle[at] / x_in])
        low, high = ends.min(0), ends.max(0)
        # numbers on an edge, and those that are saturated, may say something else
        first, last = np.quantile(low, 0.99), np.quantile(high, 0.01)
        tried = [(low.max() + high.min()) / 2, *np.linspace(first, last, 31)]
        values = [roundings.saturated(x * factor, dtype) for factor in tried]
        best = int(np.argmin([np.square(value - dump).sum() for value in values]))
        if abs(tried[best] - 1) > 1e-3:
            says = f"{1 / tried[best]:.4g} ({name})"
            yield says, jnp.asarray(values[best].reshape(case.dump.shape))


simple("scale_missing", "scale 1/sqrt(H) missing", "attn_scores",
       lambda case: case.exact / attention_scale(case))  # fmt: skip
simple("scale_missing", "softmax of scores without the scale 1/sqrt(H)", "attn_softmax",
       lambda case: case.run(case.inputs[0] / attention_scale(case)))  # fmt: skip
