"""Headroom: one float32 trace forecasts where an engine in another format overflows."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qwen_jax import trace
from stages import headroom
from stages.architectures import any_stage
from stages.errors import UserError
from stages.headroom import FORMATS, Headroom
from stages.trace import MemoryTrace
from tests.described import as_described
from tests.planted.checkpoints import copy_checkpoint, overflowing, unscaled_scores
from tests.planted.matrix import Bench, make_bench
from tests.planted.shares import memory_trace
from tools.numpy_engine import engine
from tools.numpy_engine.engine import OPERATIONS, Array, Context, Run, Weights

Site = tuple[int | None, str, int]  # a layer, a stage, and a channel; of scores, a head
LENGTH = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headroom")


def site(layer: int | None, stage: str, value: Array) -> set[Site]:
    """Where a value is not finite; of scores, without what the mask removes."""
    if stage == "attn_scores":
        value = np.where(np.tri(value.shape[1], dtype=bool), value, 0).reshape(len(value), -1).T
    wrong = ~np.isfinite(value.reshape(-1, value.shape[-1]))
    return {(layer, stage, int(i)) for i in np.flatnonzero(wrong.any(0))}


def in_float16(bench: Bench, weights: Weights, run: Run) -> set[Site]:
    """Where an operation in float16, handed the values of a sound run, has no result."""
    wrong, found = engine.Engine(bench.loaded[0], weights, "f16"), set()
    for layer, stage in list(run.stages)[1:]:  # the embedding is a lookup
        given = {s: v for (n, s), v in run.stages.items() if n == layer}
        before = ("post_ffn_residual", layer - 1) if layer else ("embedding", 0)
        given["layer_input"] = run.stages[before[1], before[0]]
        last = bench.loaded[0].layers - 1
        given.setdefault("post_ffn_residual", run.stages[last, "post_ffn_residual"])
        given = {name: engine.f16(np.clip(v, -65504, 65504)) for name, v in given.items()}
        given |= {"tokens": np.array(bench.tokens), "positions": np.arange(len(bench.tokens))}
        operation = unscaled_scores if stage == "attn_scores" else OPERATIONS[stage]
        with np.errstate(all="ignore"):
            value = engine.f16(operation(Context(wrong, layer, given)).astype(np.float32))
        found |= site(layer, stage, value)
    return found


def forecast(rows: list[Headroom]) -> set[Site]:
    found = set()
    for row in rows:
        if row.overflows:
            axis = "head" if row.stage == "attn_scores" else "channel"
            found |= {(row.layer, row.stage, int(i)) for i in np.flatnonzero(row.over[axis])}
    return found


@pytest.mark.parametrize("name", ["hard", "hard-qwen3"])
def test_every_place_where_float16_overflows_and_no_other(directory: Path, name: str) -> None:
    """One false place a model is allowed: a value that rounds to the other side of the end."""
    bench = make_bench(name, "f32", directory, LENGTH)
    weights = {name: w.copy() for name, w in bench.loaded[1].items()}
    overflowing(weights)
    run = engine.Engine(bench.loaded[0], weights).run(bench.tokens, "all")
    rows = headroom.measure(memory_trace(bench, run))
    told, true = forecast(rows), in_float16(bench, weights, run)
    assert {(n, stage) for n, stage, _ in true} >= {(1, "ffn_swigl"), (3, "ffn_swigl")}
    assert name != "hard" or {(0, "attn_scores"), (3, "attn_scores")} <= {t[:2] for t in true}
    assert true <= told and len(told - true) <= 1

    # and of a whole run in float16, in which NaN spreads, what is born in it
    wrong = engine.Engine(bench.loaded[0], weights, "f16")
    for layer in range(bench.loaded[0].layers):
        wrong.replace("attn_scores", layer, unscaled_scores)
    stages = wrong.run(bench.tokens, "all").stages
    first = next((key, value) for key, value in stages.items() if site(*key, value))
    born = site(*first[0], first[1])
    assert born == {t for t in told if t[:2] == first[0]}


def test_what_is_largest_and_where(directory: Path) -> None:
    bench = make_bench("small", "f32", directory, LENGTH)
    values = {("ffn_swigl", 1): np.zeros((LENGTH, 96), np.float32)}
    values["ffn_swigl", 1][5, 3], values["ffn_swigl", 1][9, [3, 40]] = 71002, -65521
    layout = bench.layout
    made = MemoryTrace("t", layout.config, layout.tokens, "float32", values)
    (row,) = headroom.measure(made)
    assert (row.what, row.largest, row.position, row.channel) == ("value", 71002, 5, 3)
    assert row.where == {"positions": "5,9", "channels": "3,40"} and row.overflows
    exact = made.values["ffn_swigl", 1][None].astype(np.float64)
    why = headroom.cause(any_stage("ffn_swigl"), layout.config, exact)
    assert why == "71,002 in channel 3 of ffn_swigl, and float16 ends at 65504"
    values["ffn_swigl", 1][:] = 0
    values["ffn_swigl", 1][5, 3] = 65519  # rounds to 65504
    (row,) = headroom.measure(made)
    assert not row.over and row.part > 1
    assert "ffn_out" in headroom.missing(made, FORMATS["float16"])


def test_what_an_8_bit_cache_and_the_sums_of_q8_1_hold(directory: Path) -> None:
    """q8_1's sums as llama.cpp keeps them (llama.cpp#21652), and fp8 at scale 1 (vllm#54623)."""
    bench = make_bench("hard", "f32", directory, LENGTH)
    run = Run(dict(bench.right.stages))
    swigl = run.stages[1, "ffn_swigl"].copy()
    swigl[4, 32:64] = 3000  # 32 of them are 96000
    run.stages[1, "ffn_swigl"] = swigl
    made = memory_trace(bench, run)
    (row,) = headroom.measure(made, FORMATS["q8_1"], 1)
    assert (row.layer, row.stage, row.what) == (1, "ffn_swigl", "sum of 32")
    assert (row.position, row.channel, row.where["channels"]) == (4, 32, "32-63")
    assert row.largest == pytest.approx(96000)
    assert not headroom.measure(made, FORMATS["float16"], 1)

    shape, qkv = bench.loaded[0], run.stages[2, "qkv_bias"].copy()
    qkv[:, : -shape.kv_heads * shape.head] *= (
        1e6  # q and k as they were before RoPE: not in the cache
    )
    qkv[3, -1] = 470
    run.stages[2, "qkv_bias"] = qkv
    rows = headroom.measure(memory_trace(bench, run), FORMATS["float8_e4m3fn"], 1)
    row = next(row for row in rows if row.layer == 2)
    assert (row.stage, row.position, row.channel) == ("qkv_bias", 3, qkv.shape[1] - 1)
    assert {row.stage for row in rows} <= {"qkv_bias", "k_post_rope"}
    assert float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max) == row.most == 448


def test_a_product_may_overflow_before_it_is_scaled(directory: Path) -> None:
    """As in Qwen2-7B in float16 (llama.cpp#7805): the score itself would have a place."""
    bench = make_bench("small", "f32", directory, LENGTH)
    run = Run(dict(bench.right.stages))
    scores = run.stages[1, "attn_scores"].copy()
    scores[2, 9, 4], scores[2, 4, 9] = 20000, 1e6  # the second is masked
    run.stages[1, "attn_scores"] = scores
    (row,) = headroom.measure(memory_trace(bench, run), near=1)
    assert (row.layer, row.stage, row.what) == (1, "attn_scores", "before the scale")
    assert (row.largest, row.head, row.position, row.channel) == (80000, 2, 9, 4)
    masked = np.tril(scores)[None].astype(np.float64)
    why = headroom.cause(any_stage("attn_scores"), bench.layout.config, masked)
    assert why == "a product is 80,000 before the scale, and float16 ends at 65504"


def test_the_command(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench("hard", "f32", directory, LENGTH)
    source = bench.model.directory
    assert source is not None
    made = copy_checkpoint(source, directory / "overflows", overflowing)
    monkeypatch.setenv("COLUMNS", "80")
    argv = ["--model", str(made), "--tokens", ",".join(map(str, bench.tokens)), "--overwrite"]
    argv += ["--out", str(directory / "t"), "--json", str(directory / "j")]
    assert trace.main([*argv, "--headroom", "f16"]) == 1
    shown = capsys.readouterr().out.splitlines()
    (first,) = (line for line in shown if line.startswith("in float16 overflows first layer 0"))
    assert "before the scale in head" in first and first.endswith("float16 ends at 65,504")
    start = next(i for i, line in enumerate(shown) if line.startswith("layer  stage"))
    assert all(len(line) <= 80 for line in shown[start:-1])
    as_described("trace", (directory / "j").read_bytes())
    found = json.loads((directory / "j").read_text())["headroom"]
    told = {(row["layer"], row["stage"]) for row in found["rows"] if "where" in row}
    assert {(0, "attn_scores"), (3, "attn_scores"), (1, "ffn_swigl"), (3, "ffn_swigl")} <= told
    assert found["overflows"] and found["missing"] == []
    assert trace.main([*argv, "--headroom", "bfloat16", "--stages", "ffn_up"]) == 0
    shown = capsys.readouterr().out
    assert "in bfloat16 nothing overflows" in shown and "so not known: embedding, " in shown
    with pytest.raises(UserError, match="use --dtype float32"):
        trace.main([*argv, "--headroom", "q8_1", "--dtype", "f16"])
