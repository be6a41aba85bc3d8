"""The stage graph and its node data are what google-ai-edge/model-explorer reads."""

import json
from typing import Any

import pytest

from stages.architectures import ARCHITECTURES
from stages.open import open_trace
from tests.planted import faults
from tests.planted.matrix import make_bench
from tools.localize import Localization, localize
from tools.report import explorer


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Localization:
    directory = tmp_path_factory.mktemp("explorer")
    bench = make_bench("small-qwen3", "f32", directory, length=8)
    run = bench.plant(faults.FAULTS["ffn_up.row_corrupted"], "one")
    return localize(open_trace(run.dump(directory / "dump"), bench.layout), bench.model)


@pytest.fixture(scope="module")
def written(report: Localization, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    files = explorer.write(report, tmp_path_factory.mktemp("explorer") / "out")
    return {path.stem: json.loads(path.read_text()) for path in files}


def test_every_stage_is_a_node_and_every_input_an_edge(written: dict[str, Any]) -> None:
    (graph,) = written["graph"]["graphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    arch = ARCHITECTURES["qwen3"]
    layers = len({node["namespace"] for node in graph["nodes"] if node.get("namespace")})
    expected = list(arch.computation_order(layers))
    assert len(nodes) == len(graph["nodes"]) == len(expected) + 1
    # without these its page waits for ever, though its own types give them a default
    assert all({"namespace", "incomingEdges"} <= set(node) for node in graph["nodes"])
    for stage, layer in expected:
        node = nodes[explorer.node((stage.name, layer))]
        assert len(node["incomingEdges"]) == len(stage.inputs)
        assert all(edge["sourceNodeId"] in nodes for edge in node["incomingEdges"])
    edge = nodes["layer-2/post_attn_residual"]["incomingEdges"][0]
    assert edge["sourceNodeId"] == "layer-1/post_ffn_residual"


def test_node_data_is_of_nodes_and_shows_the_fault(
    written: dict[str, Any], report: Localization
) -> None:
    ids = {node["id"] for node in written["graph"]["graphs"][0]["nodes"]}
    assert {"graph", "bits", "nats", "class"} <= set(written)
    for name, data in written.items():
        if name != "graph":
            assert set(data["qwen3"]["results"]) <= ids
    bits = written["bits"]["qwen3"]["results"]
    assert len(bits) == len(report.items)
    assert [n for n, d in bits.items() if d["bgColor"] == explorer.FAULT] == ["layer-2/ffn_up"]
    assert written["class"]["qwen3"]["results"]["layer-1/ffn_up"]["value"] == "f32"


def test_its_own_package_takes_both(written: dict[str, Any]) -> None:
    why = "not installed: pip install ai-edge-model-explorer (half a gigabyte)"
    pytest.importorskip("model_explorer", reason=why)
    import dacite
    from model_explorer import graph_builder, node_data_builder

    strict = dacite.Config(strict=True)
    found = dacite.from_dict(graph_builder.GraphCollection, written["graph"], strict)
    assert len(found.graphs[0].nodes) == len(written["graph"]["graphs"][0]["nodes"])
    for name, data in written.items():
        if name in ("graph", "class"):  # a class is a word, which its types do not know
            continue
        dacite.from_dict(node_data_builder.GraphNodeData, data["qwen3"], strict)
