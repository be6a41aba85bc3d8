"""What a notebook shows of a result: ``_repr_html_``, a table that needs no style of the page."""

from collections.abc import Iterable
from html import escape

from stages.architecture import Key
from stages.trace import Trace
from tools import difference
from tools.difference import TraceDifference
from tools.localize.result import Localization, faults, sentence
from tools.localize.show import fault_lines
from tools.report import views
from tools.report.explorer import colours
from tools.report.views import View
from tools.shown import for_notebook


@for_notebook.register
def of_localization(report: Localization) -> str:
    """The verdict, the map in bits, and every fault."""
    (view, *_) = views.of_localizations({"A": report}, {"A": {}})
    said = "".join(f"<li>{escape('; '.join(fault_lines(fault)))}</li>" for fault in faults(report))
    faulty = {finding.suspect.key for finding in report.findings}
    parts = [_map(report.trace, view, faulty), f"<ol>{said}</ol>" if said else ""]
    return _whole(sentence(report), parts, view)


@for_notebook.register
def of_difference(found: TraceDifference) -> str:
    """The verdict, and the map of relative L2."""
    view = views.of_difference(found)
    return _whole(difference.sentence(found), [_map(found.a, view, set())], view)


def _whole(title: str, parts: Iterable[str], view: View) -> str:
    return (
        f"<div><p><b>{escape(title)}</b></p>{''.join(parts)}"
        f'<p style="opacity:.7">{escape(view.says)}</p></div>'
    )


def _map(trace: Trace, view: View, faulty: set[Key]) -> str:
    stages, lines = views.grid(trace, view, "A", faulty)
    turned = "writing-mode:vertical-rl;transform:rotate(180deg)"
    head = "".join(f'<th scope="col"><span style="{turned}">{name}</span></th>' for name in stages)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in lines
    )
    return (
        '<table style="font-size:11px;font-variant-numeric:tabular-nums"><thead><tr>'
        f"<th>layer</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(cell: views.Cell | None) -> str:
    if cell is None or cell.shade is None:
        return "<td></td>"
    ground, ink = colours(cell.shade)
    style = f"background:{ground};color:{ink};padding:1px 4px"
    return f'<td style="{style}">{cell.text}{"*" * cell.fault}</td>'
