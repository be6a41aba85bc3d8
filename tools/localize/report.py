"""What localize found out about a trace: as data, as JSON, and as a sentence."""

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult

from stages import verdict
from stages.architecture import LINEAR, LOOKUP, NORM, ROTATION, SCORES, WEIGHTED_SUM
from stages.architectures import any_stage
from stages.trace import Trace
from stages.verdict import LocalError, Suspect

if TYPE_CHECKING:  # importing this loads no JAX
    from tools.localize.fitting import Fitted

SCHEMA = 2
COLOURS = {
    "exact": "green", "f64": "green", "f32": "green", "tf32/f16": "cyan", "bf16": "yellow",
    "8-bit": "magenta", "lower": "red",
}  # fmt: skip


@dataclass
class Explanation:
    """One explanation that restores a suspect's bits."""

    name: str
    bits: float
    says: str


@dataclass
class Finding:
    """A suspect with what explains it."""

    suspect: Suspect
    dump_only: bool = False
    diagnosis: list[Explanation] = field(default_factory=list)
    shape: str = ""


@dataclass
class Localization:
    """Everything localize found out about one trace. Prints as the command does."""

    trace: Trace
    model: str
    dtype: str
    items: list[LocalError]
    findings: list[Finding]
    skipped: list[dict[str, Any]]
    fitted: "Fitted"

    @property
    def precision(self) -> dict[str, dict[str, Any]]:
        table = verdict.precision(self.items, {f.suspect.key for f in self.findings})
        for stage, entry in table.items():
            found = self.fitted.names(stage)
            if found:
                entry["class"] = verdict.coarsest(f.level for f in found)
                entry["format"] = ", ".join(dict.fromkeys(f.name for f in found))
        return table

    @property
    def computed_in(self) -> list[str]:
        """The number formats that stages are computed in, for people."""
        stages = dict.fromkeys(item.stage for item in self.items)
        said = {part for s in stages for f in self.fitted.names(s) for part in f.says.split("; ")}
        return sorted(said - {"float32"})  # of one weight beside others that have a format

    def to_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return to_json(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from tools.localize.show import show_localization

        show_localization(console, self)
        return ()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, highlight=False, soft_wrap=True).print(self)
        return text.getvalue()

    def __repr__(self) -> str:
        return f"<Localization of {self.trace.path}: {sentence(self)}>"

    @property
    def verdict(self) -> str:
        if self.findings:
            return "fault"
        fine = ("exact", "f64", "f32")
        return "clean" if all(p["class"] in fine for p in self.precision.values()) else "precision"


@dataclass
class Fault:
    """Findings of one cause, as reported: one entry, whatever the number of layers."""

    layer: int | str | None
    stage: str
    findings: list[Finding]
    also: list[str] = field(default_factory=list)

    @property
    def first(self) -> Finding:
        return self.findings[0]

    def to_json(self) -> dict[str, Any]:
        worst = min(self.findings, key=lambda f: f.suspect.found)
        suspect = worst.suspect
        entry: dict[str, Any] = {
            "layer": self.layer,
            "stage": self.stage,
            "bits": None if suspect.why == "nan" else round(suspect.found, 1),
            "expected_bits": round(suspect.expected, 1),
            "where": suspect.where,
            "diagnosis": [
                {"name": e.name, "bits": round(e.bits, 1), "says": e.says}
                for e in self.first.diagnosis
            ],
        }
        if suspect.item.segment:
            entry["segment"] = [*dict.fromkeys(s for s, _ in suspect.item.segment), self.stage]
        if suspect.why == "nan":
            entry["nonfinite"] = suspect.item.born
        if self.first.dump_only:
            entry["dump_only"] = True
        if self.also:
            entry["also"] = self.also
        if self.first.shape:
            entry["shape"] = self.first.shape
        return entry


def faults(report: Localization) -> list[Fault]:
    """Findings put together by cause, first cause first."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in report.findings:
        name = finding.diagnosis[0].name if finding.diagnosis else finding.suspect.why
        groups.setdefault((finding.suspect.item.stage, name), []).append(finding)
    measured: dict[str, set[int | None]] = {}
    for item in report.items:
        measured.setdefault(item.stage, set()).add(item.layer)
    result: list[Fault] = []
    for (stage, name), found in groups.items():
        layers = [f.suspect.item.layer for f in found]
        fault = Fault(_layers(layers, measured[stage]), stage, found)
        twin = next((f for f in result if _same_cause(f, fault, name)), None)
        if twin:
            twin.also.append(stage)
        else:
            result.append(fault)
    order = {item.key: place for place, item in enumerate(report.items)}
    return sorted(result, key=lambda f: order[f.first.suspect.key])


TWINS = (NORM, ROTATION)  # kinds whose stages one piece of an engine's code computes


def _same_cause(first: Fault, second: Fault, name: str) -> bool:
    """Whether two stages that share code show the same named mistake in the same layers."""
    named = bool(first.first.diagnosis) and first.first.diagnosis[0].name == name
    kinds = [any_stage(fault.stage).kind for fault in (first, second)]
    related = kinds[0] is kinds[1] and kinds[0] in TWINS
    layers = first.layer == second.layer or (first.layer == "all" and second.layer is None)
    return named and related and layers


def _layers(found: list[int | None], measured: set[int | None]) -> int | str | None:
    if len(found) == 1:
        return "all" if measured == {found[0]} and len(measured) > 1 else found[0]
    if set(found) == measured:
        return "all"
    mask = np.zeros(max(n for n in measured if n is not None) + 2, bool)
    mask[[n for n in found if n is not None]] = True
    return verdict.ranges(mask)


def to_json(report: Localization) -> dict[str, Any]:
    """The object of ``--json``."""
    return {
        "schema": SCHEMA,
        "verdict": report.verdict,
        "trace": str(report.trace.path),
        "model": report.model,
        "dtype": report.dtype,
        "faults": [fault.to_json() for fault in faults(report)],
        "precision": report.precision,
        "skipped": report.skipped,
    }


def sentence(report: Localization) -> str:
    """The verdict in one sentence."""
    found = faults(report)
    if found:
        first = found[0]
        what = place(first)
        finding = first.first
        why = finding.diagnosis[0].says if finding.diagnosis else "of no known kind"
        if finding.suspect.why == "nan" and not finding.diagnosis:
            why = finding.shape
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        return f"fault: {what}: {why}{more}"
    lowered: dict[str, list[str]] = {}
    for stage, entry in report.precision.items():
        if entry["class"] not in ("exact", "f64", "f32"):
            lowered.setdefault(entry["class"], []).append(stage)
    added = f" ({'; '.join(report.computed_in)})" if report.computed_in else ""
    if not lowered:
        return f"clean: every stage that could be checked has the bits of float32 or better{added}"
    meaning = _meaning(report, lowered)
    parts = [
        f"{name} in {'all other stages' if len(s) > 12 else ', '.join(s)}"
        for name, s in lowered.items()
    ]
    return "precision, no fault: " + (meaning or "; ".join(parts)) + added


def _through(items: list[LocalError]) -> dict[str, set[str]]:
    """Stage -> the missing stages that it was computed through."""
    through: dict[str, set[str]] = {}
    for item in items:
        through.setdefault(item.stage, set()).update(stage for stage, _ in item.segment)
    return through


def _meaning(report: Localization, lowered: dict[str, list[str]]) -> str | None:
    """What a pattern of precision classes means, where it has one cause."""
    through = _through(report.items)
    kinds = {stage.name: stage.kind for stage in report.trace.tables.stages}
    classes = {s: p["class"] for s, p in report.precision.items() if kinds[s] is not LOOKUP}
    elsewhere = any(name in ("exact", "f64", "f32") for name in classes.values())
    products = {name for name, kind in kinds.items() if kind.sums_products}

    def blamed(stage: str) -> set[str]:
        """After missing stages, the products among them are what lowers the precision."""
        return through[stage] & products - {stage} or {stage}

    stages = {name: set().union(*map(blamed, found)) for name, found in lowered.items()}
    linears = {name for name, kind in kinds.items() if kind is LINEAR}
    cache = {name for name, kind in kinds.items() if kind in (SCORES, WEIGHTED_SUM)}
    if len(stages) == 1 and not elsewhere:
        return f"{next(iter(stages))} in every stage that could be checked"
    if len(stages) == 1:
        name, found = next(iter(stages.items()))
        if name == "tf32/f16" and found <= cache:
            return "f16-level attn_scores and attention, f32 elsewhere: an f16 key/value cache"
        if name == "bf16" and found <= cache:
            return "bf16-level attn_scores and attention, f32 elsewhere: a bf16 key/value cache"
        if name in ("8-bit", "lower") and found <= cache:
            return f"{name} attn_scores and attention, f32 elsewhere: a quantised key/value cache"
        if name in ("8-bit", "lower") and found <= linears:
            if not all(report.fitted.names(s) for s in lowered[name] if not through[s]):
                return f"{name} linear layers, f32 elsewhere; no number format explains them"
            return f"{name} linear layers, f32 elsewhere: activations are quantised before matmuls"
        if found <= linears | cache:
            return f"{name} products, f32 elsewhere: matmuls run in {name}"
    eight, sixteen = stages.get("8-bit", set()), stages.get("tf32/f16", set())
    if len(stages) == 2 and eight and sixteen and eight <= linears and sixteen <= cache:
        return "8-bit linear layers and an f16 key/value cache, f32 elsewhere"
    return None


def place(fault: Fault) -> str:
    layer = fault.layer
    stage = " and ".join([fault.stage, *fault.also])
    if fault.first.suspect.item.segment:
        chain = [*dict.fromkeys(s for s, _ in fault.first.suspect.item.segment), fault.stage]
        stage = f"the segment {' > '.join(chain)} (not dumped in between)"
    if layer is None:
        return stage
    return f"{stage} of all layers" if layer == "all" else f"layer {layer} {stage}"
