"""Mistake of which terms: parts of a sum are left out, or come in more than once."""

from collections.abc import Sequence
from itertools import product

import jax.numpy as jnp
import numpy as np
from jax import Array

from stages.verdict import ranges
from tools.localize.mistakes.operands import (
    biases,
    key_distance,
    masked_softmax,
    with_bias,
)
from tools.localize.mistakes.registry import (
    BIASES,
    LINEARS,
    RESIDUALS,
    Candidates,
    Edit,
    mistake,
    simple,
)
from tools.localize.mistakes.solving import round_numbers
from tools.localize.stage_case import StageReplay


def _biased(case: StageReplay, *factors: float) -> Array:
    """With the biases of q, k and v times these."""
    pairs = zip(factors, biases(case), strict=True)
    return with_bias(case, *(factor * bias for factor, bias in pairs))


simple("bias_missing", "bias not added", BIASES, lambda case: case.inputs[0],
       rest=("bias_after_rope",), everywhere=True)  # fmt: skip


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


@mistake("no causal mask: attends to the future", "attn_softmax", everywhere=True)
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


# --- of a sum of products, which inputs

BLOCKS = 32  # that the inputs of a linear layer are cut into, to see how often each was counted
CHANNELS = 256  # output channels that this is told by
WHOLE = 0.02  # how far from a whole number a block's count may lie and still be one


@mistake("not every input summed once: {}", LINEARS)
def terms_counted(case: StageReplay) -> Candidates:
    """A shard's part of the sum, or parts that came in more than once: the dump as a sum of each
    block of inputs times how often it was counted, by least squares."""
    counts = counted(case)
    if counts is None:
        return
    value = case.run(case.inputs[0] * jnp.asarray(counts))
    yield Edit(_counted_as(counts), value)


def counted(case: StageReplay) -> np.ndarray | None:
    """[in] how often each input was counted, where some were not once; None where they were, or
    where no whole numbers explain the dump."""
    if not case.dumped:
        return None
    small = case.sampled(CHANNELS)
    x, found = (np.asarray(v)[0] for v in (small.inputs[0], small.dump))
    weight = np.concatenate([np.asarray(w, np.float64) for w in small.weights.values()])
    keep = np.isfinite(found)
    found = np.where(keep, found, 0)
    width = x.shape[-1]

    def solved(columns: Sequence[np.ndarray], left: np.ndarray) -> np.ndarray:
        parts = [np.where(keep, x[:, c] @ weight[:, c].T, 0).ravel() for c in columns]
        return np.asarray(np.linalg.lstsq(np.stack(parts, 1), left.ravel(), rcond=None)[0])

    blocks = np.array_split(np.arange(width), min(BLOCKS, width))
    counts = np.concatenate(
        [np.full(len(b), n) for b, n in zip(blocks, solved(blocks, found), strict=True)]
    )
    whole = np.rint(counts)
    # a block that was counted in part: the end of a shard lies in it
    broken = np.abs(counts - whole) > WHOLE
    if 0 < broken.sum() <= max(4 * len(blocks[0]), 4):
        rest = np.where(keep, (x * np.where(broken, 0, whole)) @ weight.T, 0)
        single = np.flatnonzero(broken)
        whole[single] = np.rint(solved([*single[:, None]], found - rest))
    sound = (whole == 1).all() or not whole.any()  # nothing at all is no part of the sum
    return None if sound or np.abs(whole).max() > 1024 else whole


def _counted_as(counts: np.ndarray) -> str:
    width = len(counts)
    if (counts == counts[0]).all():
        return f"the sum {counts[0]:g} times, as if added up over as many copies"
    kept = counts != 0
    said = []
    if not kept.all():
        shards = width / kept.sum()
        first = int(np.flatnonzero(kept)[0])
        runs = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(int), [0]])))
        part = ""
        if len(runs) == 2 and shards == round(shards) and first % kept.sum() == 0:
            place = _ordinal(first // int(kept.sum()))
            of = "half" if shards == 2 else f"of {shards:g} parts"
            part = f", the {place} {of}: as one of {shards:g} ranks before their all-reduce"
        said.append(f"only inputs {ranges(kept)} of the {width} columns summed{part}")
    for count in np.unique(counts[kept & (counts != 1)]):
        said.append(f"inputs {ranges(counts == count)} counted {count:g} times")
    return "; ".join(said)


# --- of an addition, how much of either


@mistake("not the plain sum: {}", RESIDUALS, near=True, priority=2)
def residual_multiple(case: StageReplay) -> Candidates:
    """Any multiple of the residual and of the block's output; of all channels or of some."""
    if not case.dumped:
        return
    keep = np.asarray(case.finite)
    residual, branch = case.inputs
    x, y, found = (np.where(keep, np.asarray(v), 0)[0] for v in (residual, branch, case.dump))
    moments = np.array([[(x * x).sum(), (x * y).sum()], [(x * y).sum(), (y * y).sum()]])
    if np.linalg.det(moments) <= 0:
        return
    both = np.linalg.solve(moments, [(x * found).sum(), (y * found).sum()])
    for (a, free_a), (c, free_c) in product(*(round_numbers(v, 3) for v in both)):
        if abs(a - c) < 1e-4 * abs(a):  # a factor of the sum
            continue
        yield Edit(_multiples(a, c), a * residual + c * branch, free_a + free_c)
    # of each channel: the residual once, and the block's output as often as that leaves
    counts = ((found - x) * y).sum(0) / np.maximum(np.square(y).sum(0), 1e-300)
    odd = np.abs(counts - 1) > 1e-3
    if odd.any() and not odd.all():
        for count, free in round_numbers(float(np.median(counts[odd])), 3):
            told = f"the block's output {count:.6g} times in channels {ranges(odd)}"
            yield Edit(told, residual + jnp.asarray(np.where(odd, count, 1.0)) * branch, free)


def _multiples(residual: float, branch: float) -> str:
    said = [f"the residual {residual:.6g} times"] if residual != 1 else []
    said += [f"the block's output {branch:.6g} times"] if branch != 1 or not said else []
    return ", ".join(said)


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
