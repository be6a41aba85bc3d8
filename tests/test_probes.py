"""Probed stages against the same stages measured in full."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax import probes
from qwen_jax.models.ops import positional_by_layer
from qwen_jax.replay import Measured, Replay
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages import roundings, verdict
from stages.trace import MemoryTrace
from tests.planted.matrix import make_bench
from tests.tiny import write_checkpoint
from tests.traces import jax_trace
from tools.localize.cost import softmax_error
from tools.localize.formats import fit
from tools.localize.measure import settle

QKV = ("T", "(N+2K)*H")


LENGTH = 40
GAPS = tuple(np.cumsum([100, 1, 1, 3, 1, 9, 1, 1] * 5).tolist())  # positions with gaps
# the second layer sees seven positions
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


def a_replay(model: Weights, values: Any, positions: tuple[int, ...]) -> Replay:
    tokens = tuple(np.random.default_rng(1).integers(0, 48, len(positions)).tolist())
    config = model.config.to_json()
    trace = MemoryTrace("t", config, tokens, "float32", values, positions)
    return Replay(trace, model, np.dtype("float32"), unoptimised=True)


def traced(directory: Path, positions: tuple[int, ...]) -> Replay:
    """A trace of our own of random tokens at these positions, and its model."""
    model = open_model(write_checkpoint(directory, **SLIDING))
    replay = a_replay(model, {}, positions)
    values = jax_trace(directory, replay.trace.tokens, positions=positions)
    return a_replay(model, values, positions)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Replay:
    return traced(tmp_path_factory.mktemp("sound"), GAPS)


def changed(r: Replay, values: Any) -> Replay:
    """The same with other dumps; None for none."""
    kept = {k: v for k, v in (r.trace.values | values).items() if v is not None}  # type: ignore[attr-defined]
    return a_replay(r.weights, kept, r.trace.positions)


@pytest.fixture
def small_chunks(monkeypatch):
    """Some rows at a time, and a quarter of the keys."""
    for name, value in {"CHUNK": 1, "FEWEST": 12, "LONG": 16, "BLOCK": 300}.items():
        monkeypatch.setattr(probes, name, value)


def by_key(measured: Any) -> dict[Any, Measured]:
    return {(m.stage.name, m.layer): m for m in measured}


def check_close(r: Replay) -> dict[Any, Measured]:
    """Everything but products is the same; of products stages are within 0.4 bits, and slices as
    far as the mean of eight squares goes."""
    full, found = by_key(r), by_key(r.probed())
    assert list(found) == list(full)
    for key, expected in full.items():
        m = found[key]
        assert (m.rows, m.segment) == (expected.rows, expected.segment)
        estimated = m.estimated and m.stage.kind.sums_products
        for name in ("scale",) if estimated else ("error", "scale", "expected"):
            for side in ("rows", "columns"):
                a, b = (getattr(x.sums, f"{name}_{side}") for x in (m, expected))
                # a scale of y instead of y*; what is below the smallest float32 is nothing
                rtol = 1e-5 if estimated else 1e-6
                np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-60, err_msg=f"{key} {name}")
        if estimated:
            a, b = (settle.judged(r, x, "float32") for x in (m, expected))
            assert abs(a.bits - b.bits) < 0.4, (key, a.bits, b.bits)
            for axis, (levels, _) in a.slices.items():
                off = levels - b.slices[axis][0]
                assert off.min() > -1.6 and off.max() < 3.5, (key, axis, off)
    return found


def test_a_probed_trace(sound):
    found = check_close(sound)
    assert all(m.estimated for m in found.values() if m.stage.scope != "start")


def test_some_rows_and_keys_at_a_time(sound, small_chunks):
    check_close(sound)


def test_positions_that_go_back(tmp_path):
    """What a query sees in a sliding window is then no interval."""
    r = traced(tmp_path, (*range(20), *range(10, 30)))
    found = check_close(r)
    assert found["attn_scores", 0].estimated and not found["attn_scores", 1].estimated


def test_last_layers_of_few_rows_and_missing_stages(sound):
    r, values = sound, {}
    for (stage, layer), value in r.trace.values.items():
        row = r.arch.stage[stage]
        last = layer is None or (layer == 1 and row.axes != QKV and not stage.startswith("k_"))
        if last and stage != "attn_norm":
            values[stage, layer] = np.take(value, range(20, LENGTH), row.axes.index("T"))
    values |= dict.fromkeys([("attn_scores", 0), ("ffn_up", 0), ("post_ffn_residual", 0)])
    found = check_close(changed(r, values))
    assert not found["attn_softmax", 0].estimated and not found["attn_norm", 1].estimated
    assert found["ffn_gate", 0].estimated and found["attention", 1].rows == 20


def test_few_rows_are_all_looked_at(sound):
    """Then nothing of a product is random."""
    r, stage = sound, sound.arch.stage["attn_out"]
    dumps = {n: r.load(n, 0)[:, :5] for n in ("attention", "attn_out")}
    (x, y), w = (
        (d[0].astype(np.float64) for d in dumps.values()),
        r.weights.read(tensors := "model.layers.0.self_attn.o_proj.weight"),
    )
    with r.numerics():
        reading = probes.Reading(lambda x: [(roundings.q8_0(x).astype(float), x * 0.0)], [None])
        both = probes.Reading(reading.inputs, [roundings.f16])
        screen = probes.Screen(r.weights, {False: r.pos[False].last(5)}, np.zeros((5, 4)),
                               np.dtype("float32"), {}, {"attn_out": [reading, both]})  # fmt: skip
        sums, read = screen.measure((stage,), False, dumps, {"o_proj": tensors})["attn_out"]
    for found, weight in zip(read, (w, roundings.f16(w)), strict=True):
        off = np.square(y - roundings.q8_0(x).astype(np.float64) @ weight.T.astype(np.float64))
        np.testing.assert_allclose(found.error_rows, off.sum(1), rtol=1e-6)
        np.testing.assert_allclose(found.error_columns, off.sum(0), rtol=1e-6)
    error = np.square(y - x @ w.T.astype(np.float64))
    np.testing.assert_allclose(sums.error_rows, error.sum(1), rtol=1e-6)
    np.testing.assert_allclose(sums.error_columns, error.sum(0), rtol=1e-6)


# what is spoiled: stage and layer, where, the value that is put there
SPOILED = {
    "an infinite score": (("attn_scores", 0), (1, 9, 3), np.inf),
    "a weight that is masked": (("attn_softmax", 0), (1, 9, 30), 1e-9),
    "a number that is none": (("ffn_swigl", 0), (3, 3), np.nan),
    "a channel of zeros": (("ffn_up", 1), (slice(None), 5), 0.0),
    "a head of zeros": (("attn_scores", 1), (2,), 0.0),
    "an element": (("attn_out", 0), (11, 7), 0.3),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_odd_is_measured(sound, small_chunks, what):
    key, at, value = SPOILED[what]
    spoiled = sound.trace.values[key].copy()
    spoiled[at] = value
    r = changed(sound, {key: spoiled})
    measured = by_key(r.probed())
    items = {k: settle.judged(r, m, "float32") for k, m in measured.items()}
    assert key in settle.doubtful([*items.values()], "float32")
    settle.settle(r, measured, items, "float32", fit.Fitted())
    exact = [settle.judged(r, m, "float32") for m in r]
    found, expected = (
        {s.key: (s.why, s.where) for s in verdict.suspects(each, "float32")}
        for each in ([*items.values()], exact)
    )
    assert found == expected
    assert not any(items[k].estimated for k in found)


def test_nothing_of_a_sound_trace_is_doubtful(sound):
    scores = sound.trace.values["attn_scores", 0].copy()
    scores[:, 3, 20:] = np.nan  # masked, and so no part of the computation
    r = changed(sound, {("attn_scores", 0): scores})
    items = [settle.judged(r, m, "float32") for m in r.probed()]
    assert settle.doubtful(items, "float32") == set()


def test_nats_of_sound_scores_are_those_of_a_sample(sound, monkeypatch):
    whole = softmax_error.measure(sound)
    monkeypatch.setattr(softmax_error, "SAMPLE", 20)
    for a, b in zip(whole, softmax_error.measure(sound, {0, 1}), strict=True):
        assert a.rms / 1.5 < b.rms < a.rms * 1.5
        assert a.max / 4 < b.max <= a.max * 1.0001
        assert 0 <= b.position < LENGTH


def test_intervals():
    mask = np.tril(np.ones((4, 6), bool), 1)
    first, end = probes.interval(mask)
    assert (first.tolist(), end.tolist()) == ([0, 0, 0, 0], [2, 3, 4, 5])
    mask[1, 0] = False
    assert probes.interval(mask)[0][1] == 1
    mask[2, 1] = False
    assert probes.interval(mask) is None


def test_memory_does_not_grow_with_the_square_of_the_length():
    """Of 4,096 rows of the demo, a chunk of what attention reads is a hundredth."""
    config, length = open_model(None).config, 4096
    pos = positional_by_layer(config, np.arange(length)[None])
    screen = probes.Screen(open_model(None), pos, np.zeros((length, 16)), np.dtype("float32"), {})
    scores = np.broadcast_to(np.float32(0), (1, 14, length, length))
    dumps = {"attn_scores": scores, "attn_softmax": scores}
    rows = (config.arch.stage["attn_softmax"],)
    group = probes._Group(screen, rows, False, length, True, dumps, {})
    sizes = [group._cut("attn_softmax", scores, chunk).size for chunk in group._chunks()]
    assert max(sizes) <= scores.size / 100
    assert sum(sizes) < 0.65 * scores.size  # of the half that no query sees, little is read


@pytest.mark.parametrize(
    ("name", "mode", "which", "first"),
    [("small", "f32", "one", 5), ("small-qwen3", "act8", "all", 27)],
)
def test_faults_are_those_of_the_full_replay(tmp_path, name, mode, which, first):
    """A sample of what ``python -m tests.planted.matrix --compare`` compares."""
    bench = make_bench(name, mode, tmp_path, length=24)
    for fault in [*bench.plantable.values()][first::50]:
        assert bench.differs(fault, which) == "", fault.name
