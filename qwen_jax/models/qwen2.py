"""The stage functions of Qwen2: one pure function per row of ``stages/qwen2.py``, under its name.

A function takes the configuration, what the positions decide, then the row's inputs and the row's
parameters, in the row's order. Each mirrors the rounding points of transformers'
``modeling_qwen2`` (eager attention). Two rules hold throughout:

* A function returns its value in the *compute* dtype: float32 for float16 and bfloat16 models,
  otherwise the model dtype. ``forward.run_stages`` rounds it to the model dtype, once, in one
  place. Where Hugging Face rounds *inside* a stage, the function says so with ``rounded``.
* Only ``jax.lax`` primitives and dtype conversions are used. ``jax.nn`` helpers that carry their
  own ``jit`` would be fused units even in an un-jitted run.

Axis letters: see ``qwen_jax.models.ops``.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qwen_jax.config import Config
from qwen_jax.models.ops import (
    Positional,
    contract,
    linear,
    rms_norm,
    rotate,
    rounded,
    row_sums,
    split_heads,
    wide,
)


def embedding(config: Config, pos: Positional, tokens: Array, embed_tokens: Array) -> Array:
    """Rows of the embedding. tokens [B, T] int32, embed_tokens [V, D] -> [B, T, D]."""
    return jnp.take(embed_tokens, tokens, axis=0)


def attn_norm(config: Config, pos: Positional, x: Array, input_layernorm: Array) -> Array:
    """[B, T, D] -> [B, T, D]"""
    return rms_norm(config, x, input_layernorm)


def qkv_matmul(
    config: Config, pos: Positional, x: Array, q_proj: Array, k_proj: Array, v_proj: Array
) -> Array:
    """[B, T, D] -> [B, T, (N+2K)*H], without the bias."""
    return lax.concatenate([linear(x, weight) for weight in (q_proj, k_proj, v_proj)], 2)


def qkv_bias(
    config: Config, pos: Positional, qkv: Array, q_bias: Array, k_bias: Array, v_bias: Array
) -> Array:
    """[B, T, (N+2K)*H] -> the same.

    ``qkv`` arrives unrounded, as the row says: a linear layer with a bias adds it to the float32
    accumulator and rounds once, on the CPU as on a GPU. Rounding ``qkv_matmul`` first changes 28 %
    of bfloat16 elements.
    """
    return qkv + lax.concatenate([q_bias, k_bias, v_bias], 0).astype(qkv.dtype)


def q_post_rope(config: Config, pos: Positional, qkv: Array) -> Array:
    """[B, T, (N+2K)*H] -> [B, T, N, H]"""
    return rotate(split_heads(config, qkv)[0], pos)


def k_post_rope(config: Config, pos: Positional, qkv: Array) -> Array:
    """[B, T, (N+2K)*H] -> [B, T, K, H]"""
    return rotate(split_heads(config, qkv)[1], pos)


def k_cache(config: Config, pos: Positional, k: Array) -> Array:
    """[B, T, K, H] -> [B, S, K, H]. An exact cache; for another see ``qwen_jax.cache``."""
    return k


def v_cache(config: Config, pos: Positional, qkv: Array) -> Array:
    """[B, T, (N+2K)*H] -> [B, S, K, H]. An exact cache; for another see ``qwen_jax.cache``."""
    return split_heads(config, qkv)[2]


def attn_scores(config: Config, pos: Positional, q: Array, k: Array) -> Array:
    """q [B, T, N, H], k [B, S, K, H] -> [B, N, T, S]. Query head n reads key head n // G.

    Hugging Face rounds q.k before it scales; the scale itself is a float32 number.
    """
    batch, length, n, h = q.shape
    # The queries change places, not the products, which are many more: [B, K, G, T, H]
    grouped = lax.transpose(q.reshape(batch, length, k.shape[2], -1, h), (0, 2, 3, 1, 4))
    products = contract(grouped, k, ((4,), (3,)), ((0, 1), (0, 2)))  # [B, K, G, T, S]
    products = products.reshape(batch, n, length, k.shape[1])
    return rounded(products, q.dtype) * np.asarray(h**-0.5, products.dtype)


def attn_softmax(config: Config, pos: Positional, scores: Array) -> Array:
    """[B, N, T, S] -> [B, N, T, S], in float32 whatever the model dtype.

    A masked score becomes the lowest finite number, as in Hugging Face, not minus infinity: a row
    with nothing to attend to (padding) is uniform rather than NaN.
    """
    lowest = jnp.finfo(scores.dtype).min
    w = wide(scores)
    masked = lax.select(
        jnp.broadcast_to(pos.mask[:, None], w.shape), w, jnp.full(w.shape, lowest, w.dtype)
    )
    high = lax.reduce(masked, np.array(-np.inf, w.dtype), lax.max, (3,))
    weights = lax.exp(masked - high[..., None])
    total = row_sums(weights)
    return weights / total[..., None]


def attention(config: Config, pos: Positional, weights: Array, values: Array) -> Array:
    """weights [B, N, T, S], v from a cache [B, S, K, H] or qkv [B, S, (N+2K)*H] -> [B, T, N*H]"""
    v = values if values.ndim == 4 else split_heads(config, values)[2]
    batch, n, length, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[2], -1, length, keys)  # [B, K, G, T, S]
    mixed = contract(grouped, v, ((4,), (1,)), ((0, 1), (0, 2)))  # [B, K, G, T, H]
    return lax.transpose(mixed, (0, 3, 1, 2, 4)).reshape(batch, length, -1)


def attn_out(config: Config, pos: Positional, x: Array, o_proj: Array) -> Array:
    """[B, T, N*H] -> [B, T, D]"""
    return linear(x, o_proj)


def post_attn_residual(config: Config, pos: Positional, layer_input: Array, x: Array) -> Array:
    """[B, T, D] + [B, T, D] -> [B, T, D]"""
    return wide(layer_input) + wide(x)


def ffn_norm(config: Config, pos: Positional, x: Array, post_attention_layernorm: Array) -> Array:
    """[B, T, D] -> [B, T, D]"""
    return rms_norm(config, x, post_attention_layernorm)


def ffn_gate(config: Config, pos: Positional, x: Array, gate_proj: Array) -> Array:
    """[B, T, D] -> [B, T, F]"""
    return linear(x, gate_proj)


def ffn_up(config: Config, pos: Positional, x: Array, up_proj: Array) -> Array:
    """[B, T, D] -> [B, T, F]"""
    return linear(x, up_proj)


def ffn_silu(config: Config, pos: Positional, gate: Array) -> Array:
    """gate * sigmoid(gate), rounded once. [B, T, F] -> [B, T, F]"""
    w = wide(gate)
    return w / (1 + lax.exp(-w))


def ffn_swigl(config: Config, pos: Positional, silu: Array, up: Array) -> Array:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202). [B, T, F] * [B, T, F] -> [B, T, F]"""
    return wide(silu) * wide(up)


def ffn_out(config: Config, pos: Positional, x: Array, down_proj: Array) -> Array:
    """[B, T, F] -> [B, T, D]"""
    return linear(x, down_proj)


def post_ffn_residual(config: Config, pos: Positional, residual: Array, x: Array) -> Array:
    """[B, T, D] + [B, T, D] -> [B, T, D]"""
    return wide(residual) + wide(x)


def final_norm(config: Config, pos: Positional, x: Array, norm: Array) -> Array:
    """[B, T, D] -> [B, T, D]"""
    return rms_norm(config, x, norm)


def lm_head(config: Config, pos: Positional, x: Array, lm_head: Array) -> Array:
    """[B, T, D], [V, D] -> [B, T, V]"""
    return linear(x, lm_head)
