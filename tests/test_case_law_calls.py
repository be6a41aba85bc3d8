"""Case law of engines that run in calls, through a cache, or in batches: bugs of real ones,
re-enacted in the NumPy engine; each is placed to stage, layer and call and called what it was, or
is no fault, and it is said what it costs. See ``test_case_law``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stages.invariance import partings
from stages.trace import MemoryTrace
from tests.planted.cache_faults import CACHE_FAULTS
from tests.planted.cached import CHUNKS, LENGTH, bench_for
from tests.planted.faults import FAULTS, flat
from tests.planted.matrix import Bench, cosine, make_bench
from tools.localize import Localization
from tools.localize.cost.query import Question
from tools.localize.result import faults as reported
from tools.localize.result import sentence
from tools.numpy_engine import engine
from tools.numpy_engine.engine import OPERATIONS, Array, Context

STEPS = CHUNKS["both"]  # three calls for the prompt, then eight tokens one by one
BIASED = (0, 3)  # the layers with a bias of k that is tens of times k itself


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("case-law-calls")


@pytest.fixture(scope="module")
def bench(directory: Path) -> Bench:
    return make_bench("hard", "f32", directory, length=LENGTH, steps=STEPS)


def replaced(bench: Bench, **operations: engine.Operation) -> engine.Run:
    """A run with operations of its own in all layers."""
    wrong = engine.Engine(*bench.loaded, bench.mode)
    for stage, operation in operations.items():
        for layer in range(wrong.shape.layers):
            wrong.replace(stage, layer, operation)
    return wrong.run(bench.tokens, "all", **bench.more)


# --- prefill right, decode wrong


@dataclass(frozen=True)
class Case:
    """One mistake of ``CACHE_FAULTS``, in all layers: where, from which call on, and its name."""

    threads: str
    plant: str
    stage: str
    step: int
    name: str
    also: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    "factor of scaled RoPE not inverted in the decode": Case(
        "llm-awq#315 llm-awq#334",
        "cache.factor_not_inverted",
        "q_post_rope",
        3,
        "rope_scaled",
        ("k_post_rope",),
    ),
    "only head 0 rotated at T = 1": Case(
        "higgs#23 mlx-lm#1189",
        "cache.first_head_rotated",
        "q_post_rope",
        3,
        "rope_first_head_only",
        ("k_post_rope",),
    ),
    "keys overwritten": Case(
        "realizar#94", "cache.k_row_overwritten", "attn_scores", 5, "cache_row_overwritten"
    ),
    "values overwritten": Case(
        "realizar#94", "cache.v_row_overwritten", "attention", 5, "cache_row_overwritten"
    ),
    "scales of an fp8 cache not applied": Case(
        "vllm#54623 sgl-cookbook#237", "cache.scale_lost", "k_cache", 0, "cache_scale_lost"
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_one_mistake_with_a_cache(directory: Path, what: str) -> None:
    case = CASES[what]
    fault = CACHE_FAULTS[case.plant]
    bench = bench_for(fault, "f32", directory)
    report = bench.localize(bench.plant(fault, "all"))
    (found,) = reported(report)
    assert (found.stage, found.layer, found.name) == (case.stage, "all", case.name), sentence(
        report
    )
    assert found.also == list(case.also)
    assert (found.when.step if found.when else 0) == case.step


def test_mask_skipped_where_there_is_a_cache(bench: Bench) -> None:
    """TinyLLM#18: no mask "if there is a cache", right for one token; but a prompt has one, too."""

    def unmasked(c: Context) -> Array:
        return engine.softmax(c["attn_scores"], np.full(1, True))

    (found,) = reported(bench.localize(replaced(bench, attn_softmax=unmasked)))
    assert (found.stage, found.layer, found.name) == ("attn_softmax", "all", "mask_missing")
    assert found.when and (found.when.step, found.when.steps) == (0, "0-2")


# --- formats of caches


def cached(directory: Path, cache: str) -> tuple[Bench, Localization]:
    bench = make_bench("hard", "f32", directory, length=LENGTH, steps=STEPS, cache=cache)
    return bench, bench.localize(bench.right, harm=Question())


@pytest.mark.parametrize(
    ("cache", "name", "says"),
    [
        ("float8_e4m3fn", "kv float8_e4m3", "float8_e4m3 at scale 1"),
        ("q4_0", "kv q4_0", "a cache in q4_0"),
    ],
)
def test_nonsense_with_a_coarse_cache(
    directory: Path, bench: Bench, cache: str, name: str, says: str
) -> None:
    """QwenLM#840, vllm#10411, vllm#41343, exllamav2#493: of Qwen2 alone, as k has a huge bias.
    llama.cpp#21385, turboquant-pro#98: perplexity 7.5 becomes 10^4, in the layers with that bias,
    where the cosine is best. Nothing is computed wrongly; what it costs is said, and where."""
    exact = bench.right
    bench, report = cached(directory, cache)
    assert report.verdict == "precision" and report.costs and report.harm
    assert {report.precision[stage]["format"] for stage in engine.CACHED} == {name}
    assert abs(report.harm.logprob_change) > 0.5
    said = sentence(report)
    assert "it costs" in said and "layer 0 k_cache" in said and says in said
    worst = sorted(report.nats, key=lambda layer: -layer.max)[:2]
    assert {layer.layer for layer in worst} == set(BIASED) and worst[-1].max > 3
    cosines = [
        cosine(bench.right.stages[n, "k_cache"], exact.stages[n, "k_cache"]) for n in range(4)
    ]
    assert {int(n) for n in np.argsort(cosines)[2:]} == set(BIASED) and max(cosines) > 0.998


def test_a_finer_cache_costs_nothing_to_speak_of(directory: Path) -> None:
    _, report = cached(directory, "q8_0")
    assert report.verdict == "precision" and not report.costs
    assert "no fault" in sentence(report) and "q8_0" in sentence(report)


def test_scales_that_were_loaded(bench: Bench) -> None:
    """vllm#54623, sgl-cookbook#237: the same checkpoint where its scales are used. Each format is
    told from the other, and neither is accused."""

    def kept(stage: str, rows: Callable[[Context], Array], c: Context) -> Array:
        scale = np.float32(0.4 if stage == "k_cache" else 0.0173)
        return c.put(stage, engine.float8(rows(c) / scale, "float8_e4m3fn") * scale)

    run = replaced(
        bench,
        k_cache=lambda c: kept("k_cache", lambda c: c["k_post_rope"], c),
        v_cache=lambda c: kept("v_cache", lambda c: c.attended()[2], c),
    )
    report = bench.localize(run)
    assert report.verdict == "precision", sentence(report)
    found = {report.precision[stage]["format"] for stage in engine.CACHED}
    assert found == {"kv float8_e4m3 at a constant scale"}
    assert bench.localize(run, engine.CACHED).verdict == "precision"  # and if it is not dumped


# --- batches


def test_positions_of_the_short_row_of_a_padded_batch(directory: Path) -> None:
    """unsloth#3699, unsloth#4100, nnsight#673: a batch padded on the left counts the padding. The
    long row is right, the short one, of which the first call has fewer rows, is not: in its prompt
    and in its decode."""
    padding, rest = 7, LENGTH - 6 - 8
    steps = (13 - padding, rest // 2, rest - rest // 2, *[1] * 8)
    short = make_bench("hard", "f32", directory, length=LENGTH, steps=steps)
    assert short.localize(short.right).verdict == "clean"
    fault = FAULTS["qk_post_rope.positions_not_shifted"]  # by 7
    report = short.localize(short.plant(fault, "all"))
    (found,) = reported(report)
    assert (found.stage, found.layer, found.also) == ("q_post_rope", "all", ["k_post_rope"])
    assert found.name == "positions_not_shifted" and f"+{padding}" in sentence(report)
    assert found.when is None  # in every call


BLOCK = 16  # rows from which on the kernel takes another block


def _norm_in_blocks(stage: str, beside: int, c: Context) -> Array:
    """The sum of squares in 4 parts; in 16 where the launch has many rows, some of them of others,
    ``beside``."""
    x = c.normed(stage)
    parts = 16 if len(x) + beside >= BLOCK else 4
    squares = (x * x).reshape(*x.shape[:-1], -1, parts)
    total = np.zeros(squares.shape[:-2], np.float32)
    for column in np.moveaxis(np.add.accumulate(squares, -2)[..., -1, :], -1, 0):
        total = total + column
    root = np.sqrt(total / np.float32(x.shape[-1]) + np.float32(c.shape.eps))
    return x / root[..., None] * c.weight(engine.NORMS[stage][1])


def test_a_norm_whose_block_depends_on_the_rows(bench: Bench) -> None:
    """vllm#48271, vllm#48391: from 256 rows on RMSNorm is added up in blocks of another size, so
    that a sequence alone is not what it is in company. Neither is a fault; where they part is found
    by the rule of bit-equal inputs and unequal outputs."""
    found = []
    for beside in (0, 0, 20):
        norms = {
            stage: partial(_norm_in_blocks, stage, beside) for stage in ("attn_norm", "ffn_norm")
        }
        run = replaced(bench, **norms)
        assert bench.localize(run).verdict == "clean"
        values = {(stage, layer): value for (layer, stage), value in run.stages.items()}
        config, tokens = bench.layout.config, tuple(bench.tokens)
        found.append(MemoryTrace("run", config, tokens, "float32", values))
    alone, again, company = found
    assert not partings(alone, again)
    first, *more = partings(alone, company)
    assert first.key == ("attn_norm", 0)
    assert {each.stage for each in more} <= {"attn_norm", "ffn_norm"}


def _memory_read_too(c: Context) -> Array:
    """The weighted sum over all slots of the cache; weights of those that are empty are 0."""
    v = c.memory["v_cache"]
    weights = np.pad(c["attn_softmax"], [(0, 0), (0, 0), (0, len(v) - c.keys)])
    return flat(c.mix(weights, v))


def _memory_of_others(c: Context) -> Array:
    c.memory["v_cache"][c.keys :] = np.nan
    return OPERATIONS["v_cache"](c)


def test_memory_that_was_never_written(bench: Bench) -> None:
    """vllm#40047, torchtitan#3668, Wan2GP#1628: a cache of ``torch.empty``, and 0 times NaN."""
    run = replaced(bench, v_cache=_memory_of_others, attention=_memory_read_too)
    for omit in ((), engine.CACHED):
        report = bench.localize(run, omit)
        (found,) = reported(report)
        assert (found.stage, found.layer, found.name) == ("attention", 0, "nan")
        assert "0 times what lies in slots never written" in sentence(report)


def _slots_counted(c: Context) -> Array:
    """Slots behind the keys have the scores that memory happens to give, and are counted."""
    scores = np.where(c.allowed, c["attn_scores"], np.float32(-np.inf))
    empty = len(c.memory["k_cache"]) - c.keys
    others = np.random.default_rng(c.keys).standard_normal((*scores.shape[:2], empty))
    weights = np.concatenate([scores, others.astype(np.float32)], -1)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True))[..., : c.keys]


def test_memory_of_others_is_counted(bench: Bench) -> None:
    """vllm#51187, Wan2GP#1628: what comes out depends on who was there before ("lock lock")."""
    report = bench.localize(replaced(bench, attn_softmax=_slots_counted))
    (found,) = reported(report)
    assert (found.stage, found.layer, found.name) == ("attn_softmax", "all", "mask_unfilled_slots")
    assert "with what memory held in them" in sentence(report)


# --- kernels


def _fused(c: Context) -> Array:
    """Scores, softmax and sum at once in float64, rounded once."""
    q, k, v = (x.astype(np.float64) for x in (c["q_post_rope"], c.k, c.v))
    weights = engine.softmax(c.scores(q, k) * c.shape.head**-0.5, c.allowed)
    return flat(c.mix(weights, v)).astype(np.float32)


def test_the_more_exact_kernel_is_no_fault(directory: Path, bench: Bench) -> None:
    """aprender#2091, aprender#2210, aprender#2350, mlxcel#1045: a fused kernel and its fallback
    write other texts, and the fused one is nearer to exact. Of two engines in bfloat16 neither is
    at fault, and it is said which is the more precise."""
    from tools.localize.side_by_side import judgements

    half = make_bench("hard", "bf16", directory, length=LENGTH, steps=STEPS)
    found = []
    for wide in (False, True):
        run = half.right
        if wide:
            made = engine.Engine(*half.loaded, "bf16")
            for layer in range(made.shape.layers):
                made.replace("attention", layer, _fused)
            run = made.run(half.tokens, "all", steps=STEPS)
        found.append(half.localize(run, ("attn_scores", "attn_softmax", *engine.CACHED)))
    assert [report.verdict for report in found] == ["precision"] * 2, [*map(sentence, found)]
    (row,) = [row for row in judgements(*found) if row["stage"] == "attention"]
    assert row["right"] in ("B", "both") and row["b"]["bits"][0] > row["a"]["bits"][0]
