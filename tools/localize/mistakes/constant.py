"""Mistake of which constant: an eps, a theta, a factor, a window, a position."""

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from stages.architecture import CACHE
from tools.localize.mistakes import cache_rows, column_groups, scales
from tools.localize.mistakes.operands import attention_scale, normed
from tools.localize.mistakes.registry import LINEARS, NORMS, Candidates, Edit, mistake, simple
from tools.localize.mistakes.solving import lowest, round_numbers
from tools.localize.stage_case import StageReplay

simple("embedding_scaled_sqrt_d", "embedding multiplied by sqrt(D), as Gemma does", "embedding",
       lambda case: case.exact * np.sqrt(case.config.hidden_size), everywhere=True)  # fmt: skip


def _with_eps(case: StageReplay, eps: float) -> Array:
    # 0 would divide by zero in a row of zeros; the smallest normal number does not
    return case.run(config=replace(case.config, rms_norm_eps=eps or 1e-300))


@mistake(
    "eps {} instead of the model's",
    NORMS,
    joined="number",
    near=True,
    priority=2,
    everywhere=True,
    number=(_with_eps, tuple(10.0**n for n in range(-8, 1))),
)
def norm_eps(case: StageReplay) -> Candidates:
    for eps, free in _epsilons(case):
        if eps != case.config.rms_norm_eps:
            yield Edit(f"{eps:.6g}", _with_eps(case, eps), free)


def _epsilons(case: StageReplay) -> Iterator[tuple[float, int]]:
    """Every row's factor on what it should be gives its root: what is no mean square is eps."""
    if not case.dumped:
        yield 0.0, 0
        return
    keep = np.asarray(case.finite)
    y, found = (np.where(keep, np.asarray(v), 0) for v in (case.exact, case.dump))
    square = np.asarray(jnp.square(normed(case)).mean(-1))
    factor = (y * found).sum(-1) / np.maximum(np.square(y).sum(-1), 1e-300)
    telling = factor > 0
    inside = (square + case.config.rms_norm_eps) / np.square(np.where(telling, factor, 1))
    weight = telling / np.maximum(np.square(inside), 1e-300)
    eps = float((weight * (inside - square)).sum() / max(weight.sum(), 1e-300))
    if eps > 0:
        yield from round_numbers(eps, 2)
    if eps < case.config.rms_norm_eps / 2:
        yield 0.0, 0


@mistake("soft-capped at {}, as Gemma 2 does", "lm_head attn_scores", near=True)
def softcap(case: StageReplay) -> Candidates:
    for cap, free in _caps(case):
        yield Edit(f"{cap:.6g}", cap * jnp.tanh(case.exact / cap), free)


def _caps(case: StageReplay) -> Iterator[tuple[float, int]]:
    if not case.dumped:
        yield from ((cap, 0) for cap in (30.0, 50.0))
        return
    keep = np.asarray(case.finite)
    y, found = (np.where(keep, np.asarray(v), 0).ravel() for v in (case.exact, case.dump))
    high = float(np.abs(found).max())
    if high == 0 or high >= np.abs(y).max():
        return
    yield from round_numbers(
        lowest(
            lambda cap: float(np.square(cap * np.tanh(y / cap) - found).sum()),
            high * (1 + np.geomspace(1e-6, 1e3, 64)),
        ),
        3,
    )


simple("scale_hidden", "scaled by 1/sqrt(D) instead of 1/sqrt(H)", "attn_scores",
       lambda case: case.exact / attention_scale(case) * case.config.hidden_size**-0.5)  # fmt: skip


simple("scale_head", "scaled by 1/H instead of 1/sqrt(H)", "attn_scores",
       lambda case: case.exact * attention_scale(case))  # fmt: skip


simple("scale_twice", "scale applied twice", "attn_softmax",
       lambda case: case.run(case.inputs[0] * attention_scale(case)))  # fmt: skip


simple("softmax_base_2", "powers of 2 instead of e", "attn_softmax",
       lambda case: case.run(case.inputs[0] * np.log(2)))  # fmt: skip


@mistake(
    "the cache's scale {} not applied on reading",
    "k_cache v_cache attn_scores attention",
    lenient=True,
    joined="layer",
)
def cache_scale_lost(case: StageReplay) -> Candidates:
    """The codes are what was dumped of the cache, or what stages without one were computed of."""
    if case.stage.kind is CACHE:
        right, found = (np.asarray(x)[0, -case.rows :] for x in (cache_rows.kept(case), case.dump))
        for says, value, free in scales.lost(right, found):
            yield Edit(says, jnp.asarray(value)[None], free)
    elif "k_cache" not in case.arch.stage and case.has_calls:
        for says, value in scales.codes(np.asarray(cache_rows.kept(case))[0]):
            yield says, cache_rows.with_rows(case, jnp.asarray(value)[None])


mistake(
    "weights off {}: as by a wrong zero point",
    LINEARS,
    "weight_zero_point",
    priority=2,
    joined="file",
    room="constant",
)(column_groups.zero_points)


simple("scale_missing", "scale 1/sqrt(H) missing", "attn_scores",
       lambda case: case.exact / attention_scale(case), everywhere=True)  # fmt: skip
simple("scale_missing", "softmax of scores without the scale 1/sqrt(H)", "attn_softmax",
       lambda case: case.run(case.inputs[0] / attention_scale(case)), everywhere=True)  # fmt: skip


@mistake("scaled by 1/sqrt({}) instead of 1/sqrt(H)", "attn_scores", near=True, priority=2)
def scale_other(case: StageReplay) -> Candidates:
    """By the root of another whole number: of the hidden size, a padded head, all heads."""
    if case.dumped:
        keep = np.asarray(case.finite)
        y, found = (np.where(keep, np.asarray(v), 0) for v in (case.exact, case.dump))
        factor = float((y * found).sum() / max(np.square(y).sum(), 1e-300))
        if factor > 0:
            number = round(case.config.head_dim / factor**2)
            if 0 < number != case.config.head_dim:
                yield str(number), case.exact * np.sqrt(case.config.head_dim / number)
