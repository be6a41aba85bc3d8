"""One HTML file: the verdict, the heat map, the cells behind it, and where all of it is from.

It asks for nothing from anywhere, and says so to the browser. Without JavaScript it is a document
with tables; with it, the cells open.
"""

import gzip
import json
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from qwen_jax.weights.base import Weights
from stages import verdict
from stages.architecture import Key, place_of
from stages.trace import Trace
from stages.version import NAME, version
from tools.diff import TraceDifference
from tools.localize import side_by_side
from tools.localize.cost.show import summary
from tools.localize.decode_steps import wrong_calls
from tools.localize.preflight import trace_dtype
from tools.localize.result import Fault, Localization, faults, place, sentence
from tools.localize.show import elements, fault_lines
from tools.report import cells, views
from tools.report.views import View

Sides = Mapping[str, Localization]
VENDORED = ("d3.min.js", "plot.umd.min.js")


def of_localizations(
    reports: Sequence[Localization],
    weights: Sequence[Weights],
    difference: TraceDifference | None = None,
) -> str:
    """The page of one trace, or of two side by side.

    Arguments:
        weights: of each.
        difference: of the two, where they can be compared.
    """
    sides = dict(zip("AB", reports, strict=False))
    behind: dict[str, dict[str, Any]] = {}
    created: dict[str, dict[Key, float | None]] = {}
    for (side, report), model in zip(sides.items(), weights, strict=True):
        details = dict(cells.details(report, model))
        created[side] = {key: each["relative_l2"] for key, each in details.items()}
        behind[side] = _behind(report, details)
    found = views.of_localizations(sides, created)
    if difference:
        found.append(views.of_difference(difference))
    traces = {side: report.trace for side, report in sides.items()}
    body = [
        *(_verdict(side, report, len(sides) > 1) for side, report in sides.items()),
        _difference(difference) if difference else "",
        _map(traces, found, {side: _faulty(report) for side, report in sides.items()}),
        _right(*reports) + _margins(*reports) if len(reports) == 2 else "",
        *(_faults(side, report, len(sides) > 1) for side, report in sides.items()),
        *(_unchecked(side, report, len(sides) > 1) for side, report in sides.items()),
        _provenance(traces, {side: report.model for side, report in sides.items()}),
    ]
    worst = next((r for r in reports if r.wrong), reports[0])
    return _document(sentence(worst), body, _script_data(found, behind, _calls(reports[0].trace)))


def of_difference(found: TraceDifference) -> str:
    """The page of two traces that were compared."""
    view = views.of_difference(found)
    behind = {"A": {_id(key): {"facts": _apart(row)} for key, row in found.rows.items()}}
    body = [
        f"<header><h1>{escape(said(found))}</h1></header>",
        _logits(found),
        _map({"A": found.a}, [view], {"A": set()}, f"{found.a.name} against {found.b.name}"),
        _provenance({"A": found.a, "B": found.b}, {}),
    ]
    return _document(said(found), body, _script_data([view], behind, []))


def of_tables(
    title: str, legend: str, tables: Iterable[tuple[str, Sequence[str], Sequence[Sequence[str]]]]
) -> str:
    """A page of tables alone: (caption, names of the columns, rows), and what they mean."""
    made = [_table(caption, names, rows) for caption, names, rows in tables]
    head = f"<header><h1>{escape(title)}</h1></header>"
    return _document(title, [head, *made, f"<pre>{escape(legend)}</pre>"], "")


# --- parts


def _id(key: Key) -> str:
    return f"{'end' if key[1] is None else key[1]}-{key[0]}"


def _verdict(side: str, report: Localization, several: bool) -> str:
    name = f'<span class="side">{side}</span> ' if several else ""
    about = (
        f"{report.trace.path}: {report.trace.arch.name}, {report.dtype}, "
        f"{len(report.trace.tokens)} tokens, weights of {report.model}"
    )
    tag = "h1" if side == "A" else "p"
    cost = f"<p>{escape(summary(report.harm))}</p>" if report.harm else ""
    return (
        f'<header class="{report.verdict}"><{tag} class="verdict">{name}'
        f"{escape(sentence(report))}</{tag}>{cost}<p>{escape(about)}</p></header>"
    )


def said(found: TraceDifference) -> str:
    parting = found.parting
    if parting is None:
        return f"agree: every stage within relative L2 {found.tolerance:g}"
    row = found.rows[parting]
    return (
        f"differ: the traces part at {place_of(*parting)}: relative L2 {row.relative_l2:.1e}, "
        f"tolerance {found.tolerance:g}"
    )


def _difference(found: TraceDifference) -> str:
    return f"<p>A against B: {escape(said(found))}</p>{_logits(found)}"


def _logits(found: TraceDifference) -> str:
    logits = found.logits
    if logits is None:
        return "<p>Logits are not in both traces, so nothing is known of the next token.</p>"
    return (
        f"<p>Next token: arg-max equal at {logits.argmax_equal} of {logits.positions} positions, "
        f"KL mean {logits.kl_mean:.1e}, largest {logits.kl_max:.1e} nats.</p>"
    )


def _faulty(report: Localization) -> set[Key]:
    return {finding.suspect.key for finding in report.findings}


def _map(
    traces: Mapping[str, Trace],
    found: list[View],
    faulty: Mapping[str, set[Key]],
    caption: str = "",
) -> str:
    """The heat map: a table a side, with the first view in its cells."""
    first = found[0]
    tables = "".join(
        _heat_map(side, trace, first, faulty[side], caption or f"{side}: {trace.name}")
        for side, trace in traces.items()
    )
    choices = "".join(
        f'<label><input type="radio" name="view" value="{view.name}"'
        f"{' checked' if view is first else ''}> {escape(view.label)}</label>"
        for view in found
    )
    legend = "".join(f'<li class="s{shade}">{escape(says)}</li>' for shade, says in first.legend())
    return (
        '<section id="map" aria-labelledby="map-title"><h2 id="map-title">Layers and stages</h2>'
        f'<form id="controls" hidden><fieldset><legend>show</legend>{choices}</fieldset>'
        '<label id="call" hidden>call of the engine <input type="range" min="-1" value="-1">'
        " <output>all</output></label></form>"
        f'<p id="says">{escape(first.says)}</p>'
        f'<div class="sides">{tables}</div><ol id="legend" aria-label="shades">{legend}</ol>'
        '<p id="hint" hidden>A click on a cell, or Enter, opens it; arrow keys move.</p>'
        '</section><section id="detail" tabindex="-1" hidden aria-labelledby="detail-title">'
        "</section>"
    )


def _heat_map(side: str, trace: Trace, view: View, faulty: set[Key], caption: str) -> str:
    count = trace.config["num_hidden_layers"]
    values = view.cells[side]
    there = set(trace.entries)
    shown = [stage for stage in trace.arch.stages if any(key[0] == stage.name for key in there)]
    head = "".join(f'<th scope="col"><span>{stage.name}</span></th>' for stage in shown)
    lines = []
    for layer in [*range(count), None]:
        line = []
        for stage in shown:
            key = (stage.name, layer)
            exists = stage.scope == "end" if layer is None else stage.layer_of(layer) == layer
            line.append(_cell(side, key, view, values, key in faulty) if exists else "<td></td>")
        name = "end" if layer is None else str(layer)
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(line)}</tr>')
    return (
        f'<div class="scroll"><table class="heat" data-side="{side}"><caption>'
        f'{escape(caption)}</caption><thead><tr><th scope="col">layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(side: str, key: Key, view: View, values: Mapping[Key, float | None], faulty: bool) -> str:
    name = f'id="{side}-{_id(key)}"'
    if key not in values:
        return f'<td {name} class="none">–</td>'
    text, shade = view.text(values[key]), view.shade(values[key])
    mark, more = ("*", " fault") if faulty else ("", "")
    name += " data-fault" * faulty
    return f'<td {name} class="s{shade}{more}">{text}{mark}</td>'


def _faults(side: str, report: Localization, several: bool) -> str:
    found = faults(report)
    if not found:
        return ""
    stages = {stage for stage, _ in report.trace.entries}
    entries = "".join(_fault(side, fault, stages) for fault in found)
    of = f" of {side}" if several else ""
    return f'<section class="faults"><h2>Faults{of}</h2><ol>{entries}</ol></section>'


def _fault(side: str, fault: Fault, stages: Collection[str]) -> str:
    key = fault.first.suspect.key
    link = f'<a href="#{side}-{_id(key)}">{escape(place(fault))}</a>'
    link = link if key[0] in stages else escape(place(fault))
    said = "".join(f"<li>{escape(line)}</li>" for line in fault_lines(fault))
    return f"<li>{link}<ul>{said}</ul></li>"


def _right(a: Localization, b: Localization) -> str:
    rows = []
    for row in side_by_side.judgements(a, b):
        said = [" to ".join(dict.fromkeys(f"{x:.1f}" for x in row[s]["bits"])) for s in "ab"]
        marked = [t + "*" * bool(row[s]["fault_layers"]) for s, t in zip("ab", said, strict=True)]
        rows.append([row["stage"], *marked, side_by_side.said(row)])
    other = side_by_side.same_weights(a, b) is False or a.model != b.model
    note = " (each judged by its own weights)" if other else ""
    names = ("stage", "A bits", "B bits", "right")
    return _table(f"Which of the two is right{note}", names, rows)


def _margins(a: Localization, b: Localization) -> str:
    found = side_by_side.margins(a, b)
    if found is None:
        return ""
    sentence, rows = found
    return _table(sentence, side_by_side.MADE_BY, rows) if rows else f"<p>{escape(sentence)}</p>"


def _table(caption: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{_breaks(cell)}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<section><div class="scroll"><table class="plain"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _breaks(cell: str) -> str:
    """Where a cell of a narrow table may be broken: a path or a hash anywhere, a number nowhere,
    else between words."""
    longest = max(map(len, cell.split()), default=0)
    return ' class="long"' if longest > 24 else ' class="short"' if len(cell) <= 24 else ""


def _unchecked(side: str, report: Localization, several: bool) -> str:
    entries = []
    for entry in report.skipped:
        layers = entry.get("layers")
        of = f" of layers {', '.join(map(str, layers))}" if layers else ""
        through = entry.get("checked_through")
        then = f"checked together with {', '.join(through)}" if through else "not checked"
        entries.append(f"{entry['stage']}{of}: {entry['why']}; {then}")
    entries = entries or ["nothing was left out: every stage was checked alone"]
    of = f" of {side}" if several else ""
    listed = "".join(f"<li>{escape(line)}</li>" for line in entries)
    return f"<section><h2>What was not checked{of}</h2><ul>{listed}</ul></section>"


def _provenance(traces: Mapping[str, Trace], models: Mapping[str, str]) -> str:
    sides = list(traces)
    made = [dict(_made(trace, models.get(side))) for side, trace in traces.items()]
    names = list(dict.fromkeys(name for each in made for name in each))
    rows = [[name, *(each.get(name, "") for each in made)] for name in names]
    rows.append(["this report", *[f"{NAME} {version()}"] * len(sides)])
    return _table("Where this is from", ("", *sides), rows)


def _made(trace: Trace, model: str | None) -> Iterator[tuple[str, str]]:
    yield "trace", str(trace.path)
    if model:
        yield "judged by the weights of", model
    yield "architecture", trace.arch.name
    yield "dtype", trace.dtype or f"not said; its values are {trace_dtype(trace)}"
    yield "tokens", f"{len(trace.tokens)}, positions {trace.positions[0]} to {trace.positions[-1]}"
    more = ", ..." if len(trace.steps) > 12 else ""
    yield "rows of each call of the engine", ", ".join(map(str, trace.steps[:12])) + more
    if trace.manifest is None:
        yield "manifest", "none: tokens and weights are taken on trust"
        return
    manifest = trace.manifest
    yield "cache", manifest.cache or "none"
    hashes = sorted(w.xxh3 for w in manifest.model.weights.values())
    yield "weights", f"{manifest.model.name}, {len(hashes)} tensors, {_digest(hashes)}"
    for name, value in manifest.producer.items():
        yield name, listed(value)


def listed(value: Any) -> str:
    """What a manifest or a result says, for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {listed(each)}" for name, each in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _digest(hashes: Sequence[str]) -> str:
    """One hash of many."""
    from stages.files import tensor_hash

    return "XXH3 " + tensor_hash(np.frombuffer("".join(hashes).encode(), np.uint8))


# --- what is behind the cells


def _behind(
    report: Localization, details: Mapping[Key, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    said: dict[Key, list[str]] = {}
    for number, fault in enumerate(faults(report), 1):
        for finding in fault.findings:
            lines = [f"fault {number}: {place(fault)}", *fault_lines(fault)]
            said.setdefault(finding.suspect.key, []).extend(lines)
    precision, found = report.precision, {}
    suspects = {finding.suspect.key: finding.suspect for finding in report.findings}
    steps = report.trace.steps
    ends = np.cumsum(steps) if len(steps) > 1 else None
    for item in report.items:
        more = details.get(item.key, {})
        number_class = verdict.class_of(item.level, item.stage, item.segment) or "lower"
        facts = [["significant bits", "NaN" if item.born else f"{item.bits:.1f}"]]
        if item.exact_bits is not None:
            facts.append(["against exact arithmetic", f"{item.exact_bits:.1f} bits"])
        if not item.born:
            facts.append(["precision class", number_class])
        if format := precision.get(item.name, {}).get("format"):
            facts.append(["number format", format])
        if item.segment:
            facts.append(["computed through", ", ".join(dict.fromkeys(s for s, _ in item.segment))])
        if item.born:
            facts.append(["NaN or infinite", f"{elements(item.born)}, from finite inputs"])
        if report.harm and (share := report.harm.shares.get(item.key)):
            facts.append(["share of the margin", f"{share.margin:+.2g} nats"])
        suspect = suspects.get(item.key)
        found[_id(item.key)] = {
            "facts": facts + _numbers(more),
            "fault": said.get(item.key, []),
            "slices": cells.measured(item),
            "grid": more.get("grid"),
            "histogram": more.get("histogram"),
            "calls": None if ends is None or "position" not in item.slices
            else cells.by_call(item, ends),
            "wrong": None if ends is None or suspect is None
            else wrong_calls(report.trace, suspect).tolist(),
        }  # fmt: skip
    for key in said.keys() - {item.key for item in report.items}:  # of no stage alone
        found[_id(key)] = {"facts": [], "fault": said[key]}
    return found


def _numbers(more: dict[str, Any]) -> list[list[str]]:
    if not more:
        return [["values", "not looked at: the model is large, and this cell is not suspected"]]
    worst = more["largest"]
    at = ", ".join(f"{axis} {i}" for axis, i in worst["at"].items())
    relative = more["relative_l2"]
    return [
        ["relative L2 of its error", "–" if relative is None else f"{relative:.2e}"],
        ["error, value (rms)", f"{more['rms_error']:.3g}, {more['rms_value']:.3g}"],
        ["largest error", f"{worst['error']:.3g} at {at}"],
        ["found, expected there", f"{worst['found']:.9g}, {worst['expected']:.9g}"],
        ["elements", f"{more['elements']:,}"],
    ]


def _apart(row: Any) -> list[list[str]]:
    facts = [
        ["relative L2", f"{row.relative_l2:.2e}"],
        ["largest difference", f"{row.max_abs:.3g} at {', '.join(map(str, row.at))}"],
        ["1 - cosine", f"{1 - row.cosine:.1e}"],
        ["equal, within one ULP", f"{100 * row.ulp_0:.1f} %, {100 * row.ulp_1:.1f} %"],
        ["NaN or infinite in A, B", f"{row.nonfinite_a}, {row.nonfinite_b}"],
        ["elements", f"{row.count:,}"],
    ]
    return facts + [[f"worst {axis}", f"{i} ({r:.1e})"] for axis, (i, r) in row.worst.items()]


def _calls(trace: Trace) -> list[str]:
    """What each call of the engine computed, for people."""
    steps = trace.steps
    if len(steps) < 2:
        return []
    ends = np.cumsum(steps)
    return [
        f"{n + 1} of {len(steps)}: "
        + (f"row {end - 1}" if rows == 1 else f"rows {end - rows} to {end - 1}")
        for n, (rows, end) in enumerate(zip(steps, ends, strict=True))
    ]


def _script_data(
    found: list[View], behind: Mapping[str, Mapping[str, Any]], calls: list[str]
) -> str:
    """What the script reads: the views as JSON, and the cells compressed."""
    shown = [
        {
            "name": view.name,
            "label": view.label,
            "says": view.says,
            "edges": view.edges,
            "good": view.good,
            "legend": view.legend(),
            "cells": {
                side: {
                    _id(key): [
                        view.text(v),
                        view.shade(v),
                        v if v is None or np.isfinite(v) else None,
                    ]
                    for key, v in values.items()
                }
                for side, values in view.cells.items()
            },
        }
        for view in found
    ]
    text = json.dumps({"views": shown, "calls": calls}, allow_nan=False, separators=(",", ":"))
    whole = json.dumps(behind, allow_nan=False, separators=(",", ":")).encode()
    packed = b64encode(gzip.compress(whole, mtime=0)).decode()
    scripts = [(files("tools.report") / "vendor" / name).read_text("utf-8") for name in VENDORED]
    scripts.append((files("tools.report") / "report.js").read_text("utf-8"))
    text = text.replace("<", "\\u003c")  # or a name could end the script
    return (
        f'<script type="application/json" id="views">{text}</script>'
        f'<script type="text/plain" id="cells">{packed}</script>'
        + "".join(f"<script>{script}</script>" for script in scripts)
    )


def _document(title: str, body: Iterable[str], scripts: str) -> str:
    style = (files("tools.report") / "report.css").read_text("utf-8")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main>{scripts}</body></html>\n"
    )
