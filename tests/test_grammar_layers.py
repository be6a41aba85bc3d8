"""What holds in some layers is said of those, and what whole missing layers do wrong is named."""

from dataclasses import replace

import numpy as np
import pytest

from tests.planted.matrix import Bench, make_bench
from tools.localize.result import faults as reported
from tools.numpy_engine.engine import Context, Engine, causal, rope_table, rotate, softmax

LENGTH = 40


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return make_bench("small", "f32", tmp_path_factory.mktemp("layers"), length=LENGTH)


def windowed(c: Context):
    t, s = np.indices((LENGTH, LENGTH))
    return softmax(c["attn_scores"], causal(LENGTH) & (t - s < 9 + 3 * (c.layer == 2)))


def test_layers_with_other_windows_are_other_faults(bench):
    made = Engine(*bench.loaded, "f32")
    for layer in (0, 2):
        made.replace("attn_softmax", layer, windowed)
    found = reported(bench.localize(made.run(bench.tokens, "all")))
    assert [(fault.layer, fault.diagnosis[0].says) for fault in found] == [
        (0, "sliding window of 9 positions"),
        (2, "sliding window of 12 positions"),
    ]


def test_rows_that_differ_by_layer_are_said_of_each(bench):
    def wrong(c: Context, heads: int):
        positions = c.positions.copy()
        positions[16 : 20 + 3 * c.layer] -= 16
        x = c.attended()[heads]
        return rotate(x, *rope_table(positions, c.shape.head, c.shape.theta))

    made = Engine(*bench.loaded, "f32")
    for layer in range(3):
        made.replace("q_post_rope", layer, lambda c: wrong(c, 0))
        made.replace("k_post_rope", layer, lambda c: wrong(c, 1))
    (fault,) = reported(bench.localize(made.run(bench.tokens, "all")))
    entry = fault.to_json()
    assert (fault.stage, fault.also, fault.layer) == ("q_post_rope", ["k_post_rope"], "all")
    assert entry["diagnosis"][0]["says"] == "RoPE positions of some rows off by -16"
    assert entry["positions_by_layer"] == {"0": "16-19", "1": "16-22", "2": "16-25"}


SAYS = {"rope_theta": "theta 200000", "gate_up_swapped": "gate", "norm_eps": "eps 0.003"}


@pytest.mark.parametrize("name", SAYS)
def test_logits_alone(bench, name):
    """An engine that shows nothing else is wrong in all of its layers."""
    shape = bench.loaded[0]
    made = Engine(replace(shape, eps=3e-3) if name == "norm_eps" else shape, bench.loaded[1])
    swapped = {"ffn_gate": "mlp.up_proj.weight", "ffn_up": "mlp.gate_proj.weight"}
    for layer in range(3):
        if name == "rope_theta":
            for heads, stage in enumerate(("q_post_rope", "k_post_rope")):
                made.replace(stage, layer, lambda c, h=heads: rotate(
                    c.attended()[h], *rope_table(c.positions, shape.head, 2e5)))  # fmt: skip
        if name == "gate_up_swapped":
            for stage, weight in swapped.items():
                made.replace(stage, layer, lambda c, w=weight: c["ffn_norm"] @ c.weight(w).T)
    run = made.run(bench.tokens, "all")
    hidden = tuple({stage for _, stage in run.stages} - {"lm_head"})
    (fault,) = reported(bench.localize(run, omit=hidden))
    assert fault.stage == "lm_head"
    assert fault.diagnosis[0].name == name
    assert SAYS[name] in fault.diagnosis[0].says
    assert fault.diagnosis[0].bits > 18


def test_banned_tokens_are_no_overflow(bench):
    def wrong(c: Context):
        logits = c.linear(c["final_norm"], c.weight("lm_head.weight"))
        logits[:, [5, 17]] = -np.inf
        return logits

    made = Engine(*bench.loaded, "f32")
    made.replace("lm_head", None, wrong)
    (fault,) = reported(bench.localize(made.run(bench.tokens, "all")))
    assert fault.diagnosis[0].name == "logits_banned"
    assert "2 ids: 5,17 set to minus infinity" in fault.diagnosis[0].says
