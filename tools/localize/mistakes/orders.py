"""Orders of channels: which one a dump is in, by matching, and what that order is called."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax import Array

from tools.localize.stage_case import StageReplay

Candidates = Iterator[tuple[str, Array]]

# Rows from which on the nearest of 150 000 channels is nearest by more than chance: in four rows
# the best of them agrees to 4 bits, and 6.7 are asked of the coarsest engine.
ROWS = 4
SEARCHED = 16384  # channels, every one of which is compared with every other
TRIED = 64  # output channels on which a change of the whole weight is tried first
GAIN = 2.0  # bits that it has to bring there


# --- orders


def _blocks(width: int) -> list[int]:
    return [size for size in (8, 16, 32, 64, 128, 256) if width % size == 0 and width > size]


def orders(width: int, head: int, groups: int) -> Iterator[tuple[str, np.ndarray]]:
    """Orders that people put channels into by mistake: (what it is, where each one comes from).

    ``head`` is the size of a head if the channels are those of heads, ``groups`` the number of
    key/value heads; else 0.
    """
    all_of_them = np.arange(width)
    if width % 2 == 0:
        yield "halves exchanged", np.roll(all_of_them, width // 2)
        yield "halves interleaved", all_of_them.reshape(2, -1).T.ravel()
        yield "even ones first", all_of_them.reshape(-1, 2).T.ravel()
        yield "pairs exchanged", all_of_them.reshape(-1, 2)[:, ::-1].ravel()
    yield "reversed", all_of_them[::-1]
    if head and width % head == 0 and head % 2 == 0:
        heads = all_of_them.reshape(-1, head)
        yield "halves of every head interleaved", _within(heads, (2, -1))
        yield "even ones of every head first", _within(heads, (-1, 2))
        yield "halves of every head exchanged", np.roll(heads, head // 2, 1).ravel()
        yield "heads reversed", heads[::-1].ravel()
        if groups and len(heads) % groups == 0:
            grouped = heads.reshape(groups, -1, head)
            yield "heads by their place in a group", grouped.swapaxes(0, 1).ravel()
            other = heads.reshape(-1, groups, head)
            yield "heads by their group", other.swapaxes(0, 1).ravel()
    for size in _blocks(width):
        yield f"blocks of {size} reversed", all_of_them.reshape(-1, size)[::-1].ravel()
        yield f"reversed in blocks of {size}", all_of_them.reshape(-1, size)[:, ::-1].ravel()


def _within(heads: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Every head [heads, H] read as a matrix of that shape, transposed."""
    return heads.reshape(len(heads), *shape).swapaxes(1, 2).ravel()


def described(order: np.ndarray, head: int, groups: int) -> str:
    width = len(order)
    for says, known in orders(width, head, groups):
        if np.array_equal(order, known):
            return says
    step = int(-order[0] % width)
    if np.array_equal(order, (np.arange(width) - step) % width):
        return f"rolled by {step if step <= width // 2 else step - width}"
    moved = np.flatnonzero(order != np.arange(width))
    shown = ", ".join(f"{place} holds {order[place]}" for place in moved[:3])
    return f"{len(moved)} moved ({shown}{', ...' if len(moved) > 3 else ''})"


# --- rows


def _nearest(found: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """Which channel of ``right`` [rows, C] each channel of ``found`` is; None where that is no
    order of theirs."""
    width = found.shape[1]
    own = np.square(found - right).sum(0)
    size = np.square(right).sum(0)
    order = np.arange(width)
    for first in range(0, width, 512):
        part = slice(first, first + 512)
        distance = size - 2 * found[:, part].T @ right + np.square(found[:, part]).sum(0)[:, None]
        best = distance.argmin(1)
        closer = distance[np.arange(len(best)), best] < 0.5 * own[part]
        order[part] = np.where(closer, best, order[part])
    moved = order != np.arange(width)
    # what is no order repeats a third of the channels
    repeated = width - len(set(order.tolist()))
    return order if moved.any() and repeated <= 0.1 * moved.sum() else None


def row_order(case: StageReplay) -> dict[str, np.ndarray]:
    """Weight -> where each of its rows comes from, of those that have moved."""
    dump, exact = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (case.dump, case.exact))
    if len(dump) < ROWS or not np.isfinite(dump).all():
        return {}
    found, first = {}, 0
    for name, weight in case.weights.items():
        part = slice(first, first + len(weight))
        first += len(weight)
        order = _nearest(dump[:, part], exact[:, part]) if len(weight) <= SEARCHED else None
        if order is not None:
            found[name] = order
    return found


def moved(case: StageReplay, value: Array, orders: dict[str, np.ndarray]) -> Array:
    """``value`` [..., C] with the channels of the moved weights in their order."""
    parts, first = [], 0
    for name, weight in case.weights.items():
        part = np.arange(first, first + len(weight))
        first += len(weight)
        parts.append(part[orders[name]] if name in orders else part)
    return value[..., np.concatenate(parts)]


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
