"""Mistake of which keys a row sees: read off the softmax, or off the sums that attention makes of
it where that is all there is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd

import jax.numpy as jnp
import numpy as np
from jax import Array

from tools.localize.mistakes.cache_rows import kept
from tools.localize.mistakes.operands import key_distance, masked_softmax
from tools.localize.mistakes.registry import Candidates, Edit, mistake
from tools.localize.mistakes.solving import lowest, round_numbers
from tools.localize.stage_case import StageReplay

SOFTMAX_OR_SUM = "attn_softmax attention"
LOOKED_AT = 32  # rows that are searched where the softmax was not dumped
CLEAR = 1e-3  # of a row's sum: what has to be missing to say how much


@dataclass(frozen=True)
class Weighing:
    """What a softmax weighs.

    Attributes:
        weights: [N, rows, S] e^(score - high), 0 where the mask removes the key.
        high: [N, rows, 1] the largest score.
    """

    weights: np.ndarray
    high: np.ndarray


def weighing(case: StageReplay) -> Weighing | None:
    """Of a softmax, or of the weighted sum behind one that was not dumped; else None."""
    if "_weighing" not in case.__dict__:
        softmax = case if case.stage.name == "attn_softmax" else case.other("attn_softmax")
        found = None
        if case.dumped and (softmax.stage is case.stage or not softmax.dumped):
            rows = softmax.last(case.rows)
            if rows.replayable:
                kept = np.asarray(case.pos.mask)[:, None]
                scores = np.where(kept, np.asarray(rows.inputs[0]), -np.inf)[0]
                high = scores.max(-1, keepdims=True)
                with np.errstate(invalid="ignore"):
                    found = Weighing(np.nan_to_num(np.exp(scores - high)), high)
        case.__dict__["_weighing"] = found
    held: Weighing | None = case.__dict__["_weighing"]
    return held


def with_softmax(case: StageReplay, made: Callable[[StageReplay], Array]) -> Array:
    """The stage's value if its softmax is what ``made`` makes of that."""
    if case.stage.name == "attn_softmax":
        return made(case)
    return case.edited({"attn_softmax": lambda softmax: made(softmax.last(case.rows))}).exact


def seeing(case: StageReplay, allowed: np.ndarray) -> Array:
    """The stage's value if its rows see these keys: allowed [rows, S] bool."""
    return with_softmax(case, lambda softmax: masked_softmax(softmax, allowed))


def seen(case: StageReplay) -> dict[int, tuple[int, int]]:
    """Row -> the first and the last key that it gives weight to."""
    found = weighing(case)
    if found is None:
        return {}
    if case.stage.name == "attn_softmax":
        # a weight that is too small for float32 is not one that was masked
        due = found.weights.max(0) > 1e-30
        given = (np.asarray(case.dump)[0] > 0).any(0)
        spans = {}
        for row in range(case.rows):
            keys = np.flatnonzero(given[row])
            if keys.size:
                behind, ahead = keys[0], keys[-1]
                spans[row] = (
                    int(behind) if due[row, :behind].any() else 0,
                    int(ahead) if due[row, ahead + 1 :].any() else _own(case, row),
                )
        return spans
    return {row: _span(case, found, row) for row in _spread(case.rows)}


def _spread(rows: int) -> list[int]:
    return sorted({int(row) for row in np.linspace(0, rows - 1, LOOKED_AT)})


def _own(case: StageReplay, row: int) -> int:
    """The number of a row's own key."""
    return len(case.replay.trace.tokens) - case.rows + row


def _span(case: StageReplay, found: Weighing, row: int) -> tuple[int, int]:
    """The first and last key of the sum that comes nearest to a row of attention."""
    own = _own(case, row)
    weights = found.weights[:, row, : own + 1]
    v = _values(case)[:, : own + 1]  # [N, S, H]
    dump = np.asarray(case.dump)[0, row].reshape(len(v), 1, -1)

    def errors(order: slice) -> np.ndarray:
        """Of the sums of the keys from one end up to each."""
        w, x = weights[:, order], v[:, order]
        total = np.maximum(np.cumsum(w, 1)[..., None], 1e-300)
        return np.asarray(np.square(np.cumsum(w[..., None] * x, 1) / total - dump).sum((0, 2)))

    behind, ahead = errors(slice(None, None, -1)), errors(slice(None))
    if behind.min() <= ahead.min():
        return own - int(behind.argmin()), own
    return 0, int(ahead.argmin())


def _values(case: StageReplay) -> np.ndarray:
    """[N, S, H] v as each query head reads it."""
    v = np.asarray(kept(case))[0].transpose(1, 0, 2)
    return np.repeat(v, case.config.num_attention_heads // len(v), 0)


@mistake("sliding window of {} positions", SOFTMAX_OR_SUM, room="terms", everywhere=True)
def mask_windowed(case: StageReplay) -> Candidates:
    distance = key_distance(case)
    longest = int(distance.max()) + 1
    if case.dumped:
        late = {_own(case, row) - first + 1 for row, (first, _) in seen(case).items() if first}
        windows = sorted(late) if len(late) <= 2 else []
    else:
        windows = [case.config.sliding_window or longest]
    for window in windows:
        # one as long as the sequence is none
        own = case.sliding and window == case.config.sliding_window
        if 1 <= window < longest and not own:
            yield str(window), seeing(case, (distance >= 0) & (distance < window))


@mistake("the layer's sliding window not applied", SOFTMAX_OR_SUM, room="terms", everywhere=True)
def mask_window_missing(case: StageReplay) -> Candidates:
    distance = key_distance(case)
    if case.sliding and int(distance.max()) >= (case.config.sliding_window or 0):
        yield "", seeing(case, distance >= 0)


@mistake("the {} of the sequence not seen", SOFTMAX_OR_SUM, room="terms")
def mask_keys_missing(case: StageReplay) -> Candidates:
    """The first keys, or what does not fill a block at the end."""
    spans = seen(case)
    distance = key_distance(case)
    keys = np.arange(distance.shape[1])
    firsts = {first for row, (first, _) in spans.items() if _own(case, row) >= first}
    if len(firsts - {0}) == 1:
        first = max(firsts)
        allowed = (distance >= 0) & (keys >= first)
        yield from _where_any(case, f"first {first} keys", allowed)
    short = {row: last for row, (_, last) in spans.items() if last < _own(case, row)}
    if short:
        block = gcd(*(last + 1 for last in short.values()))
        own = np.array([_own(case, row) for row in range(case.rows)])
        whole = (own + 1) // block * block
        if block > 1 and all(last + 1 == whole[row] for row, last in short.items()):
            allowed = keys < whole[:, None]
            told = f"keys after the last whole block of {block}"
            yield from _where_any(case, told, allowed)


def _where_any(case: StageReplay, told: str, allowed: np.ndarray) -> Candidates:
    """Rows that are left without a key are 0, or as they should be."""
    rows = np.asarray(allowed.any(-1))
    some = rows[:, None] if case.stage.name == "attn_softmax" else rows[None, :, None]
    value = seeing(case, allowed)
    yield told, jnp.where(some, value, 0.0)
    yield told, jnp.where(some, value, case.exact)


def _at_temperature(softmax: StageReplay, temperature: float) -> Array:
    return softmax.run(softmax.inputs[0] / temperature)


@mistake(
    "softmax at temperature {}",
    SOFTMAX_OR_SUM,
    room="constant",
    near=True,
    number=(_at_temperature, tuple(2.0**n for n in range(-6, 7))),
)
def softmax_temperature(case: StageReplay) -> Candidates:
    found = weighing(case)
    if found is None:
        return
    head = case.config.head_dim
    slope = _slope_of_logs(case) if case.stage.name == "attn_softmax" else _slope(case, found)
    for temperature, free in round_numbers(1 / slope, 3) if slope > 0 else ():
        # the scale missing or twice has a name
        if temperature != 1 and abs(2 * abs(np.log(temperature)) - np.log(head)) > 1e-4:
            made = partial(_at_temperature, temperature=temperature)
            yield Edit(f"{temperature:.6g}", with_softmax(case, made), free)


def _slope_of_logs(case: StageReplay) -> float:
    """log p is linear in the scores: its slope within rows is 1 / temperature; 0 for none."""
    kept = np.asarray(case.pos.mask)[:, None] & (np.asarray(case.dump) > 1e-4)
    scores = np.where(kept, np.asarray(case.inputs[0]), 0.0)
    logs = np.log(np.where(kept, np.asarray(case.dump), 1.0))
    count = np.maximum(kept.sum(-1, keepdims=True), 1)
    x = np.where(kept, scores - scores.sum(-1, keepdims=True) / count, 0.0)
    y = np.where(kept, logs - logs.sum(-1, keepdims=True) / count, 0.0)
    square = float((x * x).sum())
    return max(float((x * y).sum()) / square, 0.0) if square > 0 else 0.0


def _slope(case: StageReplay, found: Weighing) -> float:
    """The same of some rows of attention."""
    rows = _spread(case.rows)
    weights, v = found.weights[:, rows], _values(case)
    dump = np.asarray(case.dump)[0, rows].reshape(weights.shape[1], len(v), -1).transpose(1, 0, 2)

    def error(slope: float) -> float:
        changed = weights**slope
        mixed = changed @ v / np.maximum(changed.sum(-1, keepdims=True), 1e-300)
        return float(np.square(mixed - dump).sum())

    return lowest(error, np.geomspace(1 / 64, 64, 49))


@mistake("empty slots of the cache, {}, not masked", SOFTMAX_OR_SUM, room="terms")
def mask_unfilled_slots(case: StageReplay) -> Candidates:
    """Keys of zeros score 0 and their v adds nothing: what each row lacks says how many."""
    found = weighing(case)
    if found is None or not case.has_calls:
        return
    total = found.weights.sum(-1, keepdims=True)
    left = _left(case)
    with np.errstate(all="ignore"):
        empty = (total * np.exp(found.high) * (1 / left - 1))[..., 0]  # e^0 each
        telling = np.isfinite(empty) & (left[..., 0] < 1 - CLEAR) & (left[..., 0] > 1e-6)
    if telling.any():
        counts = np.zeros(case.rows)
        for row in np.flatnonzero(telling.any(0)):
            counts[row] = np.rint(np.median(empty[telling[:, row], row]))
        yield from _with_slots(case, found, counts)
    less = left.max() < 1 + CLEAR and left.min() < left.max() - CLEAR
    if case.stage.name == "attn_softmax" and less:
        yield Edit("with what memory held in them", case.exact * left, 1)


def _with_slots(case: StageReplay, found: Weighing, counts: np.ndarray) -> Candidates:
    """So many empty slots [rows] counted by every row; and, where all rows see as many in all, of
    the rows that are too little off to say so."""
    _, ends = case.bounds
    in_all = ends[:, 0] + counts
    some = counts > 0
    tried = []
    if some.any() and len(np.unique(in_all[some])) == 1:
        slots = int(in_all[some][0])
        tried.append((f"{slots} in all", np.maximum(slots - ends[:, 0], 0)))
    several = np.unique(counts[some])
    tried.append((f"{', '.join(f'{n:g}' for n in several[:4])} of them", counts))
    if len(several) == 1:  # rows that they are too little in to be counted, but not to be seen
        same = np.full(case.rows, several[0])
        value = _times(case, _less(found, same))
        tried.append((f"{several[0]:g} of them", np.where(_nearer(case, value), same, 0)))
    for told, number in tried:
        yield told, _times(case, _less(found, number))


def _less(found: Weighing, number: np.ndarray) -> np.ndarray:
    """[N, rows, 1] what so many empty slots [rows] leave of a row's weights."""
    total = found.weights.sum(-1, keepdims=True)
    with np.errstate(over="ignore"):
        return np.asarray(total / (total + number[None, :, None] * np.exp(-found.high)))


def _nearer(case: StageReplay, value: Array) -> np.ndarray:
    """[rows] bool: which rows of a value are clearly nearer to the dump than they should be."""
    axis = case.dump.ndim - 2
    keep = np.asarray(case.finite)
    others = tuple(n for n in range(case.dump.ndim) if n != axis)
    with_it, without = (
        np.square(np.where(keep, np.asarray(case.dump - x), 0)).sum(others)
        for x in (value, case.exact)
    )
    return np.asarray(with_it < without / 4)


def _times(case: StageReplay, factor: np.ndarray) -> Array:
    """The stage's value with every row of a head times its own factor [N, rows, 1]."""
    if case.stage.name == "attn_softmax":
        return case.exact * factor
    grid = case.exact.reshape(1, case.rows, len(factor), -1)
    return (grid * factor.transpose(1, 0, 2)).reshape(case.exact.shape)


def _left(case: StageReplay) -> np.ndarray:
    """[N, rows, 1] what is left of each row's weights of 1."""
    if case.stage.name == "attn_softmax":
        kept = np.asarray(case.pos.mask)[:, None]
        return np.asarray(np.where(kept, np.asarray(case.dump), 0).sum(-1, keepdims=True)[0])
    heads = case.config.num_attention_heads
    y, found = (np.asarray(x)[0].reshape(case.rows, heads, -1) for x in (case.exact, case.dump))
    factor = (y * found).sum(-1) / np.maximum(np.square(y).sum(-1), 1e-300)
    return np.asarray(factor.T[..., None])
