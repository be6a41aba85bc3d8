"""What the heat map can show: bits, shares, nats, relative L2, headroom; each a number per cell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from stages.architecture import Key, Stage
from stages.trace import Trace
from stages.verdict import EXACT_BITS
from tools.difference import TraceDifference
from tools.localize.result import Localization, to_json

SHADES = 9  # of the ramp in report.css: 0 is pale, all is well; the last is dark


@dataclass(frozen=True)
class View:
    """One way to look at the cells.

    Attributes:
        name, label: for the page, and for people.
        says: what the number is, in a sentence.
        edges: rising; a cell's shade is the number of edges that its size reaches, or, where
            large is good, the number of those that it does not.
        good: whether large is good.
        form: how a number is written, as of ``format``.
        cells: side -> (stage, layer) -> number.
    """

    name: str
    label: str
    says: str
    edges: tuple[float, ...]
    good: bool
    form: str
    cells: Mapping[str, Mapping[Key, float | None]]

    def shade(self, value: float | None) -> int:
        """0 to ``SHADES`` - 1; what is no number is as bad as it gets."""
        if value is None or not math.isfinite(value):
            return SHADES - 1
        reached = sum(abs(value) >= edge for edge in self.edges)
        return SHADES - 1 - reached if self.good else reached

    def text(self, value: float | None) -> str:
        if value is None:
            return "NaN"
        if self.good and value >= EXACT_BITS:
            return "exact"
        if not value:
            return "0"
        return format(value, self.form) if math.isfinite(value) else str(value)

    def legend(self) -> list[tuple[int, str]]:
        """(shade, what it stands for), the best first."""
        edges = [format(edge, "g") for edge in self.edges]
        ranges = [f"< {edges[0]}", *(f"{a} – {b}" for a, b in pairwise(edges))]
        ranges.append(f"≥ {edges[-1]}")
        shades = [self.shade(x) for x in (self.edges[0] / 2, *self.edges)]
        return sorted(zip(shades, ranges, strict=True))


# Bits that tell the precision classes apart, with float32's divided once more.
BITS = (2.5, 5.5, 8.4, 11.0, 14.0, 18.0, 21.0, 24.0)
L2 = tuple(10.0**-n for n in (7, 6, 5, 4, 3, 2, 1, 0))
NATS = tuple(10.0**-n for n in (6, 5, 4, 3, 2, 1, 0, -1))
RANGE = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0)


class Cell(NamedTuple):
    """One stage of one layer in a view; its shade is None where there is no number."""

    key: Key
    text: str
    shade: int | None
    fault: bool


def grid(
    trace: Trace, view: View, side: str, faulty: set[Key]
) -> tuple[list[str], list[tuple[str, list[Cell | None]]]]:
    """Stages, and for each layer and the end of the model its name and a cell for each stage; None
    where there cannot be one."""
    shown = [s for s in trace.arch.stages if any(name == s.name for name, _ in trace.entries)]
    values = view.cells[side]

    def cell(stage: Stage, layer: int | None) -> Cell | None:
        key = stage.name, layer
        if not (stage.scope == "end" if layer is None else stage.layer_of(layer) == layer):
            return None
        if key not in values:
            return Cell(key, "–", None, False)
        return Cell(key, view.text(values[key]), view.shade(values[key]), key in faulty)

    layers = [*range(trace.config["num_hidden_layers"]), None]
    lines = [("end" if n is None else str(n), [cell(s, n) for s in shown]) for n in layers]
    return [stage.name for stage in shown], lines


def of_localizations(
    reports: Mapping[str, Localization], created: Mapping[str, Mapping[Key, float | None]]
) -> list[View]:
    """The views of one or two localized traces; those without a number are left out.

    ``created``: the relative L2 of the error created at each cell, where it was measured.
    """
    said = {side: to_json(report) for side, report in reports.items()}
    bits = {
        side: {i.key: i.bits if math.isfinite(i.bits) and not i.born else None for i in r.items}
        for side, r in reports.items()
    }
    shares, nats, headroom = ({side: f(data) for side, data in said.items()} for f in
                              (_shares, _nats, _headroom))  # fmt: skip
    found = [
        View("bits", "bits", "Significant bits of the error created at each stage alone, replayed "
             "in float64 on the engine's own inputs; * marks a fault.", BITS, True, ".1f", bits),
        View("shares", "shares (nats)", "How far the error created at each stage moves the margin "
             "of the next token over its rival, in nats; the sum is the change against exact "
             "arithmetic.", NATS, False, "+.0e", shares),
        View("nats", "score error (nats)", "Largest error of the attention scores over the keys "
             "that are seen, in nats: what the softmax feels.", NATS, False, ".2g", nats),
        View("l2", "relative L2", "Relative L2 of the error created at each stage alone.",
             L2, False, ".0e", created),
        View("headroom", "headroom", "Largest value, or partial sum, as a part of what float16 "
             "holds: 1 overflows; – is less than a quarter.", RANGE, False, ".2g", headroom),
    ]  # fmt: skip
    return [view for view in found if any(view.cells.values())]


def of_difference(found: TraceDifference) -> View:
    """How far two traces have come apart."""
    cells = {key: None if row.unmatched else row.relative_l2 for key, row in found.rows.items()}
    says = "Relative L2 of A against B: what arrived at a stage and what was created there."
    return View("apart", "A against B", says, L2, False, ".0e", {"A": cells, "B": {}})


def _shares(data: dict[str, Any]) -> dict[Key, float | None]:
    harm = data.get("harm") or {}
    return {(s["stage"], s["layer"]): s["share"] for s in harm.get("shares", ())}


def _nats(data: dict[str, Any]) -> dict[Key, float | None]:
    return {("attn_scores", n["layer"]): n["max"] for n in data.get("nats") or ()}


def _headroom(data: dict[str, Any]) -> dict[Key, float | None]:
    return {(h["stage"], h["layer"]): h["float16"] for h in data.get("headroom") or ()}
