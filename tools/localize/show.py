"""What ``localize`` found out, for people."""

from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen_jax import cli
from stages import verdict
from stages.architecture import place_of
from stages.verdict import LocalError
from tools.localize.cost.show import show_harm
from tools.localize.result import COLOURS, Fault, Finding, Localization, faults, place, sentence

OVER = 5  # overflows that are told


def _table(report: Localization) -> Table:
    """Layers down, stages across, significant bits in the cells; faults marked with ``*``."""
    held = {item.key: item for item in report.items}
    faulty = {finding.suspect.key for finding in report.findings}
    rows = report.trace.arch.layer_stages
    shown = [row.name for row in rows if any(key[0] == row.name for key in held)]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for name in shown:
        table.add_column(name.replace("_", "\n"), justify="right")
    felt = {row.layer: row for row in report.nats}
    if felt:
        table.add_column("score\nerror,\nnats", justify="right")
    for layer in sorted({n for _, n in held if n is not None}):
        cells = [_cell(held.get((name, layer)), (name, layer) in faulty) for name in shown]
        nats = [Text(f"{felt[layer].max:.1g}" if layer in felt else "-")] if felt else []
        table.add_row(str(layer), *cells, *nats)
    return table


def _cell(item: LocalError | None, faulty: bool) -> Text:
    if item is None:
        return Text("-", style="dim")
    number = "exact" if item.bits >= verdict.EXACT_BITS else f"{item.bits:.1f}"
    if faulty:
        return Text(number + "*", style="bold red")
    found = verdict.class_of(item.level, item.stage, item.segment) or "lower"
    return Text(number, style=COLOURS[found])


def show_localization(show: Console, report: Localization) -> None:
    """Print the verdict, the table, every fault, and what was not checked."""
    show.print(Text(sentence(report), style="bold"))
    held = {item.key: item for item in report.items}
    faulty = {finding.suspect.key for finding in report.findings}
    show.print(
        f"\n{report.trace.path}: {report.dtype}, {len(report.trace.tokens)} tokens, weights of "
        f"{report.model}; significant bits of the error created at each stage\n"
    )
    cli.fold(show, _table(report))
    whole = Text()
    ends = [row for row in report.trace.arch.stages if row.scope != "layer"]
    for key in [(row.name, row.layer_of(0)) for row in ends]:
        if key in held:
            whole.append(f"{key[0]} ")
            whole.append(_cell(held[key], key in faulty))
            whole.append("   ")
    if whole:
        show.print(whole)
    for number, fault in enumerate(faults(report), 1):
        _print_fault(show, number, fault)
    for finding in report.odd:
        show.print(odd_line(finding))
    show.print(f"{report.coverage}")
    show_harm(show, report)
    over = [row for row in report.headroom if row.overflows]
    for row in over[:OVER]:
        place = place_of(row.stage, row.layer)
        what = "" if row.what == "value" else f" {row.what}"
        show.print(f"in float16 overflows {place}: {row.largest:,.0f}{what}, channel {row.channel}")
    if len(over) > OVER:
        show.print(f"and {len(over) - OVER} more stages, see headroom of --json")
    for entry in report.skipped:
        through = entry.get("checked_through")
        note = f", checked together with {', '.join(through)}" if through else ": not checked"
        where = f" of layers {_short(entry['layers'])}" if "layers" in entry else ""
        show.print(f"{entry['why']}: {entry['stage']}{where}{note}")


def _short(layers: Iterable[int]) -> str:
    mask = np.zeros(max(layers) + 2, bool)
    mask[list(layers)] = True
    return verdict.ranges(mask)


def _print_fault(show: Console, number: int, fault: Fault) -> None:
    show.print(f"\nfault {number}: {place(fault)}", style="bold red")
    for line in fault_lines(fault):
        show.print(f"  {line}")


def fault_lines(fault: Fault) -> list[str]:
    """What is said of a fault below its place, on paper too."""
    entry = fault.to_json()
    where = ", ".join(f"{axis} {place}" for axis, place in entry["where"].items())
    if count := entry.get("nonfinite"):
        lines = [f"{elements(count)} NaN or infinite, from finite inputs"]
    else:
        lines = [f"{entry['bits']} bits, {entry['expected_bits']} expected; {where}"]
        if factor := entry.get("exceeds_bound"):
            lines.append(f"{factor:,g} times what rounding can do at most")
    if differing := entry.get("positions_by_layer"):
        some = [f"{where} in layer {layer}" for layer, where in differing.items()][:OVER]
        more = ", ..." if len(differing) > OVER else ""
        lines.append(f"positions {', '.join(some)}{more}")
    if fault.when:
        lines.append(fault.when.says)
    for each in entry["diagnosis"]:
        lines.append(f"matches '{each['says']}' to {each['bits']} bits ({each['name']})")
    if "shape" in entry:
        lines.append(entry["shape"])
    if "dump_only" in entry:
        lines.append("only the dump is wrong: later stages used the right value")
    return lines


def odd_line(finding: Finding) -> str:
    """What is said of a stage that is lower than its like, within what rounding can do."""
    suspect = finding.suspect
    where = ", ".join(f"{axis} {which}" for axis, which in suspect.where.items())
    return (
        f"odd, no fault: {place_of(*suspect.key)}, {where}: "
        f"{suspect.found:.1f} bits, {suspect.expected:.1f} usual; "
        f"{finding.excess:.2g} of what rounding can do at most"
    )


def elements(count: int) -> str:
    return f"{count:,} element{'s' * (count != 1)}"
