"""Mistake of which terms: parts of a sum are left out, or come in more than once."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from tools.localize.mistakes.operands import (
    biases,
    key_distance,
    masked_softmax,
    with_bias,
)
from tools.localize.mistakes.registry import BIASES, RESIDUALS, Candidates, mistake, simple
from tools.localize.stage_case import StageReplay


def _biased(case: StageReplay, *factors: float) -> Array:
    """With the biases of q, k and v times these."""
    pairs = zip(factors, biases(case), strict=True)
    return with_bias(case, *(factor * bias for factor, bias in pairs))


simple("bias_missing", "bias not added", BIASES, lambda case: case.inputs[0],
       rest=("bias_after_rope",))  # fmt: skip


simple("bias_doubled", "bias added twice", BIASES, lambda case: _biased(case, 2, 2, 2))


simple("bias_subtracted", "bias subtracted", BIASES, lambda case: _biased(case, -1, -1, -1))


simple("bias_q_only", "bias added to q alone", BIASES, lambda case: _biased(case, 1, 0, 0))


simple("bias_q_missing", "bias of q not added", BIASES, lambda case: _biased(case, 0, 1, 1))


simple("bias_k_missing", "bias of k not added", BIASES, lambda case: _biased(case, 1, 0, 1))


simple("bias_v_missing", "bias of v not added", BIASES, lambda case: _biased(case, 1, 1, 0))


simple("bias_v_only", "bias added to v alone", BIASES, lambda case: _biased(case, 0, 0, 1),
       rest=("bias_after_rope",))  # fmt: skip


@mistake("bias added to the {} of the channels alone", BIASES)
def bias_shard_only(case: StageReplay) -> Candidates:
    parts = biases(case)
    for shards in (2, 4, 8):
        for place in range(shards):
            kept = [_shard(b, shards, place) for b in parts]
            yield f"{_ordinal(place)} of {shards} shards", with_bias(case, *kept)
    for shards in (2, 4):  # of the three side by side
        kept_whole = _shard(jnp.concatenate(parts), shards, 0)
        yield f"first of {shards} shards", case.inputs[0] + kept_whole


def _shard(x: Array, shards: int, place: int) -> Array:
    return jnp.where(np.arange(len(x)) * shards // len(x) == place, x, 0)


def _ordinal(place: int) -> str:
    return ("first", "second", "third")[place] if place < 3 else f"{place + 1}th"


@mistake("no causal mask: attends to the future", "attn_softmax")
def mask_missing(case: StageReplay) -> Candidates:
    yield "", masked_softmax(case, np.ones_like(key_distance(case), bool))
    if len(case.replay.trace.steps) > 1:  # what there was of it in each call
        _, end = case.bounds
        yield "", masked_softmax(case, np.arange(key_distance(case).shape[1]) < end)


@mistake("causal mask aligned at the first key: row {}", "attn_softmax")
def mask_top_left(case: StageReplay) -> Candidates:
    if len(case.replay.trace.steps) > 1:
        start, _ = case.bounds
        rows = np.arange(len(start)) + key_distance(case).shape[1] - len(start)
        allowed = np.arange(key_distance(case).shape[1]) <= rows[:, None] - start
        yield "i of a call sees keys 0 to i", masked_softmax(case, allowed)


@mistake("a call sees its own keys alone, not the cache", "attn_softmax")
def mask_past_missing(case: StageReplay) -> Candidates:
    if len(case.replay.trace.steps) > 1:
        start, _ = case.bounds
        own = np.arange(key_distance(case).shape[1]) >= start
        yield "", masked_softmax(case, (key_distance(case) >= 0) & own)


@mistake("empty slots of the cache, {}, not masked", "attn_softmax")
def mask_unfilled_slots(case: StageReplay) -> Candidates:
    slots = _empty_slots(case)
    if slots is not None:
        _, end = case.bounds
        kept = case.pos.mask[:, None]
        scores = jnp.where(kept, case.inputs[0], -jnp.inf)
        high = jnp.maximum(scores.max(-1, keepdims=True), 0)
        weights = jnp.exp(scores - high)
        total = weights.sum(-1, keepdims=True) + (slots - end) * jnp.exp(-high)
        yield f"{slots} in all", weights / total
    if (left := _left_by_others(case)) is not None:
        yield "with what memory held in them", case.exact * left


@mistake("causal mask off by one: sees {} future token", "attn_softmax")
def mask_off_by_one(case: StageReplay) -> Candidates:
    for ahead in (1, 2):
        yield str(ahead), masked_softmax(case, key_distance(case) >= -ahead)


@mistake("causal mask too strict: a token does not see itself", "attn_softmax")
def mask_strict(case: StageReplay) -> Candidates:
    strict = key_distance(case) >= 1
    yield "", masked_softmax(case, strict)  # the first row is then uniform
    strict[0, 0] = True
    yield "", masked_softmax(case, strict)
    yield "", jnp.where(np.arange(len(strict))[:, None] == 0, 0.0, masked_softmax(case, strict))


@mistake("1 added to the denominator of the softmax", "attn_softmax")
def softmax_plus_one(case: StageReplay) -> Candidates:
    kept = case.pos.mask[:, None]
    scores = jnp.where(kept, case.inputs[0], -jnp.inf)
    high = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - high)
    total = weights.sum(-1, keepdims=True)
    yield "", weights / (total + 1)  # after the maximum was subtracted
    yield "", weights / (total + jnp.exp(-high))


simple("residual_missing", "residual not added", RESIDUALS, lambda case: case.inputs[1])


simple("branch_missing", "only the residual; the block's output not added", RESIDUALS,
       lambda case: case.inputs[0])  # fmt: skip


simple("residual_doubled", "residual added twice", RESIDUALS,
       lambda case: 2 * case.inputs[0] + case.inputs[1])  # fmt: skip


simple("branch_doubled", "the block's output added twice", RESIDUALS,
       lambda case: case.inputs[0] + 2 * case.inputs[1])  # fmt: skip


@mistake("{}", RESIDUALS)
def residual_subtracted(case: StageReplay) -> Candidates:
    residual, branch = case.inputs
    yield "the block's output subtracted from the residual", residual - branch
    yield "the residual subtracted from the block's output", branch - residual


simple("swigl_up_missing", "not multiplied by up", "ffn_swigl", lambda case: case.inputs[0])


@mistake("a token's own k not in the cache yet when it is read", "attn_scores")
def cache_read_before_write(case: StageReplay) -> Candidates:
    """A token's own k is not there yet: its score with itself is 0."""
    if case.has_calls:
        rows = np.arange(case.rows)
        own = rows + case.exact.shape[-1] - case.rows
        yield "", case.exact.at[:, :, rows, own].set(0.0)


def _empty_slots(case: StageReplay) -> int | None:
    """How many slots a cache has whose empty ones were counted by a softmax, with score 0: what
    every row lacks of 1 says it."""
    if not case.has_calls:
        return None
    mask = np.asarray(case.pos.mask)[:, None]
    scores = np.where(mask, np.asarray(case.inputs[0]), -np.inf)
    with np.errstate(all="ignore"):
        total = np.exp(scores).sum(-1)
        kept_sum = np.where(mask, np.asarray(case.dump), 0).sum(-1)
        empty = total * (1 / kept_sum - 1)  # e^0 each
        telling = np.isfinite(empty) & (kept_sum < 1 - 1e-3) & (kept_sum > 1e-6)
    if not telling.any():
        return None
    _, ends = case.bounds
    slots = np.broadcast_to(ends[:, 0], empty.shape[1:])[None] + empty
    return int(np.rint(np.median(slots[telling])))


def _left_by_others(case: StageReplay) -> np.ndarray | None:
    """What slots of memory that hold no key of the sequence, but were counted, leave of every row's
    sum: [1, N, rows, 1]. None where a row has more than it should, or all have the same."""
    if not case.has_calls:
        return None
    mask = np.asarray(case.pos.mask)[:, None]
    with np.errstate(invalid="ignore"):
        left = np.where(mask, np.asarray(case.dump), 0).sum(-1, keepdims=True)
    sound = np.isfinite(left).all() and left.max() < 1 + 1e-3 and left.min() < left.max() - 1e-3
    return left if sound else None
