"""What engines round numbers to, in NumPy, step by step as they do it.

Every function takes an array and gives what is left of it, float32. Those that quantise along the
last axis have blocks there; ``nudge`` moves every code by that relative amount before it is
rounded, to see which codes hang on the last bit of the arithmetic before them.

The recipes of ggml were measured against llama.cpp's CPU backend: products and scores agree with
it to 22 to 25 bits. Those of ONNX are the formulas of ``DynamicQuantizeLinear``, those of PyTorch
the ones of ``choose_qparams`` (FBGEMM) and torchao.
"""

from collections.abc import Callable
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


def _divided(x: Any, y: Array) -> Array:
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
    codes = np.rint(_nudged(blocks * _divided(F32(127), most), nudge)).astype(F32)
    return codes, f16(most / F32(127))


def q8_0(x: Array, nudge: float = 0.0) -> Array:
    """Blocks of 32, one float16 scale."""
    codes, d = _q8(x, nudge)
    return (codes * d).reshape(x.shape)


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
    factor = _divided(F32(-127), _extreme(blocks))
    codes = np.minimum(np.rint(_nudged(blocks * factor, nudge)), 127).astype(F32)
    return (codes * _divided(F32(1), factor)).reshape(x.shape)


def _symmetric(x: Array, half: int, nudge: float) -> Array:
    """``quantize_row_q4_0_ref`` (half 8), ``_q5_0_ref`` (16): the extreme value becomes -half."""
    blocks = _blocks(x, 32)
    d = _extreme(blocks) / F32(-half)
    scaled = _nudged(blocks * _divided(F32(1), d), nudge) + F32(half + 0.5)
    codes = np.minimum(np.trunc(scaled), 2 * half - 1)
    return ((codes - half).astype(F32) * f16(d)).reshape(x.shape)


def _affine(x: Array, most: int, nudge: float) -> Array:
    """``quantize_row_q4_1_ref`` (most 15), ``_q5_1_ref`` (31): from the minimum to the maximum."""
    blocks = _blocks(x, 32)
    low = blocks.min(-1, keepdims=True)
    d = (blocks.max(-1, keepdims=True) - low) / F32(most)
    scaled = _nudged((blocks - low) * _divided(F32(1), d), nudge) + F32(0.5)
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
    scaled = _nudged(blocks * _divided(F32(1), d), nudge)
    values = IQ4_NL[np.searchsorted(middle, scaled, side="right")]
    weight = blocks * blocks * values
    upper, lower = (_sum_in_order(weight * factor) for factor in (blocks, values))
    fitted = np.where(lower > 0, _divided(upper, lower), F32(0))
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
    codes = np.rint(_nudged(_divided(x, scale), nudge))
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
    zero = np.clip(np.rint(_divided(-low, scale)), 0, levels)
    # engines add the zero point before or after they round: a nudge is one of the largest code
    codes = np.clip(np.rint(_divided(x, scale) + np.float64(nudge * levels)) + zero, 0, levels)
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
    return (e4m3(_divided(grid, scale), nudge) * scale).reshape(x.shape)


def scaled_e4m3_tensor(x: Array, nudge: float = 0.0) -> Array:
    """float8_e4m3fn with one float32 scale for the whole array."""
    x = np.asarray(x, F32)
    scale = np.abs(x).max(keepdims=True) / F32(448)
    return e4m3(_divided(x, scale), nudge) * scale


# --- RoPE


def angles_by_recurrence(positions: Array, head_size: int, theta: float) -> Array:
    """[T, H/2] float32 angles of ``ggml_rope_cache_init``: from pair to pair multiplied by
    theta^(-2/H) in float32, so that pair i has been rounded i times."""
    step = _step(head_size, theta)
    angle = np.asarray(positions).astype(F32)
    columns = []
    for _ in range(head_size // 2):
        columns.append(angle)
        angle = angle * step
    return np.stack(columns, -1)


def _step(head_size: int, theta: float) -> Any:
    """theta^(-2/H), rounded as ``powf`` of float32 arguments is."""
    return F32(np.float64(F32(theta)) ** np.float64(F32(-2.0) / F32(head_size)))


def angles_by_powers(positions: Array, head_size: int, theta: float) -> Array:
    """[T, H/2] float32 angles with powers of that step: kernels that make pair i alone."""
    powers = (np.float64(_step(head_size, theta)) ** np.arange(head_size // 2)).astype(F32)
    return np.asarray(positions).astype(F32)[:, None] * powers


def angles_by_exp2(positions: Array, head_size: int, theta: float) -> Array:
    """[T, H/2] float32 angles of MLX: 2^(-2i/H * log2 theta), every step in float32."""
    part = np.arange(head_size // 2, dtype=F32) / F32(head_size // 2)
    frequency = np.exp2((-part * np.log2(F32(theta))).astype(np.float64)).astype(F32)
    return np.asarray(positions).astype(F32)[:, None] * frequency


def angles_by_exp(positions: Array, head_size: int, theta: float) -> Array:
    """[T, H/2] float32 angles of exp(-2i/H * ln theta), every step in float32."""
    part = np.arange(0, head_size, 2, dtype=F32) * F32(-np.log(theta) / head_size)
    frequency = np.exp(part.astype(np.float64)).astype(F32)
    return np.asarray(positions).astype(F32)[:, None] * frequency


def angles_of_hugging_face(positions: Array, head_size: int, theta: float) -> Array:
    """[T, H/2] float32 angles as Hugging Face has them but for a last bit of the frequencies."""
    exponent = np.arange(0, head_size, 2) / head_size
    return np.asarray(positions).astype(F32)[:, None] * (1 / theta**exponent).astype(F32)


def angles_in_f64(positions: Array, head_size: int, theta: float) -> Array:
    """[T, H/2] angles without any rounding to float32."""
    exponent = np.arange(0, head_size, 2) / head_size
    return np.asarray(positions, np.float64)[:, None] * theta**-exponent


# --- a weighted sum kept in float16


def sum_in_f16(scores: Array, v: Array) -> Array:
    """[N, T, S] float32 scores, -inf where masked, and v [S, N, H] in float16 values: [T, N, H].

    ``ggml_compute_forward_flash_attn_ext_f16_one_chunk``: key by key, the running sum is scaled
    down at every new maximum and rounded to float16 at every step.
    """
    heads, rows, keys = scores.shape
    most = np.full((heads, rows), -np.inf, F32)
    weight = np.zeros((heads, rows), F32)
    total = np.zeros((heads, rows, v.shape[-1]), F32)
    wide, added = v.astype(np.float64), np.empty(total.shape)
    for key in range(keys):
        score = scores[..., key]
        higher = score > most
        if higher.any():
            shrink = np.exp(most[higher] - score[higher])
            total[higher] = f16(total[higher] * shrink[:, None])
            weight[higher] *= shrink
            most[higher] = score[higher]
        with np.errstate(invalid="ignore"):
            share = np.where(np.isfinite(score), np.exp(score - most), F32(0))
        np.multiply(share[..., None].astype(np.float64), wide[key][:, None], out=added)
        added += total
        total = to_dtype(added, np.float16)  # a fused multiply-add in float32, then stored
        weight += share
    return (total * _divided(F32(1), weight)[..., None]).swapaxes(0, 1)


Rounding = Callable[..., Array]

# Formats of a key/value cache in llama.cpp, and what the other factor of a product is converted to
# by the type of the first (``vec_dot_type``). q8_1 has q8_0's values, see ``q8_1_excess``.
CACHE: dict[str, Rounding] = {
    "f16": f16, "bf16": bf16, "q8_0": q8_0, "q4_0": q4_0, "q4_1": q4_1, "q5_0": q5_0, "q5_1": q5_1,
    "iq4_nl": iq4_nl,
}  # fmt: skip
PARTNER: dict[str, Rounding] = {
    "f16": f16, "bf16": bf16, "q8_0": q8_0, "q4_0": q8_0, "q4_1": q8_0, "q5_0": q8_0, "q5_1": q8_0,
    "iq4_nl": q8_0,
}  # fmt: skip
WITH_MINIMUM = ("q4_1", "q5_1")  # types whose minimum multiplies the partner's stored sum


# --- functions that are approximated

MLAS_ODD = (
    4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03,
    2.48287947061529e-01,
)  # fmt: skip
MLAS_EVEN = (
    6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03,
    1.16817656904453e-01, 9.93151921023180e-01,
)  # fmt: skip


def _horner(square: Array, coefficients: tuple[float, ...]) -> Array:
    """A polynomial by fused multiply-adds: one rounding each."""
    found = np.full_like(square, coefficients[0])
    for each in coefficients[1:]:
        found = (found.astype(np.float64) * square + np.float64(F32(each))).astype(F32)
    return found


def mlas_logistic(x: Array) -> Array:
    """The sigmoid of onnxruntime's MLAS (``MlasComputeLogistic``): a quotient of polynomials, to
    which 1/2 is added. Where the sigmoid is small little of it is left: at -9 three digits."""
    x = np.clip(np.asarray(x, F32), F32(-18), F32(18))
    square = x * x
    quotient = _horner(square, MLAS_ODD) * x / _horner(square, MLAS_EVEN)
    return np.clip(quotient + F32(0.5), F32(0), F32(1))
