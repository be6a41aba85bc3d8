"""Stages replaced in a candidate: fused attention, products in another arithmetic, and faults such
as a compiler can make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qwen_jax.config import Config
from qwen_jax.models import FUNCTIONS, StageFunction, qwen2
from qwen_jax.models.ops import Positional, linear, split_heads, wide
from stages.architecture import Architecture, Stage


@dataclass(frozen=True)
class Variant:
    """Which stages a layer computes, and how: arguments of ``forward.run_stages``."""

    stages: tuple[Stage, ...]
    functions: Mapping[str, StageFunction]


def fused_attention(config: Config, pos: Positional, q: Array, k: Array, qkv: Array) -> Array:
    """q [B, T, N, H], k [B, S, K, H], qkv [B, S, (N+2K)*H] -> [B, T, N*H]"""
    v = split_heads(config, qkv)[2]
    mixed = jax.nn.dot_product_attention(q, k, v, mask=pos.mask[:, None])
    return mixed.reshape(*q.shape[:2], -1)


def online_attention(config: Config, pos: Positional, q: Array, k: Array, qkv: Array) -> Array:
    """The same as ``fused_attention``, as flash attention computes it (Dao et al. 2022, arXiv
    2205.14135, algorithm 1): keys in blocks, with a running maximum and sum that earlier blocks are
    scaled to."""
    v = split_heads(config, qkv)[2]
    batch, length, n, h = q.shape
    grouped = wide(q).reshape(batch, length, k.shape[2], -1, h) * np.float32(h**-0.5)
    high = jnp.full((*grouped.shape[:-1], 1), -np.inf, grouped.dtype)
    total, mixed = jnp.zeros_like(high), jnp.zeros_like(grouped)
    for first in range(0, k.shape[1], BLOCK):
        keys, values = (wide(each[:, first : first + BLOCK]) for each in (k, v))
        scores = jnp.einsum("btkgh,bskh->btkgs", grouped, keys)
        allowed = pos.mask[:, :, None, None, first : first + BLOCK]
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        highest = jnp.maximum(high, scores.max(-1, keepdims=True))
        kept, weights = jnp.exp(high - highest), jnp.exp(scores - highest)
        total = total * kept + weights.sum(-1, keepdims=True)
        mixed = mixed * kept + jnp.einsum("btkgs,bskh->btkgh", weights, values)
        high = highest
    return (mixed / total).reshape(batch, length, -1)


def _tf32(product: StageFunction) -> StageFunction:
    """Operands of 8 exponent and 10 mantissa bits, as ``cvt.rna.tf32`` leaves them but for ties."""

    def function(config: Config, pos: Positional, *operands: Array) -> Array:
        kept = (lax.reduce_precision(each, 8, 10) for each in operands)
        return product(config, pos, *kept)

    return function


def _bf16x3(product: StageFunction) -> StageFunction:
    """Each operand as the sum of two bfloat16 numbers, and the three larger of the four products
    of them (Henry, Tang & Heinecke 2019, arXiv 1904.06376)."""

    def function(config: Config, pos: Positional, x: Array, *others: Array) -> Array:
        high = [lax.reduce_precision(each, 8, 7) for each in (x, *others)]
        low = [
            lax.reduce_precision(each - part, 8, 7)
            for each, part in zip((x, *others), high, strict=True)
        ]
        small = product(config, pos, high[0], *low[1:]) + product(config, pos, low[0], *high[1:])
        return small + product(config, pos, *high)

    return function


def _split_k(product: StageFunction) -> StageFunction:
    """Four sums over a quarter of the terms each, added up: the terms lie along the last axis of
    the first operand."""

    def function(config: Config, pos: Positional, x: Array, *others: Array) -> Array:
        quarter = np.arange(x.shape[-1]) * 4 // x.shape[-1]
        parts = [
            product(config, pos, jnp.where(quarter == number, x, 0), *others) for number in range(4)
        ]
        return parts[0] + parts[1] + parts[2] + parts[3]

    return function


# What else a GPU may do for a float32 product; every operand of such a stage is one of the product.
PRODUCTS: dict[str, Callable[[StageFunction], StageFunction]] = {
    "tf32": _tf32,
    "bf16x3": _bf16x3,
    "split-k": _split_k,
}
ATTENTION = {"fused": fused_attention, "online": online_attention}
BLOCK = 16  # keys


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


def variant(arch: Architecture, attention: str, plant: str, products: str = "") -> Variant:
    """The stages of a point's candidate."""
    stages, functions = arch.layer_stages, dict(FUNCTIONS[arch.name])
    if attention in ATTENTION:
        stages = _fused(arch)
        functions["attention"] = ATTENTION[attention]
    if products:
        summed = [stage.name for stage in arch.stages if stage.kind.sums_products]
        functions |= {name: PRODUCTS[products](functions[name]) for name in summed}
    if plant:
        stage, function = PLANTS[plant]
        functions[stage] = function
    return Variant(stages, functions)


def _fused(arch: Architecture) -> tuple[Stage, ...]:
    """The layer's stages without scores and softmax: what they are made of goes straight into the
    weighted sum."""
    last = arch.stage["attention"]
    softmax = arch.stage[last.inputs[0]]
    scores = arch.stage[softmax.inputs[0]]
    inputs = (*scores.inputs, *last.inputs[1:])
    one = replace(last, inputs=inputs, keys=(*scores.keys, *last.keys))
    stages = (one if stage is last else stage for stage in arch.layer_stages)
    return tuple(stage for stage in stages if stage not in (scores, softmax))
