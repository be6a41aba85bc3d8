"""The arithmetic that stage functions are made of, with Hugging Face's rounding points.

Axis letters: B batch, T query position, S key position, N query heads, K key/value heads,
G = N/K, H head size, D hidden, F intermediate, V vocabulary.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from qwen_jax import rope
from qwen_jax.config import Config
from stages.mask import attention_mask

SMALL = 4096  # elements: see ``row_sums``


class Positional(struct.PyTreeNode):
    """What the positions of a run decide, and all layers of one kind of attention share.

    Attributes:
        cos, sin: [B, T, H/2] float32 RoPE tables.
        mask: [B, T, S] bool, True where a query may attend to a key.
    """

    cos: Array
    sin: Array
    mask: Array

    def last(self, rows: int) -> "Positional":
        """Tables and mask of the last ``rows`` query positions alone."""
        return Positional(self.cos[:, -rows:], self.sin[:, -rows:], self.mask[:, -rows:])


def positional(
    config: Config, positions: np.ndarray, valid: np.ndarray, sliding: bool
) -> Positional:
    """The RoPE tables and the attention mask, in NumPy.

    positions [B, T] int; valid [B, T] bool is False at padding. With ``sliding`` a query sees the
    last ``config.sliding_window`` positions, itself included.
    """
    cos, sin = rope.cos_sin(config, positions)
    allowed = attention_mask(positions, config.sliding_window if sliding else None)
    return Positional(cos=cos, sin=sin, mask=allowed & valid[:, None, :])  # type: ignore[arg-type]


def positional_by_layer(
    config: Config, positions: np.ndarray, valid: np.ndarray | None = None
) -> dict[bool, Positional]:
    """``positional`` of full layers under False and, where a model has them, of sliding-window
    layers under True."""
    valid = np.ones(positions.shape, bool) if valid is None else valid
    kinds = {False, *config.sliding_layers}
    return {sliding: positional(config, positions, valid, sliding) for sliding in kinds}


def compute_dtype(dtype: Any) -> Any:
    """What arithmetic is carried out in: float32 for the 16-bit formats, else ``dtype``."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: Array) -> Array:
    """x in the compute dtype."""
    return x.astype(compute_dtype(x.dtype))


def rounded(x: Array, dtype: Any) -> Array:
    """x, in the compute dtype, on the grid of the model's: a rounding point inside a stage.

    By arithmetic on float32, not by converting there and back. Between two such conversions a
    compiler may compute in the 16-bit format itself, which gives the same bits, and where the
    processor can (AVX512-FP16) contract two operations to one rounding, which does not: 13 to 16 %
    of the elements of a float16 RoPE came out otherwise than they were read.
    """
    found = jnp.finfo(dtype)
    if found.bits >= jnp.finfo(x.dtype).bits:
        return x
    kept = lax.reduce_precision(x, exponent_bits=found.nexp, mantissa_bits=found.nmant)
    if found.nexp == 8:
        return kept
    # ``reduce_precision`` makes zero of what float16 holds below its normal numbers, on a grid.
    grid = np.float32(found.smallest_subnormal)
    tiny = lax.round(x * (1 / grid), lax.RoundingMethod.TO_NEAREST_EVEN) * grid
    return lax.select(lax.abs(x) < np.float32(found.smallest_normal), tiny, kept)


def contract(a: Array, b: Array, axes: tuple[Any, Any], batch: Any = ((), ())) -> Array:
    """``lax.dot_general`` that accumulates and returns in the compute dtype."""
    return lax.dot_general(a, b, (axes, batch), preferred_element_type=compute_dtype(a.dtype))


def linear(x: Array, weight: Array) -> Array:
    """x [B, T, in] times weight [out, in] -> [B, T, out]."""
    return contract(x, weight, ((2,), (1,)))


def row_sums(x: Array) -> Array:
    """The sums over the last axis, in one order whatever the number of rows.

    XLA on the CPU adds up an array of fewer than 4096 elements in another order than a larger one:
    a row of a decode would have other last bits than the same row of a prefill. So few rows are
    added up among rows of zeros.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    missing = -(-SMALL // width) - rows.shape[0]
    if missing > 0:
        rows = lax.concatenate([rows, jnp.zeros((missing, width), x.dtype)], 0)
    total = lax.reduce(rows, np.zeros((), x.dtype), lax.add, (1,))
    return total[: x.size // width].reshape(x.shape[:-1])


def rms_norm(config: Config, x: Array, weight: Array) -> Array:
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) over the last axis, which weight has.

    Hugging Face normalises in float32 and rounds *before* it multiplies by the weight.
    """
    w = wide(x)
    total = row_sums(w * w)
    # Divisions and a square root, as in PyTorch. Without the barriers XLA makes of them, depending
    # on what it compiles, a product with 1/D and its own rsqrt, a last bit off in 38 % of cases.
    mean = total / lax.optimization_barrier(np.full(total.shape, x.shape[-1], w.dtype))
    root = lax.sqrt(mean + np.asarray(config.rms_norm_eps, w.dtype))
    scale = 1 / lax.optimization_barrier(root)
    return rounded(w * scale[..., None], x.dtype) * wide(weight)


def rotate(heads: Array, pos: Positional) -> Array:
    """RoPE (Su et al. 2021, arXiv 2104.09864), half-split pairs. heads [B, T, N, H].

    Hugging Face rounds the table, both products and the sum to the model dtype.
    """
    dtype = heads.dtype
    first, second = jnp.split(wide(heads), 2, axis=-1)
    cos, sin = (wide(t[:, :, None, :].astype(dtype)) for t in (pos.cos, pos.sin))

    def term(x: Array, table: Array) -> Array:
        return rounded(x * table, dtype)

    return lax.concatenate(
        [term(first, cos) - term(second, sin), term(second, cos) + term(first, sin)], 3
    )


def split_heads(config: Config, qkv: Array) -> tuple[Array, Array, Array]:
    """[B, T, (N+2K)*H] -> q [B, T, N, H], k and v [B, T, K, H]."""
    batch, length, _ = qkv.shape
    heads = qkv.reshape(batch, length, -1, config.head_dim)
    n, k = config.num_attention_heads, config.num_key_value_heads
    return heads[:, :, :n], heads[:, :, n : n + k], heads[:, :, n + k :]
