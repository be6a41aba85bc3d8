"""Index maps of channels: which one a dump is in, by matching, and what that order is called."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from jax import Array

from tools.localize.stage_case import StageReplay

with warnings.catch_warnings():  # importing it adds filters to those of the whole process
    from scipy.spatial import KDTree

Candidates = Iterator[tuple[str, Array]]

TRIED = 64  # output channels on which a change of the whole weight is tried first
GAIN = 2.0  # bits that it has to bring there


# --- matching

# Rows from which on the nearest of 150 000 channels is nearest by more than chance: in four rows
# the best of them agrees to 4 bits, and 6.7 are asked of the coarsest engine.
ROWS = 4
PROJECTED = 8  # numbers that stand for a channel until its nearest are compared in full
AS_RIGHT = 1e-12  # of the squares: what another order may leave of what was found


def match(found: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """Which channel of ``right`` [rows, C] each channel of ``found`` is; None where none has moved.

    Of one row alone the channels are numbers, and matched by size.
    """
    width = found.shape[1]
    if not np.isfinite(found).all():
        return None
    own = np.square(found - right).sum(0)
    if len(found) == 1:
        return _by_size(found[0], right[0])
    if len(found) < ROWS:
        return None
    across = np.random.default_rng(0).normal(size=(PROJECTED, len(found))) / np.sqrt(len(found))
    if len(found) <= PROJECTED:
        across = np.eye(len(found))
    _, near = KDTree((across @ right).T).query((across @ found).T, min(4, width))
    near = np.asarray(near).reshape(width, -1)
    off = np.stack([np.square(found - right[:, column]).sum(0) for column in near.T])
    best = near[np.arange(width), off.argmin(0)]
    order = np.where(off.min(0) < 0.5 * own, best, np.arange(width))
    return order if (order != np.arange(width)).any() else None


def _by_size(found: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """The same of numbers [C]. What is where it should be stays, of numbers that are equal too."""
    order = np.arange(len(right))
    spread = np.abs(np.sort(found) - np.sort(right)).max()  # the noise that came with them
    rest = np.flatnonzero(np.abs(found - right) > 2 * spread + 1e-12 * np.abs(right).max())
    order[rest[found[rest].argsort()]] = rest[right[rest].argsort()]
    return order if rest.size else None


def parted(sizes: Sequence[int]) -> Iterator[list[slice]]:
    """Channels of several weights side by side: each alone, then more and more of them together."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    count = len(sizes)
    for cuts in sorted(range(1 << (count - 1)), key=lambda cuts: -cuts.bit_count()):
        # the last are together first: k and v lie side by side in more caches than q and k
        at = [0, *(n for n in range(1, count) if cuts >> (count - 1 - n) & 1), count]
        yield [slice(ends[a], ends[b]) for a, b in pairwise(at)]


def matched(
    found: np.ndarray, right: np.ndarray, sizes: Sequence[int]
) -> tuple[np.ndarray, list[slice]] | None:
    """The order [C] that channels are in, and the parts that they stay within: the smallest ones
    that leave as little unexplained as all of them together. None where they are in none."""
    best: tuple[float, np.ndarray, list[slice]] | None = None
    whole = np.square(found - right).sum()
    for parts in parted(sizes):
        order = np.arange(found.shape[1])
        for part in parts:
            own = match(found[:, part], right[:, part])
            if own is not None:
                order[part] = part.start + own
        left = float(np.square(found - right[:, order]).sum())
        if left < 0.5 * whole and (best is None or left < 0.5 * best[0]):
            best = left, order, parts
    return None if best is None else best[1:]


# --- names


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


# Sizes that blocks of channels have, besides a head's: of quantisations, tiles and vectors.
BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def patterns(
    width: int, head: int = 0, groups: int = 0, sizes: Sequence[int] = (), every: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Orders that people put channels into by mistake: (what it is, where each one comes from).

    An order that is not one of shards moves blocks of one size within periods of one size: it
    exchanges halves, reverses, or reads a matrix of blocks by its columns.

    Arguments:
        head: the size of a head if the channels are those of heads; else 0.
        groups: the number of key/value heads; else 0.
        sizes: of several weights side by side.
        every: blocks and periods of all sizes, not of usual ones alone.
    """
    if len(sizes) > 1:
        yield from _sharded(sizes, [n for n in _divisors(groups or 8) if n > 1], groups)
    usual = {n for n in (*BLOCKS, head, head // 2, width, width // 2) if n and width % n == 0}
    tried = _divisors(width) if every else sorted(usual)
    for period in sorted(tried, key=lambda n: (n != width, n != head, n)):
        for unit in (n for n in tried if n < period and period % n == 0):
            yield from _moved_blocks(width, period, unit, head, groups)


def _sharded(
    sizes: Sequence[int], counts: list[int], groups: int
) -> Iterator[tuple[str, np.ndarray]]:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    parts = [np.arange(a, b) for a, b in pairwise(starts)]
    for count in counts:
        if all(size % count == 0 for size in sizes):
            order = np.concatenate(
                [np.split(part, count)[n] for n in range(count) for part in parts]
            )
            of = "by key/value head" if count == groups else f"by shard of {count}"
            yield f"interleaved {of}", order
            yield f"read as if interleaved {of}", order.argsort()


def _moved_blocks(
    width: int, period: int, unit: int, head: int, groups: int
) -> Iterator[tuple[str, np.ndarray]]:
    grid = np.arange(width).reshape(-1, period // unit, unit)
    count = period // unit
    each = "" if period == width else " of every head" if period == head else f" in every {period}"
    by = "" if unit == 1 else " by heads" if unit == head else f" in blocks of {unit}"
    of = "" if unit == 1 else "heads " if unit == head else f"blocks of {unit} "
    if count == 2:
        yield "pairs exchanged" if period == 2 else f"halves{each} exchanged", grid[:, ::-1].ravel()
        return
    if period == width and unit == head and groups and count % groups == 0:
        places = grid.reshape(groups, -1, head)
        yield "heads by their place in a group", places.swapaxes(0, 1).ravel()
        yield "heads by their group", grid.reshape(-1, groups, head).swapaxes(0, 1).ravel()
    for parts in _divisors(count)[1:-1]:
        says = f"{parts} parts{each} interleaved{by}"
        if parts == 2:
            says = f"halves{each} interleaved{by}"
        elif parts == count // 2:
            says = f"even ones{each} first{by}"
        yield says, grid.reshape(-1, parts, count // parts, unit).swapaxes(1, 2).ravel()
    yield f"{of}reversed{each}", grid[:, ::-1].ravel()


def described(
    order: np.ndarray,
    head: int = 0,
    groups: int = 0,
    sizes: Sequence[int] = (),
    fits: Callable[[np.ndarray], Any] | None = None,
) -> tuple[str, np.ndarray] | None:
    """What an order is called, and that order; None if it has no name. ``fits``: whether another
    order is as good, where channels are alike."""
    fits = fits or partial(np.array_equal, order)
    width = len(order)
    step = int(-order[0] % width)
    rolled = (np.arange(width) - step) % width
    if 2 * step != width and fits(rolled):
        return f"rolled by {signed(step, width)}", rolled
    for says, known in patterns(width, head, groups, sizes, every=width <= 1 << 15):
        if fits(known):
            return says, known
    if head and width % head == 0:
        heads = order.reshape(-1, head)
        if (heads == heads[:, :1] // head * head + np.arange(head)).all():
            return f"heads in the order {listed(heads[:, 0] // head)}", order
    return None


def moves(order: np.ndarray) -> str:
    """What is said of an order that has no name."""
    moved = np.flatnonzero(order != np.arange(len(order)))
    shown = ", ".join(f"{place} holds {order[place]}" for place in moved[:3])
    return f"{len(moved)} moved ({shown}{', ...' if len(moved) > 3 else ''})"


def signed(step: int, size: int) -> int:
    """The same step around a circle, the short way."""
    step %= size
    return step if step <= size // 2 else step - size


def listed(order: np.ndarray) -> str:
    """An order in short: what follows on one another is a run, as in 0-14,16,15,17."""
    ends = np.flatnonzero(np.diff(order) != 1)
    firsts, lasts = order[[0, *(ends + 1)]], order[[*ends, len(order) - 1]]
    runs = [
        f"{a}" if a == b else f"{a},{b}" if b == a + 1 else f"{a}-{b}"
        for a, b in zip(firsts, lasts, strict=True)
    ]
    return ",".join(runs[:24]) + (",..." if len(runs) > 24 else "")


# --- the whole weight


Change = Callable[[np.ndarray], np.ndarray]


def tried(
    case: StageReplay,
    changes: Iterator[tuple[str, Change]],
    of: Sequence[Sequence[str]] | None = None,
) -> Candidates:
    """Changes of all weights, and of each alone, that bring bits to a few output channels. ``of``:
    of these weights only."""
    small = case.sampled(TRIED)
    base = small.scored(small.exact)
    every = list(case.weights)
    for says, change in changes:
        for names in of or [every, *([name] for name in every if len(every) > 1)]:
            few = {name: change(np.asarray(small.weights[name])) for name in names}
            if small.scored(small.run(weights=few)) >= base + GAIN:
                whole = {name: change(np.asarray(case.weights[name])) for name in names}
                yield (
                    says if names == every else f"{says}, of {', '.join(names)}",
                    case.run(weights=whole),
                )
