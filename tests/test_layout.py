"""An order that is made and undone is a layout; one that is not is a fault."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from stages import aprt
from stages.open import open_trace
from tests.planted.matrix import make_bench
from tools.localize import Localization, localize
from tools.localize.result import sentence
from tools.numpy_engine import engine

LENGTH = 24


def permuted(directory: Path, name: str, which: Collection[str], skip: str = "") -> Localization:
    """What is said of an engine that holds the channels of each head of q, or k, or both pair by
    pair, wherever they are but for the stage ``skip``."""
    bench = make_bench(name, "f32", directory, length=LENGTH)
    dump = bench.right.dump(directory / f"dump-{name}-{'-'.join(which)}-{skip}")
    shape = bench.loaded[0]
    n, k, size = shape.heads, shape.kv_heads, shape.head
    order = np.arange(size).reshape(2, -1).T.ravel()
    for layer in range(shape.layers):
        for stage in ("qkv_matmul", "qkv_bias", "q_norm", "k_norm", "q_post_rope", "k_post_rope"):
            path = engine.aprt_path(dump, layer, stage)
            if stage == skip or not path.exists():
                continue
            values = aprt.read(path, layer).copy().reshape(LENGTH, -1, size)
            heads = {"q": slice(0, n), "k": slice(n, n + k)}
            for part in which:
                of = heads[part] if stage.startswith("qkv") else slice(None)
                if stage.startswith(("qkv", part)):
                    values[:, of] = values[:, of][..., order]
            engine.write_aprt(path, layer, values)
    return localize(open_trace(dump, bench.layout), bench.model)


@pytest.mark.parametrize("name", ["small", "small-qwen3"])
def test_an_order_that_scores_undo_is_no_fault(tmp_path: Path, name: str) -> None:
    found = permuted(tmp_path, name, "qk")
    assert found.verdict == "clean", sentence(found)
    layers = found.trace.config["num_hidden_layers"]
    assert [layout.layer for layout in found.layouts] == [*range(layers)]
    assert {layout.says for layout in found.layouts} == {"halves interleaved"}
    assert found.to_json()["layouts"][0]["stages"][-1] == "k_post_rope"
    assert "layout, no fault: q and k of layers" in str(found)


@pytest.mark.parametrize(("which", "skip"), [("k", ""), ("qk", "k_post_rope")])
def test_an_order_that_is_not_undone_is_a_fault(tmp_path: Path, which: str, skip: str) -> None:
    found = permuted(tmp_path, "small", which, skip)
    assert found.verdict in ("fault", "dump") and not found.layouts, sentence(found)
