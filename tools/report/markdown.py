"""What localize and diff find, as Markdown: for an issue or a pull request."""

from collections.abc import Iterator, Sequence

from qwen_jax.table import Table
from tools import difference
from tools.difference import TraceDifference
from tools.localize import show, side_by_side
from tools.localize.cost.show import summary
from tools.localize.result import Localization, faults, place, sentence


def of_localizations(reports: Sequence[Localization]) -> str:
    """One localized trace, or two side by side."""
    parts = [part for report in reports for part in _of_one(report)]
    if len(reports) == 2:
        right, *more = side_by_side.tables(*reports)
        parts += [_table(right), *side_by_side.sentences(*reports), *map(_table, more)]
    return "\n\n".join(parts) + "\n"


def of_difference(found: TraceDifference, table: Table) -> str:
    """Two traces that were compared."""
    head = f"# {difference.sentence(found)}"
    return f"{head}\n\nA {found.a.path}, B {found.b.path}\n\n{_table(table)}\n"


def of_tables(title: str, legend: str, tables: Sequence[Table]) -> str:
    """Tables alone, and what their columns mean."""
    return "\n\n".join([f"# {title}", *map(_table, tables), f"```\n{legend}\n```"]) + "\n"


def _of_one(report: Localization) -> Iterator[str]:
    yield f"# {sentence(report)}"
    yield f"{show.about(report)}. {report.coverage}."
    for number, fault in enumerate(faults(report), 1):
        lines = "".join(f"\n- {line}" for line in show.fault_lines(fault))
        yield f"**Fault {number}: {place(fault)}**\n{lines}"
    yield _table(show.bits(report))
    if report.harm:
        yield summary(report.harm)


def _table(table: Table) -> str:
    title = f"## {table.title[0].upper()}{table.title[1:]}\n\n" if table.title else ""
    return title + table.markdown.rstrip()
