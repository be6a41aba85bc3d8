"""Mistake of which entries: some of a value were changed after it was computed.

What a sampler does to logits before it draws is no mistake of the head. Which ids it did it to is
seen; a penalty or a bias is then solved for.
"""

from collections import Counter
from itertools import product

import jax.numpy as jnp
import numpy as np

from stages.verdict import ranges
from tools.localize.mistakes.registry import Candidates, Edit, mistake
from tools.localize.mistakes.solving import round_numbers
from tools.localize.stage_case import StageReplay

AFTER = "changed after the head, as a sampler does: "
MOST = 0.25  # of the vocabulary: more is the head itself
LOW = -1e4  # no head computes such a logit
CLEAR = 2.0**-12  # of the scale: what an element has to be off by to have been changed


def touched(case: StageReplay) -> np.ndarray:
    """[1, ..., V] bool: the entries that are not what the head computes; none where there are too
    many to have been picked out."""
    y, found = np.asarray(case.exact), np.asarray(case.dump)
    scale = np.sqrt(np.asarray(case.size) + np.square(y))
    with np.errstate(invalid="ignore"):
        off = ~(np.abs(found - y) <= CLEAR * scale)
    return off if 0 < off.mean() <= MOST else np.zeros_like(off)


def _ids(case: StageReplay, off: np.ndarray) -> str:
    ids = np.flatnonzero(off.reshape(-1, off.shape[-1]).any(0))
    seen = set(map(int, case.replay.trace.tokens))
    mask = np.zeros(off.shape[-1], bool)
    mask[ids] = True
    which = f": {ranges(mask)}" if len(ids) <= 6 else ""
    all_seen = seen >= set(map(int, ids))
    whose = ", those of the prompt" if seen == set(map(int, ids)) else ""
    whose = whose or (", tokens of the prompt" if all_seen else "")
    return f"{len(ids)} id{'s' if len(ids) > 1 else ''}{which}{whose}"


def _counts(case: StageReplay, shape: tuple[int, ...]) -> np.ndarray:
    """[1, ..., V] how often each id stands in the tokens."""
    counts = np.zeros(shape[-1])
    for token, count in Counter(case.replay.trace.tokens).items():
        counts[token] = count
    return np.broadcast_to(counts, shape)


@mistake(AFTER + "repetition penalty {}", "lm_head", room="entries", near=True)
def logits_penalised(case: StageReplay) -> Candidates:
    """A logit above 0 divided, one below it multiplied: once, or once per occurrence."""
    off = touched(case)
    y, found = np.asarray(case.exact), np.asarray(case.dump)
    telling = off & np.isfinite(found) & (y * found > 0)
    if not telling.any():
        return
    log = np.zeros_like(y)
    log[telling] = -np.sign(y[telling]) * np.log(found[telling] / y[telling])
    for counts, how in (
        (np.ones_like(y), ""),
        (_counts(case, y.shape), " to the power of each id's occurrences"),
    ):
        power = np.where(telling, counts, 0)
        if not power.any():
            continue
        for penalty, free in round_numbers(
            float(np.exp((power * log).sum() / np.square(power).sum())), 3
        ):
            changed = np.where(off, y * penalty ** (-np.sign(y) * counts), y)
            yield Edit(f"{penalty:.6g}{how} on {_ids(case, off)}", jnp.asarray(changed), free)


@mistake(AFTER + "{}", "lm_head", room="entries", near=True)
def logits_biased(case: StageReplay) -> Candidates:
    """A number added to some: a bias, a presence or a frequency penalty."""
    off = touched(case)
    y, found = np.asarray(case.exact), np.asarray(case.dump)
    telling = off & np.isfinite(found)
    if not telling.any():
        return
    added = (found - y)[telling]
    counts = _counts(case, y.shape)
    whose = _ids(case, off)
    seen = bool((counts[telling] > 0).all())
    for bias, free in round_numbers(float(np.median(added)), 3):
        told = f"{bias:+.6g} added to {whose}"
        if seen and bias < 0:
            told = f"presence penalty {-bias:.6g} on {whose}"
        yield Edit(told, jnp.asarray(np.where(off, y + bias, y)), free)
    if seen and len(np.unique(counts[telling])) > 1:
        alone = -float((added * counts[telling]).sum() / np.square(counts[telling]).sum())
        for each, free in round_numbers(alone, 3):
            told = f"frequency penalty {each:.6g} on {whose}"
            yield Edit(told, jnp.asarray(np.where(off, y - each * counts, y)), free)
        design = np.stack([np.ones_like(added), counts[telling]], 1)
        both = np.linalg.lstsq(design, -added, rcond=None)[0]
        for (once, a), (each, b) in product(*(round_numbers(float(v), 3) for v in both)):
            told = f"presence penalty {once:.6g}, frequency penalty {each:.6g} on {whose}"
            yield Edit(told, jnp.asarray(np.where(off, y - once - each * counts, y)), a + b)
    own = np.where(telling, np.round(found - y, 2), 0)  # as decimals
    values = np.unique(own[telling])
    if 1 < len(values) <= 8:
        told = f"{', '.join(f'{v:+g}' for v in values)} added to {whose}"
        yield Edit(told, jnp.asarray(y + own), len(values))


@mistake(AFTER + "{}", "lm_head", room="entries")
def logits_banned(case: StageReplay) -> Candidates:
    """Some set to minus infinity, or to the lowest number that a mask may have."""
    y, found = np.asarray(case.exact), np.asarray(case.dump)
    low = (found == -np.inf) | ((found <= LOW) & (y > LOW / 2))
    if low.any() and len(np.unique(found[low])) == 1:
        value = found[low][0]
        told = "minus infinity" if np.isinf(value) else f"{value:.6g}"
        changed = np.where(low, value, y)
        yield Edit(f"{_ids(case, low)} set to {told}, banned", jnp.asarray(changed))
