"""From sums of squared error to significant bits, precision classes and suspects.

The thresholds are bits: of each arithmetic, between layers, between slices. They were measured, and
none is tuned to a model: the scale that error is measured against makes every stage of one
arithmetic come out at nearly the same number of bits, whatever its values.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from stages.architecture import SOFTMAX, Key, Stage
from stages.architectures import ALL_NAMES, any_stage

EXACT_BITS = 53.0  # what "no error at all" counts as; the replay itself resolves no more

# The lowest significant bits of each arithmetic, finest first: of sums of products, and of
# everything else. Measured on the demo model and on random checkpoints: float32 22 to 27, float16
# and TF32 11.8 to 13.1, bfloat16 9.0 to 10.1, 8-bit activations 6.3 to 7.9. A sequential float32
# sum of 19000 products still has 18.6.
CLASSES = (
    ("exact", 50.0, 50.0),
    ("f64", 32.0, 32.0),
    ("f32", 18.0, 20.0),
    ("tf32/f16", 11.0, 11.0),
    ("bf16", 8.4, 8.0),
    ("8-bit", 5.5, 8.0),
)
BF16, LOWEST = 8.4, 2.5
NOMINAL = {"float64": 50.0, "float32": 23.0, "float16": 12.3, "bfloat16": 9.2}


@dataclass(frozen=True, kw_only=True)
class LocalError:
    """The error that one stage of one layer creates, judged by itself.

    Attributes:
        stage: the stage.
        skipped_rows: how many rows of the sequence come before them.
        bits: significant bits of the local error; ``EXACT_BITS`` for none.
        compared: whether anything could be: not where all of it is NaN.
        exact_bits: the same against exact arithmetic, where the rest is against what the number
            format of the engine would give; None where nothing but exact arithmetic was needed.
        level: the bits with what no fault is needed for taken out (a gap's rounding, angles): what
            precision classes and siblings are compared by.
        segment: missing stages that this one was computed through.
        born: elements that are NaN or infinite here though their inputs are finite.
        slices: {"head" | "position" | "channel": (levels, elements per slice)}.
        born_slices: the same axes -> which slices have such elements.
        dead_slices: the same axes -> which slices are zero throughout and should not be.
        estimated: its slices, if it sums products, are estimates; born and dead ones were not
            looked for. See ``doubtful``.
    """

    stage: Stage
    layer: int | None
    skipped_rows: int
    bits: float
    level: float
    segment: tuple[Key, ...]
    born: int
    slices: dict[str, tuple[np.ndarray, int]]
    born_slices: dict[str, np.ndarray]
    dead_slices: dict[str, np.ndarray]
    compared: bool = True
    exact_bits: float | None = None
    estimated: bool = False

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def key(self) -> Key:
        return self.stage.name, self.layer

    @property
    def sums_products(self) -> bool:
        """Whether products are summed in it, or in one of the missing stages behind it: a segment
        is as coarse as its coarsest member."""
        return sums_products(self.stage, self.segment)

    @property
    def shown_bits(self) -> float:
        """Against exact arithmetic: how precise it is, whatever explains that."""
        return self.bits if self.exact_bits is None else self.exact_bits


def sums_products(stage: Stage, segment: Sequence[Key]) -> bool:
    """Whether a stage or a missing one behind it sums products."""
    return stage.kind.sums_products or any(any_stage(s).kind.sums_products for s, _ in segment)


def bits(error: Any, scale: Any) -> Any:
    """-log2(rms(err) / rms(scale)) from sums of squares; at most ``EXACT_BITS``."""
    error, scale = np.asarray(error, np.float64), np.asarray(scale, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = -0.5 * np.log2(error / scale)
    return np.where(error == 0, EXACT_BITS, np.clip(value, -60.0, EXACT_BITS))


def lenient_bits(error: Any, scale: Any, expected: Any) -> Any:
    """Bits where the expected part of the error is an allowance: twice as much may be there."""
    allowed = bits(np.maximum(error - 4 * expected, 0), scale)
    return np.maximum(bits(error, scale), np.minimum(allowed, NOMINAL["float32"]))


def _level(error: Any, scale: Any, expected: Any, gap: bool, dtype: str) -> Any:
    """Bits once the expected part of the error is accounted for.

    After missing stages (``gap``) the error is set against what the engine's own rounding in them
    leads to. Otherwise the expected part is an allowance.
    """
    if gap:
        # one rounding of the stage itself is always allowed
        own = scale * 4.0 ** -NOMINAL[dtype]
        return np.minimum(NOMINAL[dtype] + bits(error, expected + own), EXACT_BITS)
    return lenient_bits(error, scale, expected)


class Sums(Protocol):
    """Sums of squares over the rows and columns of a stage's matrix, see ``replay.ErrorSums``."""

    error_rows: np.ndarray
    error_columns: np.ndarray
    scale_rows: np.ndarray
    scale_columns: np.ndarray
    born_rows: np.ndarray
    born_columns: np.ndarray
    expected_rows: np.ndarray
    expected_columns: np.ndarray
    due_rows: np.ndarray
    due_columns: np.ndarray
    lost_rows: np.ndarray
    lost_columns: np.ndarray


def judge(
    stage: Stage,
    layer: int | None,
    sums: Sums,
    segment: tuple[Key, ...],
    heads: int | None,
    skipped_rows: int,
    dtype: str,
    estimated: bool = False,
) -> LocalError:
    """Turn the sums of one stage into significant bits.

    ``heads`` is how many lie on its axes; see ``LocalError`` for the rest.
    """
    gap = bool(segment)

    def level(error: Any, scale: Any, known: Any) -> Any:
        return _level(error, scale, known, gap, dtype)

    def folded(kind: str) -> dict[str, np.ndarray]:
        rows, columns = getattr(sums, f"{kind}_rows"), getattr(sums, f"{kind}_columns")
        return stage.fold(heads, rows, columns)

    error, scale, known = folded("error"), folded("scale"), folded("expected")
    # what is NaN anyway makes slices smaller
    size = int((sums.scale_rows > 0).sum() * (sums.scale_columns > 0).sum())
    slices = {}
    for axis in error:
        used = scale[axis] > 0
        levels = level(error[axis], scale[axis], known[axis])
        elements = max(size // max(int(used.sum()), 1), 1)
        slices[axis] = (np.where(used, levels, EXACT_BITS), elements)
    due, lost = folded("due"), folded("lost")
    total, whole = sums.error_rows.sum(), sums.scale_rows.sum()
    return LocalError(
        stage=stage,
        layer=layer,
        skipped_rows=skipped_rows,
        bits=float(bits(total, whole)),
        level=float(level(total, whole, sums.expected_rows.sum())),
        segment=segment,
        born=int(sums.born_rows.sum()),
        slices=slices,
        born_slices={axis: found > 0 for axis, found in folded("born").items()},
        dead_slices={axis: (due[axis] > 0) & (lost[axis] == due[axis]) for axis in due},
        estimated=estimated,
        compared=bool(whole > 0),
    )


def class_of(level: float, stage: Stage, segment: Sequence[Key] = ()) -> str | None:
    """The name of the arithmetic that explains this many bits; None where none does.

    ``segment``: missing stages behind it.
    """
    product = sums_products(stage, segment)
    return next((n for n, sums, others in CLASSES if level >= (sums if product else others)), None)


def coarsest(classes: Iterable[str]) -> str:
    """The coarsest of some precision classes."""
    order = [name for name, _, _ in CLASSES]
    return max(classes, key=lambda name: order.index(name) if name in order else len(order))


def sibling_gap(item: LocalError) -> float:
    """How many bits below its siblings a layer is out of line. Within one precision they stay
    within 0.7 bits of each other (measured); the next class is 3 bits away. After a gap with a
    softmax in it they do not: it amplifies what a lower precision before it lost, by as much as
    the layer's scores are large."""
    if any(any_stage(stage).kind is SOFTMAX for stage, _ in item.segment):
        return 8.0
    return 2.5 if item.sums_products else 2.0


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A local error that its precision class does not explain, and why.

    Attributes:
        expected: the bits that it should have.
        why: "nan", "zero" (a slice that is nothing but zeros and should not be), "bits" (no class
            is that low), "layer" (below its siblings), "slice", "match" (a known mistake fits
            better than the right function), "changed" (a row of a cache that was not the same
            when it was read again), "grid" (bits that only a 16-bit format explains, and no such
            format is there) or "kin" (below other stages of its kind, whose format is known).
        masks: {"head" | "position" | "channel": which slices}.
    """

    item: LocalError
    expected: float
    why: str
    masks: dict[str, np.ndarray]

    @property
    def key(self) -> Key:
        return self.item.key

    @property
    def where(self) -> dict[str, str]:
        """{"heads" | "positions" | "channels": ranges or "all"}."""
        axes = [axis for axis in ("head", "position", "channel") if axis in self.masks]
        first = {"position": self.item.skipped_rows}
        return {axis + "s": ranges(self.masks[axis], first.get(axis, 0)) for axis in axes}

    @property
    def found(self) -> float:
        """The bits where it is wrong: of the worst slice, if only some are."""
        if self.why in ("slice", "zero"):
            return min(float(levels.min()) for levels, _ in self.item.slices.values())
        return self.item.bits


def suspects(items: list[LocalError], dtype: str) -> list[Suspect]:
    """The items where more error was created than precision explains, in computation order.

    Layers of one stage that lie on both sides of a class's lowest bits are of one class.
    """
    found = []
    usual = usual_levels(items, dtype)
    levels: dict[str, list[float]] = {}
    for item in items:
        levels.setdefault(item.name, []).append(item.level)
    lowered = _all_products_lowered(items)
    for item in items:
        expected = usual[item.name]
        most = item.level + sibling_gap(item)
        best = max((level for level in levels[item.name] if level <= most), default=item.level)
        explained = class_of(best, item.stage, item.segment) is not None
        if lowered and item.sums_products:
            explained = item.level >= LOWEST
        low = _low_slices(item, _cap(dtype))
        dead = _dead_slices(item, expected)
        if item.born:
            why, masks = "nan", item.born_slices
        elif dead:
            why, masks = "zero", dead
        elif not explained:
            why, masks = "bits", bad_slices(item, expected)
        elif item.level < expected - sibling_gap(item):
            why, masks = "layer", bad_slices(item, expected)
        elif low:
            why, masks = "slice", low
            sound = max(float(np.median(levels)) for levels, _ in item.slices.values())
            expected = max(expected, min(sound, _cap(dtype)))
        else:
            continue
        found.append(Suspect(item=item, expected=expected, why=why, masks=masks))
    return found


ZEROS = 16.0  # bits that a slice of zeros may have where what is lost is a 1e-4 of the usual scale

# By how many bits an estimated slice, and an estimated stage, may lie too high or too low: that of
# one of 8 squares is 0.75 bits too high in one case of 19 and 1.75 bits in one of 2000 if its error
# is spread evenly, with a deviation of 0.36 bits; a stage's was within 0.1.
UNSURE_SLICE, UNSURE_STAGE, DEVIATION = 0.75, 0.25, 0.36


def doubtful(items: list[LocalError], dtype: str) -> set[Key]:
    """The estimated items that could be suspects if they were measured, or of another class."""
    usual = usual_levels(items, dtype)
    # A layer may be out of line by a hair: then its siblings have to be measured too.
    close = {
        item.name
        for item in items
        if item.level - UNSURE_STAGE < usual[item.name] - sibling_gap(item)
    }
    found = {item.key for item in items if item.estimated and item.name in close}
    for item in items:
        if not item.estimated:
            continue
        product = item.stage.kind.sums_products
        of_slice, of_stage = (UNSURE_SLICE, UNSURE_STAGE) if product else (0.0, 0.0)
        low, high = (
            class_of(level, item.stage) for level in (item.level - of_stage, item.level + of_stage)
        )
        # a slice of zeros has fewer bits, and no more than values far from zero leave it
        dead = min(usual[item.name] - 3.0, ZEROS) + of_slice
        if (
            not np.isfinite(item.bits)
            or low is None
            or low != high
            or _low_slices(item, _cap(dtype), of_slice)
            or any((levels < dead).any() for levels, _ in item.slices.values())
        ):
            found.add(item.key)
    return found


def usual_levels(items: list[LocalError], dtype: str) -> dict[str, float]:
    """Stage -> the level it should have: its median over layers if a class explains that, else
    that of the stages of its kind, else of all stages."""
    cap = _cap(dtype)
    by_stage: dict[str, list[float]] = {}
    for item in items:
        if item.compared:
            by_stage.setdefault(item.name, []).append(min(item.level, cap))
    medians = {stage: median(levels) for stage, levels in by_stage.items()}
    stages = {item.name: item.stage for item in items}
    segments = {item.name: item.segment for item in items}
    gaps = {item.name: sibling_gap(item) for item in items}

    def best(stage: str) -> float:
        most = medians[stage] + gaps[stage]
        return max((each for each in by_stage[stage] if each <= most), default=medians[stage])

    sound = {s: m for s, m in medians.items() if class_of(best(s), stages[s], segments[s])}
    overall = median(sound.values()) if sound else NOMINAL["float32"]
    usual = {}
    for stage in stages:
        kin = [m for other, m in sound.items() if stages[other].kind is stages[stage].kind]
        usual[stage] = sound.get(stage, median(kin) if kin else overall)
    return usual


def _cap(dtype: str) -> float:
    """More bits than the trace's own precision are luck: no stage, layer or slice needs them."""
    return NOMINAL[dtype]


def _all_products_lowered(items: list[LocalError]) -> bool:
    """Whether every linear stage in every layer runs below 8 bits: a precision, not a mistake."""
    levels = [item.level for item in items if item.stage.linear]
    stages = {item.name for item in items if item.stage.linear}
    return len(stages) >= 4 and all(LOWEST <= level < BF16 for level in levels)


def _least_drop(elements: int, unsure: float = 0.0) -> float:
    """``_allowed_drop`` of slices that do not differ among themselves."""
    return float(2.0 + 3.0 / np.sqrt(elements) - unsure)


def _allowed_drop(levels: np.ndarray, elements: int, unsure: float = 0.0) -> float:
    """How many bits below the median one slice of sound arithmetic may lie.

    Rounding error is bounded or bell-shaped, so a slice of many elements is within a fraction of
    a bit of the others; one of few elements can be unlucky; and slices that differ for reasons of
    their own (blocks that are quantised together) show in the spread of all of them. Of slices that
    are ``unsure`` so many bits less are allowed, and what estimating adds to their spread is left
    out.
    """
    middle = np.median(levels)
    spread = np.median(middle - levels[levels <= middle]) / 0.6745  # of the lower side, robust
    if unsure:
        spread = np.sqrt(max(spread**2 - DEVIATION**2, 0.0))
    return _least_drop(elements, unsure) + 4.0 * float(spread)


def _low_slices(item: LocalError, cap: float, unsure: float = 0.0) -> dict[str, np.ndarray]:
    """Axis -> mask of the slices far below the rest; empty if there are none anywhere."""
    masks = {}
    for axis, (levels, elements) in item.slices.items():
        # Slices without any error say nothing about what the others may have.
        levels = np.minimum(levels, min(item.level + 1.5, cap))
        low = levels < np.median(levels) - _least_drop(elements, unsure)
        if low.any():  # or no spread need be looked at, which takes longer
            low = levels < np.median(levels) - _allowed_drop(levels, elements, unsure)
        masks[axis] = low
    return masks if any(mask.any() for mask in masks.values()) else {}


def _dead_slices(item: LocalError, expected: float) -> dict[str, np.ndarray]:
    """Axis -> mask of the slices that are zero throughout and far from what they should be; empty
    if there are none. No arithmetic makes zeros of a whole slice; only a position may be too small
    for a format that one outlier elsewhere scales, as long as that format is not known."""
    masks = {}
    for axis, dead in item.dead_slices.items():
        levels = item.slices[axis][0]
        unknown = axis == "position" and item.sums_products and item.level < CLASSES[2][1]
        masks[axis] = dead & (levels < expected - 3.0) & (not unknown)
    return masks if any(mask.any() for mask in masks.values()) else {}


def bad_slices(item: LocalError, expected: float) -> dict[str, np.ndarray]:
    """Axis -> mask of the slices that carry the error of an item that is low as a whole."""
    return {
        axis: levels < expected - _least_drop(elements)
        for axis, (levels, elements) in item.slices.items()
    }


def ranges(mask: np.ndarray, first: int = 0) -> str:
    """ "all", or ranges such as "1-" or "0,4-6"; the mask's first entry is number ``first``."""
    if mask.all() or not mask.any():
        return "all"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    runs = [(first + int(a), first + int(b) - 1) for a, b in edges.reshape(-1, 2)]
    if len(runs) > 6:
        return f"{int(mask.sum())} of {mask.size}"
    last = first + mask.size - 1
    return ",".join(
        f"{a}-" if b == last and b > a else str(a) if a == b else f"{a}-{b}" for a, b in runs
    )


def precision(items: list[LocalError], faulty: set[Key]) -> dict[str, dict[str, Any]]:
    """Stage -> {"class", "bits": [lowest, highest]} over the layers that are not faulty."""
    table = {}
    for name in ALL_NAMES:
        sound = [i for i in items if i.name == name and (i.name, i.layer) not in faulty]
        if not sound:
            continue
        levels = [item.level for item in sound]
        found = class_of(median(levels), sound[0].stage, sound[0].segment) or "lower"
        shown = [round(item.shown_bits, 1) for item in sound]
        table[name] = {"class": found, "bits": [min(shown), max(shown)], "format": None}
    return table
