"""From suspects to findings: whose fault it is, and what the mistake is."""

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.replay import Replay
from stages import headroom, verdict
from stages.architecture import ACTIVATION, CACHE, TOKENS, WEIGHTED_SUM, Key
from stages.trace import coarsest_dtype
from stages.verdict import LocalError, Suspect
from tools.localize.decode_steps import when
from tools.localize.formats.fit import Fitted
from tools.localize.formats.registry import GRIDS, Format
from tools.localize.grouping import Explanation, Finding
from tools.localize.measure import settle
from tools.localize.mistakes import shapes
from tools.localize.mistakes.catalogue import CATALOGUE, Mistake
from tools.localize.stage_case import StageReplay, confine, focus_of

# An explanation must bring back what the right function would have, within this many bits, and
# must be better than the right function by at least as much.
SLACK = 2.5
VAGUE = 4.0  # an input that lacks that many bits cannot show what a stage made of it
SMOOTH_SHAPES = ("constant_factor", "additive_constant", "row_scaled", "function_approximate")
# What need not bring back everything: those, a quantiser, whose ties fall either way, and what
# goes through a cache, whose format is not known while attention is wrong.
LENIENT = (*SMOOTH_SHAPES, "weight_requantised", "head_size")
# What has a number for every row: it follows the rounding too, and would win by that.
FITTED = ("norm_not_upcast",)
SHOWN = 3  # explanations listed for one fault


def findings(replay: Replay, items: list[LocalError], dtype: str, fitted: Fitted) -> list[Finding]:
    """Every suspect that is not cleared, explained as far as possible, in computation order."""
    suspects = [_all_rows(suspect) for suspect in verdict.suspects(items, dtype)]
    suspects += list(_matches(replay, items, dtype, {s.key for s in suspects}, fitted))
    suspects += list(_off_grid(replay, items, dtype, {s.key for s in suspects}, fitted))
    suspects += list(_below_kin(replay, items, dtype, {s.key for s in suspects}, fitted))
    order = {item.key: place for place, item in enumerate(items)}
    suspects.sort(key=lambda suspect: order[suspect.key])
    overrides, cleared, dump_only = _clear(replay, suspects, items, fitted.formats)
    kept = [s for s in suspects if s.key not in cleared]
    hints: dict[str, list[str]] = {}  # stage -> names that explained another layer
    result = []
    for suspect in kept:
        stage = suspect.item.stage
        case = _case(replay, suspect.item, overrides, suspect.key, fitted.formats)
        finding = Finding(suspect, suspect.key in dump_only, when=when(replay.trace, suspect))
        _explain_calls(case, finding, hints.get(stage, []))
        if not finding.diagnosis:
            _explain(case, finding, hints.get(stage, []))
        for formats in fitted.hints(suspect.item, replay.config):
            if not finding.diagnosis and case.replayable:
                _explain(case.under(formats), finding, hints.get(stage, []))
        if not finding.diagnosis and suspect.key in fitted.lone:
            finding.diagnosis = [_lone_format(case, fitted.lone[suspect.key])]
        if finding.diagnosis:
            hints.setdefault(stage, []).append(finding.diagnosis[0].name)
        result.append(finding)
    return result


def _all_rows(suspect: Suspect) -> Suspect:
    """Of a cache, rows that hold nothing are seldom the only wrong ones."""
    if suspect.why != "zero" or suspect.item.row.kind is not CACHE:
        return suspect
    bad = verdict.bad_slices(suspect.item, suspect.expected)
    masks = {axis: mask | suspect.masks.get(axis, False) for axis, mask in bad.items()}
    return replace(suspect, masks=masks)


def _explain_calls(case: StageReplay, finding: Finding, hints: list[str]) -> None:
    """Where the first calls of an engine are right: the same of the rows from the first wrong call
    on. Whatever mistake there is may be made in the decode alone."""
    if finding.when is None or not finding.when.row or not case.replayable:
        return
    rows = len(case.replay.trace.tokens) - finding.when.row
    masks = dict(finding.suspect.masks)
    masks["position"] = masks["position"][-rows:]
    later = Finding(replace(finding.suspect, masks=masks), finding.dump_only)
    _explain(case.last(rows), later, hints)
    finding.diagnosis = later.diagnosis


def _lone_format(case: StageReplay, formats: list[Format]) -> Explanation:
    """A format that this layer has and no other."""
    says = f"{', '.join(f.says for f in formats)}, in this layer alone"
    case = case.in_format(formats[0]) if len(formats) == 1 else case
    return Explanation("format_of_one_layer", case.scored(case.exact), says)


def _case(
    replay: Replay,
    item: LocalError,
    overrides: dict[Key, Array],
    without: Key,
    formats: dict[Key, Format],
) -> StageReplay:
    others = {key: value for key, value in overrides.items() if key != without}
    return StageReplay(replay, item.row, item.layer, others, formats)


def _clear(
    replay: Replay, suspects: list[Suspect], items: list[LocalError], formats: dict[Key, Format]
) -> tuple[dict[Key, Array], set[Key], set[Key]]:
    """Clear the stages that only suffer from the wrong *dump* of an earlier one.

    If a suspect's consumer is a suspect too, and is right once the suspect's dump is replaced by
    its exact value, then the engine went on from the right value: the consumer is cleared, and
    the mistake is one of the dump. The same where the earlier dump is merely too imprecise to
    replay from, though no suspect.
    """
    by_key = {suspect.key: suspect for suspect in suspects}
    overrides: dict[Key, Array] = {}
    cleared: set[Key] = set()
    dump_only: set[Key] = set()
    for suspect in suspects:
        if suspect.key in cleared or suspect.why == "nan":
            continue
        item = suspect.item
        readers = [
            key
            for key in replay.tables.readers(*item.key, replay.config.num_hidden_layers)
            if key in by_key and key not in cleared
        ]
        if not readers:
            continue
        case = _case(replay, item, overrides, suspect.key, formats)
        if not case.replayable:
            continue
        # as the engine would have handed it on: scores in the hundreds make a rounding matter
        exact = case.exact.astype(replay.dtype).astype(case.exact.dtype)
        certain = case.certain
        for key in readers:
            reader = by_key[key]
            row = replay.tables.stage[key[0]]
            case = StageReplay(replay, row, key[1], overrides | {suspect.key: exact}, formats)
            if not case.replayable:
                continue
            focus = focus_of(case, reader.masks) if reader.why == "slice" else None
            if case.scored(case.exact, focus) >= min(reader.expected, 24.0, certain) - SLACK:
                cleared.add(key)
                dump_only.add(suspect.key)
                overrides[suspect.key] = exact
    for suspect in suspects:
        key = suspect.key
        if key in cleared or suspect.why == "nan":
            continue
        vague = _vague_inputs(replay, suspect, items, by_key, formats)
        if vague:
            case = _case(replay, suspect.item, overrides | vague, key, formats)
            if not case.replayable:
                continue
            focus = focus_of(case, suspect.masks) if suspect.why == "slice" else None
            if case.scored(case.exact, focus) >= min(suspect.expected, 24.0) - SLACK:
                cleared.add(key)
    return overrides, cleared, dump_only


def _vague_inputs(
    replay: Replay,
    suspect: Suspect,
    items: list[LocalError],
    suspects: dict[Key, Suspect],
    formats: dict[Key, Format],
) -> dict[Key, Array]:
    """The exact values of a suspect's inputs whose dumps have far fewer bits than the trace's
    precision, though another one explains them: the engine may have gone on from better ones."""
    held = {item.key: item for item in items}
    vague = {}
    for name in suspect.item.row.inputs:
        if name == TOKENS:
            continue
        key = replay.tables.stored_as(name, suspect.key[1], replay.config.num_hidden_layers)
        item = held.get(key)
        if item and key not in suspects and item.level < verdict.NOMINAL[replay.dtype.name] - VAGUE:
            case = StageReplay(replay, item.row, key[1], formats=formats)
            if case.replayable:
                vague[key] = case.exact
    return vague


def _explain(case: StageReplay, finding: Finding, hints: list[str]) -> None:
    """Try the catalogue and the general shapes; fill in ``diagnosis`` and ``shape``."""
    suspect = finding.suspect
    if suspect.why == "nan":
        finding.shape = _nonfinite(case, suspect)
    if not case.replayable:
        return
    sound = min(suspect.expected, 24.0) - SLACK
    if suspect.why != "nan":
        suspect = finding.suspect = replace(suspect, masks=confine(case, suspect.masks, sound))
    focus = focus_of(case, suspect.masks) if suspect.why == "slice" else None
    base = case.scored(case.exact, focus)
    needed = max(sound, base + SLACK)
    found: list[tuple[int, Explanation]] = []
    # a mistake that was made before the weights were quantised comes out with their rounding
    near: list[tuple[int, Explanation]] = []
    enough = max(ANEW, base + SLACK) if _quantised(case) else np.inf

    def consider(
        rank: int, name: str, says: str, candidate: Array, rotated: bool = False, detail: str = ""
    ) -> None:
        score = case.scored(candidate, focus, rotated)
        least = _smooth_needed(base, suspect.expected) if name in LENIENT else needed
        if score >= least:
            found.append((rank, Explanation(name, score, says, detail)))
        elif score >= enough:
            says += ", before it was quantised"
            near.append((rank, Explanation(name, score, says, detail)))

    entries = _entries(case, finding.dump_only)
    entries.sort(key=lambda entry: entry.name not in hints)
    for rank, entry in enumerate(entries):
        for detail, candidate in entry.candidates(case):
            says = entry.says.replace("{}", detail)
            consider(rank, entry.name, says, candidate, entry.rotated, detail)
        if found and entry.name in hints:
            break
    if not found and suspect.why != "nan":
        local = focus_of(case, suspect.masks)
        for name, says, candidate in shapes.fits(case, suspect.masks, local):
            consider(len(entries), name, says, candidate)
    if not found and suspect.why != "nan" and case.stage.kind is ACTIVATION:
        consider(len(entries), *shapes.smooth_function(case))
    if not found and suspect.why != "nan":
        _confined(case, finding, found)
    if not found and near:
        found = [min(near, key=lambda pair: (-round(2 * pair[1].bits) / 2, pair[0]))]
    # half a bit is within the noise: the more specific entry, which stands first, wins
    found.sort(key=lambda pair: (pair[1].name in FITTED, -round(2 * pair[1].bits) / 2, pair[0]))
    seen: dict[str, Explanation] = {}
    for _, explanation in found:
        seen.setdefault(explanation.name, explanation)
    finding.diagnosis = list(seen.values())[:SHOWN]
    if not finding.diagnosis and not finding.shape:
        finding.shape = shapes.describe(case, suspect.masks, focus)


# Bits that an explanation brings back whatever the type of a weight that was quantised after the
# mistake: Q4_K's rounding leaves 4 to 5 of its own.
ANEW = 3.5


def _quantised(case: StageReplay) -> bool:
    """Whether the stage multiplies by, or looks up, rows of a quantised type."""
    types = getattr(case.model, "types", {})  # of a GGUF
    rows = [case.tables.parameter[name] for name in case.stage.parameters]
    names = [case.config.tensor_names(r.scope, case.layer)[r.name] for r in rows]
    return any(types.get(name, "F32") not in ("F32", "F16", "BF16") for name in names)


def _entries(case: StageReplay, dump_only: bool) -> list[Mistake]:
    return [
        entry
        for entry in CATALOGUE
        if case.stage.name in entry.stages and entry.dump_only in (None, dump_only)
    ]


def _confined(case: StageReplay, finding: Finding, found: list[tuple[int, Explanation]]) -> None:
    """A linear layer whose error lies in a few output channels has that many wrong rows of its
    weight: nothing else of it can confine an error so."""
    masks = finding.suspect.masks
    mask, positions = masks.get("channel"), masks.get("position", np.ones(1, bool))
    if finding.dump_only or positions.mean() < 0.5:  # a wrong row is wrong at most positions
        return
    if not case.stage.linear or mask is None or not 0 < mask.sum() <= max(4, mask.size // 50):
        return
    focus = focus_of(case, {"channel": mask})
    if focus is None:
        return
    rest = case.scored(jnp.where(focus, case.dump, case.exact))
    if rest >= min(finding.suspect.expected, 24.0) - SLACK:
        rows = verdict.ranges(mask)
        says = f"row {rows} of the weight differs: every other channel is right"
        found.append((0, Explanation("row_corrupted", rest, says)))


def _nonfinite(case: StageReplay, suspect: Suspect) -> str:
    places = ", ".join(f"{axis} {where}" for axis, where in suspect.where.items())
    if case.replayable:
        exact = np.asarray(case.exact)
        if case.stage.kind.masked:
            exact = np.where(np.asarray(case.pos.mask)[:, None], exact, 0)
        why = headroom.cause(case.stage, case.replay.trace.config, exact)
        if why:
            return f"overflow: {why}; {places}"
        if case.stage.kind is WEIGHTED_SUM and case.has_calls:
            # a weight of 0 takes nothing but a number away
            places += "; all it may see is finite: 0 times what lies in slots never written"
    return f"NaN or infinity is born here: {places}"


def _matches(
    replay: Replay, items: list[LocalError], dtype: str, known: set[Key], fitted: Fitted
) -> Iterator[Suspect]:
    """Stages whose bits a precision would explain, but a known mistake explains better.

    Only where the bits are lower than the dump's own format allows: error of a format's rounding
    has no better explanation. Only what lies near the right function is tried: a constant factor
    or offset, and the mistakes that are marked so; under the formats of the engine.
    """
    usual = verdict.usual_levels(items, dtype)
    for name, expected in usual.items():
        near = [entry for entry in CATALOGUE if entry.near and name in entry.stages]
        mine = [i for i in items if i.stage == name and i.key not in known]
        if not mine:
            continue
        floor = min(verdict.NOMINAL[_format(replay, mine[0])], 23.5)
        if expected > floor - 1.5:
            continue
        for item in mine:
            case = StageReplay(replay, item.row, item.layer, formats=fitted.formats)
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
    known = (c for entry in entries for _, c in entry.candidates(case))
    if any(case.scored(candidate) >= needed for candidate in known):
        return True
    smooth = _smooth_needed(case.scored(case.exact), expected)
    return any(case.scored(candidate) >= smooth for _, _, candidate in shapes.uniform(case))


# A factor or an offset need not bring back everything: a factor that was in the weights when they
# were quantised comes out with their rounding, a float16 scale's at least.
SMOOTH = 10.0


def _smooth_needed(base: float, expected: float) -> float:
    """The bits that a factor or an offset has to bring back."""
    return max(min(expected - SLACK, SMOOTH), base + SLACK)


def _off_grid(
    replay: Replay, items: list[LocalError], dtype: str, known: set[Key], fitted: Fitted
) -> Iterator[Suspect]:
    """Stages that have the bits of a 16-bit format, but are not in one and read nothing that is.

    Of sums of products this is not asked: their operands and sums may be in formats that are not
    known here. What is left is one rounding from exact, whichever format it is in.
    """
    if dtype != "float32":
        return
    for item in items:
        coarse = item.level < verdict.CLASSES[2][2] and not item.sums_products
        if not coarse or item.segment or item.key in known or item.key in fitted.by_item:
            continue
        count = replay.config.num_hidden_layers
        keys = [
            replay.tables.stored_as(n, item.layer, count) for n in item.row.inputs if n != TOKENS
        ]
        if not any(_grid(replay, key) for key in [item.key, *keys] if key in replay.trace.entries):
            expected = verdict.NOMINAL[dtype]
            masks = verdict.bad_slices(item, expected)
            yield Suspect(item=item, expected=expected, why="grid", masks=masks)


def _grid(replay: Replay, key: Key) -> bool:
    return coarsest_dtype(replay.trace.read(*key).ravel()[:65536]) in GRIDS


BELOW_KIN = 1.0  # linear stages of one format are within 1.4 bits of each other: 6.5 to 7.9


def _below_kin(
    replay: Replay, items: list[LocalError], dtype: str, known: set[Key], fitted: Fitted
) -> Iterator[Suspect]:
    """Linear stages that no format explains, while one does all others: they multiply by other
    weights than they were given, if they are coarser or no rounding of their inputs can be it."""
    linear = [i for i in items if i.row.linear and not i.segment and i.key not in known]
    kin = [i for i in linear if i.key in fitted.by_item]
    if dtype != "float32" or len({item.stage for item in kin}) < 3:
        return
    lowest, expected = min(i.shown_bits for i in kin), min(i.level for i in kin)
    for item in linear:
        if item.key in fitted.by_item or item.level >= verdict.CLASSES[2][1]:
            continue
        case = StageReplay(replay, item.row, item.layer, formats=fitted.formats)
        if item.bits < lowest - BELOW_KIN or (case.replayable and not _of_the_inputs(case)):
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
    return coarsest_dtype(replay.trace.read(item.stage, item.layer).ravel()[:65536])
