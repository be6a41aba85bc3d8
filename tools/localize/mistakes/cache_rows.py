"""Mistakes with a key/value cache: which row of it holds what.

They show in what was dumped of the cache; without that, and where a row was right when it was
written and is not later, in the scores (k) and in the weighted sum (v) that are computed from it.
Either way it is found out what every row holds: its own value, another row's, zeros, or something
that is none of these. What that looks like has a name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.models.ops import split_heads
from stages.architecture import CACHE, SCORES
from stages.verdict import ranges
from tools.localize.stage_case import StageReplay

Candidates = Iterator[tuple[str, Array]]

ZERO, UNKNOWN = -1, -2
# A row is another one if it is so much nearer to it than to the rest.
NEARER = 0.2
# Rows of equal tokens have the same v in layer 0. They differ by last bits at most: by less than
# this of their squares, and other rows by far more.
ALIKE = 1e-9


def kept(case: StageReplay) -> Array:
    """[1, S, K, H]: the right rows that the stage puts away, or reads from the cache."""
    value = case.last(None).inputs[0 if case.stage.kind is CACHE else 1]
    return value if value.ndim == 4 else split_heads(case.config, value)[2]


def with_rows(case: StageReplay, rows: Array) -> Array:
    """The stage's value if the cache has these rows [1, S, K, H]."""
    place = 0 if case.stage.kind is CACHE else 1
    if place == 0:
        rows = rows[:, -case.rows :]
    value = case.inputs[place]
    if value.ndim != 4:  # q, k and v side by side
        flat = rows.reshape(*rows.shape[:2], -1)
        rows = jnp.concatenate([value[..., : -flat.shape[-1]], flat], -1)
    return case.run(*[None] * place, rows)


@dataclass(frozen=True)
class Held:
    """What the rows of a cache hold.

    Attributes:
        rows: [S] the number of the row that each one holds, ZERO or UNKNOWN.
        first: the first row of the sequence that was looked at.
        later: whether the rows are as later calls read them, not as they were written.
        values: [S, K*H] what stands in rows that are UNKNOWN; of scores alone nobody can say.
        alike: [S] the first row that should hold the same as each one.
    """

    rows: np.ndarray
    first: int
    later: bool
    alike: np.ndarray
    values: np.ndarray | None = None

    @property
    def wrong(self) -> np.ndarray:
        return np.flatnonzero(self.rows != np.arange(len(self.rows)))

    def holds(self, row: int, other: int) -> bool:
        """Whether a row holds another one, or one that is no different."""
        found = self.rows[row]
        return bool(found >= 0 and self.alike[found] == self.alike[other])


def held(case: StageReplay) -> Held | None:
    """What every row holds; None where that cannot be told."""
    if "_held" not in case.__dict__:
        looked = {CACHE: _of_cache, SCORES: _of_scores}.get(case.stage.kind, _of_sum)
        finite = bool(jnp.isfinite(jnp.where(case.finite, case.dump, np.nan)[..., 0]).any())
        case.__dict__["_held"] = looked(case) if finite and case.has_calls else None
    found: Held | None = case.__dict__["_held"]
    return found


def _of_cache(case: StageReplay) -> Held:
    whole = case.last(None)
    exact = np.asarray(whole.exact)[0].reshape(whole.exact.shape[1], -1)
    found = np.asarray(case.dump)[0].reshape(case.rows, -1)
    first = len(exact) - len(found)
    off = _distances(found, exact)
    rows = np.arange(len(exact))
    alike = _alike(exact)
    rows[first:] = [_nearest(off[n], row, first + n, alike) for n, row in enumerate(found)]
    return Held(rows, first, False, alike, np.asarray(whole.dump)[0].reshape(exact.shape))


def _alike(right: np.ndarray) -> np.ndarray:
    """[S] the first of the rows [S, K*H] that each one is the same as."""
    squares = np.square(right).sum(-1)
    apart = squares[:, None] + squares - 2 * right @ right.T
    same = apart <= ALIKE * squares[:, None]
    np.fill_diagonal(same, True)  # a row with NaN is like itself alone
    return same.argmax(1)


def _distances(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    found = np.nan_to_num(found, posinf=0.0, neginf=0.0)
    return np.square(found[:, None] - exact[None]).sum(-1)


def _nearest(off: np.ndarray, row: np.ndarray, own: int, alike: np.ndarray) -> int:
    """The row that one is, by its squared distances to all; of several alike its own, or else the
    nearest by."""
    if not row.any():
        return ZERO
    same = alike == alike[off.argmin()]
    if same[own]:
        return own
    several, others = np.flatnonzero(same), off[~same]
    best = int(several[np.abs(several - own).argmin()])
    return best if off[best] < NEARER**2 * np.median(others) else UNKNOWN


def _of_scores(case: StageReplay) -> Held:
    """Every column of the scores against what it would be of every row of k."""
    seen = np.asarray(case.pos.mask)[0]  # [rows, S]
    dump, exact = (np.asarray(x)[0] for x in (case.dump, case.exact))  # [N, rows, S]
    rows = np.arange(exact.shape[-1])
    alike = rows.copy()  # k differs by position, if by nothing else
    for s in rows:
        here = seen[:, s]
        column = dump[:, here, s].ravel()
        if column.size and np.isfinite(column).all():
            candidates = exact[:, here].reshape(-1, len(rows)).T
            rows[s] = _nearest(_distances(column[None], candidates)[0], column, s, alike)
    return Held(rows, len(rows) - case.rows, True, alike)


def _of_sum(case: StageReplay) -> Held | None:
    """v is solved for: as one row that changed, or as all rows from the first wrong one on."""
    weights = np.asarray(case.inputs[0])[0]  # [N, rows, S]
    right = np.asarray(kept(case))[0]  # [S, K, H]
    length, groups, head = right.shape
    first = length - case.rows
    grid = weights.reshape(groups, -1, length)  # [K, G*rows, S]
    error = np.asarray(case.dump - case.exact)[0].reshape(case.rows, groups, -1, head)
    error = np.nan_to_num(error).transpose(1, 2, 0, 3).reshape(groups, -1, head)
    total = max(float(np.square(error).sum()), 1e-300)

    def solved(columns: np.ndarray) -> tuple[float, np.ndarray]:
        change = np.stack(
            [
                np.linalg.lstsq(w[:, columns], e, rcond=1e-9)[0]
                for w, e in zip(grid, error, strict=True)
            ]
        )
        left = error - grid[..., columns] @ change
        return float(np.square(left).sum()) / total, change.transpose(1, 0, 2)

    tried = [np.array([s]) for s in range(length)]
    tried.append(np.arange(first, length))
    left, columns = min(((solved(c)[0], n) for n, c in enumerate(tried)), key=lambda pair: pair[0])
    if left > NEARER**2:
        return None
    some = tried[columns]
    values = right.reshape(length, -1).copy()
    values[some] += solved(some)[1].reshape(len(some), -1)
    rows, flat = np.arange(length), right.reshape(length, -1)
    alike = _alike(flat)
    size = np.square(flat).sum(-1).mean()
    for s in some:
        none = np.square(values[s]).sum() < NEARER**4 * size
        off = _distances(values[s : s + 1], flat)[0]
        rows[s] = ZERO if none else _nearest(off, values[s], int(s), alike)
    return Held(rows, first, True, alike, values)


# --- names


def _is_zero(found: Held) -> str | None:
    wrong = found.wrong
    return _rows(found, wrong) if (found.rows[wrong] == ZERO).all() else None


def _is_slot(found: Held) -> str | None:
    """Each row in the slot behind its own; the first of them is then nobody's."""
    wrong, rows = found.wrong, found.rows
    if len(wrong) < 2 or rows[wrong[0]] not in (ZERO, UNKNOWN):
        return None
    behind = all(found.holds(s, s - 1) for s in range(wrong[0] + 1, wrong[-1] + 1))
    return f"from row {wrong[0]} on" if behind else None


def _permuted(found: Held) -> bool:
    wrong, rows = found.wrong, found.rows[found.wrong]
    known = len(wrong) > 1 and bool((rows >= 0).all())
    return known and sorted(found.alike[rows]) == sorted(found.alike[wrong])


def _is_permuted(found: Held) -> str | None:
    return _listed(found) if _permuted(found) else None


def _is_overwritten(found: Held) -> str | None:
    """Rows from before the calls in which they are wrong."""
    wrong = found.wrong
    late = found.later and bool((wrong < found.first).all()) and not _permuted(found)
    return _listed(found) if late else None


def _is_stale(found: Held) -> str | None:
    rows = found.rows[found.wrong]
    return _listed(found) if (rows >= 0).all() and not _permuted(found) else None


def _is_foreign(found: Held) -> str | None:
    wrong = found.wrong
    if UNKNOWN not in found.rows[wrong] or len(wrong) > len(found.rows) / 4:
        return None
    return _rows(found, wrong)


def _rows(found: Held, wrong: np.ndarray) -> str:
    mask = np.zeros(len(found.rows), bool)
    mask[wrong] = True
    return ranges(mask)


def _listed(found: Held) -> str:
    names = {ZERO: "nothing", UNKNOWN: "something else"}
    some = [f"{s} holds {names.get(int(p), p)}" for s, p in enumerate(found.rows) if p != s]
    return ", ".join(some[:4]) + (", ..." if len(some) > 4 else "")


Pattern = Callable[[Held], str | None]
# (name, what it says, how it looks); the more specific first
PATTERNS: list[tuple[str, str, Pattern]] = [
    ("cache_slot_off_by_one", "rows of the cache in the slot after their own, {}", _is_slot),
    ("cache_row_not_written", "row {} of the cache never written", _is_zero),
    ("cache_rows_permuted", "rows of the cache in another order: {}", _is_permuted),
    ("cache_row_overwritten", "rows of the cache overwritten: {}", _is_overwritten),
    ("cache_row_stale", "rows of the cache stale: {}", _is_stale),
    (
        "cache_row_foreign",
        "row {} of the cache is none of this sequence: stale memory, or another sequence's",
        _is_foreign,
    ),
]


def rows_as(pattern: Pattern, case: StageReplay) -> Candidates:
    """What the stage would be if the rows hold what they were found to."""
    found = held(case)
    if found is None or not found.wrong.size:
        return
    says = pattern(found)
    if says is None:
        return
    right = kept(case)
    rows = jnp.where(
        (found.rows < 0)[None, :, None, None], 0.0, right[:, np.maximum(found.rows, 0)]
    )
    unknown = np.flatnonzero(found.rows == UNKNOWN)
    if unknown.size and found.values is not None:
        values = found.values.reshape(right.shape[1:])
        rows = rows.at[0, unknown].set(jnp.asarray(values[unknown]))
    value = with_rows(case, rows)
    if unknown.size and case.stage.kind is SCORES:  # of k nothing but its scores is known
        value = value.at[..., unknown].set(case.dump[..., unknown])
    yield says, value
