"""Stages replaced in a candidate: fused attention, and faults such as a compiler can make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from qwen_jax.config import Config
from qwen_jax.models import FUNCTIONS, StageFunction, qwen2
from qwen_jax.models.ops import Positional, linear, split_heads
from stages.architecture import Architecture, Stage


@dataclass(frozen=True)
class Variant:
    """Which stages a layer computes, and how: arguments of ``forward.run_stages``."""

    rows: tuple[Stage, ...]
    functions: Mapping[str, StageFunction]


def fused_attention(config: Config, pos: Positional, q: Array, k: Array, qkv: Array) -> Array:
    """q [B, T, N, H], k [B, S, K, H], qkv [B, S, (N+2K)*H] -> [B, T, N*H]"""
    v = split_heads(config, qkv)[2]
    mixed = jax.nn.dot_product_attention(q, k, v, mask=pos.mask[:, None])
    return mixed.reshape(*q.shape[:2], -1)


def _bf16_stage(config: Config, pos: Positional, x: Array, weight: Array) -> Array:
    return linear(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))


def _truncated_sum(config: Config, pos: Positional, x: Array, weight: Array) -> Array:
    kept = x.shape[-1] - max(1, x.shape[-1] // 64)
    return linear(x[..., :kept], weight[:, :kept])


def _scaled_bias(config: Config, pos: Positional, qkv: Array, *biases: Array) -> Array:
    alpha = config.head_dim**-0.5
    return qwen2.qkv_bias(config, pos, qkv, *(bias * alpha for bias in biases))


# name -> (the stage it is planted in, the stage's function)
PLANTS: dict[str, tuple[str, Callable[..., Array]]] = {
    "bf16_stage": ("ffn_up", _bf16_stage),
    "truncated_sum": ("ffn_out", _truncated_sum),
    "scaled_bias": ("qkv_bias", _scaled_bias),
}


def variant(tables: Architecture, attention: str, plant: str) -> Variant:
    """The stages of a point's candidate."""
    rows, functions = tables.layer_stages, dict(FUNCTIONS[tables.name])
    if attention == "fused":
        rows = _fused(tables)
        functions["attention"] = fused_attention
    if plant:
        stage, function = PLANTS[plant]
        functions[stage] = function
    return Variant(rows, functions)


def _fused(tables: Architecture) -> tuple[Stage, ...]:
    """The layer's stages without scores and softmax: what they are made of goes straight into the
    weighted sum."""
    last = tables.stage["attention"]
    softmax = tables.stage[last.inputs[0]]
    scores = tables.stage[softmax.inputs[0]]
    inputs = (*scores.inputs, *last.inputs[1:])
    one = replace(last, inputs=inputs, keys=(*scores.keys, *last.keys))
    rows = (one if row is last else row for row in tables.layer_stages)
    return tuple(row for row in rows if row not in (scores, softmax))
