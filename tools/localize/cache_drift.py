"""Rows of the key/value cache that a later call read otherwise, as findings."""

from collections.abc import Sequence

import numpy as np

from stages.architectures import ARCHITECTURES
from stages.manifest import Changed
from stages.trace import Trace
from stages.verdict import EXACT_BITS, LocalError, Suspect, ranges
from tools.localize.grouping import CHANGED, Explanation, Finding


def with_changes(trace: Trace, findings: list[Finding]) -> list[Finding]:
    """What has changed in the cache, and the findings.

    A stage that reads a changed row is off by that row, whatever it does itself: what was found of
    it there, in the calls since then, counts to the change.
    """
    arch, layers = ARCHITECTURES[trace.arch.name].cached, trace.config["num_hidden_layers"]
    found: dict[tuple[str, int], list[Changed]] = {}
    for each in trace.changed:
        found.setdefault((f"{each.cache.lower()}_cache", each.layer), []).append(each)
    result = []
    for (stage, layer), changes in found.items():
        finding = _finding(trace, stage, layer, changes)
        result.append(finding)
        readers = list(arch.readers(stage, layer, layers))
        for other in findings:
            if other.suspect.key in readers and _follows(other.suspect, trace, changes):
                other.diagnosis = finding.diagnosis
    return result + findings


def _finding(trace: Trace, stage: str, layer: int, changes: Sequence[Changed]) -> Finding:
    rows = np.zeros(len(trace.tokens), bool)
    rows[[each.row for each in changes]] = True
    bits = min(each.bits for each in changes)
    item = LocalError(
        stage=ARCHITECTURES[trace.arch.name].cached.stage[stage],
        layer=layer,
        skipped_rows=0,
        bits=bits,
        level=bits,
        segment=(),
        born=0,
        slices={},
        born_slices={},
        dead_slices={},
    )
    which, step = ranges(rows), min(each.step for each in changes)
    if rows.sum() == 1:
        says = f"row {which} changed in step {step}"
    else:
        which = f"{which} rows" if which == "all" or " of " in which else f"rows {which}"
        says = f"{which} changed, first in step {step}"
    suspect = Suspect(item=item, expected=EXACT_BITS, why="changed", masks={"position": rows})
    return Finding(suspect, diagnosis=[Explanation(CHANGED, EXACT_BITS, says)])


def _follows(suspect: Suspect, trace: Trace, changes: Sequence[Changed]) -> bool:
    """Whether a reader is wrong in calls from the change on alone, and at those keys alone."""
    positions = np.flatnonzero(suspect.masks.get("position", ())) + suspect.item.skipped_rows
    if not len(positions) or trace.step_of(positions[0]) < min(each.step for each in changes):
        return False
    keys = np.flatnonzero(suspect.masks["channel"]) if suspect.item.stage.heads_lead else ()
    return {*map(int, keys)} <= {each.row for each in changes}
