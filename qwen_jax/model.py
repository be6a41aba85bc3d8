"""The Qwen2 forward pass: one pure function per row of the stage table, under the row's name.

Each function mirrors the rounding points of transformers' ``modeling_qwen2`` (eager attention).
Two rules hold throughout:

* A function returns its value in the *compute* dtype: float32 for float16 and bfloat16 models,
  otherwise the model dtype. ``run_stages`` rounds it to the model dtype, once, in one place. Where
  Hugging Face rounds *inside* a stage, the function says so with ``_round``.
* Only ``jax.lax`` primitives and dtype conversions are used. ``jax.nn`` helpers that carry their
  own ``jit`` would be fused units even in an un-jitted run.

Axis letters: B batch, T query position, S key position, N query heads, K key/value heads,
G = N/K, H head size, D hidden, F intermediate, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import register_dataclass

from qwen_jax import rope
from qwen_jax.config import Config
from qwen_jax.params import EndParams, LayerParams, Params, StartParams
from stages.mask import causal_mask
from stages.table import END_STAGES, LAYER_INPUT, LAYER_STAGES, START_STAGES, TOKENS, Stage


@register_dataclass
@dataclass(frozen=True)
class Env:
    """What every layer of one run shares.

    Attributes:
        cos, sin: [B, T, H/2] float32 RoPE tables.
        mask: [B, T, S] bool, True where a query may attend to a key.
    """

    cos: Array
    sin: Array
    mask: Array


def make_env(config: Config, positions: np.ndarray, valid: np.ndarray, sliding: bool) -> Env:
    """The RoPE tables and the attention mask for ``positions`` [B, T] (int).

    ``valid`` [B, T] (bool) is False at padding. With ``sliding`` a query sees the last
    ``config.sliding_window`` positions, itself included.
    """
    cos, sin = rope.cos_sin(config, positions)
    allowed = causal_mask(positions.shape[1], config.sliding_window if sliding else None)
    return Env(cos=cos, sin=sin, mask=allowed[None] & valid[:, None, :])


def compute_dtype(dtype: Any) -> Any:
    """What arithmetic is carried out in: float32 for the 16-bit formats, else ``dtype``."""
    return jnp.promote_types(dtype, jnp.float32)


def _wide(x: Array) -> Array:
    return x.astype(compute_dtype(x.dtype))


def _round(x: Array, dtype: Any) -> Array:
    """Round to the model dtype and come back: a rounding point inside a stage."""
    return x.astype(dtype).astype(x.dtype)


def _contract(a: Array, b: Array, axes: tuple[Any, Any], batch: Any = ((), ())) -> Array:
    """``lax.dot_general`` that accumulates and returns in the compute dtype."""
    return lax.dot_general(a, b, (axes, batch), preferred_element_type=compute_dtype(a.dtype))


def _linear(x: Array, weight: Array) -> Array:
    """x [B, T, in] times weight [out, in] -> [B, T, out]."""
    return _contract(x, weight, ((2,), (1,)))


def _rms_norm(config: Config, x: Array, weight: Array) -> Array:
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) over D. x [B, T, D] -> [B, T, D].

    Hugging Face normalises in float32 and rounds *before* it multiplies by the weight.
    """
    wide = _wide(x)
    total = lax.reduce(wide * wide, np.zeros((), wide.dtype), lax.add, (2,))
    # Divisions and a square root, as in PyTorch. Without the barriers XLA makes of them, depending
    # on what it compiles, a product with 1/D and its own rsqrt, a last bit off in 38 % of cases.
    mean = total / lax.optimization_barrier(np.full(total.shape, x.shape[-1], wide.dtype))
    root = lax.sqrt(mean + np.asarray(config.rms_norm_eps, wide.dtype))
    scale = 1 / lax.optimization_barrier(root)
    return _round(wide * scale[..., None], x.dtype) * _wide(weight)


def _rotate(heads: Array, env: Env) -> Array:
    """RoPE (Su et al. 2021, arXiv 2104.09864), half-split pairs. heads [B, T, N, H].

    Hugging Face rounds the table, both products and the sum to the model dtype.
    """
    dtype = heads.dtype
    first, second = jnp.split(_wide(heads), 2, axis=-1)
    cos, sin = (_wide(t[:, :, None, :].astype(dtype)) for t in (env.cos, env.sin))

    def term(x: Array, table: Array) -> Array:
        return _round(x * table, dtype)

    return lax.concatenate(
        [term(first, cos) - term(second, sin), term(second, cos) + term(first, sin)], 3
    )


def _split_qkv(config: Config, qkv: Array) -> tuple[Array, Array, Array]:
    """[B, T, (N+2K)*H] -> q [B, T, N, H], k and v [B, T, K, H]."""
    batch, length, _ = qkv.shape
    heads = qkv.reshape(batch, length, -1, config.head_dim)
    n, k = config.num_attention_heads, config.num_key_value_heads
    return heads[:, :, :n], heads[:, :, n : n + k], heads[:, :, n + k :]


def embedding(config: Config, p: StartParams, env: Env, tokens: Array) -> Array:
    """Rows of the embedding. tokens [B, T] int32 -> [B, T, D]."""
    return jnp.take(p.embed_tokens, tokens, axis=0)


def attn_norm(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    """[B, T, D] -> [B, T, D]"""
    return _rms_norm(config, x, p.input_layernorm)


def qkv_matmul(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    """[B, T, D] -> [B, T, (N+2K)*H], without the bias."""
    return lax.concatenate([_linear(x, w) for w in (p.q_proj, p.k_proj, p.v_proj)], 2)


def qkv_bias(config: Config, p: LayerParams, env: Env, qkv: Array) -> Array:
    """[B, T, (N+2K)*H] -> the same.

    ``qkv`` arrives unrounded (see ``UNROUNDED``): a linear layer with a bias adds it to the
    float32 accumulator and rounds once, on the CPU as on a GPU. Rounding ``qkv_matmul`` first
    changes 28 % of bfloat16 elements.
    """
    bias = lax.concatenate([p.q_bias, p.k_bias, p.v_bias], 0)
    return qkv + bias.astype(qkv.dtype)


def q_post_rope(config: Config, p: LayerParams, env: Env, qkv: Array) -> Array:
    """[B, T, (N+2K)*H] -> [B, T, N, H]"""
    return _rotate(_split_qkv(config, qkv)[0], env)


def k_post_rope(config: Config, p: LayerParams, env: Env, qkv: Array) -> Array:
    """[B, T, (N+2K)*H] -> [B, T, K, H]"""
    return _rotate(_split_qkv(config, qkv)[1], env)


def attn_scores(config: Config, p: LayerParams, env: Env, q: Array, k: Array) -> Array:
    """q [B, T, N, H], k [B, S, K, H] -> [B, N, T, S]. Query head n reads key head n // G.

    Hugging Face rounds q.k before it scales; the scale itself is a float32 number.
    """
    batch, length, n, h = q.shape
    # The queries change places, not the products, which are many more: [B, K, G, T, H]
    grouped = lax.transpose(q.reshape(batch, length, k.shape[2], -1, h), (0, 2, 3, 1, 4))
    products = _contract(grouped, k, ((4,), (3,)), ((0, 1), (0, 2)))  # [B, K, G, T, S]
    products = products.reshape(batch, n, length, k.shape[1])
    return _round(products, q.dtype) * np.asarray(h**-0.5, products.dtype)


def attn_softmax(config: Config, p: LayerParams, env: Env, scores: Array) -> Array:
    """[B, N, T, S] -> [B, N, T, S], in float32 whatever the model dtype.

    A masked score becomes the lowest finite number, as in Hugging Face, not minus infinity: a row
    with nothing to attend to (padding) is uniform rather than NaN.
    """
    lowest = jnp.finfo(scores.dtype).min
    wide = _wide(scores)
    masked = lax.select(
        jnp.broadcast_to(env.mask[:, None], wide.shape),
        wide,
        jnp.full(wide.shape, lowest, wide.dtype),
    )
    high = lax.reduce(masked, np.array(-np.inf, wide.dtype), lax.max, (3,))
    weights = lax.exp(masked - high[..., None])
    total = lax.reduce(weights, np.zeros((), wide.dtype), lax.add, (3,))
    return weights / total[..., None]


def attention(config: Config, p: LayerParams, env: Env, weights: Array, qkv: Array) -> Array:
    """weights [B, N, T, S], qkv [B, S, (N+2K)*H] -> [B, T, N*H]"""
    v = _split_qkv(config, qkv)[2]
    batch, n, length, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[2], -1, length, keys)  # [B, K, G, T, S]
    mixed = _contract(grouped, v, ((4,), (1,)), ((0, 1), (0, 2)))  # [B, K, G, T, H]
    return lax.transpose(mixed, (0, 3, 1, 2, 4)).reshape(batch, length, -1)


def attn_out(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    """[B, T, N*H] -> [B, T, D]"""
    return _linear(x, p.o_proj)


def post_attn_residual(
    config: Config, p: LayerParams, env: Env, layer_input: Array, x: Array
) -> Array:
    """[B, T, D] + [B, T, D] -> [B, T, D]"""
    return _wide(layer_input) + _wide(x)


def ffn_norm(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    """[B, T, D] -> [B, T, D]"""
    return _rms_norm(config, x, p.post_attention_layernorm)


def ffn_gate(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    """[B, T, D] -> [B, T, F]"""
    return _linear(x, p.gate_proj)


def ffn_up(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    """[B, T, D] -> [B, T, F]"""
    return _linear(x, p.up_proj)


def ffn_silu(config: Config, p: LayerParams, env: Env, gate: Array) -> Array:
    """gate * sigmoid(gate), rounded once. [B, T, F] -> [B, T, F]"""
    wide = _wide(gate)
    return wide / (1 + lax.exp(-wide))


def ffn_swigl(config: Config, p: LayerParams, env: Env, silu: Array, up: Array) -> Array:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202). [B, T, F] * [B, T, F] -> [B, T, F]"""
    return _wide(silu) * _wide(up)


def ffn_out(config: Config, p: LayerParams, env: Env, x: Array) -> Array:
    """[B, T, F] -> [B, T, D]"""
    return _linear(x, p.down_proj)


def post_ffn_residual(config: Config, p: LayerParams, env: Env, residual: Array, x: Array) -> Array:
    """[B, T, D] + [B, T, D] -> [B, T, D]"""
    return _wide(residual) + _wide(x)


def final_norm(config: Config, p: EndParams, env: Env, x: Array) -> Array:
    """[B, T, D] -> [B, T, D]"""
    return _rms_norm(config, x, p.norm)


def lm_head(config: Config, p: EndParams, env: Env, x: Array) -> Array:
    """[B, T, D] -> [B, T, V]"""
    return _linear(x, p.lm_head)


StageFunction = Callable[..., Array]
_ROWS = (*START_STAGES, *LAYER_STAGES, *END_STAGES)
FUNCTIONS: dict[str, StageFunction] = {stage.name: globals()[stage.name] for stage in _ROWS}

# Inputs that a stage reads before they are rounded to the model dtype.
UNROUNDED = {("qkv_bias", "qkv_matmul")}


def run_stages(
    rows: Sequence[Stage],
    config: Config,
    params: Any,
    env: Env,
    given: Mapping[str, Array],
    dtype: Any,
    functions: Mapping[str, StageFunction] = FUNCTIONS,
) -> dict[str, Array]:
    """Compute the stages of ``rows`` in order, from ``given`` values and from each other.

    Parameters may come in any dtype and are first cast to ``dtype``, as ``from_pretrained`` does.
    Returns the stages alone, each rounded to ``dtype``, with a batch axis in front.
    """
    params = jax.tree.map(lambda weight: weight.astype(dtype), params)
    values, unrounded = dict(given), {}
    for stage in rows:
        inputs = [
            unrounded[name] if (stage.name, name) in UNROUNDED else values[name]
            for name in stage.inputs
        ]
        with jax.named_scope(stage.name):
            unrounded[stage.name] = functions[stage.name](config, params, env, *inputs)
            values[stage.name] = unrounded[stage.name].astype(dtype)
    return {stage.name: values[stage.name] for stage in rows}


@register_dataclass
@dataclass(frozen=True)
class Stages:
    """Every named sub-stage of one forward pass. Values carry the batch axis in front.

    Attributes:
        start: {"embedding"}.
        layers: one dictionary per layer, by stage name.
        end: {"final_norm", "lm_head"}.
    """

    start: dict[str, Array]
    layers: tuple[dict[str, Array], ...]
    end: dict[str, Array]


def forward(
    config: Config, params: Params, tokens: Array, envs: Mapping[bool, Env], dtype: Any
) -> Stages:
    """The whole model in one pure function. tokens [B, T] int32; logits are ``end["lm_head"]``.

    ``envs`` holds the ``make_env`` of full layers under False and, for a model that has them, of
    sliding-window layers under True.
    """
    env = envs[False]
    start = run_stages(START_STAGES, config, params.start, env, {TOKENS: tokens}, dtype)
    x, layers = start["embedding"], []
    for layer_params, sliding in zip(params.layers, config.sliding_layers, strict=True):
        env = envs[sliding]
        layers.append(run_stages(LAYER_STAGES, config, layer_params, env, {LAYER_INPUT: x}, dtype))
        x = layers[-1]["post_ffn_residual"]
    end = run_stages(END_STAGES, config, params.end, env, {"post_ffn_residual": x}, dtype)
    return Stages(start=start, layers=tuple(layers), end=end)
