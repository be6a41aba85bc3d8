"""What error costs: the shares of the stages add up to what the error does to the next token."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax import trace_model
from qwen_jax.replay import Replay
from stages.architecture import LINEAR, Stage
from stages.architectures import any_stage
from stages.errors import UserError
from tests.described import as_described
from tests.planted import faults, flips
from tests.planted.matrix import Bench, make_bench
from tests.planted.shares import exact_logits, log_softmax, measured, replay_of, true_changes
from tests.traces import torch_trace
from tools.localize import __main__
from tools.localize.cost import attribution, autodiff, result, softmax_error
from tools.localize.cost.query import Question
from tools.numpy_engine import engine

# With the mean of the slopes between dump and truth little is left out: 2e-9 was measured at most,
# of these checkpoints in f32, where a share is what float64 leaves of it. Slopes at the dump are
# wrong by the error's square; slopes in float32 by 5e-6 nats at most, of those of
# tests/planted/shares.py.
MODES = ("f32", "f16", "bf16", "act8")
BOUND = 1e-6
BOUNDS_AT_DUMP = {"f16": 0.02, "bf16": 0.2}
NARROW = 2e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harm")


def bench_of(directory: Path, mode: str, name: str = "small", length: int = 24, **more) -> Bench:
    return make_bench(name, mode, directory, length, **more)


def worst(found, true: tuple[float, float], floor: float = 0.0) -> float:
    """How far the two sums are from the truth, relative to it or to the largest share."""
    sums, largest = (found.sum, found.logprob_sum), abs(found.largest[0][1].margin)
    scale = max(*map(abs, true), largest, floor)
    return max(abs(s - t) for s, t in zip(sums, true, strict=True)) / scale


@pytest.mark.grid
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["small", "small-qwen3"])
def test_shares_add_up_to_the_true_change(directory: Path, name: str, mode: str) -> None:
    bench = bench_of(directory, mode, name)
    found = measured(bench, bench.right)
    true = true_changes(bench, bench.right, found)
    assert found.lost is None
    assert worst(found, true) < BOUND
    assert found.truth is not None
    assert found.margin - found.exact_margin == pytest.approx(true[0], rel=1e-6, abs=1e-12)
    assert found.logprob_change == pytest.approx(true[1], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("mode", BOUNDS_AT_DUMP)
def test_shares_alone_are_nearly_as_good(directory: Path, mode: str) -> None:
    bench = bench_of(directory, mode)
    found = measured(bench, bench.right, checked=False)
    assert found.truth is None
    assert worst(found, true_changes(bench, bench.right, found)) < BOUNDS_AT_DUMP[mode]
    wide = attribution.measure(replay_of(bench, bench.right), Question(checked=False))
    assert wide is not None
    assert 0 < furthest(found, wide) < NARROW


def test_a_large_model_is_checked_in_float32(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(directory, "bf16")
    wide = measured(bench, bench.right)
    monkeypatch.setattr(attribution, "CHECKED", 0)
    ran: set[Any] = set()
    run = autodiff.Layer.run

    def noted(self: autodiff.Layer, stage: Stage, count: int, inputs: Any) -> Any:
        value = run(self, stage, count, inputs)
        ran.update(x.dtype for x in (value, *inputs) if x.dtype != np.int32)
        return value

    monkeypatch.setattr(autodiff.Layer, "run", noted)
    autodiff.compiled.cache_clear()
    found = attribution.measure(replay_of(bench, bench.right), Question(), clean=False)
    assert found is not None
    assert 0 < furthest(found, wide) < NARROW
    assert found.logprob_change == pytest.approx(wide.logprob_change, abs=NARROW)
    patched = [(found.shares[key].patched, share.patched) for key, share in wide.shares.items()]
    assert ran == {np.dtype(np.float32)}  # of the patches, too
    assert [a is None for a, _ in patched] == [b is None for _, b in patched]
    assert all(a == pytest.approx(b, abs=NARROW) for a, b in patched if a is not None)


def furthest(found: result.Harm, wide: result.Harm) -> float:
    """By how much the shares of one differ at most."""
    return max(abs(found.shares[key].margin - share.margin) for key, share in wide.shares.items())


def test_pytorch_has_the_same_truth(directory: Path) -> None:
    """Its norms are in float32 at best, so a coarser engine is asked about."""
    bench = bench_of(directory, "f16")
    found = measured(bench, bench.right)
    exact = torch_trace(bench.model.directory, tuple(bench.tokens), "float64")["lm_head", None]
    changed = log_softmax(bench.right.stages[None, "lm_head"][-1]) - log_softmax(exact[-1])
    assert found.logprob_sum == pytest.approx(changed[found.token], rel=0.02)
    assert found.sum == pytest.approx(changed[found.token] - changed[found.against], rel=0.02)


@pytest.mark.parametrize(
    "omit",
    [
        ("qkv_matmul", "attn_softmax", "ffn_gate", "ffn_silu"),
        ("embedding", "attn_scores", "ffn_swigl", "post_attn_residual", "final_norm"),
        ("post_ffn_residual", "ffn_out", "q_post_rope", "lm_head"),
    ],
)
def test_missing_stages_leave_the_sum_as_it_is(directory: Path, omit: tuple[str, ...]) -> None:
    bench = bench_of(directory, "f16")
    whole = measured(bench, bench.right, checked=False)
    found = measured(bench, bench.right, omit, checked=False)
    assert found.lost is None
    assert not {stage for stage, _ in found.shares} & set(omit)
    assert len(found.shares) == len(whole.shares) - sum(s in omit for s, _ in whole.shares)
    # without the logits those that follow from the rest are looked at
    head = whole.shares["lm_head", None].logprob if "lm_head" in omit else 0.0
    assert found.logprob_sum == pytest.approx(whole.logprob_sum - head, rel=0.02, abs=2e-5)


def test_a_last_layer_of_one_row_and_prompts_that_begin_anywhere(directory: Path) -> None:
    more = {"first_position": 5, "last_row": True}
    bench = bench_of(directory, "f16", **more)
    found = measured(bench, bench.right)
    assert worst(found, true_changes(bench, bench.right, found)) < 0.02


@pytest.mark.parametrize("omit", [(), ("k_cache", "v_cache")])
def test_a_decode_whose_cache_rounds(directory: Path, omit: tuple[str, ...]) -> None:
    """What it costs is what the cache rounded, seen there or, undumped, where it is read."""
    model = bench_of(directory, "f32").model
    tokens = "1,2,3,4,5,6,7,8,9"
    trace = trace_model(model, tokens, prefill_chunk=4, generate=6, cache="float8_e4m3fn")
    for key in [key for key in trace.entries if key[0] in omit]:
        del trace.entries[key]
    found = attribution.measure(
        Replay(trace, model, np.dtype("float32"), unoptimised=True), Question()
    )
    assert found is not None and found.row == len(trace.tokens) - 1
    exact = log_softmax(exact_logits(model, trace.tokens, 0)[-1])
    ours = log_softmax(trace.read("lm_head", None)[-1])
    true = float(ours[found.token] - exact[found.token])
    assert abs(true) > 1e-3
    assert found.logprob_sum == pytest.approx(true, rel=0.02)
    of_cache = {"attn_scores", "attention"} if omit else {"k_cache", "v_cache"}
    assert all(key[0] in of_cache for key, share in found.largest if abs(share.margin) > 1e-4)


def test_any_row_and_any_two_tokens(directory: Path) -> None:
    bench = bench_of(directory, "f16")
    found = measured(bench, bench.right, row=-5, token=3, against=9)
    assert (found.row, found.token, found.against) == (19, 3, 9)
    assert worst(found, true_changes(bench, bench.right, found)) < 0.02
    assert set(np.flatnonzero(found.shares["attn_out", 2].slices["position"])) == {19}
    with pytest.raises(UserError, match="rows 0 to 23"):
        measured(bench, bench.right, row=24)
    with pytest.raises(UserError, match="0 to 191"):
        measured(bench, bench.right, token=192)


def test_a_mistake_has_all_of_the_change(directory: Path) -> None:
    bench = bench_of(directory, "f32")
    run = faults.plant(bench.loaded, bench.tokens, "attn_out.row_corrupted", [1], "f32", "all")
    found = measured(bench, run)
    key, share = found.largest[0]
    assert key == ("attn_out", 1)
    assert abs(found.sum - share.margin) < 1e-4 * abs(share.margin)
    # the only stage with an error to speak of: without it there is none
    assert share.patched == pytest.approx(found.margin - found.exact_margin, rel=1e-4)
    assert found.sum == pytest.approx(true_changes(bench, run, found)[0], rel=0.1)


def test_slices_add_up(directory: Path) -> None:
    bench = bench_of(directory, "bf16")
    found = measured(bench, bench.right)
    for (stage, _), share in found.shares.items():
        row = any_stage(stage)
        axes = {"position"} if row.kind is LINEAR and stage != "lm_head" else set(share.slices)
        assert axes == set(share.slices)
        for parts in share.slices.values():
            assert parts.sum() == pytest.approx(share.margin, abs=1e-12)
        assert set(share.tensors) == (set(row.parameters) if len(row.parameters) > 1 else set())
        if share.tensors:
            assert sum(share.tensors.values()) == pytest.approx(share.margin, abs=1e-12)


@pytest.mark.parametrize("tensor", ["k_proj", "v_proj"])
def test_a_weight_that_was_rounded_has_the_share_of_its_stage(directory: Path, tensor: str) -> None:
    """Of three weights side by side; judged by the weights of before (``--against-model``)."""
    bench = bench_of(directory, "f32")

    def rounded(weights: engine.Weights) -> None:
        name = f"model.layers.1.self_attn.{tensor}.weight"
        weights[name] = engine.q8_0(weights[name])

    run = engine.Engine(*bench.loaded, "f32", rounded).run(bench.tokens, "all")
    key, share = measured(bench, run).largest[0]
    assert key == ("qkv_matmul", 1)
    assert share.tensors[tensor] == pytest.approx(share.margin, rel=1e-2)
    assert share.tensors["q_proj"] == pytest.approx(0, abs=1e-2 * abs(share.margin))


def test_scores_in_nats_are_those_of_numpy(directory: Path) -> None:
    bench = bench_of(directory, "f16_kv", "hard")
    (*_, last) = softmax_error.measure(replay_of(bench, bench.right))
    stages = {stage: v.astype(np.float64) for (layer, stage), v in bench.right.stages.items()
              if layer == last.layer}  # fmt: skip
    q, k, dump = (stages[n] for n in ("q_post_rope", "k_post_rope", "attn_scores"))
    exact = np.einsum("tnh,snh->nts", q, np.repeat(k, q.shape[1] // k.shape[1], 1))
    exact /= np.sqrt(q.shape[-1])
    seen = np.tril(np.ones(exact.shape[1:], bool))
    error = np.abs(dump - exact) * seen
    assert last.max == pytest.approx(error.max())
    assert error[last.head, last.position].max() == error.max()
    assert last.rms == pytest.approx(np.sqrt((error**2).sum() / (seen.sum() * len(error))))

    def softmax(scores: np.ndarray) -> np.ndarray:
        weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        return weights / weights.sum(-1, keepdims=True)

    lowered = [softmax(np.where(seen, scores, -1e30)) for scores in (dump, exact)]
    variation = np.abs(lowered[0] - lowered[1]).sum(-1) / 2
    assert last.variation == pytest.approx(variation.mean())
    assert last.variation_max == pytest.approx(variation.max())


def test_the_command(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = bench_of(directory, "bf16")
    dump = bench.right.dump(directory / "bf16")
    model, tokens = str(bench.model.directory), ",".join(map(str, bench.tokens))
    argv = [str(dump), "--model", model, "--tokens", tokens]
    assert __main__.main([*argv, "--json", str(directory / "j")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((directory / "j").read_text())["harm"]
    assert f"after row 23: the error moves log p({found['token']})" in shown
    assert "shares of that margin" in shown
    total = sum(share["share"] for share in found["shares"])
    assert found["sum_of_shares"] == pytest.approx(total)
    assert found["exact_margin"] == pytest.approx(found["margin"] - total, rel=1e-4)
    tried = [share for share in found["shares"] if "patched" in share]
    assert [share["linear"] for share in tried] == [True] * result.PATCHED
    moved = abs(found["logprob_change"])
    assert __main__.main([*argv, "--harm", "shares", "--max-nats", str(moved / 2)]) == 1
    assert "as far as its shares tell" in capsys.readouterr().out
    assert __main__.main([*argv, "--harm", "none"]) == 0
    assert "error moves" not in capsys.readouterr().out
    for wrong in (["--token", "3"], ["--max-nats", "1"]):
        with pytest.raises(UserError, match="--harm none"):
            __main__.main([*argv, "--harm", "none", *wrong])


def test_a_clean_trace_costs_nothing_unasked(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = bench_of(directory, "f32")
    dump = bench.right.dump(directory / "f32")
    argv = [str(dump), "--model", str(bench.model.directory)]
    argv += ["--tokens", ",".join(map(str, bench.tokens))]
    for more, told in (([], False), (["--harm", "shares"], True), (["--max-nats", "1"], True)):
        assert __main__.main([*argv, *more]) == 0
        assert ("error moves" in capsys.readouterr().out) is told


def test_two_engines_one_token_apart(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8-bit activations and bfloat16 put another token first each."""
    bench, argv, first = bench_of(directory, "f32"), [], []
    tokens = [0, *np.random.default_rng(25).integers(1, 192, 23).tolist()]
    for mode in ("act8", "bf16"):
        run = engine.Engine(*bench.loaded, mode).run(tokens, "last")
        first.append(int(run.stages[None, "lm_head"].argmax()))
        argv += ["--against", str(run.dump(directory / f"apart-{mode}"))]
    assert first[0] != first[1]
    argv += ["--model", str(bench.model.directory), "--tokens", ",".join(map(str, tokens))]
    assert __main__.main([*argv[1:], "--json", str(directory / "j")]) == 0
    as_described("localize", (directory / "j").read_bytes())
    told = json.loads((directory / "j").read_text())
    found, sides = told["apart"], [told["harm"], told["against"]["harm"]]
    assert [found["token"], found["against"]] == first
    assert all([side["token"], side["against"]] == first for side in sides)
    ours, theirs = found["margins"]
    assert ours > 0 > theirs and found["difference"] == ours - theirs
    # the shares of each side add up to its own change, and exact arithmetic has one margin
    moved = sum(abs(side["margin"] - side["exact_margin"]) for side in sides)
    assert found["sum_of_shares"] == pytest.approx(found["difference"], abs=BOUND * moved)
    rows = found["shares"]
    assert sum(row["difference"] for row in rows) == pytest.approx(found["sum_of_shares"])
    by_a = {(row["stage"], row["layer"]): row["share"] for row in sides[0]["shares"]}
    assert all(row["a"] == by_a[row["stage"], row["layer"]] for row in rows)
    shown = capsys.readouterr().out
    assert f"the margin of {first[0]} over {first[1]} is" in shown
    assert f"B puts {first[1]} first" in shown and "A - B" in shown


def test_what_tips_a_token_is_confirmed_or_said_not_to_be_linear(directory: Path) -> None:
    """Some of ``python -m tests.planted.flips``, by other prompts."""
    for flip in islice(flips.Trial("small", directory, 3).flips(), 4):
        assert flip.change > 0 and flip.sum == pytest.approx(flip.change, rel=0.02)
        assert flip.confirmed and (flip.exact or not flip.share.linear)


def test_nan_costs_nothing_that_can_be_said(directory: Path) -> None:
    bench = bench_of(directory, "f32")
    run = faults.plant(bench.loaded, bench.tokens, "ffn_silu.nan", [1], "f32", "all")
    assert attribution.measure(replay_of(bench, run), Question()) is None
