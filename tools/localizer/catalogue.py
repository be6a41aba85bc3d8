"""Known mistakes of Qwen2 engines: for each, what a stage's dump would then be.

An entry is a function from a Case to candidate values. The dump is compared with each; the entry
that restores its significant bits names the mistake. ``{}`` in what an entry says is replaced by
the detail of the candidate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import model, params, rope
from qwen_jax.model import Env
from stages.table import LAYER_INPUT, STAGE, STAGES
from tools.localizer.case import LINEAR_WEIGHTS, Case

Array = Any
Candidates = Iterator[tuple[str, Array]]


@dataclass(frozen=True)
class Mistake:
    """One entry.

    Attributes:
        name: identifier in ``--json``.
        says: for people.
        stages: where it can be made.
        near: the wrong value can lie so close to the right one that a coarser precision would
            explain the difference.
        dump_only: True if it is a mistake of the dump alone: later stages used the right value.
            False if they used the wrong one. None if it can be either.
    """

    name: str
    says: str
    stages: tuple[str, ...]
    candidates: Callable[[Case], Candidates]
    dump_only: bool | None
    near: bool


CATALOGUE: list[Mistake] = []
NORMS = "attn_norm ffn_norm final_norm"
LINEARS = "qkv_matmul attn_out ffn_gate ffn_up ffn_out lm_head"
ROPES = "q_post_rope k_post_rope"
ALL = " ".join(stage.name for stage in STAGES)
WITH_HEADS = "qkv_matmul qkv_bias q_post_rope k_post_rope attn_scores attn_softmax attention"

NORM_WEIGHT = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "final_norm": "norm",
}


def mistake(
    name: str, says: str, stages: str, dump_only: bool | None = False, near: bool = False
) -> Callable[[Callable[[Case], Candidates]], Callable[[Case], Candidates]]:
    """Enter the decorated function into the catalogue."""

    def enter(candidates: Callable[[Case], Candidates]) -> Callable[[Case], Candidates]:
        CATALOGUE.append(Mistake(name, says, tuple(stages.split()), candidates, dump_only, near))
        return candidates

    return enter


# --- embedding


@mistake("embedding_scaled_sqrt_d", "embedding multiplied by sqrt(D), as Gemma does", "embedding")
def _(case: Case) -> Candidates:
    yield "", case.exact * np.sqrt(case.config.hidden_size)


def _embedding_table(case: Case) -> np.ndarray:
    return params.start_params(case.model).embed_tokens


def _rows(case: Case, table: np.ndarray, tokens: np.ndarray) -> Array:
    return jnp.asarray(table[tokens % len(table)].astype(np.float64))[None]


@mistake("embedding_id_off_by_one", "embedding row of token id {}", "embedding")
def _(case: Case) -> Candidates:
    tokens = np.array(case.replay.trace.tokens)
    for step in (1, -1):
        yield f"{step:+d}", _rows(case, _embedding_table(case), tokens + step)


@mistake("embedding_shifted", "embedding of the token {} positions on", "embedding", None)
def _(case: Case) -> Candidates:
    for step in (1, -1):
        yield f"{-step:+d}", jnp.roll(case.exact, step, 1)
        # the end of the prompt has no neighbour: some repeat the first or last token instead
        edge = jnp.roll(case.exact, step, 1)
        keep = 0 if step == 1 else -1
        yield f"{-step:+d}", edge.at[:, keep].set(case.exact[:, keep])
        yield f"{-step:+d}", edge.at[:, keep].set(0)


@mistake("embedding_from_lm_head", "rows of the output head instead of the embedding", "embedding")
def _(case: Case) -> Candidates:
    if not case.config.tie_word_embeddings:
        head = params.end_params(case.model).lm_head
        yield "", _rows(case, head, np.array(case.replay.trace.tokens))


@mistake("embedding_transposed", "embedding table read as [D, V]", "embedding")
def _(case: Case) -> Candidates:
    table = _embedding_table(case)
    read = table.reshape(-1).reshape(table.shape[::-1]).T
    yield "", _rows(case, read, np.array(case.replay.trace.tokens))


# --- RMSNorm


def _norm_weight(case: Case) -> Array:
    return getattr(case.weights, NORM_WEIGHT[case.stage.name])


def _with_norm(case: Case, weight: Array) -> Array:
    return case.run(weights=replace(case.weights, **{NORM_WEIGHT[case.stage.name]: weight}))


@mistake("norm_eps", "eps {} instead of the model's", NORMS, near=True)
def _(case: Case) -> Candidates:
    for eps in (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-4, 1e-7):
        if eps != case.config.rms_norm_eps:
            yield f"{eps:g}", case.run(config=replace(case.config, rms_norm_eps=eps))
    # 0 would divide by zero in a row of zeros; the smallest normal number does not
    yield "0", case.run(config=replace(case.config, rms_norm_eps=1e-300))


@mistake("norm_layernorm", "LayerNorm (mean subtracted) instead of RMSNorm", NORMS, near=True)
def _(case: Case) -> Candidates:
    x = case.inputs[0]
    yield "", case.run(x - x.mean(-1, keepdims=True))


@mistake("norm_one_plus_weight", "multiplied by 1 + weight, as Gemma does", NORMS)
def _(case: Case) -> Candidates:
    yield "", _with_norm(case, 1 + _norm_weight(case))


@mistake("norm_weight_missing", "norm weight not applied", NORMS)
def _(case: Case) -> Candidates:
    yield "", _with_norm(case, jnp.ones_like(_norm_weight(case)))


@mistake("norm_weight_swapped", "weight of another norm: {}", NORMS)
def _(case: Case) -> Candidates:
    layer = case.last_layer if case.layer is None else case.layer
    around = case.parameters(layer)
    weights = {
        "attn_norm": around.input_layernorm,
        "ffn_norm": around.post_attention_layernorm,
        "final_norm": case.parameters(None).norm,
    }
    for name, weight in weights.items():
        if name != case.stage.name:
            yield name, _with_norm(case, weight)


@mistake("norm_weight_other_layer", "norm weight of layer {}", NORMS)
def _(case: Case) -> Candidates:
    field = NORM_WEIGHT[case.stage.name]
    for layer in _other_layers(case):
        weights = case.parameters(layer)
        for name in (field,) if case.layer is not None else NORM_WEIGHT_FIELDS:
            yield str(layer), _with_norm(case, getattr(weights, name))


NORM_WEIGHT_FIELDS = ("input_layernorm", "post_attention_layernorm")


@mistake("norm_sum_not_mean", "divided by the root of the sum of squares, not of the mean", NORMS)
def _(case: Case) -> Candidates:
    x = case.inputs[0]
    total = (x * x).sum(-1, keepdims=True) + case.config.rms_norm_eps
    yield "", x / jnp.sqrt(total) * _norm_weight(case)


@mistake("norm_skipped", "not normalised: {}", NORMS)
def _(case: Case) -> Candidates:
    x = case.inputs[0]
    yield "the input itself", x
    yield "the input times the weight", x * _norm_weight(case)


@mistake("norm_eps_outside", "eps added outside the square root", NORMS, near=True)
def _(case: Case) -> Candidates:
    x = case.inputs[0]
    root = jnp.sqrt((x * x).mean(-1, keepdims=True)) + case.config.rms_norm_eps
    yield "", x / root * _norm_weight(case)


@mistake("norm_mean_abs", "divided by the mean magnitude instead of the root mean square", NORMS)
def _(case: Case) -> Candidates:
    x = case.inputs[0]
    yield (
        "",
        x / (jnp.abs(x).mean(-1, keepdims=True) + case.config.rms_norm_eps) * _norm_weight(case),
    )
    yield "", x / jnp.abs(x).mean(-1, keepdims=True) * _norm_weight(case)


# --- linear layers


def _other_layers(case: Case) -> list[int]:
    """Every other layer, the nearest first."""
    here = case.last_layer + 1 if case.layer is None else case.layer
    others = [n for n in range(case.config.num_hidden_layers) if n != case.layer]
    return sorted(others, key=lambda n: (abs(n - here), n))[:8]


def _linear_with(case: Case, change: Callable[[Array], Array]) -> Array:
    fields = LINEAR_WEIGHTS[case.stage.name]
    return case.run(
        weights=replace(case.weights, **{f: change(getattr(case.weights, f)) for f in fields})
    )


def _reread(weight: Array) -> Array:
    """The weight's memory [out, in] read as [in, out]; shape [out, in]."""
    out, width = weight.shape
    return weight.reshape(-1).reshape(width, out).T


@mistake("weight_transposed", "weight read transposed{}", LINEARS)
def _(case: Case) -> Candidates:
    yield "", _linear_with(case, _reread)
    fields = LINEAR_WEIGHTS[case.stage.name]
    for name in fields if len(fields) > 1 else ():
        weights = replace(case.weights, **{name: _reread(getattr(case.weights, name))})
        yield f" ({name} alone)", case.run(weights=weights)


@mistake("weight_other_layer", "weight of layer {}", "qkv_matmul attn_out ffn_gate ffn_up ffn_out")
def _(case: Case) -> Candidates:
    for layer in _other_layers(case):
        others = case.parameters(layer)
        yield str(layer), case.run(weights=others)
        fields = LINEAR_WEIGHTS[case.stage.name]
        for name in fields if len(fields) > 1 else ():
            mixed = replace(case.weights, **{name: getattr(others, name)})
            yield f"{layer} ({name} alone)", case.run(weights=mixed)


@mistake("kv_swapped", "k and v projections swapped", "qkv_matmul")
def _(case: Case) -> Candidates:
    w = case.weights
    yield "", case.run(weights=replace(w, k_proj=w.v_proj, v_proj=w.k_proj))


@mistake(
    "rows_rope_permuted",
    "rows of {} in the order of interleaved RoPE, as GGUF converters store them",
    "qkv_matmul qkv_bias q_post_rope k_post_rope",
    None,
)
def _(case: Case) -> Candidates:
    pairs = case.config.head_dim // 2

    def to_interleaved(heads: Array) -> Array:  # [..., H] on the last axis
        return heads.reshape(*heads.shape[:-1], 2, pairs).swapaxes(-1, -2).reshape(heads.shape)

    def to_halves(heads: Array) -> Array:
        return heads.reshape(*heads.shape[:-1], pairs, 2).swapaxes(-1, -2).reshape(heads.shape)

    n, k = case.config.num_attention_heads, case.config.num_key_value_heads
    exact = case.exact
    heads = exact.reshape(*exact.shape[:2], -1, case.config.head_dim)
    parts = {"q and k": slice(0, n + k), "q": slice(0, n), "k": slice(n, n + k)}
    if case.stage.kind == "rotation":
        parts = {case.stage.name[0]: slice(None)}
    for what, part in parts.items():
        for permute in (to_interleaved, to_halves):
            moved = heads.at[:, :, part].set(permute(heads[:, :, part]))
            yield what, moved.reshape(exact.shape)


@mistake(
    "input_not_normed",
    "applied to {} instead of the normed value",
    "qkv_matmul ffn_gate ffn_up lm_head",
)
def _(case: Case) -> Candidates:
    before = {"qkv_matmul": LAYER_INPUT, "lm_head": "post_ffn_residual"}
    name = before.get(case.stage.name, "post_attn_residual")
    value = case.value(name)
    if value is not None:
        yield name, case.run(value[:, -1:] if case.last_only else value)


@mistake("bias_already_added", "dumped after the bias was added", "qkv_matmul", None, near=True)
def _(case: Case) -> Candidates:
    w = case.weights
    yield "", case.exact + jnp.concatenate([w.q_bias, w.k_bias, w.v_bias])


@mistake("gate_up_swapped", "gate and up projections swapped", "ffn_gate ffn_up", None)
def _(case: Case) -> Candidates:
    other = "ffn_up" if case.stage.name == "ffn_gate" else "ffn_gate"
    yield "", case.run(stage=other, weights=case.parameters(case.layer, other))


@mistake(
    "head_tied", "the embedding used as the output head, which this model does not tie", "lm_head"
)
def _(case: Case) -> Candidates:
    if not case.config.tie_word_embeddings:
        yield "", case.run(weights=replace(case.weights, lm_head=_embedding_table(case)))


@mistake("logits_wrong_position", "logits of {}", "lm_head", None)
def _(case: Case) -> Candidates:
    norm = case.computed("final_norm")
    if norm is None:
        return
    if case.last_only:
        for place in (-2, 0):
            if norm.shape[1] > 1:
                name = "the first position" if place == 0 else "the position before the last"
                yield name, case.run(norm[:, place : place + 1 if place + 1 else None])
    else:
        for step in (1, -1):
            yield f"the position {-step:+d}", jnp.roll(case.exact, step, 1)
            rolled, edge = jnp.roll(case.exact, step, 1), 0 if step == 1 else -1
            yield f"the position {-step:+d}", rolled.at[:, edge].set(case.exact[:, edge])


@mistake("logits_softmaxed", "probabilities instead of logits", "lm_head")
def _(case: Case) -> Candidates:
    yield "", jax.nn.softmax(case.exact, -1)


@mistake("logits_log_softmaxed", "log-probabilities instead of logits", "lm_head")
def _(case: Case) -> Candidates:
    yield "", jax.nn.log_softmax(case.exact, -1)


@mistake("softcap", "soft-capped at {}, as Gemma 2 does", "lm_head attn_scores", near=True)
def _(case: Case) -> Candidates:
    for cap in (30.0, 50.0, 20.0, 15.0, 100.0):
        yield f"{cap:g}", cap * jnp.tanh(case.exact / cap)


# --- bias


def _biases(case: Case) -> tuple[Array, Array, Array]:
    return case.weights.q_bias, case.weights.k_bias, case.weights.v_bias


def _with_bias(case: Case, q: Array, k: Array, v: Array) -> Array:
    return case.inputs[0] + jnp.concatenate([q, k, v])


@mistake("bias_missing", "bias not added", "qkv_bias")
def _(case: Case) -> Candidates:
    yield "", case.inputs[0]


@mistake("bias_doubled", "bias added twice", "qkv_bias")
def _(case: Case) -> Candidates:
    yield "", _with_bias(case, *(2 * b for b in _biases(case)))


@mistake("bias_subtracted", "bias subtracted", "qkv_bias")
def _(case: Case) -> Candidates:
    yield "", _with_bias(case, *(-b for b in _biases(case)))


@mistake("bias_other_layer", "bias of layer {}", "qkv_bias")
def _(case: Case) -> Candidates:
    for layer in _other_layers(case):
        w = case.parameters(layer)
        yield str(layer), _with_bias(case, w.q_bias, w.k_bias, w.v_bias)


@mistake("bias_kv_swapped", "biases of k and v swapped", "qkv_bias")
def _(case: Case) -> Candidates:
    q, k, v = _biases(case)
    yield "", _with_bias(case, q, v, k)


@mistake("bias_q_only", "bias added to q alone", "qkv_bias")
def _(case: Case) -> Candidates:
    q, k, v = _biases(case)
    yield "", _with_bias(case, q, 0 * k, 0 * v)


def _one_bias_missing(part: str) -> Callable[[Case], Candidates]:
    def candidates(case: Case) -> Candidates:
        kept = [0 * b if p == part else b for p, b in zip("qkv", _biases(case), strict=True)]
        yield "", _with_bias(case, *kept)

    return candidates


for _part in "qkv":
    mistake(f"bias_{_part}_missing", f"bias of {_part} not added", "qkv_bias")(
        _one_bias_missing(_part)
    )


# --- RoPE


def _table(case: Case, positions: np.ndarray, **changes: Any) -> Env:
    """The environment with RoPE tables for other positions or another configuration."""
    config = replace(case.config, **changes)
    cos, sin = rope.cos_sin(config, positions)
    return replace(case.env, cos=jnp.asarray(cos), sin=jnp.asarray(sin))


def _positions(case: Case) -> np.ndarray:
    return np.arange(len(case.replay.trace.tokens))[None]


def _unrotated(case: Case) -> Array:
    q, k, _ = model._split_qkv(case.config, case.inputs[0])
    return q if case.stage.name == "q_post_rope" else k


@mistake("rope_interleaved", "RoPE pairs interleaved", ROPES)
def _(case: Case) -> Candidates:
    x = _unrotated(case)
    cos, sin = (t.astype(jnp.float64)[:, :, None, :] for t in (case.env.cos, case.env.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    yield "", turned.reshape(x.shape)


@mistake("rope_theta", "RoPE with theta {}", ROPES, near=True)
def _(case: Case) -> Candidates:
    for theta in (10000.0, 1e6, 5e5, 1e5, 1e7):
        if theta != case.config.rope_theta:
            yield f"{theta:g}", case.run(env=_table(case, _positions(case), rope_theta=theta))


@mistake("rope_position_off_by_one", "RoPE positions off by {}", ROPES)
def _(case: Case) -> Candidates:
    for step in (1, -1):
        yield f"{step:+d}", case.run(env=_table(case, _positions(case) + step))


@mistake("rope_sign", "RoPE turns the other way", ROPES)
def _(case: Case) -> Candidates:
    yield "", case.run(env=replace(case.env, sin=-case.env.sin))


@mistake("rope_missing", "not rotated", ROPES)
def _(case: Case) -> Candidates:
    yield "", _unrotated(case)


@mistake("rope_partial", "only {} rotated", ROPES)
def _(case: Case) -> Candidates:
    x, half = _unrotated(case), case.config.head_dim // 2
    whole = case.run()
    first = replace(case.config, head_dim=half)
    if half % 2 == 0:
        for config in (first, case.config):
            cos, sin = rope.cos_sin(config, _positions(case))
            cos, sin = (t[:, :, None, : half // 2].astype(np.float64) for t in (cos, sin))
            a, b = jnp.split(x[..., :half], 2, -1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
            yield "the first half of the channels", jnp.concatenate([turned, x[..., half:]], -1)
    pairs = np.arange(case.config.head_dim) % half < half // 2
    yield "the first half of the pairs", jnp.where(pairs, whole, x)
    yield "the second half of the pairs", jnp.where(pairs, x, whole)
    first_channels = np.arange(case.config.head_dim) < half
    yield "the first half of the channels", jnp.where(first_channels, whole, x)
    yield "the second half of the channels", jnp.where(first_channels, x, whole)


@mistake("rope_cos_sin_swapped", "cos and sin swapped", ROPES)
def _(case: Case) -> Candidates:
    yield "", case.run(env=replace(case.env, cos=case.env.sin, sin=case.env.cos))


@mistake("rope_frequency_step", "RoPE frequencies theta^(-{}) instead of theta^(-2i/H)", ROPES)
def _(case: Case) -> Candidates:
    index = np.arange(case.config.head_dim // 2)
    for says, exponent in (("i/H", 1.0), ("4i/H", 4.0)):
        frequency = case.config.rope_theta ** (-exponent * index / case.config.head_dim)
        angle = _positions(case)[..., None] * frequency
        yield says, case.run(env=replace(case.env, cos=jnp.cos(angle), sin=jnp.sin(angle)))


@mistake("rope_twice", "rotated twice", ROPES)
def _(case: Case) -> Candidates:
    yield "", case.run(env=_table(case, 2 * _positions(case)))


@mistake("rope_position_constant", "every position rotated as position {}", ROPES)
def _(case: Case) -> Candidates:
    last = _positions(case)[0, -1]
    for place in (last, 1, last + 1):
        yield str(place), case.run(env=_table(case, np.full_like(_positions(case), place)))


@mistake("rope_scaled", "RoPE positions divided by {}", ROPES)
def _(case: Case) -> Candidates:
    for factor in (2, 4, 8):
        cos, sin = rope.cos_sin(case.config, _positions(case) / factor)
        yield (
            str(factor),
            case.run(env=replace(case.env, cos=jnp.asarray(cos), sin=jnp.asarray(sin))),
        )


@mistake("rope_yarn_missing", "YaRN not applied{}", ROPES, near=True)
def _(case: Case) -> Candidates:
    if case.config.yarn is not None:
        yield "", case.run(env=_table(case, _positions(case), yarn=None))
        plain = replace(case.config.yarn, attention_factor=1.0)
        yield " to the magnitude", case.run(env=_table(case, _positions(case), yarn=plain))


# --- attention


def _scale(case: Case) -> float:
    return case.config.head_dim**-0.5


@mistake("dump_before_scale", "dumped before the scale 1/sqrt(H)", "attn_scores", True)
@mistake("scale_missing", "scale 1/sqrt(H) missing", "attn_scores")
def _(case: Case) -> Candidates:
    yield "", case.exact / _scale(case)


@mistake("scale_hidden", "scaled by 1/sqrt(D) instead of 1/sqrt(H)", "attn_scores")
def _(case: Case) -> Candidates:
    yield "", case.exact / _scale(case) * case.config.hidden_size**-0.5


@mistake("scale_head", "scaled by 1/H instead of 1/sqrt(H)", "attn_scores")
def _(case: Case) -> Candidates:
    yield "", case.exact * _scale(case)


@mistake("scale_twice", "scale applied twice", "attn_softmax")
def _(case: Case) -> Candidates:
    yield "", case.run(case.inputs[0] * _scale(case))


@mistake("scale_missing", "softmax of scores without the scale 1/sqrt(H)", "attn_softmax")
def _(case: Case) -> Candidates:
    yield "", case.run(case.inputs[0] / _scale(case))


def _tiled(case: Case, heads: Array) -> Array:
    """Key/value heads [B, S, K, H] as N of them, so that query head n reads n % K."""
    return jnp.tile(heads, (1, 1, case.config.num_attention_heads // heads.shape[2], 1))


@mistake(
    "gqa_tiled",
    "key/value heads tiled (n % K) instead of repeated (n // G)",
    "attn_scores attention",
)
def _(case: Case) -> Candidates:
    if case.stage.name == "attn_scores":
        yield "", case.run(None, _tiled(case, case.inputs[1]))
    else:
        v = model._split_qkv(case.config, case.inputs[1])[2]
        yield "", _mixed(case, _tiled(case, v))


def _mixed(case: Case, v: Array) -> Array:
    """The weighted sum of any v [B, S, N or K, H]."""
    weights = case.inputs[0]
    v = jnp.repeat(v, weights.shape[1] // v.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v)
    return out.reshape(*out.shape[:2], -1)


@mistake("scores_q_unrotated", "scores of q before RoPE", "attn_scores")
def _(case: Case) -> Candidates:
    qkv = case.value("qkv_bias")
    if qkv is not None:
        q, k, _ = model._split_qkv(case.config, qkv)
        yield "", case.run(q)
        yield "", case.run(q, k)


@mistake("scores_k_unrotated", "scores of k before RoPE", "attn_scores")
def _(case: Case) -> Candidates:
    qkv = case.value("qkv_bias")
    if qkv is not None:
        yield "", case.run(None, model._split_qkv(case.config, qkv)[1])


def _masked_softmax(case: Case, allowed: np.ndarray) -> Array:
    return case.run(env=replace(case.env, mask=jnp.asarray(allowed)[None]))


def _distance(case: Case) -> np.ndarray:
    index = np.arange(case.dump.shape[-1])
    return index[:, None] - index[None, :]


@mistake("mask_missing", "no causal mask: attends to the future", "attn_softmax")
def _(case: Case) -> Candidates:
    yield "", _masked_softmax(case, np.ones_like(_distance(case), bool))


@mistake("mask_off_by_one", "causal mask off by one: sees {} future token", "attn_softmax")
def _(case: Case) -> Candidates:
    for ahead in (1, 2):
        yield str(ahead), _masked_softmax(case, _distance(case) >= -ahead)


@mistake("mask_strict", "causal mask too strict: a token does not see itself", "attn_softmax")
def _(case: Case) -> Candidates:
    strict = _distance(case) >= 1
    yield "", _masked_softmax(case, strict)  # the first row is then uniform
    strict[0, 0] = True
    yield "", _masked_softmax(case, strict)
    yield "", jnp.where(np.arange(len(strict))[:, None] == 0, 0.0, _masked_softmax(case, strict))


@mistake("mask_windowed", "sliding window of {} positions", "attn_softmax")
def _(case: Case) -> Candidates:
    seen = int(np.median((np.asarray(case.dump)[0, :, -1] > 0).sum(-1)))
    for window in dict.fromkeys((seen, seen - 1, seen + 1, case.config.sliding_window or seen)):
        if window >= 1:
            allowed = (_distance(case) >= 0) & (_distance(case) < window)
            yield str(window), _masked_softmax(case, allowed)


@mistake("mask_window_missing", "the layer's sliding window not applied", "attn_softmax")
def _(case: Case) -> Candidates:
    if case.layer is not None and case.config.sliding_layers[case.layer]:
        yield "", _masked_softmax(case, _distance(case) >= 0)


@mistake("softmax_wrong_axis", "softmax over queries instead of keys", "attn_softmax")
def _(case: Case) -> Candidates:
    lowest = jnp.finfo(jnp.float64).min
    masked = jnp.where(case.env.mask[:, None], case.inputs[0], lowest)
    over = jax.nn.softmax(masked, 2)
    yield "", over
    yield "", jnp.where(case.env.mask[:, None], over, 0)


@mistake("softmax_base_2", "powers of 2 instead of e", "attn_softmax")
def _(case: Case) -> Candidates:
    yield "", case.run(case.inputs[0] * np.log(2))


@mistake("softmax_plus_one", "1 added to the denominator of the softmax", "attn_softmax")
def _(case: Case) -> Candidates:
    kept = case.env.mask[:, None]
    scores = jnp.where(kept, case.inputs[0], -jnp.inf)
    high = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - high)
    total = weights.sum(-1, keepdims=True)
    yield "", weights / (total + 1)  # after the maximum was subtracted
    yield "", weights / (total + jnp.exp(-high))


@mistake("softmax_temperature", "softmax at temperature {}", "attn_softmax", near=True)
def _(case: Case) -> Candidates:
    # log p is linear in the scores: its slope within rows is 1 / temperature
    kept = np.asarray(case.env.mask)[:, None] & (np.asarray(case.dump) > 1e-4)
    scores = np.where(kept, np.asarray(case.inputs[0]), 0.0)
    logs = np.log(np.where(kept, np.asarray(case.dump), 1.0))
    count = np.maximum(kept.sum(-1, keepdims=True), 1)
    x = np.where(kept, scores - scores.sum(-1, keepdims=True) / count, 0.0)
    y = np.where(kept, logs - logs.sum(-1, keepdims=True) / count, 0.0)
    if (x * x).sum() > 0 and (x * y).sum() > 0:
        slope = float((x * y).sum() / (x * x).sum())
        yield f"{1 / slope:.4g}", case.run(case.inputs[0] * slope)


@mistake("v_from_k", "k used in the place of v", "attention")
def _(case: Case) -> Candidates:
    yield "", _mixed(case, model._split_qkv(case.config, case.inputs[1])[1])
    rotated = case.value("k_post_rope")
    if rotated is not None:
        yield "", _mixed(case, rotated)


@mistake("v_shifted", "v of the position {}", "attention")
def _(case: Case) -> Candidates:
    v = model._split_qkv(case.config, case.inputs[1])[2]
    for step in (1, -1):
        rolled, edge = jnp.roll(v, step, 1), 0 if step == 1 else -1
        yield f"{-step:+d}", _mixed(case, rolled)
        yield f"{-step:+d}", _mixed(case, rolled.at[:, edge].set(v[:, edge]))
        yield f"{-step:+d}", _mixed(case, rolled.at[:, edge].set(0))


@mistake("v_without_bias", "v before its bias", "attention")
def _(case: Case) -> Candidates:
    before = case.value("qkv_matmul")
    if before is not None:
        yield "", _mixed(case, model._split_qkv(case.config, before)[2])


@mistake(
    "heads_not_transposed", "heads merged without transposing [N, T, H] to [T, N, H]", "attention"
)
def _(case: Case) -> Candidates:
    grid = case.exact.reshape(1, case.exact.shape[1], case.config.num_attention_heads, -1)
    yield "", grid.swapaxes(1, 2).reshape(case.exact.shape)


# --- residual additions


def _residual_inputs(case: Case) -> tuple[Array, Array]:
    return case.inputs[0], case.inputs[1]


RESIDUALS = "post_attn_residual post_ffn_residual"


@mistake("residual_missing", "residual not added", RESIDUALS)
def _(case: Case) -> Candidates:
    yield "", case.inputs[1]


@mistake("branch_missing", "only the residual; the block's output not added", RESIDUALS)
def _(case: Case) -> Candidates:
    yield "", case.inputs[0]


@mistake("residual_normed", "residual taken after the norm", RESIDUALS)
def _(case: Case) -> Candidates:
    name = "attn_norm" if case.stage.name == "post_attn_residual" else "ffn_norm"
    value = case.computed(name)
    if value is not None:
        yield "", value + case.inputs[1]


@mistake("residual_doubled", "residual added twice", RESIDUALS)
def _(case: Case) -> Candidates:
    yield "", 2 * case.inputs[0] + case.inputs[1]


@mistake("branch_doubled", "the block's output added twice", RESIDUALS)
def _(case: Case) -> Candidates:
    yield "", case.inputs[0] + 2 * case.inputs[1]


@mistake("residual_subtracted", "{}", RESIDUALS)
def _(case: Case) -> Candidates:
    residual, branch = _residual_inputs(case)
    yield "the block's output subtracted from the residual", residual - branch
    yield "the residual subtracted from the block's output", branch - residual


@mistake("residual_layer_input", "residual taken from the layer's input", "post_ffn_residual")
def _(case: Case) -> Candidates:
    value = case.value(LAYER_INPUT)
    if value is not None:
        yield "", value + case.inputs[1]


# --- feed-forward


def _activation(name: str, says: str, function: Callable[[Array], Array]) -> None:
    def candidates(case: Case) -> Candidates:
        yield "", function(case.inputs[0])

    mistake(name, says, "ffn_silu", near=True)(candidates)


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


@mistake("silu_of_up", "SiLU of up instead of gate", "ffn_silu")
def _(case: Case) -> Candidates:
    up = case.value("ffn_up")
    if up is not None:
        yield "", case.run(up)


@mistake("swigl_no_silu", "gate * up without SiLU", "ffn_swigl")
def _(case: Case) -> Candidates:
    gate = case.value("ffn_gate")
    if gate is not None:
        yield "", gate * case.inputs[1]


@mistake("swigl_silu_of_up", "gate * silu(up)", "ffn_swigl")
def _(case: Case) -> Candidates:
    gate = case.value("ffn_gate")
    if gate is not None:
        yield "", gate * jax.nn.silu(case.inputs[1])


@mistake("swigl_added", "silu(gate) + up instead of their product", "ffn_swigl")
def _(case: Case) -> Candidates:
    yield "", case.inputs[0] + case.inputs[1]


@mistake("swigl_up_missing", "not multiplied by up", "ffn_swigl")
def _(case: Case) -> Candidates:
    yield "", case.inputs[0]


# --- layout of the dump, and anything else that can happen to any stage


def _grid(case: Case) -> Array:
    """The exact value [B=1, T, heads, rest] or [1, N, T, S] or [1, T, C], without the batch."""
    exact, heads = case.exact[0], case.heads
    if case.stage.axes == ("N", "T", "S") or exact.ndim != 2 or not heads:
        return exact
    return exact.reshape(exact.shape[0], heads, -1)


@mistake("layout_transposed", "dumped with its axes transposed", ALL, None)
def _(case: Case) -> Candidates:
    exact = case.exact[0]
    if exact.ndim == 2:
        yield "", exact.T.reshape(case.exact.shape)


@mistake(
    "layout_heads_first",
    "dumped heads first, [heads, T, H]",
    f"{ROPES} qkv_matmul qkv_bias attention",
    True,
)
def _(case: Case) -> Candidates:
    grid = _grid(case)
    if grid.ndim == 3:
        yield "", grid.swapaxes(0, 1).reshape(case.exact.shape)


@mistake(
    "layout_channels_first",
    "dumped with head and channel exchanged",
    f"{ROPES} qkv_matmul qkv_bias attention",
    None,
)
def _(case: Case) -> Candidates:
    grid = _grid(case)
    if grid.ndim == 3:
        yield "", grid.swapaxes(1, 2).reshape(case.exact.shape)


@mistake("layout_tokens_first", "dumped tokens first, [T, N, S]", "attn_scores attn_softmax", None)
def _(case: Case) -> Candidates:
    yield "", case.exact[0].swapaxes(0, 1).reshape(case.exact.shape)


@mistake("layout_keys_first", "dumped keys first, [N, S, T]", "attn_scores attn_softmax", None)
def _(case: Case) -> Candidates:
    yield "", case.exact.swapaxes(2, 3)


@mistake("layer_off_by_one", "the dump of layer {}", ALL, None)
def _(case: Case) -> Candidates:
    if case.layer is None or case.stage.scope != "layer":
        return
    count = case.config.num_hidden_layers
    for layer in {(case.layer - 1) % count, (case.layer + 1) % count} - {case.layer}:
        other = Case(case.replay, STAGE[case.stage.name], layer)
        if other.inputs is not None:
            yield str(layer), other.exact


@mistake("stage_swapped", "the dump of {}", ALL, True)
def _(case: Case) -> Candidates:
    for row in STAGES:
        if row.name == case.stage.name or row.axes != case.stage.axes or row.scope != "layer":
            continue
        if case.layer is not None:
            other = Case(case.replay, row, case.layer, case.overrides)
            if other.exact is not None:
                yield row.name, other.exact


@mistake("positions_permuted", "positions in another order: {}", ALL, None)
def _(case: Case) -> Candidates:
    """Match every position of the dump to the position of the exact value it is nearest to."""
    if case.stage.axes[0] != "T" or case.dump.ndim < 3:
        return
    length = case.dump.shape[1]
    found, exact = (
        np.nan_to_num(np.asarray(x).reshape(length, -1), posinf=0.0, neginf=0.0)
        for x in (case.dump, case.exact)
    )
    distance = (found**2).sum(1)[:, None] + (exact**2).sum(1)[None] - 2 * found @ exact.T
    order = distance.argmin(1)
    moved = np.flatnonzero(order != np.arange(length))
    if moved.size and len(set(order)) >= length - 1:  # a shift may repeat or lose the last one
        says = ", ".join(f"{place} holds {order[place]}" for place in moved[:4])
        yield says + (", ..." if moved.size > 4 else ""), case.exact[:, order]


@mistake("heads_permuted", "heads in the order {}", WITH_HEADS, None)
def _(case: Case) -> Candidates:
    """Match every head of the dump to the head of the exact value that it is nearest to."""
    heads = case.heads
    if not heads or heads < 2:
        return
    lead = case.stage.axes == ("N", "T", "S")

    def by_head(x: Array) -> np.ndarray:
        x = np.asarray(x)
        if not lead:
            x = np.moveaxis(x.reshape(1, x.shape[1], heads, -1), 2, 1)
        else:
            x = np.where(np.asarray(case.env.mask)[:, None], x, 0)
        return np.nan_to_num(x.reshape(heads, -1), posinf=0.0, neginf=0.0)

    found, exact = by_head(case.dump), by_head(case.exact)
    distance = (found**2).sum(1)[:, None] + (exact**2).sum(1)[None] - 2 * found @ exact.T
    order = distance.argmin(1)
    if sorted(order) == list(range(heads)) and not np.array_equal(order, np.arange(heads)):
        shape = (1, heads, *case.dump.shape[2:]) if lead else None
        if lead:
            moved = np.asarray(case.exact)[:, order].reshape(shape)
        else:
            grid = np.asarray(case.exact).reshape(1, case.dump.shape[1], heads, -1)
            moved = grid[:, :, order].reshape(case.dump.shape)
        says = ",".join(map(str, order)) if heads <= 16 else "of a permutation"
        yield says, jnp.asarray(moved)
