"""The first operation with bit-equal inputs and unequal outputs."""

from pathlib import Path

import numpy as np
import pytest

import qwen_jax
from stages.invariance import equality, partings
from stages.trace import MemoryTrace, Trace
from tests.tiny import write_checkpoint
from tools.parity import invariance

TOKENS = (3, 1, 4, 1, 5, 9, 2, 6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    model = write_checkpoint(tmp_path_factory.mktemp("invariance") / "tiny")
    return qwen_jax.trace_model(model, TOKENS)


def changed(trace: Trace, *places: tuple[str, int | None, tuple[int, ...]]) -> Trace:
    """The same with the next number at places of stages."""
    values = {key: np.array(trace.read(*key)) for key in trace.entries}
    for stage, layer, at in places:
        value = values[stage, layer]
        value[at] = np.nextafter(value[at], np.float32(np.inf))
    return MemoryTrace("changed", trace.config, trace.tokens, "float32", values)


def test_nothing_parts_from_itself(whole: Trace) -> None:
    assert partings(whole, changed(whole)) == []


def test_a_last_bit_is_found_where_it_is_made(whole: Trace) -> None:
    """And what is made of it is not held against what comes after it."""
    other = changed(whole, ("k_post_rope", 0, (5, 1, 0)), ("attn_scores", 0, (0, 6, 5)))
    [found] = partings(whole, other)
    assert found.key == ("k_post_rope", 0) and found.rows == [5]
    # row 4 does not see key 5
    [_, second] = partings(whole, changed(other, ("attn_scores", 0, (0, 4, 2))))
    assert second.key == ("attn_scores", 0) and second.rows == [4]


def test_a_masked_score_does_not_count(whole: Trace) -> None:
    assert partings(whole, changed(whole, ("attn_scores", 0, (0, 2, 5)))) == []


def test_what_is_equal_to_the_last_bit_is_counted(whole: Trace) -> None:
    seen = ("attn_scores", 0, (0, 6, 5)), ("attn_scores", 0, (0, 2, 5))  # the second is masked
    other = changed(whole, ("qkv_matmul", 1, (2, 7)), *seen)
    found = equality(whole, other)
    assert found is not None
    counts = {(each.stage, each.layer): (each.equal, each.of) for each in found.operations}
    size, heads = len(TOKENS), whole.config["num_attention_heads"]
    unmasked = heads * size * (size + 1) // 2
    assert counts["attn_scores", 0] == (unmasked - 1, unmasked)
    every = whole.read("qkv_matmul", 1).size
    assert counts["qkv_matmul", 1] == (every - 1, every)
    unequal = {key for key, (equal, of) in counts.items() if equal != of}
    assert unequal == {("qkv_matmul", 1), ("attn_scores", 0)}
    assert found.parts_first == partings(whole, other)[0]
    assert found.parts_first.key == ("attn_scores", 0)


def test_other_tokens_are_not_counted(whole: Trace) -> None:
    other = changed(whole)
    other.tokens = (*TOKENS[:-1], 7)
    assert equality(whole, other) is None


def test_a_missing_stage_is_passed_over(whole: Trace) -> None:
    other = changed(whole, ("attn_norm", 1, (2, 0)), ("qkv_matmul", 1, (2, 7)))
    del other.entries["attn_norm", 1]
    [found] = partings(whole, other)
    assert found.key == ("qkv_matmul", 1) and found.rows == [2]


def test_ways_of_computing_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an engine that is off by a bit in a later call."""
    import jax

    from qwen_jax.engine import JaxEngine

    class Odd(JaxEngine):
        def run_calls(self, batch, steps, cache, logits, want, emit):  # type: ignore[no-untyped-def]
            def odd(stage, layer, value, first):  # type: ignore[no-untyped-def]
                if (stage, layer) == ("ffn_up", 1):
                    later = np.nextafter(value, np.float32(np.inf))
                    value = np.where(first + np.arange(value.shape[1])[:, None] < 16, value, later)
                emit(stage, layer, value, first)

            used = odd if len(steps) > 1 else emit
            return super().run_calls(batch, steps, cache, logits, want, used)

    monkeypatch.setattr(invariance, "LENGTHS", (20,))
    monkeypatch.setattr(invariance, "BATCHES", (2,))
    model = qwen_jax.open_model(write_checkpoint(tmp_path / "tiny"))
    random = np.random.default_rng(0)

    def stream(length: int) -> tuple[int, ...]:
        return tuple(random.integers(0, 48, length).tolist())

    made = Odd(model, "float32", "xla", jax.devices("cpu")[0], keep=True)
    found = {each.way: each for each in invariance.sweep(made, model, stream, "float32")}
    assert not found["through a cache"].partings  # in one call
    chunks = [each for each in found["in chunks of 16"].partings if each.stage == "ffn_up"]
    assert chunks and chunks[0].rows == [16, 17, 18, 19]
    assert "identical" in found["through a cache"].says
