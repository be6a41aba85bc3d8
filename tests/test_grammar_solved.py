"""Constants and terms that are solved for from a dump: any number, any shard, any rows, each by its
own name and with its detail.

A mistake is planted in one operation of the NumPy engine; only that stage is looked at.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from qwen_jax.replay import Replay
from stages.open import open_trace
from stages.trace import Trace
from tests.planted.matrix import Bench, make_bench
from tools.localize import behind
from tools.localize.explaining import order
from tools.localize.grouping import Explanation
from tools.localize.mistakes import CATALOGUE
from tools.localize.stage_case import NotDumped, StageReplay
from tools.numpy_engine.engine import (
    Array,
    Context,
    Engine,
    causal,
    rms_norm,
    rope_table,
    rotate,
    softmax,
)

LENGTH, LAYER = 48, 1
SOUND = 20.0  # bits that have to come back of about 23


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Callable[[str], Bench]:
    directory = tmp_path_factory.mktemp("solved")

    @cache
    def made(name: str) -> Bench:
        return make_bench(name, "f32", directory, length=LENGTH)

    return made


def traced(bench: Bench, path, stage: str, wrong, layer=LAYER, omit=(), **more) -> Trace:
    """The dump of an engine with a wrong operation in one layer."""
    made = Engine(*bench.loaded, "f32")
    made.replace(stage, layer, wrong)
    run = made.run(bench.tokens, "all", **more)
    trace = open_trace(run.dump(path / "trace", omit), bench.layout)
    trace.steps = run.steps
    return trace


def told(case: StageReplay) -> tuple[str, str, float, int]:
    """The name and sentence of the best explanation, its bits, and how many numbers it fitted."""
    found = []
    for rank, entry in enumerate(CATALOGUE):
        if case.stage.name in entry.stages and entry.dump_only in (None, False):
            try:
                edits = list(entry.edits(case))
            except NotDumped:
                continue
            for detail, value, free in edits:
                bits = case.scored(value, None, entry.rotated)
                says = entry.says.replace("{}", detail)
                found.append((Explanation(entry.name, bits, says, detail, free), rank))
    best, _ = min(found, key=lambda pair: order(*pair))
    return best.name, best.says, best.bits, best.free


def explained(bench, tmp_path, stage: str, wrong, layer=LAYER, **more):
    trace = traced(bench, tmp_path, stage, wrong, layer, **more)
    replay = Replay(trace, bench.model, np.dtype("float32"), unoptimised=True)
    with replay.numerics():
        case = StageReplay(replay, trace.arch.stage[stage], layer)
        assert case.scored(case.exact) < SOUND - 2.5
        return told(case)


def norm(eps: float) -> Callable[[Context], Array]:
    weight = "input_layernorm.weight"
    return lambda c: rms_norm(c["layer_input"], c.weight(weight), eps)


def turned(c: Context, positions: Array, size: float = 1.0, theta: float | None = None, by=1.0):
    q = c.attended()[0]
    cos, sin = rope_table(positions * by, c.shape.head, theta or c.shape.theta)
    return rotate(q, np.float32(size) * cos, np.float32(size) * sin)


def moved(c: Context, rows: list[int], step: int) -> Array:
    positions = c.positions.copy()
    positions[rows] += step
    return positions


def columns(c: Context, counts: Callable[[int], Array]) -> Array:
    x = c["ffn_swigl"]
    return (x * counts(x.shape[1]).astype(np.float32)) @ c.weight("mlp.down_proj.weight").T


def only(first: int, last: int) -> Callable[[int], Array]:
    return lambda width: (np.arange(width) >= first) & (np.arange(width) < last)


def windowed(size: int, first: int = 0) -> Callable[[Context], Array]:
    def wrong(c: Context) -> Array:
        t, s = np.indices((LENGTH, LENGTH))
        allowed = causal(LENGTH) & (t - s < size) & ((s >= first) | (t < first))
        return softmax(c["attn_scores"], allowed)

    return wrong


def grown(c: Context, by: float, channels: slice = slice(None)) -> Array:
    factor = np.ones(c["ffn_out"].shape[-1], np.float32)
    factor[channels] = by
    return c["post_attn_residual"] + factor * c["ffn_out"]


def capped(c: Context) -> Array:
    scale = np.float32(c.shape.head**-0.5 / 7)
    return np.float32(7) * np.tanh(c.scores(c["q_post_rope"], c.k) * scale)


SOLVED = [
    ("attn_norm", norm(1e-2), "norm_eps", "eps 0.01 "),
    ("attn_norm", norm(2.5e-4), "norm_eps", "eps 0.00025 "),
    ("attn_norm", norm(3e-1), "norm_eps", "eps 0.3 "),
    ("q_post_rope", lambda c: turned(c, c.positions, theta=1.5e5), "rope_theta", "theta 150000"),
    ("q_post_rope", lambda c: turned(c, c.positions, theta=5e5), "rope_theta", "theta 500000"),
    ("q_post_rope", lambda c: turned(c, c.positions, theta=1e6 * 4 ** (16 / 14)), "rope_theta",
     "NTK scaling by 4"),
    ("q_post_rope", lambda c: turned(c, c.positions, by=1 / 3), "rope_scaled", "divided by 3"),
    ("q_post_rope", lambda c: turned(c, c.positions, by=2.5), "rope_scaled", "multiplied by 2.5"),
    ("q_post_rope", lambda c: turned(c, c.positions, 1.1386294), "rope_magnitude", "0.1 ln 4 + 1"),
    ("q_post_rope", lambda c: turned(c, c.positions, 0.93), "rope_magnitude", "0.93"),
    ("q_post_rope", lambda c: turned(c, moved(c, [17, 18, 33], -16)), "rope_positions_some",
     "some rows off by -16"),
    ("q_post_rope", lambda c: turned(c, c.positions + 37), "positions_not_shifted", "+37"),
    ("q_post_rope", lambda c: turned(c, c.positions * 0 + 9), "rope_position_constant",
     "position 9"),
    ("q_post_rope", lambda c: turned(c, c.positions % 20), "rope_positions_some",
     "rows 20-39 off by -20; rows 40- off by -40"),
    ("attn_scores", lambda c: c.scores(c["q_post_rope"], c.k) / np.float32(10), "scale_other",
     "1/sqrt(100)"),
    ("attn_scores", capped, "softcap", "at 7,"),
    ("attn_softmax", windowed(13), "mask_windowed", "window of 13"),
    ("attn_softmax", windowed(99, 8), "mask_keys_missing", "first 8 keys"),
    ("ffn_out", lambda c: columns(c, only(0, 80)), "terms_counted", "first half"),
    ("ffn_out", lambda c: columns(c, only(40, 80)), "terms_counted", "second of 4 parts"),
    ("ffn_out", lambda c: columns(c, only(0, 97)), "terms_counted", "only inputs 0-96 of the 160"),
    ("ffn_out", lambda c: columns(c, lambda n: 1 + 3 * only(0, 80)(n)), "terms_counted",
     "inputs 0-79 counted 4 times"),
    ("ffn_out", lambda c: columns(c, lambda n: np.full(n, 2)), "terms_counted", "sum 2 times"),
    ("post_ffn_residual", lambda c: grown(c, 4), "residual_multiple", "output 4 times"),
    ("post_ffn_residual", lambda c: grown(c, 0.35), "residual_multiple", "output 0.35 times"),
    ("post_ffn_residual", lambda c: grown(c, 8, slice(0, 48)), "residual_multiple",
     "output 8 times in channels 0-47"),
]  # fmt: skip


def sampled(change: Callable[[Array, Array], Array]) -> Callable[[Context], Array]:
    """Logits [T, V] changed by how often each id [V] stands in the prompt."""

    def wrong(c: Context) -> Array:
        z = c.linear(c["final_norm"], c.weight("lm_head.weight"))
        return change(z, np.bincount(c["tokens"], minlength=z.shape[-1])[None])

    return wrong


def penalised(z: Array, counts: Array, by: float, every: bool) -> Array:
    power = (np.float32(by) ** (counts if every else counts > 0)).astype(np.float32)
    return np.where(z > 0, z / power, z * power)


SAMPLED = [
    (lambda z, n: penalised(z, n, 1.3, False), "logits_penalised", "penalty 1.3 on"),
    (lambda z, n: penalised(z, n, 1.1, True), "logits_penalised", "1.1 to the power of"),
    (lambda z, n: z - np.float32(0.7) * (n > 0), "logits_biased", "presence penalty 0.7 on"),
    (lambda z, n: z - np.float32(0.5) * (n > 0) - np.float32(0.2) * n, "logits_biased",
     "presence penalty 0.5, frequency penalty 0.2"),
    (lambda z, n: z - np.float32(0.25) * n, "logits_biased", "frequency penalty 0.25"),
    (lambda z, n: z + np.float32(5) * (np.arange(n.size) == 7), "logits_biased",
     "+5 added to 1 id: 7"),
    (lambda z, n: np.where((np.arange(n.size) > 188), np.float32(-1e9), z), "logits_banned",
     "3 ids: 189- set to -1e+09"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name", "says"), SAMPLED, ids=lambda x: str(x)[:24])
def test_logits_changed_after_the_head(bench, tmp_path, change, name, says):
    found = explained(bench("small"), tmp_path, "lm_head", sampled(change), None)
    assert found[0] == name, found
    assert "as a sampler does" in found[1] and says in found[1], found
    assert found[3] == 0, found


@pytest.mark.parametrize(("stage", "wrong", "name", "says"), SOLVED, ids=lambda x: str(x)[:24])
@pytest.mark.parametrize("model", ["small", "small-qwen3"])
def test_solved(bench, tmp_path, model, stage, wrong, name, says):
    found = explained(bench(model), tmp_path, stage, wrong)
    assert found[0] == name, found
    assert says in found[1], found
    assert found[2] >= SOUND, found
    assert found[3] == 0, found  # a number that somebody would write is none that was fitted


BEHIND = ("attn_scores", "attn_softmax")


def slots(count: int) -> Callable[[Context], Array]:
    """Attention over that many more keys of zeros than there are, in calls of one row."""

    def wrong(c: Context) -> Array:
        q, k, v = c["q_post_rope"], c.k, c.v
        scores = c.scores(q, k) * np.float32(c.shape.head**-0.5)
        allowed = np.broadcast_to(c.allowed, scores.shape)
        if len(q) == 1 and len(k) % 16 == 0:
            scores = np.pad(scores, ((0, 0), (0, 0), (0, count)))
            allowed = np.pad(allowed, ((0, 0), (0, 0), (0, count)), constant_values=True)
            v = np.pad(v, ((0, count), (0, 0), (0, 0)))
        weights = softmax(scores, allowed)
        return c.mix(weights, v).reshape(len(q), -1)

    return wrong


def fused(allowed: Callable[[Array, Array], Array], by: float = 1.0) -> Callable[[Context], Array]:
    def wrong(c: Context) -> Array:
        t, s = np.indices((LENGTH, LENGTH))
        scale = np.float32(by * c.shape.head**-0.5)
        weights = softmax(c.scores(c["q_post_rope"], c.k) * scale, causal(LENGTH) & allowed(t, s))
        return c.mix(weights, c.v).reshape(LENGTH, -1)

    return wrong


def test_empty_slots_where_the_softmax_is_dumped(bench, tmp_path):
    def wrong(c: Context) -> Array:
        weights = softmax(c["attn_scores"], c.allowed)
        if len(weights[0]) == 1 and c.keys % 16 == 0:
            high = c["attn_scores"].max(-1, keepdims=True)
            total = np.exp(c["attn_scores"] - high).sum(-1, keepdims=True)
            weights = weights * (total / (total + 16 * np.exp(-high)))
        return weights

    found = explained(bench("small"), tmp_path, "attn_softmax", wrong, steps=[20] + [1] * 28)
    assert found[0] == "mask_unfilled_slots" and "16 of them" in found[1], found


FUSED = [
    (slots(16), "mask_unfilled_slots", "16 of them", [20] + [1] * 28),
    (slots(5), "mask_unfilled_slots", "5 of them", [20] + [1] * 28),
    (fused(lambda t, s: t - s < 11), "mask_windowed", "window of 11", ()),
    (fused(lambda t, s: (s >= 6) | (t < 6)), "mask_keys_missing", "first 6 keys", ()),
    (fused(lambda t, s: (s < (t + 1) // 8 * 8) | (t < 7)), "mask_keys_missing",
     "last whole block of 8", ()),
    (fused(lambda t, s: t >= s, 0.8), "softmax_temperature", "temperature 1.25", ()),
    (fused(lambda t, s: t >= s, np.sqrt(16)), "scale_missing", "scale", ()),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "name", "says", "steps"), FUSED, ids=lambda x: str(x)[:24])
def test_fused_attention_hides_no_name(bench, tmp_path, wrong, name, says, steps):
    made = bench("small")
    trace = traced(made, tmp_path, "attention", wrong, omit=BEHIND, steps=steps)
    replay = Replay(trace, made.model, np.dtype("float32"), unoptimised=True)
    with replay.numerics():
        case = StageReplay(replay, trace.arch.stage["attention"], LAYER)
        if steps:  # as of an engine whose first calls are right
            case = case.last(LENGTH - 31)
        found = told(case)
        if found[2] < SOUND or found[3]:
            segment = [(missing, LAYER) for missing in BEHIND]
            tried = (
                (entry.name, says, case.scored(edit.value), 0)
                for entry, edit, says in behind.edits(case, segment)
            )
            found = next((each for each in tried if each[2] >= SOUND), found)
    assert found[0] == name, found
    assert says in found[1] and found[2] >= SOUND, found
