"""What the mistake is that one suspect shows."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from stages import headroom, verdict
from stages.architecture import ACTIVATION, WEIGHTED_SUM
from stages.verdict import Suspect
from tools.localize import behind, bounds
from tools.localize.blaming import Blame
from tools.localize.decode_steps import when
from tools.localize.formats.registry import Format
from tools.localize.grouping import Explanation, Finding
from tools.localize.mistakes import CATALOGUE, Mistake, shapes
from tools.localize.stage_case import SLACK, StageReplay, confine, focus_of, smooth_needed
from tools.localize.suspecting import Evidence

SHOWN = 3  # explanations listed for one fault


def explain(evidence: Evidence, blame: Blame) -> list[Finding]:
    """Every suspect explained as far as possible, in computation order."""
    hints: dict[str, list[str]] = {}  # stage -> names that explained another layer
    result = []
    for suspect in blame.suspects:
        stage = suspect.item.name
        finding = one(evidence, blame, suspect, hints.get(stage, []))
        if finding.diagnosis:
            hints.setdefault(stage, []).append(finding.diagnosis[0].name)
        result.append(finding)
    return result


def one(evidence: Evidence, blame: Blame, suspect: Suspect, hints: list[str]) -> Finding:
    """One suspect explained.

    ``hints``: names that explained the same stage of other layers.
    """
    replay, fitted = evidence.replay, evidence.fitted
    case = blame.case(evidence, suspect.item)
    finding = Finding(suspect, suspect.key in blame.dump_only, when=when(replay.trace, suspect))
    finding.excess = _least_excess(case, suspect)
    _explain_calls(case, finding, hints)
    if not finding.diagnosis:
        _explain(case, finding, hints)
    if finding.excess > 1:
        for formats in fitted.hints(suspect.item, replay.config):
            if not finding.diagnosis and case.replayable:
                _explain(case.under(formats), finding, hints)
    if not finding.diagnosis and suspect.key in fitted.lone:
        finding.diagnosis = [_lone_format(case, fitted.lone[suspect.key])]
    elif case.replayable and finding.excess < np.inf:
        # what is left once the mistake is made good shows the arithmetic; or the other layers do
        level = finding.diagnosis[0].bits if finding.diagnosis else suspect.expected
        finding.excess = _excess(case, finding.suspect, bounds.unit_of(suspect.item, level))
    return finding


def _least_excess(case: StageReplay, suspect: Suspect) -> float:
    """By what factor a suspect's error exceeds what the trace's own precision can do. What is NaN,
    or zero throughout, no rounding makes."""
    if suspect.why in ("nan", "zero") or not case.replayable:
        return np.inf
    level = verdict.NOMINAL[case.replay.dtype.name]
    return _excess(case, suspect, bounds.unit_of(suspect.item, level))


def _excess(case: StageReplay, suspect: Suspect, unit: float) -> float:
    focus = focus_of(case, suspect.masks) if suspect.why == "slice" else None
    return bounds.excess(case, suspect.item, focus, unit)


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
        rank: int, value: Array, name: str, says: str, entry: Mistake | None, lenient: bool,
        detail: str = "", free: int = 0,
    ) -> None:  # fmt: skip
        score = case.scored(value, focus, entry is not None and entry.rotated)
        least = smooth_needed(base, suspect.expected) if lenient else needed
        if suspect.why == "nan" and _infinite_alike(case, value):
            least = sound  # what is finite was right before
        if score >= least:
            found.append((rank, Explanation(name, score, says, detail, free, entry)))
        elif score >= enough:
            says += ", before it was quantised"
            near.append((rank, Explanation(name, score, says, detail, free, entry)))

    entries = _entries(case, finding.dump_only)
    rounding = finding.excess <= 1  # may be: then a name without a number of its own is wanted
    if rounding:
        entries = [entry for entry in entries if entry.near and not entry.fitted]
    entries.sort(key=lambda entry: entry.name not in hints)
    for rank, entry in enumerate(entries):
        for detail, value, free in entry.edits(case):
            says = entry.says.replace("{}", detail)
            consider(rank, value, entry.name, says, entry, entry.lenient, detail, free)
        if found and entry.name in hints:
            break
    exact = any(explanation.free == 0 for _, explanation in found)
    if not exact and not rounding and suspect.why != "nan":
        for entry, edit, says in behind.edits(case, suspect.item.segment):
            count = len(found)
            consider(0, edit.value, entry.name, says, entry, False, edit.detail, edit.free)
            if len(found) > count:
                break
    if not found and suspect.why != "nan" and not rounding:
        local = focus_of(case, suspect.masks)
        for fit in shapes.fits(case, suspect.masks, local):
            consider(len(entries), fit.value, fit.name, fit.says, None, fit.smooth, "", fit.free)
    if not (found or rounding) and suspect.why != "nan" and case.stage.kind is ACTIVATION:
        fit = shapes.smooth_function(case)
        consider(len(entries), fit.value, fit.name, fit.says, None, fit.smooth, "", fit.free)
    if not (found or rounding) and suspect.why != "nan":
        _confined(case, finding, found)
    if not found and near:
        found = [min(near, key=lambda pair: order(pair[1], pair[0]))]
    found.sort(key=lambda pair: order(pair[1], pair[0]))
    seen: dict[str, Explanation] = {}
    for _, explanation in found:
        seen.setdefault(explanation.name, explanation)
    finding.diagnosis = list(seen.values())[:SHOWN]
    if not finding.diagnosis and not finding.shape:
        finding.shape = shapes.describe(case, suspect.masks, focus)


def _infinite_alike(case: StageReplay, value: Array) -> bool:
    """Whether a candidate has the dump's infinities, and no others."""
    found, dump = np.asarray(value), np.asarray(case.dump)
    infinite = np.isinf(dump)
    same = np.array_equal(found[infinite], dump[infinite])
    return bool(infinite.any()) and same and bool(np.isfinite(found[~infinite]).all())


A_NUMBER = 2.0  # bits that a number which was fitted to the dump is worth: it follows the rounding


def order(explanation: Explanation, rank: int) -> tuple[bool, float, int, int]:
    """What orders explanations: each bit that is brought back saves one for every element, so that
    the best wins; but half a bit is within the noise, and then the shortest does: the one with
    the fewest numbers of its own, and of those the more specific, which stands first."""
    fitted = explanation.known is not None and explanation.known.fitted
    bits = explanation.bits - A_NUMBER * explanation.free
    return fitted, -round(2 * bits) / 2, explanation.free, rank


# Bits that an explanation brings back whatever the type of a weight that was quantised after the
# mistake: Q4_K's rounding leaves 4 to 5 of its own.
ANEW = 3.5


def _quantised(case: StageReplay) -> bool:
    """Whether the stage multiplies by, or looks up, rows of a quantised type."""
    types = getattr(case.model, "types", {})  # of a GGUF
    rows = [case.arch.parameter[name] for name in case.stage.parameters]
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
        found.append((0, Explanation("row_corrupted", rest, says, free=1)))


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
