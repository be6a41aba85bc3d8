"""What localize found out about a trace: as data, as JSON, and as a sentence."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from stages import verdict
from stages.architecture import LINEAR, LOOKUP, SCORES, WEIGHTED_SUM, Key, place_of
from stages.trace import Trace
from stages.verdict import LocalError
from tools.localize import grouping
from tools.localize.cost.result import Harm, Nats
from tools.localize.coverage import Coverage
from tools.localize.grouping import Fault, Finding
from tools.localize.schema import LayoutEntry
from tools.shown import Shown

if TYPE_CHECKING:  # importing this loads no JAX
    from stages.headroom import Headroom
    from tools.localize.formats.fit import Fitted

SCHEMA = 3
# Nats by which the error has to move the log-probability of the token to be said to cost something.
# Qwen2-7B in eager bfloat16 loses 0.114 a token (perplexity 7.997 for 7.138 on wikitext,
# transformers#33317), the smallest loss on record that people called broken.
COSTS = 0.1
# The same where no token was asked about: the mean total variation of a layer's softmax.
VARIATION = 0.1
COLOURS = {
    "exact": "green", "f64": "green", "f32": "green", "tf32/f16": "cyan", "bf16": "yellow",
    "8-bit": "magenta", "lower": "red",
}  # fmt: skip


@dataclass(frozen=True)
class Localization(Shown):
    """Everything localize found out about one trace. Prints as the command does.

    Attributes:
        nats: the error of each layer's scores.
        layouts: how layers hold q and k, where that is not the usual way and is undone.
        odd: what has fewer bits than its like, but no fewer than arithmetic can leave.
        coverage: how many of the operations were judged.
        harm: what the error costs a token; None where that was not asked for, or NaN is about.
        headroom: what takes more than a quarter of float16's range.
        rounding: the model that the weights are a rounding of, and what that costs with all else.
    """

    trace: Trace
    model: str
    dtype: str
    items: list[LocalError]
    findings: list[Finding]
    skipped: list[dict[str, Any]]
    fitted: "Fitted"
    nats: list[Nats]
    layouts: tuple[LayoutEntry, ...]
    odd: list[Finding]
    coverage: Coverage
    harm: Harm | None = None
    rounding: tuple[str, Harm | None] | None = None
    headroom: "list[Headroom]" = field(default_factory=list)

    @property
    def precision(self) -> dict[str, dict[str, Any]]:
        faulty = {finding.suspect.key for finding in self.findings}
        table = verdict.precision(self.items, faulty | self.in_a_layout)
        for stage, entry in table.items():
            found = self.fitted.names(stage)
            if found:
                entry["class"] = verdict.coarsest(f.level for f in found)
                entry["format"] = ", ".join(dict.fromkeys(f.name for f in found))
        return table

    @property
    def in_a_layout(self) -> set[Key]:
        """The stages that hold their values in another order."""
        return {(name, layout.layer) for layout in self.layouts for name in layout.stages}

    @property
    def computed_in(self) -> list[str]:
        """The number formats that stages are computed in, for people."""
        stages = dict.fromkeys(item.name for item in self.items)
        said = {part for s in stages for f in self.fitted.names(s) for part in f.says.split("; ")}
        return sorted(said - {"float32"})  # of one weight beside others that have a format

    def to_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return to_json(self)

    def __repr__(self) -> str:
        return f"<Localization of {self.trace.path}: {sentence(self)}>"

    @property
    def costs(self) -> bool:
        """Whether the error is felt: by the token, or, where none was asked about, by a softmax."""
        if self.harm:
            return abs(self.harm.logprob_change) >= COSTS
        return any(layer.variation >= VARIATION for layer in self.nats)

    @property
    def wrong(self) -> bool:
        """Whether there is a mistake, of the engine or of the dump alone."""
        return self.verdict in ("fault", "dump")

    @property
    def verdict(self) -> str:
        if self.findings:
            written = all(finding.dump_only for finding in self.findings)
            return "dump" if written else "fault"
        fine = ("exact", "f64", "f32")
        return "clean" if all(p["class"] in fine for p in self.precision.values()) else "precision"


def faults(report: Localization) -> list[Fault]:
    """Findings put together by cause, first cause first."""
    return grouping.faults(report.findings, report.items)


def to_json(report: Localization) -> dict[str, Any]:
    """The object of ``--json``."""
    found = {
        "schema": SCHEMA,
        "verdict": report.verdict,
        "costs": report.costs,
        "coverage": msgspec.to_builtins(report.coverage),
        "trace": str(report.trace.path),
        "model": report.model,
        "dtype": report.dtype,
        "faults": [fault.to_json() for fault in faults(report)],
        "layouts": msgspec.to_builtins(report.layouts),
        "odd": [_odd(finding) for finding in report.odd],
        "precision": report.precision,
        "nats": msgspec.to_builtins(report.nats),
        "headroom": [row.to_json("float16") for row in report.headroom],
        "skipped": report.skipped,
    }
    if report.harm:
        found["harm"] = report.harm.to_json()
    if report.rounding and report.rounding[1]:
        found["rounding"] = {"model": report.rounding[0], "harm": report.rounding[1].to_json()}
    return found


def _odd(finding: Finding) -> dict[str, Any]:
    """An element of ``odd``."""
    suspect = finding.suspect
    return {
        "layer": suspect.item.layer,
        "stage": suspect.item.name,
        "bits": round(suspect.found, 1),
        "expected_bits": round(suspect.expected, 1),
        "where": suspect.where,
        "exceeds_bound": float(f"{finding.excess:.2g}"),
    }


def sentence(report: Localization) -> str:
    """The verdict in one sentence."""
    found = faults(report)
    if found:
        first = found[0]
        what = place(first) + (f", {first.when.says}" if first.when else "")
        finding = first.first
        why = first.diagnosis[0].says if first.diagnosis else "of no known kind"
        if finding.suspect.why == "nan" and not first.diagnosis:
            why = finding.shape
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        if report.verdict == "dump":
            went_on = "the engine went on from right values, only what was written down is wrong"
            return f"dump: {what}: {why}{more}; {went_on}"
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
    return f"precision, {_cost(report)}: {meaning or '; '.join(parts)}{added}"


def _cost(report: Localization) -> str:
    """What precision costs: "no fault" where it is not felt."""
    if not report.costs:
        return "no fault"
    if report.harm is None:
        worst = max(report.nats, key=lambda layer: layer.variation)
        return f"and layer {worst.layer} feels it, whose scores are off by {worst.rms:.2g} nats"
    change = report.harm.logprob_change
    shares = report.harm.shares.items()
    (stage, layer), share = max(shares, key=lambda pair: pair[1].logprob / change)
    return (
        f"and it costs {abs(change):.2g} nats, {share.logprob / change:.0%} of it at "
        f"{place_of(stage, layer)}"
    )


def _through(items: list[LocalError]) -> dict[str, set[str]]:
    """Stage -> the missing stages that it was computed through."""
    through: dict[str, set[str]] = {}
    for item in items:
        through.setdefault(item.name, set()).update(stage for stage, _ in item.segment)
    return through


GROUPS = {
    "linear": (LINEAR,),
    "unexplained": (LINEAR,),  # by any number format
    "cache": (SCORES, WEIGHTED_SUM),
    "products": (LINEAR, SCORES, WEIGHTED_SUM),
}
QUANTISED = "{} attn_scores and attention, f32 elsewhere: a quantised key/value cache"
UNEXPLAINED = "{} linear layers, f32 elsewhere; no number format explains them"
ACTIVATIONS = "{} linear layers, f32 elsewhere: activations are quantised before matmuls"
# What it means that the stages of these precision classes lie within these groups, and that all
# others have the bits of float32; the first that fits. {} is the class; "" is any one.
MEANINGS: tuple[tuple[dict[str, str], str], ...] = (
    ({"tf32/f16": "cache"}, "f16-level attn_scores and attention, f32 elsewhere: an f16 "
     "key/value cache"),
    ({"bf16": "cache"}, "bf16-level attn_scores and attention, f32 elsewhere: a bf16 "
     "key/value cache"),
    ({"8-bit": "cache"}, QUANTISED),
    ({"lower": "cache"}, QUANTISED),
    ({"8-bit": "unexplained"}, UNEXPLAINED),
    ({"lower": "unexplained"}, UNEXPLAINED),
    ({"8-bit": "linear"}, ACTIVATIONS),
    ({"lower": "linear"}, ACTIVATIONS),
    ({"": "products"}, "{} products, f32 elsewhere: matmuls run in {}"),
    ({"8-bit": "linear", "tf32/f16": "cache"}, "8-bit linear layers and an f16 key/value cache, "
     "f32 elsewhere"),
)  # fmt: skip


def _meaning(report: Localization, lowered: dict[str, list[str]]) -> str | None:
    """What a pattern of precision classes means, where it has one cause."""
    through = _through(report.items)
    kinds = {stage.name: stage.kind for stage in report.trace.arch.stages}
    products = {name for name, kind in kinds.items() if kind.sums_products}

    def blamed(stage: str) -> set[str]:
        """After missing stages, the products among them are what lowers the precision."""
        return through[stage] & products - {stage} or {stage}

    stages = {name: set[str]().union(*map(blamed, found)) for name, found in lowered.items()}
    only = next(iter(stages)) if len(stages) == 1 else ""
    classes = {p["class"] for s, p in report.precision.items() if kinds[s] is not LOOKUP}
    if only and not classes & {"exact", "f64", "f32"}:
        return f"{only} in every stage that could be checked"
    groups = {name: {s for s, k in kinds.items() if k in of} for name, of in GROUPS.items()}
    direct = [stage for found in lowered.values() for stage in found if not through[stage]]
    if all(report.fitted.names(stage) for stage in direct):
        groups["unexplained"] = set()
    for where, says in MEANINGS:
        named = {name or only: group for name, group in where.items()}
        if named.keys() == stages.keys() and all(stages[n] <= groups[g] for n, g in named.items()):
            return says.replace("{}", only)
    return None


def place(fault: Fault) -> str:
    layer = fault.layer
    stage = " and ".join([fault.stage, *fault.also])
    if fault.first.suspect.item.segment:
        chain = [*dict.fromkeys(s for s, _ in fault.first.suspect.item.segment), fault.stage]
        stage = f"the segment {' > '.join(chain)} (not dumped in between)"
        began = fault.first.suspect.item.segment[0][1]
        if isinstance(layer, int) and began is not None and began < layer:
            return f"layers {began} to {layer} {stage}"
    if layer is None:
        return stage
    return f"{stage} of all layers" if layer == "all" else f"layer {layer} {stage}"
