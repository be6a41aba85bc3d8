"""What a notebook shows of a result: ``_repr_html_``, a table that needs no style of the page."""

from collections.abc import Iterable
from html import escape

from stages.architecture import Key
from stages.trace import Trace
from tools.diff import TraceDifference
from tools.localize.result import Localization, faults, sentence
from tools.report import page, views
from tools.report.explorer import colours
from tools.report.views import View


def of_localization(report: Localization) -> str:
    """The verdict, the map in bits, and every fault."""
    (view, *_) = views.of_localizations({"A": report}, {"A": {}})
    said = "".join(
        f"<li>{escape('; '.join(page.fault_lines(fault)))}</li>" for fault in faults(report)
    )
    faulty = {finding.suspect.key for finding in report.findings}
    parts = [_map(report.trace, view, faulty), f"<ol>{said}</ol>" if said else ""]
    return _whole(sentence(report), parts, view)


def of_difference(found: TraceDifference) -> str:
    """The verdict, and the map of relative L2."""
    view = views.of_difference(found)
    return _whole(page.said(found), [_map(found.a, view, set())], view)


def _whole(title: str, parts: Iterable[str], view: View) -> str:
    return (
        f"<div><p><b>{escape(title)}</b></p>{''.join(parts)}"
        f'<p style="opacity:.7">{escape(view.says)}</p></div>'
    )


def _map(trace: Trace, view: View, faulty: set[Key]) -> str:
    values = view.cells["A"]
    shown = [stage for stage in trace.arch.stages if any(key[0] == stage.name for key in values)]
    turned = "writing-mode:vertical-rl;transform:rotate(180deg)"
    head = "".join(f'<th scope="col"><span style="{turned}">{r.name}</span></th>' for r in shown)
    lines = []
    for layer in [*range(trace.config["num_hidden_layers"]), None]:
        cells = []
        for stage in shown:
            key = (stage.name, layer)
            if key not in values:
                cells.append("<td></td>")
                continue
            ground, ink = colours(view.shade(values[key]))
            mark = "*" if key in faulty else ""
            style = f"background:{ground};color:{ink};padding:1px 4px"
            cells.append(f'<td style="{style}">{view.text(values[key])}{mark}</td>')
        name = "end" if layer is None else str(layer)
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    return (
        '<table style="font-size:11px;font-variant-numeric:tabular-nums"><thead><tr>'
        f"<th>layer</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )
