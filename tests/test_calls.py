"""Engines that run in calls: mistakes with a cache are placed to the call and named; sound caches
of any format are never accused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stages.open import open_trace
from tests.planted import faults
from tests.planted.cache_faults import CACHE_FAULTS
from tests.planted.cached import ASIDE, CHUNKS, DECODING, LENGTH, bench_for, judge, known
from tests.planted.faults import attend, flat, scores
from tests.planted.matrix import Bench, make_bench
from tools.localize import localize
from tools.localize.decode_steps import decoded_from
from tools.localize.mistakes import cache_rows
from tools.localize.result import faults as reported
from tools.localize.result import sentence
from tools.numpy_engine import engine
from tools.numpy_engine.engine import Array, Context

MODES = ("f32", "bf16")
NAMES = {
    "bfloat16": "kv bfloat16", "float16": "kv float16", "float8_e4m3fn": "kv float8_e4m3",
    "float8_e5m2": "kv float8_e5m2", "q8_0": "kv q8_0", "q4_0": "kv q4_0",
    "int8": "kv int8 per token and head",
}  # fmt: skip

REPEATED = (
    "v_tail_not_written", "v_row_stale", "v_slot_off_by_one", "v_row_not_written",
    "v_of_another_sequence",
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calls")


@pytest.mark.parametrize("name", known())
def test_a_mistake_is_placed_to_the_call_and_named(directory: Path, name: str) -> None:
    """Each in one arithmetic; all in both: ``python -m tests.planted.cached --mode f32 bf16``."""
    fault = known()[name]
    mode = MODES[[*known()].index(name) % 2]
    row = judge(bench_for(fault, mode, directory), fault)
    assert row.placed and row.called and row.named, row


@pytest.mark.parametrize("name", REPEATED)
def test_equal_tokens_have_the_same_v(directory: Path, name: str) -> None:
    """In layer 0, where every row of such a token could as well be another one of them."""
    fault = CACHE_FAULTS[f"cache.{name}"]
    some = bench_for(fault, "bf16", directory)
    few = sorted(set(some.tokens))[:12]
    tokens = np.random.default_rng(5).choice(few, len(some.tokens)).tolist()
    bench = Bench(some.model.directory, tokens, "bf16", **some.more)
    run = faults.plant(bench.loaded, tokens, fault, [0], bench.mode, "all", **bench.more)
    (found,) = reported(bench.localize(run))
    assert found.layer == 0 and found.diagnosis[0].name == fault.diagnosis


V = np.random.default_rng(4).normal(size=(9, 6))


@pytest.mark.parametrize(
    ("tokens", "holds", "name"),
    [
        ("777777123", {8: 6}, "cache_row_stale"),  # most tokens are one
        ("123412356", {0: 4, 1: 5, 2: 6, 4: 0, 5: 1, 6: 2, 3: 7, 7: 3}, "cache_rows_permuted"),
        ("122345678", {5: 4, 6: 5, 7: 6, 4: cache_rows.ZERO}, "cache_slot_off_by_one"),
        ("112233445", {1: 0, 3: 2}, None),  # what it holds is what it should
    ],
)
def test_rows_that_are_alike(tokens: str, holds: dict[int, int], name: str | None) -> None:
    right = V[[int(t) for t in tokens]]
    there = np.vstack([right, np.zeros(6)])[[holds.get(n, n) for n in range(9)]]
    alike, off = cache_rows._alike(right), cache_rows._distances(there, right)
    rows = np.array([cache_rows._nearest(off[n], there[n], n, alike) for n in range(9)])
    found = cache_rows.Held(rows, 0, False, alike)
    told = [
        entry for entry, _, pattern in cache_rows.PATTERNS if found.wrong.size and pattern(found)
    ]
    assert told[:1] == ([name] if name else [])


def test_a_row_with_nan_is_like_itself_alone() -> None:
    right = V[[0, 1, 1, 2]]
    right[3, 0] = np.nan
    assert cache_rows._alike(right).tolist() == [0, 1, 1, 3]


def test_a_position_is_one_of_the_sequence(directory: Path) -> None:
    """Not of the calls that are wrong, to which the search for a name is confined."""
    bench = make_bench("hard", "f32", directory, length=LENGTH, steps=CHUNKS["both"])
    row = LENGTH - 3
    run = engine.Engine(*bench.loaded, "f32").run(bench.tokens, "all", **bench.more)
    run.stages[1, "ffn_up"][row] = 0
    (found,) = reported(bench.localize(run))
    assert found.diagnosis[0].says == f"zero in position {row}"


@pytest.mark.parametrize("cache", ["q4_0", "q8_0", "int8"])
def test_a_row_of_blocks_that_is_never_written(directory: Path, cache: str) -> None:
    fault = CACHE_FAULTS["cache.k_row_not_written"]
    steps = CHUNKS["both"]
    bench = make_bench("hard", "f32", directory, length=LENGTH, steps=steps, cache=cache)
    (found,) = reported(bench.localize(bench.plant(fault, "one")))
    assert found.stage == "k_cache" and found.diagnosis[0].name == fault.diagnosis


def test_there_are_mistakes_enough() -> None:
    assert len(CACHE_FAULTS) >= 30
    assert set(ASIDE) < set(CACHE_FAULTS) and len(DECODING) >= 6


@pytest.mark.grid
@pytest.mark.parametrize("cache", NAMES)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_cache_of_any_format_is_read_off_and_not_accused(
    directory: Path, cache: str, chunks: str
) -> None:
    """Under the bias of k that published models have: tens of times k itself."""
    mode = MODES[(list(NAMES).index(cache) + list(CHUNKS).index(chunks)) % 2]
    steps = CHUNKS[chunks]
    bench = make_bench("hard", mode, directory, length=LENGTH, steps=steps, cache=cache)
    report = bench.localize(bench.right)
    assert report.verdict == "precision", sentence(report)
    stored = {report.precision[stage]["format"] for stage in engine.CACHED}
    assert stored == {NAMES[cache] if mode == "f32" or "16" not in cache else None}
    assert report.precision["attn_scores"]["format"] is None  # judged by what was read back


def _its_own(cached: str, new: Callable[[Context], Array], first: bool, c: Context) -> Array:
    """What attention reads: rows of its own, or of the first call, before the cache rounds them."""
    held: Array = c[cached]
    return held if first and c.past else np.concatenate([held[: c.past], new(c)])


@pytest.mark.parametrize(
    ("cache", "first"), [("q8_0", True), ("q4_0", False), ("float8_e4m3fn", True)]
)
def test_a_prefill_may_read_what_the_cache_has_not_rounded(
    directory: Path, cache: str, first: bool
) -> None:
    """As engines do that call a kernel of their own for it; with the cache dumped, and without."""
    bench = make_bench("hard", "f32", directory, length=LENGTH, steps=CHUNKS["both"], cache=cache)
    made = engine.Engine(*bench.loaded)
    k = partial(_its_own, "k_cache", lambda c: c["k_post_rope"], first)
    v = partial(_its_own, "v_cache", lambda c: c.attended()[2], first)
    for layer in range(made.shape.layers):
        made.replace("attn_scores", layer, lambda c: scores(c, k=k(c)))
        made.replace("attention", layer, lambda c: flat(attend(c, v(c))))
    run = made.run(bench.tokens, "all", **bench.more)
    when = "the first call" if first else "their own call"
    for omit in ((), engine.CACHED):
        report = bench.localize(run, omit)
        assert report.verdict == "precision", sentence(report)
        assert f"read unrounded in {when}" in sentence(report)
        formats = {stage: entry["format"] for stage, entry in report.precision.items()}
        where = ("attn_scores", "attention") if omit else engine.CACHED
        assert {formats[stage] for stage in where} == {NAMES[cache]}


# Each of them in v, and what shows in both or in k alone.
UNSEEN = [f"cache.v_{what}" for what in (
    "row_not_written", "row_stale", "tail_not_written", "slot_off_by_one", "of_another_sequence",
    "not_appended", "before_bias",
)] + [f"cache.{what}" for what in (
    "kv_exchanged", "k_before_rope", "k_heads_exchanged", "k_of_another_sequence",
    "k_slot_off_by_one",
)]  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_a_mistake_in_a_cache_that_was_not_dumped(directory: Path, name: str) -> None:
    """It shows in what is computed from it: k in the scores, v in the weighted sum."""
    fault = CACHE_FAULTS[name]
    mode = MODES[UNSEEN.index(name) % 2]
    row = judge(bench_for(fault, mode, directory), fault, engine.CACHED)
    assert row.placed and row.called and row.named, row


@pytest.fixture(scope="module")
def late(directory: Path) -> tuple[Bench, engine.Run]:
    """The decoded tokens' positions begin at 0 again."""
    fault = CACHE_FAULTS["cache.position_restarts"]
    bench = bench_for(fault, "f32", directory)
    return bench, bench.plant(fault, "one")


def test_what_is_said_of_the_calls(late: tuple[Bench, engine.Run], tmp_path: Path) -> None:
    """Of a dump that came call by call, as a user hands it over."""
    bench, run = late
    report = localize(open_trace(run.dump_calls(tmp_path / "dump"), bench.layout), bench.model)
    (fault,) = reported(report)
    entry = fault.to_json()
    assert (entry["steps"], entry["first"]) == ("3-", {"step": 3, "position": 40})
    assert entry["where"]["positions"] == "40-"
    said = (
        "layer 2 q_post_rope and k_post_rope, from the first decoded token on (step 3, position 40)"
    )
    assert said in sentence(report) and said.partition(", ")[2] in str(report)
    assert fault.also == ["k_post_rope"]


def test_a_mistake_of_every_call_says_nothing_of_calls(directory: Path) -> None:
    fault = CACHE_FAULTS["cache.v_before_bias"]
    bench = bench_for(fault, "f32", directory)
    (found,) = reported(bench.localize(bench.plant(fault, "one")))
    assert found.when is None and "steps" not in found.to_json()


@pytest.mark.parametrize(
    ("steps", "first"), [((40, 1, 1), 1), ((1, 1, 1), 1), ((7, 7), 2), ((5, 1, 1, 2), 4)]
)
def test_where_the_decode_begins(steps: tuple[int, ...], first: int) -> None:
    assert decoded_from(steps) == first
