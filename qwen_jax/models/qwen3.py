"""The stage functions in which Qwen3 differs from Qwen2: see ``qwen_jax.models.qwen2``.

Each mirrors the rounding points of transformers' ``modeling_qwen3`` (eager attention).
"""

from jax import Array

from qwen_jax.config import Config
from qwen_jax.models.ops import Positional, rms_norm, rotate, split_heads


def q_norm(config: Config, pos: Positional, qkv: Array, q_norm: Array) -> Array:
    """[B, T, (N+2K)*H], [H] -> [B, T, N, H]"""
    return rms_norm(config, split_heads(config, qkv)[0], q_norm)


def k_norm(config: Config, pos: Positional, qkv: Array, k_norm: Array) -> Array:
    """[B, T, (N+2K)*H], [H] -> [B, T, K, H]"""
    return rms_norm(config, split_heads(config, qkv)[1], k_norm)


def q_post_rope(config: Config, pos: Positional, q: Array) -> Array:
    """[B, T, N, H] -> the same"""
    return rotate(q, pos)


def k_post_rope(config: Config, pos: Positional, k: Array) -> Array:
    """[B, T, K, H] -> the same"""
    return rotate(k, pos)
