"""Mistake of which function: a norm, an activation or an exponential is taken for another."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from tools.localize.mistakes.approximations import (
    exponentials,
    tanh_by_fraction,
    tanh_by_long_fraction,
)
from tools.localize.mistakes.operands import mean_square, norm_weight, normed
from tools.localize.mistakes.registry import NORMS, ROPES, Candidates, mistake, simple
from tools.localize.stage_case import StageReplay


def _over(case: StageReplay, root: Callable[[Array], Array]) -> Array:
    """What is normed over any ``root`` of it, times the weight."""
    return normed(case) / root(normed(case)) * norm_weight(case)


def _layer_norm(case: StageReplay) -> Array:
    x = normed(case) - normed(case).mean(-1, keepdims=True)
    return x / jnp.sqrt(mean_square(case, x)) * norm_weight(case)


simple("norm_layernorm", "LayerNorm (mean subtracted) instead of RMSNorm", NORMS, _layer_norm,
       near=True, everywhere=True)  # fmt: skip


@mistake("normalised over all heads together, not over each", NORMS)
def norm_over_all_heads(case: StageReplay) -> Candidates:
    if case.stage.axes[-1] == "H":
        x = normed(case)
        mean = (x * x).mean((-2, -1), keepdims=True) + case.config.rms_norm_eps
        yield "", x / jnp.sqrt(mean) * norm_weight(case)


def _root_of_sum(case: StageReplay, x: Array) -> Array:
    return jnp.sqrt((x * x).sum(-1, keepdims=True) + case.config.rms_norm_eps)


simple("norm_sum_not_mean", "divided by the root of the sum of squares, not of the mean", NORMS,
       lambda case: _over(case, partial(_root_of_sum, case)))  # fmt: skip


def _root_less_eps(x: Array) -> Array:
    return jnp.sqrt((x * x).mean(-1, keepdims=True))


simple("norm_eps_outside", "eps added outside the square root", NORMS, 
       lambda case: _over(case, lambda x: _root_less_eps(x) + case.config.rms_norm_eps),
       near=True, joined="number")  # fmt: skip


def _mean_magnitude(x: Array) -> Array:
    return jnp.abs(x).mean(-1, keepdims=True)


@mistake("divided by the mean magnitude instead of the root mean square", NORMS)
def norm_mean_abs(case: StageReplay) -> Candidates:
    yield "", _over(case, lambda x: _mean_magnitude(x) + case.config.rms_norm_eps)
    yield "", _over(case, _mean_magnitude)


simple("logits_softmaxed", "probabilities instead of logits", "lm_head",
       lambda case: jax.nn.softmax(case.exact, -1))  # fmt: skip


simple("logits_log_softmaxed", "log-probabilities instead of logits", "lm_head",
       lambda case: jax.nn.log_softmax(case.exact, -1))  # fmt: skip


simple("rope_cos_sin_swapped", "cos and sin swapped", ROPES,
       lambda case: case.run(pos=case.pos.replace(cos=case.pos.sin, sin=case.pos.cos)))  # fmt: skip


@mistake("softmax over queries instead of keys", "attn_softmax")
def softmax_wrong_axis(case: StageReplay) -> Candidates:
    lowest = jnp.finfo(jnp.float64).min
    masked = jnp.where(case.pos.mask[:, None], case.inputs[0], lowest)
    over = jax.nn.softmax(masked, 2)
    yield "", over
    yield "", jnp.where(case.pos.mask[:, None], over, 0)


def _activation(name: str, says: str, function: Callable[[Array], Array]) -> None:
    def candidates(case: StageReplay) -> Candidates:
        yield "", function(case.inputs[0])

    mistake(says, "ffn_silu", name, near=True, everywhere=name.startswith("act_"))(candidates)


_activation("act_gelu", "GELU instead of SiLU", lambda x: jax.nn.gelu(x, approximate=False))


_activation("act_gelu_tanh", "GELU (tanh form) instead of SiLU", lambda x: jax.nn.gelu(x))


_activation("act_relu", "ReLU instead of SiLU", lambda x: jnp.maximum(x, 0))


_activation("act_sigmoid", "sigmoid alone, not times its argument", jax.nn.sigmoid)


_activation(
    "act_quick_gelu", "quick GELU x*sigmoid(1.702x) instead of SiLU",
    lambda x: x * jax.nn.sigmoid(1.702 * x),
)  # fmt: skip


_activation("act_missing", "activation not applied", lambda x: x)


_activation("act_tanh", "tanh instead of SiLU", jnp.tanh)


@mistake("exponentials by {}", "ffn_silu attn_softmax", near=True)
def exp_approximate(case: StageReplay) -> Candidates:
    x = case.inputs[0]
    for says, exponential in exponentials():
        if case.stage.name == "ffn_silu":
            yield says, x / (1 + exponential(-x))
        else:
            kept = case.pos.mask[:, None]
            high = jnp.where(kept, x, -jnp.inf).max(-1, keepdims=True)
            weights = jnp.where(kept, exponential(jnp.where(kept, x - high, 0.0)), 0.0)
            yield says, weights / weights.sum(-1, keepdims=True)


_activation(
    "silu_tanh_form", "SiLU as x/2 (1 + tanh(x/2)) with tanh by a fraction",
    lambda x: x / 2 * (1 + tanh_by_fraction(x / 2)),
)  # fmt: skip


_activation(
    "silu_tanh_form", "SiLU as x/2 (1 + tanh(x/2)) with tanh by a long fraction",
    lambda x: x / 2 * (1 + tanh_by_long_fraction(x / 2)),
)  # fmt: skip


_activation(
    "silu_tanh_form", "SiLU by the tanh form of GELU, 1.702 times narrower",
    lambda x: 1.702 * jax.nn.gelu(x / 1.702),
)  # fmt: skip


_activation("silu_hard", "hard SiLU: x relu6(x + 3) / 6", lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1))


_activation(
    "silu_softsign", "sigmoid by x / (1 + |x|)",
    lambda x: x * (0.5 + 0.5 * x / (1 + jnp.abs(x))),
)  # fmt: skip


simple("swigl_added", "silu(gate) + up instead of their product", "ffn_swigl",
       lambda case: case.inputs[0] + case.inputs[1])  # fmt: skip
