"""The stages as a graph for google-ai-edge/model-explorer, and what was found as its node data.

Source of the formats: ``graph_builder.py`` and ``node_data_builder.py`` of
``ai-edge-model-explorer`` 0.1.34.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_jax.config import Config
from stages import verdict
from stages.architecture import TOKENS, Architecture, Key, Stage, axis_size
from stages.errors import UserError
from tools.localize.result import Localization
from tools.report import views

# The shades of report.css, pale to dark.
RAMP = (
    "#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494",
    "#081d58",
)  # fmt: skip
DARK_FROM, FAULT = 6, "#d55e00"
Data = dict[str, Any]


def colours(shade: int) -> tuple[str, str]:
    """The colours of a cell's ground and of its text, where there is no style sheet."""
    return RAMP[shade], "#fff" if shade >= DARK_FROM else "#111"


def node(key: Key) -> str:
    """The id of a stage's node: ``layer-3/ffn_up``, or ``lm_head``."""
    return key[0] if key[1] is None else f"layer-{key[1]}/{key[0]}"


def graph(arch: Architecture, layers: int, dims: dict[str, int]) -> Data:
    """A collection of one graph: a node a stage, and one for the tokens; an edge an input.

    ``dims`` maps axis letters to sizes.
    """
    # what its types give a default, its pages do not
    nodes: list[Data] = [{"id": TOKENS, "label": TOKENS, "namespace": "", "incomingEdges": []}]
    for stage, layer in arch.computation_order(layers):
        sources = [
            TOKENS if name == TOKENS else node(arch.stored_as(name, layer, layers))
            for name in stage.inputs
        ]
        nodes.append(
            {
                "id": node((stage.name, layer)),
                "label": stage.name,
                "namespace": f"layer-{layer}" if stage.scope == "layer" else "",
                "attrs": [{"key": k, "value": v} for k, v in _attributes(arch, stage, layer)],
                "incomingEdges": [
                    {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
                    for i, source in enumerate(sources)
                ],
                "outputsMetadata": [
                    {"id": "0", "attrs": [{"key": "shape", "value": _shape(stage, dims)}]}
                ],
            }
        )
    return {"label": arch.name, "graphs": [{"id": arch.name, "nodes": nodes}]}


def _attributes(arch: Architecture, stage: Stage, layer: int | None) -> Iterator[tuple[str, str]]:
    yield "value", stage.value
    yield "arithmetic", stage.kind.name
    yield "axes", " x ".join(stage.axes)
    for name in stage.parameters:
        yield f"parameter {name}", arch.parameter[name].tensor_name(layer)


def _shape(stage: Stage, dims: dict[str, int]) -> str:
    return " x ".join(str(axis_size(axis, dims)) for axis in stage.axes)


def node_data(report: Localization) -> dict[str, Data]:
    """File name -> node data: the views of the report, and the precision class of each stage."""
    found = {
        view.name: _numbers(view, report, view.cells["A"])
        for view in views.of_localizations({"A": report}, {"A": {}})
    }
    classes = {
        node(item.key): {"value": verdict.class_of(item.level, item.stage, item.segment) or "lower"}
        for item in report.items
    }
    found["class"] = {report.trace.arch.name: {"name": "precision class", "results": classes}}
    return found


def _numbers(view: views.View, report: Localization, cells: Any) -> Data:
    faulty = {finding.suspect.key for finding in report.findings}
    results = {}
    for key, value in cells.items():
        known = value is not None and math.isfinite(value)
        ground, ink = (FAULT, "#111") if key in faulty else colours(view.shade(value))
        held = float(f"{value:.4g}") if known else 0.0
        results[node(key)] = {"value": held, "bgColor": ground, "textColor": ink}
    return {report.trace.arch.name: {"name": view.label, "results": results}}


def write(report: Localization, directory: Path) -> list[Path]:
    """Write ``graph.json`` and a file of node data for each view; what was written.

    Raises:
        UserError: it cannot be written.
    """
    trace, layers = report.trace, report.trace.config["num_hidden_layers"]
    dims = Config.from_json(trace.config).dims(len(trace.tokens))
    files = {"graph": graph(trace.arch, layers, dims)} | node_data(report)
    written = []
    try:
        directory.mkdir(exist_ok=True)
        for name, data in files.items():
            path = directory / f"{name}.json"
            path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from None
    return written
