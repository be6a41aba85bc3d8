"""What a click on a cell opens: the slices of one stage of one layer, and its error's histogram.

Levels are sent as one byte each, in quarters of a bit: a picture shows no more.
"""

from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import numpy as np

from qwen_jax.replay import Replay
from qwen_jax.weights.base import Weights
from stages import verdict
from stages.architecture import SOFTMAX, Key
from stages.files import numpy_dtype
from stages.verdict import LocalError
from tools.localize.result import Localization
from tools.localize.stage_case import StageReplay

# Multiplications spent on the cells of one report, half a minute's: beyond it a cell shows what the
# localizer measured, and neither its grid nor its histogram. Faults come first.
BUDGET = 5e10
ROWS, COLUMNS, BARS = 32, 64, 128  # of a grid, and bars of a chart: more than that are put together
OCTAVES = 24  # of a histogram: what lies more than so far below the largest counts as that far

LOWEST, QUARTERS, NOTHING = -10.0, 4.0, 255


def packed(levels: Any) -> str:
    """Bits, one byte each: (bits + 10) * 4; 255 where there is nothing."""
    levels = np.asarray(levels, np.float64)
    codes = np.clip(np.rint((levels - LOWEST) * QUARTERS), 0, NOTHING - 1)
    found = np.where(np.isnan(levels), NOTHING, codes).astype(np.uint8)
    return b64encode(found.tobytes()).decode()


def binned(sums: np.ndarray, most: int, axis: int = -1) -> tuple[np.ndarray, int]:
    """Sums over neighbours along an axis so that at most ``most`` are left, and how many are one;
    the last may be of fewer."""
    step = max(1, -(-sums.shape[axis] // most))
    starts = np.arange(0, sums.shape[axis], step)
    return np.add.reduceat(sums, starts, axis), step


def lowest(levels: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """The lowest of neighbouring levels, so that at most ``most`` are left."""
    step = max(1, -(-levels.size // most))
    return np.minimum.reduceat(levels, np.arange(0, levels.size, step)), step


def measured(item: LocalError) -> dict[str, Any]:
    """The slices that the localizer itself measured: {"head" | "position" | "channel" | "key":
    ...}. The channels of scores and softmax are the positions of keys."""
    found = {}
    for axis, (levels, _) in item.slices.items():
        kept, step = lowest(np.asarray(levels), BARS)
        first = item.skipped_rows if axis == "position" else 0
        name = "key" if axis == "channel" and item.stage.heads_lead else axis
        found[name] = {"levels": packed(kept), "step": step, "first": first, "size": levels.size}
    return found


def by_call(item: LocalError, ends: np.ndarray) -> str:
    """The lowest level of the rows of each call of the engine; ``ends`` [calls] are row numbers."""
    levels = np.full(item.skipped_rows + item.slices["position"][0].size, np.nan)
    levels[item.skipped_rows :] = item.slices["position"][0]
    parts = np.split(levels, ends[:-1])
    return packed([np.nanmin(p) if np.isfinite(p).any() else np.nan for p in parts])


def details(report: Localization, weights: Weights) -> Iterator[tuple[Key, dict[str, Any]]]:
    """The grid, the histogram and the numbers of every cell that the budget is enough for."""
    replay = Replay(report.trace, weights, numpy_dtype(report.dtype))
    faulty = {finding.suspect.key for finding in report.findings}
    lowest_of: dict[str, float] = {}
    for item in report.items:
        lowest_of[item.name] = min(item.level, lowest_of.get(item.name, item.level))

    def wanted(item: LocalError) -> tuple[bool, bool]:
        return item.key not in faulty, item.level > lowest_of[item.name]

    spent = 0.0
    for item in sorted(report.items, key=wanted):
        with replay.numerics():
            case = StageReplay(replay, item.stage, item.layer, formats=report.fitted.formats)
            if not case.replayable:
                continue
            spent += _work(case)
            if spent > BUDGET and item.key not in faulty:
                return
            yield item.key, detail(case)


def _work(case: StageReplay) -> float:
    """About how many multiplications a cell takes."""
    each = sum(w.size for w in case.weights.values()) if case.stage.linear else 1
    return float(max(case.rows * each, case.dump.size * 64))


def detail(case: StageReplay) -> dict[str, Any]:
    """What only the values themselves show, of one stage of one layer."""
    exact, dump, size = (np.asarray(x, np.float64) for x in (case.exact, case.dump, case.size))
    keep = np.asarray(case.finite) & np.isfinite(exact)
    if case.stage.kind is SOFTMAX:
        keep &= np.asarray(case.pos.mask)[:, None]  # what the mask removes is zero, and no element
    with np.errstate(all="ignore"):
        error = np.where(keep, dump - exact, 0.0)
        scale = np.where(keep, size + np.square(exact), 0.0)
    whole, wrong = float(np.square(np.where(keep, exact, 0)).sum()), float(np.square(error).sum())
    place = np.unravel_index(int(np.abs(error).argmax()), error.shape)
    before = len(case.replay.trace.tokens) - case.rows
    index = [int(i) for i in place[1:]]
    index[case.stage.row_axes() - 1] += before
    count = max(int(keep.sum()), 1)
    return {
        "elements": int(keep.sum()),
        "relative_l2": (wrong / whole) ** 0.5 if whole else None,
        "rms_error": (wrong / count) ** 0.5,
        "rms_value": (whole / count) ** 0.5,
        "largest": {
            "error": float(error[place]),
            "at": dict(zip(case.stage.axes, index, strict=True)),
            "found": float(dump[place]),
            "expected": float(exact[place]),
        },
        "grid": _grid(case, error, scale, before),
        "histogram": _histogram(error[keep], exact[keep]),
    }


def _grid(case: StageReplay, error: np.ndarray, scale: np.ndarray, before: int) -> dict[str, Any]:
    """Bits of heads (or else of neighbouring channels) x positions."""
    heads, stage = case.heads, case.stage
    sums = []
    for values in (np.square(error), scale):
        by_head = np.asarray(stage.by_head(heads or 1, values))
        grid = by_head.sum(-1) if heads else by_head[0].T
        grid, height = binned(grid, ROWS, 0)
        grid, width = binned(grid, COLUMNS, 1)
        sums.append(grid)
    levels = np.where(sums[1] > 0, verdict.bits(*sums), np.nan)
    return {
        "levels": packed(levels),
        "rows": len(levels),
        "of": "head" if heads else "channel",
        "height": height,
        "width": width,
        "first": before,
    }


def _histogram(error: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """How many elements have an error of such a size at a value of such a size, in octaves: a
    constant relative error is a diagonal, one of absolute size a horizontal line.

    ``counts``: [value, error, elements], with log2 of each; an error of zero has null.
    """
    x, right = _octaves(exact)
    y, top = _octaves(error)
    counts = np.bincount(x * (OCTAVES + 2) + y, minlength=(OCTAVES + 2) ** 2)
    return {
        "counts": [
            [right - x, None if y > OCTAVES else top - y, n]
            for x, row in enumerate(counts.reshape(OCTAVES + 2, -1).tolist())
            for y, n in enumerate(row)
            if n
        ]
    }


def _octaves(values: np.ndarray) -> tuple[np.ndarray, int]:
    """How many octaves below the largest each value lies, ``OCTAVES`` at most and one more of a
    zero; and log2 of the largest."""
    _, exponents = np.frexp(values)
    zero = values == 0
    highest = int(exponents[~zero].max()) if (~zero).any() else 0
    below = np.minimum(highest - exponents, OCTAVES)
    return np.where(zero, OCTAVES + 1, below), highest - 1
