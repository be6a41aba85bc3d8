"""Findings put together by cause: one mistake is one fault, however many stages show it.

An engine that exchanged two layers is wrong in eight stages of both; one that has an eps of its own
is so wherever the eps is seen. What is said of a fault is then said of all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stages import verdict
from stages.architecture import ADD, CACHE, NORM, ROTATION, Key
from stages.architectures import any_stage
from stages.verdict import LocalError, Suspect
from tools.localize.decode_steps import When

if TYPE_CHECKING:  # importing results loads no JAX
    from tools.localize.mistakes.registry import Mistake


@dataclass
class Explanation:
    """One explanation that restores a suspect's bits.

    Attributes:
        detail: what its mistake found: a layer, an order, a constant.
        free: how many numbers were fitted to the dump for it.
        known: the mistake of the catalogue that it is.
    """

    name: str
    bits: float
    says: str
    detail: str = ""
    free: int = 0
    known: "Mistake | None" = None


@dataclass
class Finding:
    """A suspect with what explains it, and in which calls of the engine it is one.

    Attributes:
        excess: by what factor the error exceeds what arithmetic can do, see ``bounds``; infinite
            for what no rounding makes.
    """

    suspect: Suspect
    dump_only: bool = False
    when: When | None = None
    diagnosis: list[Explanation] = field(default_factory=list)
    shape: str = ""
    excess: float = float("inf")

    @property
    def odd(self) -> bool:
        """Whether arithmetic alone may be all it is: no mistake without a number of its own
        explains it, and rounding can do as much."""
        return self.excess <= 1 and not any(e.free == 0 for e in self.diagnosis)


@dataclass
class Fault:
    """Findings of one cause, as reported: one entry, whatever the number of layers.

    Attributes:
        layer, stage: where it was found; the first of the stages.
        findings: of that stage first.
        also: the other stages.
        diagnosis: what all of it is, where that says more than what the first stage shows.
    """

    layer: int | str | None
    stage: str
    findings: list[Finding]
    also: list[str] = field(default_factory=list)
    joined: Explanation | None = None

    @property
    def first(self) -> Finding:
        return self.findings[0]

    @property
    def diagnosis(self) -> list[Explanation]:
        """What explains it, the best first."""
        return [self.joined] if self.joined else self.first.diagnosis

    @property
    def name(self) -> str:
        """The mistake's name, or else why it is suspected."""
        return self.diagnosis[0].name if self.diagnosis else self.first.suspect.why

    @property
    def when(self) -> When | None:
        """In which calls of the engine it is, where it shows first."""
        found = [f.when for f in self.findings if f.when]
        whole = len(found) < len(self.findings)
        return None if whole else min(found, key=lambda when: when.step)

    def to_json(self) -> dict[str, Any]:
        """An element of ``faults``."""
        here = [f for f in self.findings if f.suspect.item.name == self.stage]
        suspect = min(here, key=lambda f: f.suspect.found).suspect
        entry: dict[str, Any] = {
            "layer": self.layer,
            "stage": self.stage,
            "bits": None if suspect.why == "nan" else round(suspect.found, 1),
            "expected_bits": round(suspect.expected, 1),
            "where": suspect.where,
            "diagnosis": [
                {"name": e.name, "bits": round(e.bits, 1), "says": e.says} for e in self.diagnosis
            ],
        }
        if self.when:
            entry |= self.when.to_json()
        worst = max(f.excess for f in self.findings)
        if worst < float("inf"):
            entry["exceeds_bound"] = float(f"{worst:.2g}")
        if suspect.item.segment:
            entry["segment"] = [*dict.fromkeys(s for s, _ in suspect.item.segment), self.stage]
        if suspect.why == "nan":
            entry["nonfinite"] = suspect.item.born
        if self.first.dump_only:
            entry["dump_only"] = True
        places = {f.suspect.item.layer: f.suspect.where.get("positions", "all") for f in here}
        if len({*places.values()}) > 1:
            entry["positions_by_layer"] = {str(layer): where for layer, where in places.items()}
        if self.also:
            entry["also"] = self.also
        if self.first.shape:
            entry["shape"] = self.first.shape
        return entry


def faults(findings: list[Finding], items: Sequence[LocalError]) -> list[Fault]:
    """Findings put together by cause, first cause first."""
    measured: dict[str, set[int | None]] = {}
    order: dict[Key, int] = {}
    for item in items:
        measured.setdefault(item.name, set()).add(item.layer)
        order[item.key] = len(order)
    for finding in findings:  # of a cache that is no stage of the trace
        every = set().union(*measured.values()) - {None}
        measured.setdefault(finding.suspect.item.name, every).add(finding.suspect.item.layer)
        order.setdefault(finding.suspect.key, len(order))
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        name = finding.diagnosis[0].name if finding.diagnosis else finding.suspect.why
        groups.setdefault((finding.suspect.item.name, name, _told(finding)), []).append(finding)
    found = [_fault(stage, group, measured) for (stage, *_), group in groups.items()]
    found = _other_layers(found, measured, order)
    result: list[Fault] = []
    for fault in sorted(found, key=lambda fault: order[fault.first.suspect.key]):
        twin = next((other for other in result if _same_cause(other, fault)), None)
        if twin:
            result[result.index(twin)] = _together([twin, fault], measured)
        else:
            result.append(fault)
    return [_worded(fault) for fault in result]


def _fault(stage: str, found: list[Finding], measured: dict[str, set[int | None]]) -> Fault:
    return Fault(_layers([f.suspect.item.layer for f in found], measured[stage]), stage, found)


def _together(
    found: Sequence[Fault],
    measured: dict[str, set[int | None]],
    joined: Explanation | None = None,
) -> Fault:
    """Faults of several stages as one, named after the first."""
    first = found[0]
    stages = dict.fromkeys(s for fault in found for s in (fault.stage, *fault.also))
    findings = [finding for fault in found for finding in fault.findings]
    here = [s for s in stages if measured[s] != {None}] or [first.stage]
    layers = {f.suspect.item.layer for f in findings if f.suspect.item.name in here}
    layer = _layers(list(layers), set().union(*(measured[s] for s in here)))
    others = [s for s in stages if s != first.stage]
    return Fault(layer, first.stage, findings, others, joined or first.joined)


def _layers(found: list[int | None], measured: set[int | None]) -> int | str | None:
    if len(found) == 1:
        return "all" if measured == {found[0]} and len(measured) > 1 else found[0]
    if set(found) == measured:
        return "all"
    mask = np.zeros(max(n for n in measured if n is not None) + 2, bool)
    mask[[n for n in found if n is not None]] = True
    return verdict.ranges(mask)


# --- what is one cause

CHANGED = "cache_row_changed"
# Rooms whose details are numbers: layers that differ in them have different mistakes.
NUMBERS = ("constant", "terms")


def _told(finding: Finding) -> str:
    """What findings of one stage have to say alike to be one fault, besides its name."""
    if not finding.diagnosis:
        return ""
    first = finding.diagnosis[0]
    known = first.known
    exact = known is not None and known.room in NUMBERS and first.free == 0
    return first.says if exact or first.name == CHANGED else ""


# Stages of one kind that make one mistake together: all norms, q and k, K and V.
ALIKE = (NORM, ROTATION, CACHE)


def _same_cause(first: Fault, second: Fault) -> bool:
    """Whether the faults of two stages are one mistake."""
    if (
        not (first.diagnosis and second.diagnosis)
        or first.first.dump_only != second.first.dump_only
    ):
        return False
    layers = first.layer == second.layer or (first.layer == "all" and second.layer is None)
    known = first.diagnosis[0].known
    if known and second.name in known.rest:
        return layers
    if first.name != second.name:
        return False
    one, other = first.diagnosis[0], second.diagnosis[0]
    if first.name == CHANGED:
        return layers and one.says == other.says
    kinds = {any_stage(fault.stage).kind for fault in (first, second)}
    alike = any(kinds <= {kind} for kind in ALIKE)
    match known.joined if known else "kind":
        case "number":
            return len(kinds) == 1 and one.says == other.says
        case "detail":
            return layers and one.detail == other.detail
        case "file":
            return one.detail.split(", of ")[0] == other.detail.split(", of ")[0]
        case "layer":
            return layers
        case _:
            return layers and alike


# --- weights of other layers


def _other_layers(
    found: list[Fault], measured: dict[str, set[int | None]], order: dict[Key, int]
) -> list[Fault]:
    """Faults whose weights are those of other layers, in the same way: one cause."""
    groups: list[tuple[dict[int, int], list[Fault]]] = []
    rest = []
    for fault in sorted(found, key=lambda fault: order[fault.first.suspect.key]):
        moved = _moved(fault)
        for moves, group in groups if moved else ():
            shared = moves.keys() & moved.keys()
            if shared and all(moves[layer] == moved[layer] for layer in shared):
                moves |= moved
                group.append(fault)
                break
        else:
            if moved:
                groups.append((moved, [fault]))
            else:
                rest.append(fault)
    for moves, group in groups:
        worst = min(fault.diagnosis[0].bits for fault in group)
        exchanged = len(moves) > 1 and all(moves.get(b) == a for a, b in moves.items())
        name = "layers_exchanged" if exchanged and len(group) > 1 else group[0].name
        if len(moves) == 1 and len(group) == 1:
            rest += group
        else:
            said = Explanation(name, worst, _says_moved(sorted(moves.items())))
            rest.append(_together(group, measured, said))
    return rest


def _moved(fault: Fault) -> dict[int, int]:
    """Layer -> the layer whose whole weight it has, of every finding; or nothing."""
    moved = {}
    for finding in fault.findings:
        layer = finding.suspect.item.layer
        known = finding.diagnosis[0].known if finding.diagnosis else None
        if layer is None or known is None or known.joined != "moved":
            return {}
        if not finding.diagnosis[0].detail.isdecimal():  # of one of several weights
            return {}
        moved[layer] = int(finding.diagnosis[0].detail)
    return moved


def _says_moved(moves: Sequence[tuple[int, int]]) -> str:
    moved = dict(moves)
    pairs = [(a, b) for a, b in moves if a < b and moved.get(b) == a]
    if 2 * len(pairs) == len(moves):
        said = "; ".join(f"{a} and {b}" for a, b in pairs)
        return f"weights of layers {said} exchanged"
    steps = {b - a for a, b in moves}
    if len(moves) > 1 and len(steps) == 1:
        return f"weights of the layer {steps.pop():+d}"
    said = ", ".join(f"{a} has those of {b}" for a, b in moves[:4])
    return f"weights of other layers: {said}{', ...' if len(moves) > 4 else ''}"


# --- what is said of all of it


def _worded(fault: Fault) -> Fault:
    """What the first stage says may be true of that stage alone."""
    if fault.joined or not fault.diagnosis:
        return fault
    late = [f.diagnosis[0] for f in fault.findings if f.diagnosis[0].name == "bias_after_rope"]
    first, stages = (late or fault.diagnosis)[0], (fault.stage, *fault.also)
    fault.joined = first if late else None
    known = first.known
    if known and known.together and len(stages) > 1:
        fault.joined = replace(first, says=known.together)
    if known and known.joined == "layer" and ADD in {any_stage(name).kind for name in fault.also}:
        fault.joined = replace(first, says=f"{first.says}; the biases too")
    return fault
