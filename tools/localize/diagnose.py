"""From suspects to findings: whose fault it is, and what the mistake is."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.replay import Replay
from stages import verdict
from stages.architecture import LOOKUP, TOKENS, Key
from stages.trace import coarsest_dtype
from stages.verdict import LocalError, Suspect
from tools.localize import shapes
from tools.localize.catalogue import CATALOGUE, Mistake
from tools.localize.formats import detect
from tools.localize.report import Explanation, Finding
from tools.localize.stage_replay import StageReplay, confine, focus_of

# An explanation must bring back what the right function would have, within this many bits, and
# must be better than the right function by at least as much.
SLACK = 2.5
CLASS_F16 = 14.0  # more bits than rounding the inputs of a product to 16 bits leaves
VAGUE = 4.0  # an input that lacks that many bits cannot show what a stage made of it
SHOWN = 3  # explanations listed for one fault


def findings(replay: Replay, items: list[LocalError], dtype: str) -> list[Finding]:
    """Every suspect that is not cleared, explained as far as possible, in computation order."""
    suspects = verdict.suspects(items, dtype)
    suspects += list(_matches(replay, items, dtype, {s.key for s in suspects}))
    order = {item.key: place for place, item in enumerate(items)}
    suspects.sort(key=lambda suspect: order[suspect.key])
    overrides, cleared, dump_only = _clear(replay, suspects, items)
    kept = [s for s in suspects if s.key not in cleared]
    hints: dict[str, list[str]] = {}  # stage -> names that explained another layer
    result = []
    for suspect in kept:
        stage = suspect.item.stage
        case = _case(replay, suspect.item, overrides, without=suspect.key)
        finding = Finding(suspect, dump_only=suspect.key in dump_only)
        _explain(case, finding, hints.get(stage, []))
        if finding.diagnosis:
            hints.setdefault(stage, []).append(finding.diagnosis[0].name)
        result.append(finding)
    return result


def _case(
    replay: Replay, item: LocalError, overrides: dict[Key, Array], without: Key
) -> StageReplay:
    others = {key: value for key, value in overrides.items() if key != without}
    return StageReplay(replay, item.row, item.layer, others)


def _clear(
    replay: Replay, suspects: list[Suspect], items: list[LocalError]
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
        case = _case(replay, item, overrides, without=suspect.key)
        if not case.replayable:
            continue
        # as the engine would have handed it on: scores in the hundreds make a rounding matter
        exact = case.exact.astype(replay.dtype).astype(case.exact.dtype)
        certain = case.certain
        for key in readers:
            reader = by_key[key]
            row = replay.tables.stage[key[0]]
            case = StageReplay(replay, row, key[1], overrides | {suspect.key: exact})
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
        vague = _vague_inputs(replay, suspect, items, by_key)
        if vague:
            case = _case(replay, suspect.item, overrides | vague, without=key)
            if not case.replayable:
                continue
            focus = focus_of(case, suspect.masks) if suspect.why == "slice" else None
            if case.scored(case.exact, focus) >= min(suspect.expected, 24.0) - SLACK:
                cleared.add(key)
    return overrides, cleared, dump_only


def _vague_inputs(
    replay: Replay, suspect: Suspect, items: list[LocalError], suspects: dict[Key, Suspect]
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
            case = StageReplay(replay, item.row, key[1])
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

    def consider(rank: int, name: str, says: str, candidate: Array, rotated: bool = False) -> None:
        score = case.scored(candidate, focus, rotated)
        if score >= needed:
            found.append((rank, Explanation(name, score, says)))

    entries = _entries(case, finding.dump_only)
    entries.sort(key=lambda entry: entry.name not in hints)
    for rank, entry in enumerate(entries):
        for detail, candidate in entry.candidates(case):
            says = entry.says.replace("{}", detail)
            consider(rank, entry.name, says, candidate, entry.rotated)
        if found and entry.name in hints:
            break
    if not found and suspect.why != "nan":
        local = focus_of(case, suspect.masks)
        for name, says, candidate in shapes.fits(case, suspect.masks, local):
            consider(len(entries), name, says, candidate)
    if not found and suspect.why != "nan":
        _confined(case, finding, found)
    # half a bit is within the noise: the more specific entry, which stands first, wins
    found.sort(key=lambda pair: (-round(2 * pair[1].bits) / 2, pair[0]))
    seen: dict[str, Explanation] = {}
    for _, explanation in found:
        seen.setdefault(explanation.name, explanation)
    finding.diagnosis = list(seen.values())[:SHOWN]
    if not finding.diagnosis and not finding.shape:
        finding.shape = shapes.describe(case, suspect.masks, focus)


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
    largest = float(jnp.abs(jnp.nan_to_num(case.exact)).max()) if case.replayable else 0.0
    if case.replay.dtype == np.float16 and largest > 65504:
        return f"overflow: {largest:.3g} should be here, and float16 ends at 65504; {places}"
    return f"NaN or infinity is born here: {places}"


def _matches(
    replay: Replay, items: list[LocalError], dtype: str, known: set[Key]
) -> Iterator[Suspect]:
    """Stages whose bits a precision would explain, but a known mistake explains better.

    Only where the bits are lower than the dump's own format allows: error of a format's rounding
    has no better explanation. Only what lies near the right function is tried: a constant factor
    or offset, and the mistakes that are marked so.
    """
    usual = verdict.usual_levels(items, dtype)
    for name, expected in usual.items():
        near = [entry for entry in CATALOGUE if entry.near and name in entry.stages]
        mine = [i for i in items if i.stage == name and i.key not in known]
        if not mine or mine[0].row.kind is LOOKUP or any(item.segment for item in mine):
            continue
        floor = min(verdict.NOMINAL[_format(replay, mine[0])], 23.5)
        if expected > floor - 1.5:
            continue
        for item in mine:
            suspect = Suspect(
                item=item, expected=floor, why="match", masks=verdict.bad_slices(item, floor)
            )
            if _matched(StageReplay(replay, item.row, item.layer), near, floor):
                yield suspect


def _matched(case: StageReplay, entries: list[Mistake], expected: float) -> bool:
    """Whether one of the entries explains the dump, and better than the right function does."""
    needed = max(expected - SLACK, case.scored(case.exact) + SLACK)
    known = (c for entry in entries for _, c in entry.candidates(case))
    uniform = (c for _, _, c in shapes.uniform(case))
    return any(case.scored(candidate) >= needed for candidate in chain(uniform, known))


def formats(
    replay: Replay, items: list[LocalError], dtype: str, found: list[Finding]
) -> dict[str, tuple[str, str]]:
    """Linear stage -> (precision class, format) where a trace of float32 has fewer bits there,
    and rounding the inputs in a known way reproduces the dump."""
    if dtype != "float32":
        return {}
    faulty = {finding.suspect.key for finding in found}
    result = {}
    for item in items:
        lowered = item.level < CLASS_F16 and not item.segment and item.row.linear
        if lowered and item.stage not in result and item.key not in faulty:
            explained = detect(StageReplay(replay, item.row, item.layer))
            if explained:
                result[item.stage] = explained
    return result


def _format(replay: Replay, item: LocalError) -> str:
    """The coarsest format that holds a stage's dump exactly."""
    return coarsest_dtype(replay.trace.read(item.stage, item.layer).ravel()[:65536])
