"""Reading weights in pieces, wider, or some rows alone gives what reading them whole gives."""

from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine import JaxEngine
from qwen_jax.weights import base
from qwen_jax.weights.base import Weights, aligned_empty
from tests.tiny import write_checkpoint
from tests.traces import jax_trace


class Numbers(Weights):
    """Tensors of random bits, NaN and subnormal numbers among them."""

    directory = None

    def __init__(self, dtype: str, shape: tuple[int, ...] = (37, 5)) -> None:
        super().__init__()
        self.stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        bits = np.random.default_rng(0).bytes(int(np.prod(shape)) * self.stored.itemsize)
        self.values = np.frombuffer(bits, self.stored).reshape(shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"x": self.values.shape}

    def dtype(self, name: str) -> np.dtype:
        return self.stored

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        assert out.flags.c_contiguous and out.dtype == self.stored
        out[...] = self.values[start : start + len(out)]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(autouse=True, params=[1, 64, 1 << 20])
def block(request, monkeypatch):
    monkeypatch.setattr(base, "BLOCK", request.param)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.filterwarnings("ignore:invalid value")  # a signalling NaN becomes a quiet one
def test_loaded_wider_it_is_the_same_number(dtype, wide):
    source = Numbers(dtype)
    out = aligned_empty((37, 5), np.dtype(wide))
    source.load("x", 0, out)
    np.testing.assert_array_equal(out, source.values.astype(wide))
    finite = np.isfinite(source.values)
    assert np.array_equal(np.signbit(out[finite]), np.signbit(source.values[finite]))
    whole = Numbers(dtype)
    assert same(whole.read("x"), source.values) and source.hashes == whole.hashes


@settings(deadline=None)
@given(st.lists(st.integers(1, 37), max_size=5))
def test_the_hash_does_not_depend_on_the_pieces(cuts):
    source, whole = Numbers("float16"), Numbers("float16")
    edges = sorted({0, 37, *(c for c in cuts if c < 37)})
    parts = [source.rows("x", a, b) for a, b in pairwise(edges)]
    assert same(np.concatenate(parts), source.values)
    assert source.hashes["x"] == whole.hash("x")


def test_rows_out_of_order_leave_no_hash_and_do_not_spoil_one():
    source = Numbers("float16")
    for start, stop in [(5, 37), (0, 10), (20, 37), (0, 10), (10, 12), (12, 12), (30, 37)]:
        source.rows("x", start, stop)
    assert not source.hashes
    assert source.hash("x") == Numbers("float16").hash("x")


@settings(deadline=None)
@given(st.lists(st.integers(0, 36)), st.booleans())
def test_rows_gathered_in_any_order_from_several_blocks(rows, hashed):
    source = Numbers("bfloat16")
    if hashed:
        source.hash("x")
    wanted = np.array(rows, int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BLOCK", 5 * source.values[0].nbytes)
        assert same(source.gather("x", wanted), source.values[wanted])
    assert source.hashes["x"] == Numbers("bfloat16").hash("x")


@pytest.mark.parametrize("step", [1, 5, 36, 37, 100])
def test_blocks_are_the_tensor(step):
    source = Numbers("float32")
    blocks = list(source.blocks("x", step))
    assert [start for start, _ in blocks] == list(range(0, 37, step))
    assert same(np.concatenate([rows for _, rows in blocks]), source.values)
    assert source.hashes["x"] == Numbers("float32").hash("x")


def test_memory_is_aligned():
    for size in range(1, 50):
        assert aligned_empty((size, 3), np.dtype("float16")).ctypes.data % base.ALIGNMENT == 0


def test_weights_widened_on_the_way_give_the_same_trace(tmp_path: Path, monkeypatch, block):
    model = write_checkpoint(tmp_path / "model", dtype="bfloat16", num_hidden_layers=3)
    tokens = tuple(range(1, 12))
    wide = jax_trace(model, tokens)
    monkeypatch.setattr(JaxEngine, "_host_dtype", lambda self, name: self.model.dtype(name))
    narrow = jax_trace(model, tokens)
    assert all(same(narrow[key], wide[key]) for key in wide) and len(wide) == 3 * 17 + 3
