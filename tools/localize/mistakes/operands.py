"""What mistakes are made of: the parts of a stage's operation, each to be changed alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.models.ops import Positional, split_heads
from stages.architecture import NORM, Stage
from tools.localize.stage_case import StageReplay, Weight


def if_there(value: Array | None, function: Callable[[Array], Array]) -> Array | None:
    """``function`` of a value that may not be in the trace."""
    return None if value is None else function(value)


def embedding_table(case: StageReplay) -> np.ndarray:
    return case.model.read(case.arch.embedding.tensor)


def norm_weight(case: StageReplay) -> Array:
    return jnp.asarray(case.weights[case.stage.parameters[0]])


def with_norm(case: StageReplay, weight: Weight) -> Array:
    return case.run(weights={case.stage.parameters[0]: weight})


def normed(case: StageReplay) -> Array:
    """What the norm is of: the input, or the heads that it is split into."""
    if case.stage.axes[-1] == "D":
        return case.inputs[0]
    q, k, _ = split_heads(case.config, case.inputs[0])
    return q if case.stage.axes[1] == "N" else k


def mean_square(case: StageReplay, x: Array) -> Array:
    return (x * x).mean(-1, keepdims=True) + case.config.rms_norm_eps


def head_norm(case: StageReplay) -> Stage | None:
    """The norm over H of the heads that a norm or a rotated stage is made of, if it has one."""
    stage = case.stage
    norm = stage if stage.kind is NORM else case.arch.stage[stage.inputs[0]]
    return norm if norm.kind is NORM and norm.axes[-1] == "H" else None


def biases(case: StageReplay) -> tuple[Array, ...]:
    """Of q, k and v."""
    return tuple(jnp.asarray(case.weights[name]) for name in case.stage.parameters)


def with_bias(case: StageReplay, *biases: Array) -> Array:
    return case.inputs[0] + jnp.concatenate(biases)


def rope_table(case: StageReplay, positions: np.ndarray, **changes: Any) -> Positional:
    """What other positions or another configuration would decide."""
    cos, sin = case.cos_sin(replace(case.config, **changes), positions)
    return case.pos.replace(cos=jnp.asarray(cos), sin=jnp.asarray(sin))


def rotated(case: StageReplay, x: Array) -> Array:
    """Heads [1, T, N, H] after RoPE."""
    cos, sin = (t.astype(jnp.float64)[:, :, None, :] for t in (case.pos.cos, case.pos.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def before_rope(case: StageReplay, rope: str, keys: bool = False) -> Array | None:
    """The heads that a rotated stage of this layer was made of, [1, T, N or K, H]."""
    stage = case.arch.stage[rope]
    value = case.at_keys(stage.inputs[0]) if keys else case.value(stage.inputs[0])
    if value is None or value.ndim == 4:
        return value
    q, k, _ = split_heads(case.config, value)
    return q if stage.axes[1] == "N" else k


def unrotated(case: StageReplay) -> Array:
    found = case.inputs[0]
    if found.ndim == 4:
        return found
    q, k, _ = split_heads(case.config, found)
    return q if case.stage.axes[1] == "N" else k


def attention_scale(case: StageReplay) -> float:
    return case.config.head_dim**-0.5


def mixed(case: StageReplay, v: Array) -> Array:
    """The weighted sum of any v [B, S, N or K, H]."""
    weights = case.inputs[0]
    v = jnp.repeat(v, weights.shape[1] // v.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v)
    return out.reshape(*out.shape[:2], -1)


def masked_softmax(case: StageReplay, allowed: np.ndarray) -> Array:
    return case.run(pos=case.pos.replace(mask=jnp.asarray(allowed)[None]))


def key_distance(case: StageReplay) -> np.ndarray:
    """[rows, S]: how far a key lies before a query."""
    positions = case.replay.positions[0]
    return positions[-case.rows :, None] - positions[None, :]


def embedding_rows(case: StageReplay, table: np.ndarray, tokens: np.ndarray) -> Array:
    """Rows of a table [V, D] as the stage's value, of any token ids [T]."""
    rows = jnp.asarray(table[tokens % len(table)].astype(np.float64))[None]
    return rows[:, -case.rows :]
