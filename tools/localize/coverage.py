"""What a dump says of its engine: how many of the operations were judged."""

from collections.abc import Sequence
from typing import Any

from stages.entry import Entry
from stages.trace import Trace
from stages.verdict import LocalError


class Coverage(Entry, frozen=True):
    """How many operations of a forward pass, stages of all layers, a dump shows.

    Attributes:
        judged: those judged by themselves, from their own dumped inputs.
        through_a_gap: those judged together with others, as what lies between was not dumped.
        not_dumped: those that nothing is known of.
    """

    judged: int
    through_a_gap: int
    not_dumped: int

    def __str__(self) -> str:
        total = self.judged + self.through_a_gap + self.not_dumped
        parts = [f"{self.judged} of {total} operations judged"]
        if self.through_a_gap:
            parts.append(f"{self.through_a_gap} through a gap")
        if self.not_dumped:
            parts.append(f"{self.not_dumped} not dumped")
        return ", ".join(parts)


def of(trace: Trace, items: Sequence[LocalError]) -> Coverage:
    """The coverage of a dump whose ``items`` could be measured."""
    alone = {item.key for item in items if not item.segment}
    together = {key for item in items if item.segment for key in (item.key, *item.segment)}
    total = len([*trace.arch.computation_order(trace.config["num_hidden_layers"])])
    through = len(together - alone)
    return Coverage(len(alone), through, total - len(alone) - through)


def skipped(trace: Trace, layers: int, items: list[LocalError]) -> list[dict[str, Any]]:
    """What was not checked alone: stages that are not in the trace, or that cannot be replayed from
    what is, by stage."""
    measured = {item.key for item in items}
    rows: dict[tuple[str, str], list[int | None]] = {}
    for stage, layer in trace.arch.computation_order(layers):
        if (stage.name, layer) not in trace.entries:
            rows.setdefault((stage.name, "not in the trace"), []).append(layer)
        elif (stage.name, layer) not in measured:
            why = "what it is computed from has too few rows"
            rows.setdefault((stage.name, why), []).append(layer)
    covered = {link: item.name for item in items for link in item.segment}
    result = []
    for (name, why), found in rows.items():
        entry: dict[str, Any] = {"stage": name, "why": why}
        if trace.arch.stage[name].scope == "layer" and len(found) < layers:
            entry["layers"] = found
        through = {covered.get((name, layer)) for layer in found}
        if None not in through:
            entry["checked_through"] = sorted(t for t in through if t)
        result.append(entry)
    return result
