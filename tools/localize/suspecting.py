"""Which stages look wrong: a list of detectors, each of which reads what was measured and judged.

A suspect is not yet a fault: it may suffer from what another stage wrote down (``blaming``), or be
within what rounding can do (``bounds``).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from qwen_jax.replay import Replay
from stages import verdict
from stages.architecture import CACHE, TOKENS, Key
from stages.files import coarsest_dtype
from stages.verdict import LocalError, Suspect
from tools.localize.formats.fit import Fitted
from tools.localize.formats.registry import GRIDS
from tools.localize.measure import settle
from tools.localize.mistakes import CATALOGUE, Mistake, shapes
from tools.localize.stage_case import SLACK, StageReplay, smooth_needed


@dataclass(frozen=True)
class Evidence:
    """What is known of a dump before anything is suspected.

    Attributes:
        items: every stage that could be measured, judged against its formats.
        dtype: the precision of the trace.
        fitted: those formats.
    """

    replay: Replay
    items: list[LocalError]
    dtype: str
    fitted: Fitted


Detector = Callable[[Evidence, set[Key]], Iterator[Suspect]]


def suspects(evidence: Evidence) -> list[Suspect]:
    """What any detector finds, in computation order; each stage of a layer once."""
    found: list[Suspect] = []
    for detect in DETECTORS:
        found += list(detect(evidence, {suspect.key for suspect in found}))
    order = {item.key: place for place, item in enumerate(evidence.items)}
    return sorted(found, key=lambda suspect: order[suspect.key])


def low_bits(evidence: Evidence, known: set[Key]) -> Iterator[Suspect]:
    """Stages, layers and slices that have fewer bits than their precision leaves."""
    yield from map(_all_rows, verdict.suspects(evidence.items, evidence.dtype))


def _all_rows(suspect: Suspect) -> Suspect:
    """Of a cache, rows that hold nothing are seldom the only wrong ones."""
    if suspect.why != "zero" or suspect.item.stage.kind is not CACHE:
        return suspect
    bad = verdict.bad_slices(suspect.item, suspect.expected)
    masks = {axis: mask | suspect.masks.get(axis, False) for axis, mask in bad.items()}
    return replace(suspect, masks=masks)


def near_matches(evidence: Evidence, known: set[Key]) -> Iterator[Suspect]:
    """Stages whose bits a precision would explain, but a known mistake explains better.

    Only where the bits are lower than the dump's own format allows: error of a format's rounding
    has no better explanation. Only what lies near the right function is tried: a constant factor
    or offset, and the mistakes that are marked so; under the formats of the engine.
    """
    replay, items, fitted = evidence.replay, evidence.items, evidence.fitted
    dtype = evidence.dtype
    usual = verdict.usual_levels(items, dtype)
    for name, expected in usual.items():
        near = [entry for entry in CATALOGUE if entry.near and name in entry.stages]
        mine = [i for i in items if i.name == name and i.key not in known]
        if not mine:
            continue
        floor = min(verdict.NOMINAL[_format(replay, mine[0])], 23.5)
        if expected > floor - 1.5:
            continue
        for item in mine:
            case = StageReplay(replay, item.stage, item.layer, formats=fitted.formats)
            if not case.replayable:
                continue
            cases = [case, *map(case.under, fitted.hints(item, replay.config))]
            if any(_matched(each, near, floor) for each in cases):
                item = settle.exactly(replay, item, dtype)
                masks = verdict.bad_slices(item, floor)
                yield Suspect(item=item, expected=floor, why="match", masks=masks)


def _matched(case: StageReplay, entries: list[Mistake], expected: float) -> bool:
    """Whether one of the entries explains the dump, and better than the right function does."""
    needed = max(expected - SLACK, case.scored(case.exact) + SLACK)
    known = (edit.value for entry in entries for edit in entry.edits(case))
    if any(case.scored(candidate) >= needed for candidate in known):
        return True
    smooth = smooth_needed(case.scored(case.exact), expected)
    return any(case.scored(fit.value) >= smooth for fit in shapes.uniform(case))


def off_grid(evidence: Evidence, known: set[Key]) -> Iterator[Suspect]:
    """Stages that have the bits of a 16-bit format, but are not in one and read nothing that is.

    Of sums of products this is not asked: their operands and sums may be in formats that are not
    known here. What is left is one rounding from exact, whichever format it is in.
    """
    replay, items, fitted = evidence.replay, evidence.items, evidence.fitted
    dtype = evidence.dtype
    if dtype != "float32":
        return
    for item in items:
        coarse = item.level < verdict.CLASSES[2][2] and not item.sums_products
        if not coarse or item.segment or item.key in known or item.key in fitted.by_item:
            continue
        count = replay.config.num_hidden_layers
        keys = [
            replay.arch.stored_as(n, item.layer, count) for n in item.stage.inputs if n != TOKENS
        ]
        if not any(_grid(replay, key) for key in [item.key, *keys] if key in replay.trace.entries):
            expected = verdict.NOMINAL[dtype]
            masks = verdict.bad_slices(item, expected)
            yield Suspect(item=item, expected=expected, why="grid", masks=masks)


def _grid(replay: Replay, key: Key) -> bool:
    return coarsest_dtype(replay.trace.read(*key).ravel()[:65536]) in GRIDS


BELOW_ALIKE = 1.0  # linear stages of one format are within 1.4 bits of each other: 6.5 to 7.9


def below_alike(evidence: Evidence, known: set[Key]) -> Iterator[Suspect]:
    """Linear stages that no format explains, while one does all others: they multiply by other
    weights than they were given, if they are coarser or no rounding of their inputs can be it."""
    replay, items, fitted = evidence.replay, evidence.items, evidence.fitted
    dtype = evidence.dtype
    linear = [i for i in items if i.stage.linear and not i.segment and i.key not in known]
    alike = [i for i in linear if i.key in fitted.by_item]
    if dtype != "float32" or len({item.name for item in alike}) < 3:
        return
    lowest, expected = min(i.shown_bits for i in alike), min(i.level for i in alike)
    for item in linear:
        if item.key in fitted.by_item or item.level >= verdict.CLASSES[2][1]:
            continue
        case = StageReplay(replay, item.stage, item.layer, formats=fitted.formats)
        if item.bits < lowest - BELOW_ALIKE or (case.replayable and not _of_the_inputs(case)):
            masks = verdict.bad_slices(item, expected)
            yield Suspect(item=item, expected=expected, why="kin", masks=masks)


def _of_the_inputs(case: StageReplay) -> bool:
    """Whether a linear stage's error may come from its inputs alone: it is then some change of the
    inputs times the weight, and lies in the few directions that the weight has. So of a weight with
    clearly more channels than inputs; of others nothing can be said."""
    width = case.inputs[0].shape[-1]
    small = case.sampled(2 * width)
    weight = np.concatenate([np.asarray(w, np.float64) for w in small.weights.values()])
    if len(weight) < 1.5 * width or coarsest_dtype(np.asarray(case.dump, np.float32)) in GRIDS:
        return True
    error = np.asarray(small.dump - small.exact)[0].T
    change = np.linalg.lstsq(weight, error, rcond=None)[0]
    rest, whole = (np.square(e).sum() for e in (error - weight @ change, error))
    # float32 itself leaves a millionth and less of it
    return bool(rest < 1e-3 * (1 - width / len(weight)) * whole)


def _format(replay: Replay, item: LocalError) -> str:
    """The coarsest format that holds a stage's dump exactly."""
    return coarsest_dtype(replay.trace.read(item.name, item.layer).ravel()[:65536])


DETECTORS: tuple[Detector, ...] = (low_bits, near_matches, off_grid, below_alike)
