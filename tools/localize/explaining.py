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
from tools.localize.mistakes import CATALOGUE, Edit, Mistake, shapes
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
    suspect, finite = finding.suspect, finding.suspect.why != "nan"
    if not finite:
        finding.shape = _nonfinite(case, suspect)
    if not case.replayable:
        return
    if finite:
        sound = min(suspect.expected, 24.0) - SLACK
        suspect = finding.suspect = replace(suspect, masks=confine(case, suspect.masks, sound))
    rounding = finding.excess <= 1  # may be: then a name without a number of its own is wanted
    trial = _Trial(case, suspect)
    trial.of_the_stage(_entries(case, finding.dump_only, rounding), hints)
    if finite and not rounding:
        if all(explanation.free for _, explanation in trial.found):
            trial.of_missing_stages()
        if not trial.found:
            trial.of_any_shape()
        if not trial.found and not finding.dump_only:
            trial.of_some_rows()
    finding.diagnosis = trial.best()
    if not finding.diagnosis and not finding.shape:
        finding.shape = shapes.describe(case, suspect.masks, trial.focus)


class _Trial:
    """One suspect against candidates for its dump.

    Attributes:
        focus: where the error is, as a mask of the dump's shape; None is everywhere.
        found: what brings the bits back, each with its rank: the lower, the more specific.
        anew: what brings back as much as is left of a mistake by the rounding of weights that were
            quantised after it.
    """

    def __init__(self, case: StageReplay, suspect: Suspect) -> None:
        self.case, self.suspect = case, suspect
        self.focus = focus_of(case, suspect.masks) if suspect.why == "slice" else None
        self.base = case.scored(case.exact, self.focus)
        self.sound = min(suspect.expected, 24.0) - SLACK
        self.enough = max(ANEW, self.base + SLACK) if _quantised(case) else np.inf
        self.found: list[tuple[int, Explanation]] = []
        self.anew: list[tuple[int, Explanation]] = []

    def of_the_stage(self, entries: list[Mistake], hints: list[str]) -> None:
        """The mistakes of the stage itself, those first that explained it in another layer."""
        entries = sorted(entries, key=lambda entry: entry.name not in hints)
        for rank, entry in enumerate(entries):
            for edit in entry.edits(self.case):
                says = entry.says.replace("{}", edit.detail)
                self._consider(rank, edit, entry.name, says, entry, entry.lenient)
            if self.found and entry.name in hints:
                break

    def of_missing_stages(self) -> None:
        """The mistakes of stages that were not dumped before it, until one fits."""
        count = len(self.found)
        for entry, edit, says in behind.edits(self.case, self.suspect.item.segment):
            self._consider(0, edit, entry.name, says, entry, False)
            if len(self.found) > count:
                break

    def of_any_shape(self) -> None:
        """What any stage can have: a factor, an offset, zeros, a limit, a coarser format."""
        case, masks = self.case, self.suspect.masks
        for fit in shapes.fits(case, masks, focus_of(case, masks)):
            self._of_shape(fit)
        if not self.found and case.stage.kind is ACTIVATION:
            self._of_shape(shapes.smooth_function(case))

    def of_some_rows(self) -> None:
        """Wrong rows of the weight."""
        if explanation := _confined(self.case, self.suspect, self.sound):
            self.found.append((0, explanation))

    def best(self) -> list[Explanation]:
        """The best explanations, one of each name."""
        found = sorted(self.found or self.anew, key=lambda pair: order(pair[1], pair[0]))
        if not self.found:
            found = found[:1]
        seen: dict[str, Explanation] = {}
        for _, explanation in found:
            seen.setdefault(explanation.name, explanation)
        return list(seen.values())[:SHOWN]

    def _of_shape(self, fit: shapes.Fit) -> None:
        edit = Edit("", fit.value, fit.free)
        self._consider(len(CATALOGUE), edit, fit.name, fit.says, None, fit.smooth)

    def _consider(
        self, rank: int, edit: Edit, name: str, says: str, entry: Mistake | None, lenient: bool
    ) -> None:
        score = self.case.scored(edit.value, self.focus, entry is not None and entry.rotated)
        least = max(self.sound, self.base + SLACK)
        if lenient:
            least = smooth_needed(self.base, self.suspect.expected)
        if self.suspect.why == "nan" and _infinite_alike(self.case, edit.value):
            least = self.sound  # what is finite was right before
        explanation = Explanation(name, score, says, edit.detail, edit.free, entry)
        if score >= least:
            self.found.append((rank, explanation))
        elif score >= self.enough:
            explanation = replace(explanation, says=f"{says}, before it was quantised")
            self.anew.append((rank, explanation))


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


def _entries(case: StageReplay, dump_only: bool, rounding: bool) -> list[Mistake]:
    """The mistakes that a stage can have; of an error that rounding may be, those that have no
    number for every row."""
    return [
        entry
        for entry in CATALOGUE
        if case.stage.name in entry.stages
        and entry.dump_only in (None, dump_only)
        and not (rounding and entry.fitted)
    ]


def _confined(case: StageReplay, suspect: Suspect, needed: float) -> Explanation | None:
    """A linear layer whose error lies in a few output channels has that many wrong rows of its
    weight: nothing else of it can confine an error so."""
    mask, positions = suspect.masks.get("channel"), suspect.masks.get("position", np.ones(1, bool))
    if positions.mean() < 0.5:  # a wrong row is wrong at most positions
        return None
    if not case.stage.linear or mask is None or not 0 < mask.sum() <= max(4, mask.size // 50):
        return None
    focus = focus_of(case, {"channel": mask})
    if focus is None:
        return None
    rest = case.scored(jnp.where(focus, case.dump, case.exact))
    if rest < needed:
        return None
    says = f"row {verdict.ranges(mask)} of the weight differs: every other channel is right"
    return Explanation("row_corrupted", rest, says, free=1)


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
