"""Decodes compared: with a prefill row by row, and with another generation of the same prompt."""

import json
from pathlib import Path

import numpy as np
import pytest

import qwen_jax
from stages.errors import NotComparable
from stages.trace import MemoryTrace, Trace
from tests.test_steps import STEPS, TOKENS, opened, split
from tests.tiny import write_checkpoint
from tools import diff

# The tokens of another generation, after the same prompt and one token more.
OTHERS = (*TOKENS[:8], 11, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prefill(checkpoint: Path) -> Trace:
    return qwen_jax.trace_model(str(checkpoint), TOKENS)


@pytest.fixture(scope="module")
def decode(checkpoint: Path, prefill: Trace, tmp_path_factory) -> Trace:
    return opened(checkpoint, split(prefill, tmp_path_factory.mktemp("a") / "decode"))


@pytest.fixture(scope="module")
def other(checkpoint: Path, tmp_path_factory) -> Trace:
    made = qwen_jax.trace_model(str(checkpoint), OTHERS)
    return opened(checkpoint, split(made, tmp_path_factory.mktemp("b") / "other"), OTHERS)


def changed(trace: Trace, stage: str, layer: int, row: int, factor: float) -> Trace:
    """A decode with one row of one stage multiplied."""
    values = {key: np.array(trace.read(*key)) for key in trace.entries}
    values[stage, layer][row] *= factor
    found = MemoryTrace("changed", trace.config, trace.tokens, "float32", values)
    found.steps = trace.steps
    return found


def test_a_decode_and_a_prefill_row_by_row(decode: Trace, prefill: Trace):
    same = diff.diff(decode, prefill)
    assert same.agree and "10 tokens in 5 calls" in str(same)
    assert "identical: all" in str(same) and "row by row" not in str(same)
    assert [(step.step, step.rows) for step in same.by_step] == [
        (0, (0, 3)), (1, (4, 6)), (2, (7, 7)), (3, (8, 8)), (4, (9, 9)),
    ]  # fmt: skip

    near = diff.diff(prefill, changed(decode, "ffn_up", 1, 8, 1 + 2**-18))
    assert near.agree and "row by row: all within the tolerance, most row 8 (step 3), " in str(near)

    far = diff.diff(changed(decode, "ffn_up", 1, 8, 1.5), prefill)
    assert "row by row: 1 of 10 beyond the tolerance; first row 8 (step 3), layer 1 ffn_up" in str(
        far
    )
    assert far.by_step[3].relative_l2 == pytest.approx(0.5) and far.by_step[4].relative_l2 == 0
    assert diff.diff(prefill, prefill).by_step == []


def test_nan_in_a_row_is_beyond_any_tolerance(decode: Trace, prefill: Trace):
    found = diff.diff(changed(decode, "ffn_up", 0, 5, np.nan), prefill)
    worst = found.by_step[1]
    assert (worst.row, worst.stage, worst.relative_l2) == (5, "ffn_up", np.inf)
    assert "first row 5 (step 1), layer 0 ffn_up inf" in str(found)
    assert not found.to_json()["smallest_tolerance"]


def test_rows_of_the_end_alone(decode: Trace, prefill: Trace):
    """The head's last rows: those before were not compared, and are not called equal or not."""
    values = {("lm_head", None): prefill.read("lm_head", None)[-3:]}
    part = MemoryTrace("part", prefill.config, TOKENS, "float32", values)
    part.steps = STEPS
    found = diff.diff(changed(decode, "lm_head", None, 8, 2.0), part)
    assert [step.relative_l2 > 0 for step in found.by_step] == [False, False, False, True, False]
    assert "first row 8 (step 3), lm_head" in str(found)


@pytest.mark.parametrize("near", [False, True])
def test_two_generations_part(decode: Trace, other: Trace, near: bool):
    a = changed(decode, "ffn_up", 1, 7, 1.25) if near else decode
    found = diff.diff(a, other)
    assert found.parted and not found.agree
    assert (found.parted.row, found.parted.a.step, found.parted.b.token) == (8, 3, 11)
    logits = decode.read("lm_head", None)[7].astype(np.float64)
    assert found.parted.a.margin == pytest.approx(logits[TOKENS[8]] - logits[11])
    assert found.parted.a.likeliest == logits.argmax()
    text = str(found)
    assert "compared are the 8 rows in common; decode has 2, other has 2 more" in text or near
    assert "differ: the generations part at row 8 (step 3): A goes on with token 4 (" in text
    assert f", though {logits.argmax()} is its likeliest)" in text
    if near:
        assert "until then differ: the traces part at layer 1 ffn_up" in text
        assert "first row 7 (step 2), layer 1 ffn_up 2.5e-01" in text
    else:
        assert "until then agree: every stage within" in text or "until then identical" in text
    for key in found.rows:
        assert found.a.read(*key).shape == found.b.read(*key).shape
        assert found.a.rows_of(*key) == 8


def test_a_generation_that_is_longer(checkpoint: Path, decode: Trace, tmp_path: Path):
    made = qwen_jax.trace_model(str(checkpoint), (*TOKENS, 1, 2))
    longer = opened(checkpoint, split(made, tmp_path / "longer", (*STEPS, 1, 1)), (*TOKENS, 1, 2))
    for a, b in ((decode, longer), (longer, decode)):
        found = diff.diff(a, b)
        assert found.agree and found.parted is None and len(found.a.tokens) == 10
        assert "compared are the 10 rows in common; longer has 2 more" in str(found)


def test_other_prompts_are_not_comparable(
    checkpoint: Path, decode: Trace, prefill: Trace, tmp_path
):
    """Tokens that were not chosen by the model: in a prompt, in a prefill, or all of them."""
    for count in (3, 6, 0):
        tokens = (*TOKENS[:count], 11, *TOKENS[count + 1 :])
        made = qwen_jax.trace_model(str(checkpoint), tokens)
        name = f"other{count}"
        theirs = opened(checkpoint, split(made, tmp_path / name), tokens)
        for a, b in ((decode, theirs), (theirs, decode), (made, prefill)):
            with pytest.raises(NotComparable, match="the tokens differ"):
                diff.diff(a, b)
    with pytest.raises(NotComparable, match="10 tokens / 7 tokens"):
        diff.diff(prefill, qwen_jax.trace_model(str(checkpoint), TOKENS[:7]))


def test_without_logits_the_margin_is_unknown(decode: Trace, other: Trace, tmp_path: Path):
    values = {("ffn_up", 0): decode.read("ffn_up", 0)}
    bare = MemoryTrace("bare", decode.config, TOKENS, "float32", values)
    bare.steps = STEPS
    found = diff.diff(bare, other)
    assert found.parted and found.parted.a.margin is None
    assert "A goes on with token 4 (its logits are not there), B with 11 (" in str(found)
    assert json.dumps(found.to_json())
