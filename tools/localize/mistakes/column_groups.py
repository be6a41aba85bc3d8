"""Weights that are off by one number in whole groups of columns, as by a quantiser's zero point.

An output channel is then off by a multiple of the sum of the inputs of each such group. Which
groups and which multiples is solved for, channel by channel, of the channels that are wrong.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from tools.localize.mistakes.registry import Edit
from tools.localize.stage_case import StageReplay

SIZES = (256, 128, 64, 32, 16, 8)
FEW = 8  # channels that a size of groups is tried on
LEFT = 1e-2  # of their squared error, at most, that the groups may leave
CLEAR = 1e-6  # of the squared values: a channel that is off by less is right
MOST = 3  # positions for each group that a channel may be off by, where they are few


def zero_points(case: StageReplay) -> Iterator[Edit]:
    """What a linear stage is with groups of its weights' columns off by steps of their own
    quantisation, or by any number where they lie on no grid."""
    x, dump, exact = (np.asarray(v)[0] for v in (case.inputs[0], case.dump, case.exact))
    error = dump - exact
    if not np.isfinite(error).all():
        return
    wrong = np.flatnonzero(np.square(error).sum(0) > CLEAR * np.square(exact).sum(0))
    for size in SIZES:
        if x.shape[1] % size or not wrong.size:
            continue
        sums = x.reshape(len(x), -1, size).sum(-1)
        if _left(sums, error[:, wrong[:FEW]]) > LEFT:
            continue
        found = _solved(sums, error[:, wrong])
        steps = _steps(np.concatenate([np.asarray(w) for w in case.weights.values()])[wrong], size)
        by = _count(found, steps)
        value = exact.copy()
        value[:, wrong] += sums @ (found if by is None else by[1]).T
        says, free = f"in groups of {size} columns", int((found != 0).sum())
        if by is not None:
            says, free = f"by {by[0]:+d} steps of its quantisation {says}", 0
        yield Edit(says, jnp.asarray(value)[None], free)
        return


def _left(sums: np.ndarray, error: np.ndarray) -> float:
    rest = error - sums @ _solved(sums, error).T
    return float(np.median(np.square(rest).sum(0) / np.square(error).sum(0)))


def _solved(sums: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[channels, groups]: the multiple of each group's sum [T, groups] that errors [T, channels]
    are made of; of as few groups as make them where there are too few positions for all."""
    if len(sums) >= 1.25 * sums.shape[1]:
        return np.asarray(np.linalg.lstsq(sums, error, rcond=None)[0].T)
    found = np.zeros((error.shape[1], sums.shape[1]))
    if len(sums) < 2 * MOST:  # any group makes the error of one position
        return found
    for channel, its in enumerate(error.T):
        chosen, rest, new = list[int](), its, sums  # ``new``: what a group adds to those chosen
        least = CLEAR * np.square(its).sum()
        while len(chosen) * MOST < len(its) and np.square(rest).sum() > least:
            size = np.maximum(np.square(new).sum(0), 1e-9 * np.square(sums).sum(0) + 1e-300)
            chosen.append(int((np.square(rest @ new) / size).argmax()))
            along = np.linalg.qr(sums[:, chosen])[0]
            rest, new = (v - along @ (along.T @ v) for v in (its, sums))
        if chosen:
            found[channel, chosen] = np.linalg.lstsq(sums[:, chosen], its, rcond=None)[0]
    return found


def _count(found: np.ndarray, steps: np.ndarray) -> tuple[int, np.ndarray] | None:
    """By how many steps all groups are off, and what that makes of each; None where they differ.

    Where all codes of a group are multiples of one, its step is smaller than its weights show.
    """
    with np.errstate(all="ignore"):
        counts = np.where(steps > 0, found / steps, np.inf)
    some = np.abs(counts) > 0.05
    if not some.any() or not np.isfinite(counts[some]).all():
        return None
    whole = np.rint(counts[some])
    values, times = np.unique(whole[np.abs(counts[some] - whole) < 0.05], return_counts=True)
    if not times.size:
        return None
    most = values[times.argmax()]
    wider = np.rint(most / counts[some])
    exact = np.abs(most / counts[some] - wider) < 0.05 * np.maximum(wider, 1)
    if not (exact & (wider >= 1)).all():
        return None
    made = np.zeros_like(found)
    made[some] = most * steps[some] / wider
    return int(most), made


def _steps(weight: np.ndarray, size: int) -> np.ndarray:
    """[rows, groups]: the step of the grid that a group's weights lie on; 0 where on none."""
    values = np.sort(weight.astype(np.float64).reshape(len(weight), -1, size), -1)
    gaps = np.diff(values, axis=-1)
    most = np.abs(values).max(-1)
    least = np.where(gaps > 1e-4 * most[..., None], gaps, np.inf).min(-1)
    steps = np.zeros_like(most)
    for parts in (4, 3, 2, 1):  # the widest that fits stays
        step = least / parts
        with np.errstate(all="ignore"):
            off = np.abs(values / step[..., None] - np.rint(values / step[..., None])).max(-1)
        steps = np.where(off < 0.05, step, steps)
    return np.where(np.isfinite(steps), steps, 0)
