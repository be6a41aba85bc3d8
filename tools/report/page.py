"""One HTML file: the verdict, the heat map, the cells behind it, and where all of it is from.

It asks for nothing from anywhere, and says so to the browser. Without JavaScript it is a document
with tables; with it, the cells open.
"""

import gzip
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from qwen_jax.table import Table
from qwen_jax.weights.base import Weights
from stages import verdict
from stages.architecture import Key
from stages.trace import Trace
from stages.version import NAME, version
from tools import difference
from tools.difference import TraceDifference
from tools.localize import side_by_side
from tools.localize.cost.show import summary
from tools.localize.decode_steps import wrong_calls
from tools.localize.preflight import trace_dtype
from tools.localize.result import Localization, faults, place, sentence
from tools.localize.show import about, elements, fault_lines
from tools.report import cells, views
from tools.report.views import View

Sides = Mapping[str, Localization]
VENDORED = ("d3.min.js", "plot.umd.min.js")


def of_localizations(
    reports: Sequence[Localization],
    weights: Sequence[Weights],
    apart: TraceDifference | None = None,
) -> str:
    """The page of one trace, or of two side by side.

    Arguments:
        weights: of each.
        apart: how far the two are, where they can be compared.
    """
    sides = dict(zip("AB", reports, strict=False))
    behind: dict[str, dict[str, Any]] = {}
    created: dict[str, dict[Key, float | None]] = {}
    for (side, report), model in zip(sides.items(), weights, strict=True):
        details = dict(cells.details(report, model))
        created[side] = {key: each["relative_l2"] for key, each in details.items()}
        behind[side] = _behind(report, details)
    found = views.of_localizations(sides, created)
    if apart:
        found.append(views.of_difference(apart))
    return _page(
        sentence(next((r for r in reports if r.wrong), reports[0])),
        several=len(sides) > 1,
        heads=[_head(side, report) for side, report in sides.items()],
        said=[f"A against B: {difference.sentence(apart)}", _logits(apart)] if apart else [],
        views=found,
        maps=[
            _map(side, report.trace, found[0], _faulty(report), f"{side}: {report.trace.name}")
            for side, report in sides.items()
        ],
        right=side_by_side.tables(*reports) if len(reports) == 2 else [],
        parting=side_by_side.sentences(*reports) if len(reports) == 2 else [],
        faults=[(side, _faults(side, report)) for side, report in sides.items() if faults(report)],
        unchecked=[(side, _unchecked(report)) for side, report in sides.items()],
        tables=[_provenance({side: (r.trace, r.model) for side, r in sides.items()})],
        scripts=_script_data(found, behind, _calls(reports[0].trace)),
    )


def of_difference(found: TraceDifference) -> str:
    """The page of two traces that were compared."""
    view = views.of_difference(found)
    behind = {"A": {_id(key): {"facts": _apart(row)} for key, row in found.rows.items()}}
    title = difference.sentence(found)
    return _page(
        title,
        heads=[{"sentence": title}],
        said=[_logits(found)],
        views=[view],
        maps=[_map("A", found.a, view, set(), f"{found.a.name} against {found.b.name}")],
        tables=[_provenance({"A": (found.a, None), "B": (found.b, None)})],
        scripts=_script_data([view], behind, []),
    )


def of_tables(title: str, legend: str, tables: Iterable[Table]) -> str:
    """A page of tables alone, and what their columns mean."""
    return _page(title, heads=[{"sentence": title}], tables=tables, legend=legend)


# --- parts


def _id(key: Key) -> str:
    return f"{'end' if key[1] is None else key[1]}-{key[0]}"


def _head(side: str, report: Localization) -> dict[str, Any]:
    """The verdict of a trace, what it costs, and what was judged."""
    architecture = report.trace.arch.name
    lines = [summary(report.harm)] if report.harm else []
    lines.append(f"{about(report)}; {architecture}")
    return {
        "side": side, "verdict": report.verdict, "sentence": sentence(report), "lines": lines,
    }  # fmt: skip


def _logits(found: TraceDifference) -> str:
    logits = found.logits
    if logits is None:
        return "Logits are not in both traces, so nothing is known of the next token."
    return (
        f"Next token: arg-max equal at {logits.argmax_equal} of {logits.positions} positions, "
        f"KL mean {logits.kl_mean:.1e}, largest {logits.kl_max:.1e} nats."
    )


def _faulty(report: Localization) -> set[Key]:
    return {finding.suspect.key for finding in report.findings}


def _map(side: str, trace: Trace, view: View, faulty: set[Key], caption: str) -> dict[str, Any]:
    """The heat map of a side, with a view in its cells."""
    stages, lines = views.grid(trace, view, side, faulty)
    return {"side": side, "caption": caption, "stages": stages, "lines": lines}


def _faults(side: str, report: Localization) -> list[dict[str, Any]]:
    """What is said of each fault, and the cell that it links to where that is in the map."""
    stages = {stage for stage, _ in report.trace.entries}
    entries = []
    for fault in faults(report):
        key = fault.first.suspect.key
        cell = f"{side}-{_id(key)}" if key[0] in stages else None
        entries.append({"cell": cell, "place": place(fault), "lines": fault_lines(fault)})
    return entries


def _breaks(cell: str) -> Markup:
    """Where a cell of a narrow table may be broken: a path or a hash anywhere, a number nowhere,
    else between words."""
    longest = max(map(len, cell.split()), default=0)
    name = "long" if longest > 24 else "short" if len(cell) <= 24 else ""
    return Markup(f' class="{name}"' if name else "")


def _unchecked(report: Localization) -> list[str]:
    entries = []
    for entry in report.skipped:
        layers = entry.get("layers")
        of = f" of layers {', '.join(map(str, layers))}" if layers else ""
        through = entry.get("checked_through")
        then = f"checked together with {', '.join(through)}" if through else "not checked"
        entries.append(f"{entry['stage']}{of}: {entry['why']}; {then}")
    return entries or ["nothing was left out: every stage was checked alone"]


def _provenance(sides: Mapping[str, tuple[Trace, str | None]]) -> Table:
    """Where each trace is from, and the model that it was judged by, if any."""
    made = [dict(_made(trace, model)) for trace, model in sides.values()]
    names = list(dict.fromkeys(name for each in made for name in each))
    rows = [[name, *(each.get(name, "") for each in made)] for name in names]
    rows.append(["this report", *[f"{NAME} {version()}"] * len(sides)])
    return Table("Where this is from", ("", *sides), rows)


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
) -> Markup:
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
    return Markup(
        f'<script type="application/json" id="views">{text}</script>'
        f'<script type="text/plain" id="cells">{packed}</script>'
        + "".join(f"<script>{script}</script>" for script in scripts)
    )


def _page(title: str, **parts: Any) -> str:
    """``page.html`` with its parts; what is not given is left out."""
    folder = files("tools.report")
    environment = Environment(autoescape=True)
    environment.filters |= {"breaks": _breaks, "id": _id}
    template = environment.from_string((folder / "page.html").read_text("utf-8"))
    style = Markup((folder / "report.css").read_text("utf-8"))
    return template.render(title=title, style=style, **parts) + "\n"
