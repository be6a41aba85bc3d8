"""The number formats against what nobody here wrote: ggml's own quantiser, the gguf package,
bitsandbytes' published tables, ml_dtypes."""

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from stages import numbers, roundings
from tests.ggml import dequantize, library, quantize, rounded

RANDOM = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    """Of all sizes, with zeros and equal extremes among them."""
    x = RANDOM.standard_normal(shape).astype(np.float32)
    x *= np.float32(10) ** np.arange(-3, len(x) - 3, dtype=np.float32)[:, None]
    x[1, :64] = 0
    x[2, 5], x[2, 9] = -x[2].max() * 2, x[2].max() * 2
    return x


def check(found: np.ndarray, theirs: np.ndarray, x: np.ndarray, steps: float) -> None:
    """The same but for codes that hang on the last bit, each one step off."""
    differing = found != theirs
    assert differing.mean() < 2e-3
    step = np.abs(x).max(-1, keepdims=True) / steps
    assert (np.abs(found - theirs) <= 1.01 * step)[differing].all()


WEIGHTS = [f for f in numbers.used(numbers.WEIGHT) if f.ggml and f.ways and f.block > 1]


@pytest.mark.parametrize("format", WEIGHTS, ids=lambda f: f.name)
def test_a_type_of_ggml_is_what_its_own_quantiser_makes(format: numbers.NumberFormat) -> None:
    x = values(6, 512)
    theirs = dequantize(quantize(x, format.ggml), format.ggml)
    check(format.ways[-1](x), theirs, x, {"8-bit": 127}.get(format.level, 7))


def test_what_the_inputs_of_k_quants_are_rounded_to_is_what_llama_cpp_makes_of_them() -> None:
    """Blocks of 256 codes, one float32 scale before them and 16 sums behind."""
    x = values(6, 512)
    block = np.dtype([("scale", np.float32), ("codes", np.int8, 256), ("sums", np.int16, 16)])
    raw = np.empty(x.size // 256, block)
    library().quantize_row_q8_K_ref(
        *map(ctypes.c_void_p, (x.ctypes.data, raw.ctypes.data)), ctypes.c_int64(x.size)
    )
    theirs = (raw["codes"] * raw["scale"][:, None]).astype(np.float32).reshape(x.shape)
    check(roundings.q8_k(x), theirs, x, 127)


def test_what_inputs_are_rounded_to_is_what_llama_cpp_makes_of_them() -> None:
    """The processor's own ``quantize_row_q8_0``, and the sums that ``_q8_1`` stores."""
    x = values(6, 512)
    kinds = {
        "q8_0": np.dtype([("scale", np.float16), ("codes", np.int8, 32)]),
        "q8_1": np.dtype([("scale", np.float16), ("sum", np.float16), ("codes", np.int8, 32)]),
    }
    for name, block in kinds.items():
        raw = np.empty(x.size // 32, block)
        convert = getattr(library(), f"quantize_row_{name}")
        convert(*map(ctypes.c_void_p, (x.ctypes.data, raw.ctypes.data)), ctypes.c_int64(x.size))
        theirs = raw["codes"] * raw["scale"].astype(np.float32)[:, None]
        check(numbers.named(name).round(x), theirs.reshape(x.shape), x, 127)
    stored = raw["sum"].astype(np.float64) - theirs.astype(np.float64).sum(-1)
    ours = roundings.q8_1_excess(x).ravel()
    near = np.abs(ours - stored) <= 1e-3 * np.abs(raw["sum"].astype(np.float64)) + 1e-7
    assert near.mean() > 0.98 and np.abs(ours).max() > 0


KEPT = [f for f in numbers.used(numbers.CACHE) if f.block > 1]


@pytest.mark.parametrize("format", KEPT, ids=lambda f: f.name)
def test_a_cache_of_llama_cpp_is_what_its_own_conversion_makes(
    format: numbers.NumberFormat,
) -> None:
    x = values(6, 512)
    theirs = rounded(x, format.name.upper())
    check(format.ways[-1](x), theirs, x, 127 if format.level == "8-bit" else 7)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_type_of_ggml_is_what_the_gguf_package_makes(kind: str) -> None:
    (format,) = [f for f in WEIGHTS if f.ggml == kind]
    x = values(6, 512)
    number = GGMLQuantizationType[kind]
    theirs = quants.dequantize(quants.quantize(x, number), number)
    check(format.ways[-1](x), theirs, x, 127 if kind == "Q8_0" else 7)


def test_mxfp4_is_that_of_ggml() -> None:
    x = values(6, 512)
    theirs = dequantize(quantize(x, "MXFP4"), "MXFP4")
    check(roundings.mxfp4(x), theirs, x, 2)


def test_nvfp4_is_read_as_the_gguf_package_reads_it() -> None:
    """Values that its decoder makes are left as they are, in blocks of 16 with a float8 scale."""
    block, size = 64, 36
    raw = RANDOM.integers(0, 256, (8, size), np.uint8)
    raw[:, :4] = RANDOM.integers(0x20, 0x60, (8, 4), np.uint8)  # scales that are normal numbers
    raw[:, 4::8] = 0x77  # the largest magnitude in each block
    x = quants.dequantize(raw, GGMLQuantizationType.NVFP4).reshape(8, block)
    np.testing.assert_array_equal(roundings.nvfp4(x, of_tensor=False), x)
    spread = x * np.float32(1.001)  # and what lies near them goes there, if no scale is moved
    assert np.abs(roundings.nvfp4(spread, of_tensor=False) - x).max() <= 0.07 * np.abs(x).max()


# Appendix E of QLoRA (Dettmers et al. 2023), as bitsandbytes has it.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' backends/utils.py, to four digits there
FP4 = (0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25)


@pytest.mark.parametrize("name, table", [("nf4", NF4), ("fp4", (*FP4, *(-v for v in FP4)))])
def test_a_block_of_64_has_the_values_of_bitsandbytes(name: str, table: tuple) -> None:
    x = values(6, 512)
    scale = np.abs(x.reshape(6, 8, 64)).max(-1, keepdims=True)
    left = numbers.named(name).round(x).reshape(6, 8, 64)
    codes = np.divide(left, scale, out=np.zeros_like(left), where=scale > 0)
    every = np.sort(np.array(table))
    nearest = every[np.abs(codes[..., None] - every).argmin(-1)]
    assert np.abs(codes - nearest).max() < 1e-4
    right = np.divide(x.reshape(left.shape), scale, out=np.zeros_like(left), where=scale > 0)
    assert (np.abs(right - codes) <= np.abs(right[..., None] - every).min(-1) + 1e-4).all()


@pytest.mark.parametrize("format", [f for f in numbers.FORMATS if f.dtype is not None and f.uses],
                         ids=lambda f: f.name)  # fmt: skip
def test_a_floating_format_is_that_of_ml_dtypes(format: numbers.NumberFormat) -> None:
    if format.keeps == "blocks":
        return
    x = values(6, 512)
    most = np.float32(ml_dtypes.finfo(format.dtype).max)
    theirs = np.clip(x, -most, most).astype(format.dtype).astype(np.float32)
    np.testing.assert_array_equal(format.round(x), theirs)


def test_llm_int8_keeps_columns_with_outliers() -> None:
    """bitsandbytes: the scale of a row is that of what lies below 6; outlier columns stay."""
    x = RANDOM.standard_normal((4, 32)).astype(np.float32)
    x[1, 7] = 9.0
    left = roundings.llm_int8(x)
    narrow = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(left[:, 7], narrow[:, 7])
    others = np.delete(narrow, 7, 1)
    most = np.abs(np.where(np.abs(narrow) >= 6, 0, narrow)).max(1, keepdims=True)
    codes = np.rint(others * (np.float32(127) / most))
    np.testing.assert_allclose(np.delete(left, 7, 1), codes * (most / np.float32(127)), atol=1e-6)


def test_names_are_of_one_format_each() -> None:
    for named in (lambda f: f.name, lambda f: f.of_weight):
        names = [named(f) for f in numbers.FORMATS]
        assert len(names) == len({*names})


def test_the_documents_have_the_table() -> None:
    text = (Path(__file__).parents[1] / "docs" / "localize.md").read_text()
    assert numbers.markdown() in text
