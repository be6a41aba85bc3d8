"""What engines compute in float32 or float16 that no rounding of an operand describes, in NumPy and
step by step: the angles of RoPE, a sum that is kept in float16, a sigmoid by a quotient.
"""

from typing import Any

import numpy as np

from stages.numbers import Rounding
from stages.roundings import divided, f16, to_dtype

Array = np.ndarray
F32 = np.float32


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


def angles_in_half(
    positions: Array, head_size: int, theta: float, keep: Rounding, rounded: tuple[str, ...]
) -> Array:
    """[T, H/2] angles as Hugging Face has them, of which "positions", "frequencies" or the "angles"
    themselves were rounded."""

    def kept(name: str, x: Array) -> Array:
        return keep(x) if name in rounded else x.astype(F32)

    frequencies = kept("frequencies", 1 / theta ** (np.arange(0, head_size, 2) / head_size))
    return kept("angles", kept("positions", np.asarray(positions))[:, None] * frequencies)


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
    return (total * divided(F32(1), weight)[..., None]).swapaxes(0, 1)


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
