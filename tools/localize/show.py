"""What ``localize`` found out, for people."""

from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.text import Text

from qwen_jax import cli
from qwen_jax.table import Cell, Table
from stages import verdict
from stages.architecture import place_of
from stages.verdict import LocalError
from tools.localize.cost.show import show_harm
from tools.localize.result import COLOURS, Fault, Finding, Localization, faults, place, sentence
from tools.shown import for_terminal

OVER = 5  # overflows that are printed


def bits(report: Localization) -> Table:
    """Layers down, stages across, significant bits in the cells; faults marked with ``*``."""
    held = {item.key: item for item in report.items}
    faulty = {finding.suspect.key for finding in report.findings}
    stages = [stage.name for stage in report.trace.arch.layer_stages]
    shown = [name for name in stages if any(key[0] == name for key in held)]
    felt = {each.layer: f"{each.max:.1g}" for each in report.nats}
    rows: list[list[Cell]] = []
    for layer in sorted({n for _, n in held if n is not None}):
        cells = [_cell(held.get((name, layer)), (name, layer) in faulty) for name in shown]
        rows.append([str(layer), *cells, *([felt.get(layer, "-")] if felt else [])])
    names = ["layer", *shown, *(["score error, nats"] if felt else [])]
    title = "significant bits of the error created at each stage"
    return Table(title, names, rows, left=(), narrow=True, gap=1)


def _cell(item: LocalError | None, faulty: bool) -> Text:
    if item is None:
        return Text("-", style="dim")
    number = "exact" if item.bits >= verdict.EXACT_BITS else f"{item.bits:.1f}"
    if faulty:
        return Text(number + "*", style="bold red")
    found = verdict.class_of(item.level, item.stage, item.segment) or "lower"
    return Text(number, style=COLOURS[found])


def about(report: Localization) -> str:
    """What was judged, and by what weights."""
    tokens = f"{len(report.trace.tokens)} tokens"
    return f"{report.trace.path}: {report.dtype}, {tokens}, weights of {report.model}"


@for_terminal.register
def _printed(report: Localization) -> cli.Printed:
    return cli.Printed(lambda show: show_localization(show, report))


def show_localization(show: Console, report: Localization) -> None:
    """Print the verdict, the table, every fault, and what was not checked."""
    show.print(Text(sentence(report), style="bold"))
    held = {item.key: item for item in report.items}
    faulty = {finding.suspect.key for finding in report.findings}
    table = bits(report)
    show.print(f"\n{about(report)}; {table.title}\n")
    cli.fold(show, table.terminal)
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
    for line in layout_lines(report):
        show.print(line)
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


def layout_lines(report: Localization) -> list[str]:
    """What is said of the orders that q and k are held in, one line an order."""
    layers: dict[str, list[int]] = {}
    for layout in report.layouts:
        layers.setdefault(layout.says, []).append(layout.layer)
    return [
        f"layout, no fault: q and k of layers {_short(held)} have the channels of each head in "
        f"another order ({says}), which their scores undo"
        for says, held in layers.items()
    ]


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
