"""What engines round numbers to, in NumPy, step by step as they do it.

Every function takes an array and gives what is left of it, float32. Those that quantise along the
last axis have blocks there; ``nudge`` moves every code by that relative amount before it is
rounded, to see which codes hang on the last bit of the arithmetic before them.

The recipes of ggml were measured against llama.cpp's CPU backend: products and scores agree with
it to 22 to 25 bits. Those of ONNX are the formulas of ``DynamicQuantizeLinear``, those of PyTorch
the ones of ``choose_qparams`` (FBGEMM) and torchao, those of bitsandbytes its ``default`` kernels.
Which format an engine may have where is in ``stages.numbers``.
"""

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
F32 = np.float32


def to_dtype(x: Array, dtype: Any) -> Array:
    """To a dtype and back: nearest, ties to even."""
    with np.errstate(over="ignore"):
        return np.asarray(x, F32).astype(dtype).astype(F32)


def f32(x: Array, nudge: float = 0.0) -> Array:
    return np.asarray(x, F32)


def f16(x: Array, nudge: float = 0.0) -> Array:
    return to_dtype(np.asarray(x, F32) * F32(1 + nudge), np.float16)


def bf16(x: Array, nudge: float = 0.0) -> Array:
    return to_dtype(np.asarray(x, F32) * F32(1 + nudge), ml_dtypes.bfloat16)


def tf32(x: Array, nudge: float = 0.0) -> Array:
    """float32 with ten bits of mantissa, as tensor cores read it."""
    x = np.asarray(x, F32) * F32(1 + nudge)
    bits = np.ascontiguousarray(x).view(np.uint32)
    kept = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), kept.view(F32), x)


def tf32_cut(x: Array, nudge: float = 0.0) -> Array:
    """TF32 by cutting mantissas off, as tensor cores do with what they are given."""
    x = np.ascontiguousarray(x, F32) * F32(1 + nudge)
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(F32)


def divided(x: Any, y: Array) -> Array:
    """x / y, and 0 where y is."""
    return np.divide(
        x, y, out=np.zeros(np.broadcast_shapes(np.shape(x), y.shape), F32), where=y != 0
    )


def _blocks(x: Array, size: int) -> Array:
    return np.ascontiguousarray(x, F32).reshape(*x.shape[:-1], -1, size)


def _extreme(blocks: Array) -> Array:
    """The first value of largest magnitude of each block, with its sign."""
    at = np.abs(blocks).argmax(-1)[..., None]
    return np.take_along_axis(blocks, at, -1)


def _nudged(codes: Array, nudge: float) -> Array:
    """Codes before rounding, moved; without a nudge in float32, as engines have them."""
    return codes * (1 + np.float64(nudge)) if nudge else codes


# --- ggml (llama.cpp)


def _q8(x: Array, nudge: float = 0.0) -> tuple[Array, Array]:
    """Codes and scales of ``quantize_row_q8_0`` and ``_q8_1``: d = amax/127 is stored as float16,
    but codes are rint(x * (127/amax)), with the float32 factor."""
    blocks = _blocks(x, 32)
    most = np.abs(blocks).max(-1, keepdims=True)
    codes = np.rint(_nudged(blocks * divided(F32(127), most), nudge)).astype(F32)
    return codes, f16(most / F32(127))


def q8_0(x: Array, nudge: float = 0.0) -> Array:
    """Blocks of 32, one float16 scale."""
    codes, d = _q8(x, nudge)
    return (codes * d).reshape(x.shape)


def q8_0_ref(x: Array, nudge: float = 0.0) -> Array:
    """``quantize_row_q8_0_ref``, which converters use: codes by the inverse of the scale, a half
    away from zero. It parts from ``q8_0`` where 16-bit weights lie on a half, which many do."""
    blocks = _blocks(x, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / F32(127)
    codes = _nudged(blocks * divided(F32(1), scale), nudge)
    codes = np.sign(codes) * np.floor(np.abs(codes) + codes.dtype.type(0.5))
    return (codes.astype(F32) * f16(scale)).reshape(x.shape)


def q8_1_excess(x: Array) -> Array:
    """What q8_1 adds where a weight has a minimum (q4_1, q5_1): it stores the sum of a block,
    d * sum(codes), as float16, and the minimum of a block of weights multiplies this sum, not the
    values: [..., blocks], stored sum less true sum."""
    codes, d = _q8(x)
    total = codes.sum(-1, keepdims=True)  # whole numbers: exact
    unrounded = (np.abs(_blocks(x, 32)).max(-1, keepdims=True) / F32(127)).astype(F32)
    return (f16(unrounded * total) - (d * total).astype(np.float64))[..., 0]


def q8_k(x: Array, nudge: float = 0.0) -> Array:
    """Blocks of 256, one float32 scale (``quantize_row_q8_K_ref``): the extreme value becomes -127,
    whatever its sign."""
    blocks = _blocks(x, 256)
    factor = divided(F32(-127), _extreme(blocks))
    codes = np.minimum(np.rint(_nudged(blocks * factor, nudge)), 127).astype(F32)
    return (codes * divided(F32(1), factor)).reshape(x.shape)


def _symmetric(x: Array, half: int, nudge: float) -> Array:
    """``quantize_row_q4_0_ref`` (half 8), ``_q5_0_ref`` (16): the extreme value becomes -half."""
    blocks = _blocks(x, 32)
    d = _extreme(blocks) / F32(-half)
    scaled = _nudged(blocks * divided(F32(1), d), nudge) + F32(half + 0.5)
    codes = np.minimum(np.trunc(scaled), 2 * half - 1)
    return ((codes - half).astype(F32) * f16(d)).reshape(x.shape)


def _affine(x: Array, most: int, nudge: float) -> Array:
    """``quantize_row_q4_1_ref`` (most 15), ``_q5_1_ref`` (31): from the minimum to the maximum."""
    blocks = _blocks(x, 32)
    low = blocks.min(-1, keepdims=True)
    d = (blocks.max(-1, keepdims=True) - low) / F32(most)
    scaled = _nudged((blocks - low) * divided(F32(1), d), nudge) + F32(0.5)
    codes = np.minimum(np.trunc(scaled), most).astype(F32)
    return (codes * f16(d) + f16(low)).reshape(x.shape)


def q4_0(x: Array, nudge: float = 0.0) -> Array:
    return _symmetric(x, 8, nudge)


def q5_0(x: Array, nudge: float = 0.0) -> Array:
    return _symmetric(x, 16, nudge)


def q4_1(x: Array, nudge: float = 0.0) -> Array:
    return _affine(x, 15, nudge)


def q5_1(x: Array, nudge: float = 0.0) -> Array:
    return _affine(x, 31, nudge)


IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F32)


def _sum_in_order(x: Array) -> Array:
    """The float32 sum of a C loop, one after the other: NumPy's own goes in pairs."""
    return np.add.accumulate(x, -1, dtype=F32)[..., -1:]


def iq4_nl(x: Array, nudge: float = 0.0) -> Array:
    """``quantize_row_iq4_nl_ref``: codes of a table, at a scale that makes the extreme value the
    table's first; the stored scale is then fitted to the codes by least squares, weighted x^2."""
    blocks = _blocks(x, 32)
    d = _extreme(blocks) / IQ4_NL[0]
    middle = (IQ4_NL[1:] + IQ4_NL[:-1]) / 2  # a tie goes up
    scaled = _nudged(blocks * divided(F32(1), d), nudge)
    values = IQ4_NL[np.searchsorted(middle, scaled, side="right")]
    weight = blocks * blocks * values
    upper, lower = (_sum_in_order(weight * factor) for factor in (blocks, values))
    fitted = np.where(lower > 0, divided(upper, lower), F32(0))
    return (values * f16(fitted)).reshape(x.shape)


def hadamard(x: Array, size: int) -> Array:
    """x [..., H] by an orthonormal Walsh-Hadamard matrix, ``size`` channels at a time, in float32
    (``ggml_compute_forward_fwht``: one factor, then butterflies). Its own inverse."""
    value = np.ascontiguousarray(x, F32).reshape(-1, size) * (F32(1) / np.sqrt(F32(size)))
    step = 1
    while step < size:
        pairs = value.reshape(-1, size // (2 * step), 2, step)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        value = np.stack([a + b, a - b], 2).reshape(-1, size)
        step *= 2
    return value.reshape(x.shape)


# --- integers with one scale for many values


def symmetric(
    x: Array, block: int | None = None, most: float = 127, half: float = 0, nudge: float = 0.0
) -> Array:
    """Signed codes up to ``most`` in blocks along the last axis (None: the whole row), the largest
    magnitude being ``most + half``."""
    grid = _blocks(x, block or x.shape[-1])
    scale = np.abs(grid).max(-1, keepdims=True) / F32(most + half)
    return _coded(grid, scale, most, nudge).reshape(x.shape)


def symmetric_tensor(x: Array, nudge: float = 0.0) -> Array:
    """Signed codes up to 127, one scale for the whole array."""
    x = np.asarray(x, F32)
    return _coded(x, np.abs(x).max(keepdims=True) / F32(127), 127, nudge)


def _coded(x: Array, scale: Array, most: float, nudge: float) -> Array:
    codes = np.rint(_nudged(divided(x, scale), nudge))
    return (np.clip(codes, -most - 1, most) * scale).astype(F32)


def affine_row(x: Array, levels: int = 255, nudge: float = 0.0) -> Array:
    """Unsigned codes with a zero point, for every row of the last axis."""
    x = np.asarray(x, F32)
    return _affine_coded(x, x.min(-1, keepdims=True), x.max(-1, keepdims=True), levels, nudge)


def affine_tensor(x: Array, levels: int = 255, nudge: float = 0.0) -> Array:
    """The same with one scale and zero point for the whole array: ``DynamicQuantizeLinear`` of
    ONNX; ``choose_qparams`` of PyTorch, which takes 127 levels with ``reduce_range``."""
    x = np.asarray(x, F32)
    return _affine_coded(x, x.min(keepdims=True), x.max(keepdims=True), levels, nudge)


def _affine_coded(x: Array, low: Array, high: Array, levels: int, nudge: float) -> Array:
    low, high = np.minimum(low, F32(0)), np.maximum(high, F32(0))  # zero has a code of its own
    scale = (high - low) / F32(levels)
    zero = np.clip(np.rint(divided(-low, scale)), 0, levels)
    # engines add the zero point before or after they round: a nudge is one of the largest code
    codes = np.clip(np.rint(divided(x, scale) + np.float64(nudge * levels)) + zero, 0, levels)
    return ((codes - zero) * scale).astype(F32)


# --- 8-bit floats


def saturated(x: Array, dtype: Any) -> Array:
    """Rounded to an 8-bit float; what is beyond its end becomes that, as in engines' casts."""
    most = F32(ml_dtypes.finfo(dtype).max)
    return to_dtype(np.clip(np.asarray(x, F32), -most, most), dtype)


def e4m3(x: Array, nudge: float = 0.0) -> Array:
    """float8_e4m3fn."""
    return saturated(np.asarray(x, F32) * F32(1 + nudge), ml_dtypes.float8_e4m3fn)


def e5m2(x: Array, nudge: float = 0.0) -> Array:
    return saturated(np.asarray(x, F32) * F32(1 + nudge), ml_dtypes.float8_e5m2)


def scaled_e4m3(x: Array, block: int | None = None, nudge: float = 0.0) -> Array:
    """float8_e4m3fn with one float32 scale for each block of the last axis (None: each row)."""
    grid = _blocks(x, block or x.shape[-1])
    scale = np.abs(grid).max(-1, keepdims=True) / F32(448)
    return (e4m3(divided(grid, scale), nudge) * scale).reshape(x.shape)


def scaled_e4m3_tensor(x: Array, nudge: float = 0.0) -> Array:
    """float8_e4m3fn with one float32 scale for the whole array."""
    x = np.asarray(x, F32)
    scale = np.abs(x).max(keepdims=True) / F32(448)
    return e4m3(divided(x, scale), nudge) * scale


# --- 4 bits: the nearest value of a table, times a scale


def _nearest_of(table: Array, x: Array) -> Array:
    """Each value's nearest one of a rising table; between two the lower."""
    return table[np.searchsorted((table[1:] + table[:-1]) / 2, x)]


# bitsandbytes' tables: quantiles of a normal distribution, and 8, 12, 4, 6, 2, 3 over 12.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], F32,
)  # fmt: skip
_FP4 = np.array([0.0625, 2, 3, 4, 6, 8, 12], F32) / F32(12)
FP4 = np.concatenate([-_FP4[::-1], np.zeros(1, F32), _FP4])


def by_table(x: Array, table: Array, block: int = 64, nudge: float = 0.0) -> Array:
    """bitsandbytes' ``quantize_4bit``: blocks along the last axis, the largest magnitude is 1."""
    grid = _blocks(x, block)
    scale = np.abs(grid).max(-1, keepdims=True)
    return (_nearest_of(table, _nudged(divided(grid, scale), nudge)) * scale).reshape(x.shape)


def _e2m1(x: Array, nudge: float) -> Array:
    """float4: 0, 0.5, 1, 1.5, 2, 3, 4 and 6; what is beyond is 6."""
    return to_dtype(np.clip(_nudged(x, nudge), -6, 6), ml_dtypes.float4_e2m1fn)


def mxfp4(x: Array, nudge: float = 0.0) -> Array:
    """OCP's MXFP4: blocks of 32 in float4 (e2m1), the scale a power of two (e8m0): that of the
    largest magnitude over that of 6, as ggml and torchao have it by default."""
    blocks = _blocks(x, 32)
    most = np.abs(blocks).max(-1, keepdims=True)
    exponent = np.maximum(np.frexp(most)[1] - 3, -127)  # of the largest magnitude, less that of 4
    scale = np.where(most > 0, np.ldexp(F32(1), exponent), F32(0))
    return (_e2m1(divided(blocks, scale), nudge) * scale).astype(F32).reshape(x.shape)


def nvfp4(x: Array, of_tensor: bool = True, nudge: float = 0.0) -> Array:
    """NVFP4: blocks of 16 in float4 (e2m1), each with a float8 (e4m3) scale, largest magnitude over
    6; ``of_tensor``: these in units that make the tensor's largest scale 448."""
    blocks = _blocks(x, 16)
    most = np.abs(blocks).max(-1, keepdims=True)
    unit = most.max(keepdims=True) / F32(6 * 448) if of_tensor else np.ones((1, 1), F32)
    scale = e4m3(divided(most / F32(6), unit)) * unit
    return (_e2m1(divided(blocks, scale), nudge) * scale).astype(F32).reshape(x.shape)


# --- 8-bit integers beside 16-bit floats

OUTLIER = 6.0  # bitsandbytes' threshold


def llm_int8(x: Array, nudge: float = 0.0) -> Array:
    """bitsandbytes' LLM.int8: float16, then signed codes with one scale a row of all that lies
    below ``OUTLIER``; columns with something beyond it stay float16. Needs all rows of a call."""
    x = f16(x)
    beyond = np.abs(x) >= F32(OUTLIER)
    columns = beyond.reshape(-1, x.shape[-1]).any(0)
    return np.where(columns, x, symmetric(np.where(beyond, F32(0), x), nudge=nudge))


def llm_int8_plain(x: Array, nudge: float = 0.0) -> Array:
    """The same without outliers: a threshold of 0."""
    return symmetric(f16(x), nudge=nudge)
