"""Stages replaced in a candidate: fused attention, and faults such as a compiler can make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from qwen_jax import model
from qwen_jax.config import Config
from qwen_jax.model import FUNCTIONS, Env, StageFunction
from qwen_jax.params import LayerParams
from stages.table import LAYER_STAGES, STAGE, Stage


@dataclass(frozen=True)
class Variant:
    """Which stages a layer computes, and how: the arguments of ``model.run_stages``."""

    rows: tuple[Stage, ...] = LAYER_STAGES
    functions: Mapping[str, StageFunction] = field(default_factory=lambda: FUNCTIONS)


def fused_attention(
    config: Config, p: LayerParams, env: Env, q: Array, k: Array, qkv: Array
) -> Array:
    """q [B, T, N, H], k [B, S, K, H], qkv [B, S, (N+2K)*H] -> [B, T, N*H]"""
    v = model._split_qkv(config, qkv)[2]
    mixed = jax.nn.dot_product_attention(q, k, v, mask=env.mask[:, None])
    return mixed.reshape(*q.shape[:2], -1)


def _bf16_stage(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    p, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (p, x))
    return FUNCTIONS["ffn_up"](config, p, env, x)


def _truncated_sum(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    kept = x.shape[-1] - max(1, x.shape[-1] // 64)
    p = replace(p, down_proj=p.down_proj[:, :kept])
    return FUNCTIONS["ffn_out"](config, p, env, x[..., :kept])


def _scaled_bias(config: Config, p: LayerParams, env: Env, qkv: Array) -> Array:
    alpha = config.head_dim**-0.5
    p = replace(p, **{f"{n}_bias": getattr(p, f"{n}_bias") * alpha for n in "qkv"})
    return FUNCTIONS["qkv_bias"](config, p, env, qkv)


# name -> (the stage it is planted in, the stage's function)
PLANTS: dict[str, tuple[str, Callable[..., Array]]] = {
    "bf16_stage": ("ffn_up", _bf16_stage),
    "truncated_sum": ("ffn_out", _truncated_sum),
    "scaled_bias": ("qkv_bias", _scaled_bias),
}


def variant(attention: str, plant: str) -> Variant:
    """The stages of a point's candidate."""
    rows, functions = LAYER_STAGES, dict(FUNCTIONS)
    if attention == "fused":
        inputs = ("q_post_rope", "k_post_rope", "qkv_bias")
        one = replace(STAGE["attention"], inputs=inputs)
        gone = ("attn_scores", "attn_softmax")
        rows = tuple(one if s.name == "attention" else s for s in rows if s.name not in gone)
        functions["attention"] = fused_attention
    if plant:
        stage, function = PLANTS[plant]
        functions[stage] = function
    return Variant(rows, functions)
