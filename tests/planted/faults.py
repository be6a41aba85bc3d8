"""Mistakes that people make in an engine, each written by hand and planted in ``engine.Engine``.

    fault = FAULTS["q_post_rope.rope_interleaved"]
    engine = Engine.open("qwen_jax/demo", mode="bf16")
    fault.apply(engine, layers=[2])  # default: every layer
    run = engine.run(tokens)
    run.effects  # {(2, "q_post_rope"): 0.61}: how far the stage is from right, given its inputs
    run.dump("build/foreign")

A fault is created in the stage that it names and nowhere else: every other operation stays right,
given what the faulty one hands it. A *dump* fault leaves the computation alone and spoils the file.
Prompts need 17 tokens or more, for the faults that spoil one position or look back only so far, and
models 38 channels in every axis but a head's and two layers. ``of`` gives the faults that an
architecture can have.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.numpy_engine.engine import (
    CACHED,
    HEAD_NORMS,
    LINEARS,
    NORMS,
    OPERATIONS,
    QKV,
    Array,
    Context,
    Engine,
    Key,
    Operation,
    Redump,
    Run,
    Shape,
    bf16,
    causal,
    f16,
    keys_of,
    q8_0,
    rms_norm,
    rope_table,
    rotate,
    softmax,
)


@dataclass(frozen=True)
class Fault:
    """One planted mistake.

    Attributes:
        name: unique, ``<stage>.<what>``; q and k together are ``qk_post_rope``.
        stages: where the error is created, in the order of computation.
        diagnosis: what a localizer should call it; None where only a description can be expected.
        says: one line for people.
        accept: other names that are as good.
        shape: the description to be expected where there is no name, or beside it.
        where: what it is confined to: "heads", "positions" or "channels" (of the last axis).
        dump: the computation is right and the dump is not.
        clean: not a mistake; nothing must be reported.
        one_layer: is a fault only against the other layers, so plant it in one.
        bias, head_norms: is a fault only where q and k have that.
        yarn, window: is a fault only of scaled RoPE, of sliding windows.
    """

    name: str
    stages: tuple[str, ...]
    diagnosis: str | None
    says: str
    operations: Mapping[str, Operation] = field(repr=False, default_factory=dict)
    redumps: Mapping[str, Redump] = field(repr=False, default_factory=dict)
    accept: tuple[str, ...] = ()
    shape: str | None = None
    where: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    clean: bool = False
    one_layer: bool = False
    bias: bool = False
    head_norms: bool = False
    yarn: bool = False
    window: bool = False

    @property
    def stage(self) -> str:
        """Where the error is created; the first where there are several."""
        return self.stages[0]

    @property
    def dump(self) -> bool:
        """Whether only the dump is wrong."""
        return bool(self.redumps)

    def applies(self, shape: Shape) -> bool:
        """Whether the model has what it spoils."""
        needed = set(self.stages) | ({"qkv_bias"} if self.bias else set())
        needed |= set(HEAD_NORMS) if self.head_norms else set()
        lacks = (self.yarn and not shape.yarn) or (self.window and not shape.window)
        return not lacks and needed <= {*shape.stages, *CACHED}

    def keys(self, engine: Engine, layers: Iterable[int] | None = None) -> list[Key]:
        """Where ``apply`` plants it: (layer or None, stage). Stages outside the layers: once."""
        chosen = None if layers is None else set(layers)
        keys = []
        for stage in self.stages:
            places = keys_of(stage, engine.shape.layers)
            if len(places) > 1 and chosen is not None:
                places = [(layer, name) for layer, name in places if layer in chosen]
            keys += places
        return keys

    def apply(self, engine: Engine, layers: Iterable[int] | None = None) -> list[Key]:
        """Plant it in ``layers``, or in every layer, and say where."""
        keys = self.keys(engine, layers)
        for layer, stage in keys:
            if stage in self.operations:
                engine.replace(stage, layer, self.operations[stage])
            else:
                engine.redump(stage, layer, self.redumps[stage])
        return keys


FAULTS: dict[str, Fault] = {}


def of(shape: Shape) -> dict[str, Fault]:
    """The faults that can be planted in a model."""
    return {name: fault for name, fault in FAULTS.items() if fault.applies(shape)}


def plant(
    checkpoint: str | Path | tuple[Any, Any],
    tokens: Sequence[int],
    fault: Fault | str | None = None,
    layers: Iterable[int] | None = None,
    mode: str = "f32",
    logits: str = "last",
    **more: Any,
) -> Run:
    """One run of a checkpoint directory (or of what ``engine.load`` returned) with one fault.
    ``more`` is as of ``Engine.run``."""
    if isinstance(checkpoint, tuple):
        engine = Engine(*checkpoint, mode)
    else:
        engine = Engine.open(checkpoint, mode)
    if fault:
        (FAULTS[fault] if isinstance(fault, str) else fault).apply(engine, layers)
    return engine.run(tokens, logits, **more)


# A fault whose worst row or channel is further off than this has to be found. What lies below is
# within some bits of what the arithmetic itself loses there, and need not be.
PLAIN = {
    "f32": 2.0**-17,
    "blocked": 2.0**-17,
    "online_softmax": 2.0**-17,
    "f16": 2.0**-7,
    "tf32": 2.0**-7,
    "f16_kv": 2.0**-7,
    "bf16": 2.0**-5,
    "bf16_matmul": 2.0**-5,
    "act8": 2.0**-4,
}


def plain(run: Run, mode: str) -> list[Key]:
    """Where the planted fault is too large to be taken for rounding."""
    return [key for key, peak in run.peaks.items() if peak > PLAIN[mode]]


def _add(
    stages: str,
    what: str,
    operation: Operation | Mapping[str, Operation],
    says: str,
    diagnosis: str | None = "",
    label: str = "",
    **more: Any,
) -> None:
    """Register an operation fault. The diagnosis is ``what`` unless it is given."""
    names = tuple(stages.split())
    operations = operation if isinstance(operation, Mapping) else dict.fromkeys(names, operation)
    _register(
        Fault(
            f"{label or names[0]}.{what}",
            names,
            what if diagnosis == "" else diagnosis,
            says,
            operations=operations,
            **more,
        )
    )


def _add_dump(
    stage: str, what: str, redump: Redump, says: str, diagnosis: str | None = "", **more: Any
) -> None:
    """Register a fault of the dump."""
    _register(
        Fault(
            f"{stage}.{what}",
            (stage,),
            what if diagnosis == "" else diagnosis,
            says,
            redumps={stage: redump},
            **more,
        )
    )


def _register(fault: Fault) -> None:
    assert fault.name not in FAULTS
    FAULTS[fault.name] = fault


def _neighbour(c: Context) -> int:
    """The layer before this one; for the first layer the one after it."""
    return c.layer - 1 if c.layer else 1


def _f32(x: float) -> np.float32:
    return np.float32(x)


# --- embedding -------------------------------------------------------------------------------

TABLE = "model.embed_tokens.weight"
_add(
    "embedding",
    "embedding_scaled_sqrt_d",
    lambda c: c.weight(TABLE)[c["tokens"]] * _f32(c.shape.hidden**0.5),
    "rows multiplied by sqrt(D), as Gemma does",
)
_add(
    "embedding",
    "embedding_id_off_by_one",
    lambda c: c.weight(TABLE)[(c["tokens"] + 1) % c.shape.vocabulary],
    "row of token id + 1",
)
_add(
    "embedding",
    "embedding_shifted",
    lambda c: c.weight(TABLE)[np.concatenate([c["tokens"][:1], c["tokens"][:-1]])],
    "position t has the row of token t - 1",
)
_add(
    "embedding",
    "embedding_from_lm_head",
    lambda c: c.weight("lm_head.weight")[c["tokens"]],
    "rows of the lm_head",
)
_add(
    "embedding",
    "embedding_transposed",
    lambda c: c.weight(TABLE).reshape(c.shape.hidden, -1)[:, c["tokens"]].T,
    "the table's memory read as [D, V]",
)


# --- norms -----------------------------------------------------------------------------------


def _layer_norm(c: Context, x: Array, w: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return rms_norm(centred, w, c.shape.eps)


def _norm_sum(c: Context, x: Array, w: Array) -> Array:
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + _f32(c.shape.eps)) * w


def _norm_eps_outside(c: Context, x: Array, w: Array) -> Array:
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + _f32(c.shape.eps)) * w


def _norm_mean_abs(c: Context, x: Array, w: Array) -> Array:
    return x / (np.mean(np.abs(x), axis=-1, keepdims=True) + _f32(c.shape.eps)) * w


def _norm_channel(c: Context, x: Array, w: Array) -> Array:
    w = w.copy()
    w[9] *= _f32(1.01)
    return rms_norm(x, w, c.shape.eps)


def _norm_nan(c: Context, x: Array, w: Array) -> Array:
    y = rms_norm(x, w, c.shape.eps)
    y[len(y) // 2, 3] = np.nan
    return y


OTHER_NORM = {
    "attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "input_layernorm.weight",
    "q_norm": "self_attn.k_norm.weight",
    "k_norm": "self_attn.q_norm.weight",
}


def _norm_swapped(stage: str, c: Context) -> Array:
    return rms_norm(c.normed(stage), c.weight(OTHER_NORM[stage]), c.shape.eps)


def _norm_other_layer(stage: str, c: Context) -> Array:
    if c.layer is None:
        other = c.weight("input_layernorm.weight", c.shape.layers - 1)
    else:
        other = c.weight(NORMS[stage][1], _neighbour(c))
    return rms_norm(c.normed(stage), other, c.shape.eps)


NormMistake = Callable[[Context, Array, Array], Array]
NORM_MISTAKES: list[tuple[str, NormMistake, str]] = [
    (
        "norm_eps",
        lambda c, x, w: rms_norm(x, w, 1e-6 if c.shape.eps == 1e-5 else 1e-5),
        "epsilon 1e-5 instead of 1e-6",
    ),
    ("norm_layernorm", _layer_norm, "LayerNorm: the mean is subtracted"),
    ("norm_one_plus_weight", lambda c, x, w: rms_norm(x, 1 + w, c.shape.eps), "times 1 + weight"),
    ("norm_weight_missing", lambda c, x, w: rms_norm(x, 1 + 0 * w, c.shape.eps), "no weight"),
    ("norm_sum_not_mean", _norm_sum, "sum of squares instead of their mean"),
    ("norm_skipped", lambda c, x, w: x, "the input handed through"),
    ("norm_eps_outside", _norm_eps_outside, "epsilon added after the square root"),
    ("norm_mean_abs", _norm_mean_abs, "divided by the mean absolute value"),
]


def _of_norm(stage: str, wrong: NormMistake) -> Operation:
    return lambda c: wrong(c, c.normed(stage), c.weight(NORMS[stage][1]))


for _stage in NORMS:
    for _what, _wrong, _says in NORM_MISTAKES:
        _add(_stage, _what, _of_norm(_stage, _wrong), _says)
    _add(
        _stage,
        "norm_weight_other_layer",
        partial(_norm_other_layer, _stage),
        "another layer's weight",
        accept=("norm_weight_swapped",) if _stage == "final_norm" else (),
    )
    if _stage in OTHER_NORM:
        _add(
            _stage,
            "norm_weight_swapped",
            partial(_norm_swapped, _stage),
            "the weight of the layer's other norm",
        )
_add(
    "attn_norm",
    "channel_scaled",
    _of_norm("attn_norm", _norm_channel),
    "one element of the weight times 1.01",
    "row_scaled",
    where={"channels": (9,)},
)
_add("ffn_norm", "nan", _of_norm("ffn_norm", _norm_nan), "one element is NaN", None, shape="nan")


def _norm_all_heads(c: Context, x: Array, w: Array) -> Array:
    mean = np.mean(x * x, axis=(-2, -1), keepdims=True)
    return x / np.sqrt(mean + _f32(c.shape.eps)) * w


def _norm_head_positions(c: Context, x: Array, w: Array) -> Array:
    """One mean square a head, over all positions."""
    mean = np.mean(x * x, axis=(0, -1), keepdims=True)
    return x / np.sqrt(mean + _f32(c.shape.eps)) * w


def _norm_rotated(c: Context, x: Array, w: Array) -> Array:
    return rms_norm(rotate(x, *c.tables()), w, c.shape.eps)


def _both(operation: Callable[[str], Operation]) -> dict[str, Operation]:
    """The same mistake with q and with k."""
    return {stage: operation(stage) for stage in HEAD_NORMS}


for _what, _wrong, _says in [
    ("norm_over_all_heads", _norm_all_heads, "over N * H, all heads together"),
    ("norm_skipped", lambda c, x, w: x, "missing"),
    ("norm_weight_missing", lambda c, x, w: rms_norm(x, 1 + 0 * w, c.shape.eps), "no weight"),
    ("norm_layernorm", _layer_norm, "LayerNorm: the mean is subtracted"),
]:
    _add(
        "q_norm k_norm",
        _what,
        _both(partial(_of_norm, wrong=_wrong)),
        f"q and k: {_says}",
        label="qk_norm",
    )
for _stage in HEAD_NORMS:
    _add(_stage, "norm_over_all_heads", _of_norm(_stage, _norm_all_heads), "over all heads at once")
    _add(_stage, "rope_before_norm", _of_norm(_stage, _norm_rotated), "of the rotated heads")
_add(
    "q_norm",
    "norm_over_positions",
    _of_norm("q_norm", _norm_head_positions),
    "one mean square a head, over all positions",
    None,
    shape="no known mistake",
)
_add(
    "q_norm k_norm",
    "norm_weight_swapped",
    _both(lambda stage: partial(_norm_swapped, stage)),
    "the weights of q and k exchanged",
    label="qk_norm",
)
_add(
    "q_norm k_norm q_post_rope k_post_rope",
    "rope_before_norm",
    {
        **_both(lambda stage: _of_norm(stage, _norm_rotated)),
        "q_post_rope": lambda c: c["q_norm"],
        "k_post_rope": lambda c: c["k_norm"],
    },
    "q and k: RoPE first, and no second time",
    label="qk_norm_rope",
)
_add(
    "q_norm",
    "channel_scaled",
    _of_norm("q_norm", _norm_channel),
    "one element of the weight, of every head, times 1.01",
    "row_scaled",
)


# --- linear layers ---------------------------------------------------------------------------

ROW = 37  # the output channel that row faults spoil


def _transposed(w: Array) -> Array:
    """[out, in] as read by someone who thinks that the memory is [in, out]."""
    return np.ascontiguousarray(w).reshape(w.shape[1], w.shape[0]).T


def _row_scaled(w: Array) -> Array:
    w = w.copy()
    w[ROW] *= _f32(1.01)
    return w


def _row_corrupted(w: Array) -> Array:
    w = w.copy()
    noise = np.random.default_rng(7).standard_normal((w.shape[1],)).astype(np.float32)
    w[ROW] = noise * w[ROW].std()
    return w


def _bit_flipped(w: Array) -> Array:
    """The highest mantissa bit of the largest weight of one row: times 1.5, or over 1.5 or so."""
    w = w.copy()
    column = int(np.abs(w[ROW]).argmax())
    w[ROW, column : column + 1].view(np.uint32)[...] ^= np.uint32(1 << 22)
    return w


def _with_weight(stage: str, change: Callable[[Array], Array], c: Context) -> Array:
    source, weight = LINEARS[stage]
    return c.linear(c[source], change(c.weight(weight)))


def _weight_other_layer(stage: str, c: Context) -> Array:
    source, weight = LINEARS[stage]
    return c.linear(c[source], c.weight(weight, _neighbour(c)))


def _linear_from(stage: str, source: str, c: Context) -> Array:
    return c.linear(c[source], c.weight(LINEARS[stage][1]))


_at_row = {"channels": (ROW,)}
for _stage in LINEARS:
    _add(
        _stage,
        "weight_transposed",
        partial(_with_weight, _stage, _transposed),
        "the weight's memory read as [in, out]",
    )
    if _stage != "lm_head":
        _add(
            _stage,
            "weight_other_layer",
            partial(_weight_other_layer, _stage),
            "another layer's weight",
        )
    _add(
        _stage,
        "row_scaled",
        partial(_with_weight, _stage, _row_scaled),
        "one row of the weight times 1.01",
        where=_at_row,
    )
    _add(
        _stage,
        "row_corrupted",
        partial(_with_weight, _stage, _row_corrupted),
        "one row of the weight is noise",
        where=_at_row,
    )
    _add(
        _stage,
        "bit_flipped",
        partial(_with_weight, _stage, _bit_flipped),
        "the highest mantissa bit of one weight flipped",
        None,
        accept=("row_corrupted",),
        shape="one channel",
        where=_at_row,
    )

_add(
    "ffn_gate",
    "gate_up_swapped",
    lambda c: c.linear(c["ffn_norm"], c.weight("mlp.up_proj.weight")),
    "the up projection's weight",
)
_add(
    "ffn_up",
    "gate_up_swapped",
    lambda c: c.linear(c["ffn_norm"], c.weight("mlp.gate_proj.weight")),
    "the gate projection's weight",
)
_add(
    "ffn_gate ffn_up",
    "gate_up_swapped",
    {
        **FAULTS["ffn_gate.gate_up_swapped"].operations,
        **FAULTS["ffn_up.gate_up_swapped"].operations,
    },
    "gate and up exchanged",
    label="ffn_gate_up",
)
for _stage in ("ffn_gate", "ffn_up"):
    _add(
        _stage,
        "input_not_normed",
        partial(_linear_from, _stage, "post_attn_residual"),
        "reads the residual stream, not the norm of it",
    )


# --- qkv_matmul ------------------------------------------------------------------------------


def _qkv_weights(c: Context, layer: int | None = None) -> list[Array]:
    return [c.weight(f"{name}.weight", layer) for name in QKV]


def _qkv(c: Context, weights: Sequence[Array], source: str = "attn_norm") -> Array:
    return np.concatenate([c.linear(c[source], w) for w in weights], axis=-1)


def _qkv_one(index: int, change: Callable[[Array], Array], c: Context) -> Array:
    weights = _qkv_weights(c)
    weights[index] = change(weights[index])
    return _qkv(c, weights)


def _kv_swapped(c: Context) -> Array:
    q, k, v = _qkv_weights(c)
    return _qkv(c, [q, v, k])


def _q_heads_regrouped(c: Context) -> Array:
    """Heads in the order [G, K] instead of [K, G], or the other way round."""
    q, k, v = _qkv_weights(c)
    s = c.shape
    q = q.reshape(s.kv_heads, -1, s.head, s.hidden).swapaxes(0, 1).reshape(q.shape)
    return _qkv(c, [q, k, v])


def _q_heads_swapped(c: Context) -> Array:
    q, k, v = _qkv_weights(c)
    order = np.arange(c.shape.heads)
    order[[0, -1]] = order[[-1, 0]]
    return _qkv(c, [q.reshape(c.shape.heads, -1, c.shape.hidden)[order].reshape(q.shape), k, v])


def _rows_for_interleaved_rope(w: Array, head: int) -> Array:
    """Rows i and i + H/2 of every head side by side, as converters for another RoPE order them."""
    return w.reshape(-1, 2, head // 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def _rows_rope_permuted(c: Context) -> Array:
    q, k, v = _qkv_weights(c)
    h = c.shape.head
    return _qkv(c, [_rows_for_interleaved_rope(q, h), _rows_for_interleaved_rope(k, h), v])


_add(
    "qkv_matmul",
    "weight_transposed",
    lambda c: _qkv(c, list(map(_transposed, _qkv_weights(c)))),
    "the memory of q, k and v each read as [in, out]",
)
_add(
    "qkv_matmul",
    "k_weight_transposed",
    partial(_qkv_one, 1, _transposed),
    "the memory of k's weight read as [in, out]",
    "weight_transposed",
)
_add(
    "qkv_matmul",
    "weight_other_layer",
    lambda c: _qkv(c, _qkv_weights(c, _neighbour(c))),
    "another layer's weights",
)
_add("qkv_matmul", "kv_swapped", _kv_swapped, "the weights of k and v exchanged")
_add("qkv_matmul", "heads_permuted", _q_heads_regrouped, "q heads in the order [G, K]")
_add(
    "qkv_matmul",
    "heads_swapped",
    _q_heads_swapped,
    "first and last q head exchanged",
    "heads_permuted",
)
_add(
    "qkv_matmul",
    "rows_rope_permuted",
    _rows_rope_permuted,
    "rows of q and k in the order for interleaved RoPE, as some converters write them",
)
_add(
    "qkv_matmul",
    "input_not_normed",
    lambda c: _qkv(c, _qkv_weights(c), "layer_input"),
    "reads the layer's input, not the norm of it",
)
_add(
    "qkv_matmul",
    "row_corrupted",
    partial(_qkv_one, 0, _row_corrupted),
    "one row of q's weight is noise",
    where=_at_row,
)
_add(
    "qkv_matmul",
    "row_scaled",
    partial(_qkv_one, 0, _row_scaled),
    "one row of q's weight times 1.01",
    where=_at_row,
)
_add_dump(
    "qkv_matmul",
    "bias_already_added",
    lambda e, values, key: values[key[0], "qkv_bias"],
    "dumped after the bias",
    bias=True,
)


# --- qkv_bias --------------------------------------------------------------------------------


def _biased(c: Context, factors: tuple[float, float, float], layer: int | None = None) -> Array:
    parts = zip(factors, (c.weight(f"{name}.bias", layer) for name in QKV), strict=True)
    return c["qkv_matmul"] + np.concatenate([_f32(factor) * bias for factor, bias in parts])


def _kv_bias_swapped(c: Context) -> Array:
    q, k, v = (c.weight(f"{name}.bias") for name in QKV)
    return c["qkv_matmul"] + np.concatenate([q, v, k])


for _what, _factors, _says in [
    ("bias_missing", (0, 0, 0), "no bias"),
    ("bias_doubled", (2, 2, 2), "bias added twice"),
    ("bias_subtracted", (-1, -1, -1), "bias subtracted"),
    ("bias_k_missing", (1, 0, 1), "no bias on k"),
    ("bias_q_only", (1, 0, 0), "bias on q alone"),
    ("bias_q_missing", (0, 1, 1), "no bias on q"),
    ("bias_v_missing", (1, 1, 0), "no bias on v"),
    ("bias_v_only", (0, 0, 1), "bias on v alone"),
]:
    _add("qkv_bias", _what, partial(_biased, factors=_factors), _says)
_add(
    "qkv_bias",
    "bias_other_layer",
    lambda c: _biased(c, (1, 1, 1), _neighbour(c)),
    "another layer's bias",
)
_add("qkv_bias", "bias_kv_swapped", _kv_bias_swapped, "the biases of k and v exchanged")


# --- RoPE ------------------------------------------------------------------------------------


def _table(
    c: Context, positions: Array | None = None, theta: float = 0, step: float = 2
) -> tuple[Array, Array]:
    positions = c.positions if positions is None else positions
    theta = theta or c.shape.theta
    cos, sin = rope_table(positions, c.shape.head, theta, step, c.shape.yarn)
    return c.engine.arithmetic.store(cos), c.engine.arithmetic.store(sin)


def _rope_interleaved(c: Context, x: Array) -> Array:
    cos, sin = (t[:, None] for t in c.tables())
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


def _rope_theta(c: Context, x: Array) -> Array:
    return rotate(x, *_table(c, theta=1e6 if c.shape.theta == 1e4 else 1e4))


def _rope_sign(c: Context, x: Array) -> Array:
    cos, sin = c.tables()
    return rotate(x, cos, -sin)


def _rope_angles_bf16(c: Context, x: Array) -> Array:
    step = 2 * np.arange(c.shape.head // 2) / c.shape.head
    angle = bf16(c.positions[:, None] * _f32(c.shape.theta) ** -step.astype(np.float32))
    return rotate(x, np.cos(angle), np.sin(angle))


def _rope_partial(c: Context, x: Array) -> Array:
    """The first H/2 channels rotated as a head of that size would be, the rest left alone."""
    half = c.shape.head // 2
    cos, sin = (c.engine.arithmetic.store(t) for t in rope_table(c.positions, half, c.shape.theta))
    return np.concatenate([rotate(x[..., :half], cos, sin), x[..., half:]], axis=-1)


def _rope_half_of_pairs(c: Context, x: Array) -> Array:
    """The faster half of the pairs rotated as it should be, the slower half left alone."""
    cos, sin = (t.copy() for t in c.tables())
    slow = slice(cos.shape[1] // 2, None)
    cos[:, slow], sin[:, slow] = 1, 0
    return rotate(x, cos, sin)


def _rope_swapped(c: Context, x: Array) -> Array:
    cos, sin = c.tables()
    return rotate(x, sin, cos)


def _rope_twice(c: Context, x: Array) -> Array:
    table = c.tables()
    return rotate(c.engine.arithmetic.store(rotate(x, *table)), *table)


def _rope_one_position(c: Context, x: Array) -> Array:
    return rotate(x, *_table(c, np.full(len(x), c.positions[-1])))


RopeMistake = Callable[[Context, Array], Array]
ROPE_MISTAKES: list[tuple[str, RopeMistake, str]] = [
    ("rope_interleaved", _rope_interleaved, "pairs (2i, 2i + 1) instead of (i, i + H/2)"),
    ("rope_theta", _rope_theta, "theta 10000"),
    ("rope_position_off_by_one", lambda c, x: rotate(x, *_table(c, c.positions + 1)),
     "positions count from one"),
    ("rope_sign", _rope_sign, "rotated the other way"),
    ("rope_angles_rounded", _rope_angles_bf16, "angles in bfloat16"),
    ("rope_missing", lambda c, x: x, "not rotated"),
    ("rope_partial", _rope_partial, "only half of the channels, as a smaller head"),
    ("rope_partial_pairs", _rope_half_of_pairs, "only the faster half of the pairs"),
    ("rope_cos_sin_swapped", _rope_swapped, "cos and sin exchanged"),
    ("rope_frequency_step", lambda c, x: rotate(x, *_table(c, step=1)),
     "frequencies theta^(-i/H) instead of theta^(-2i/H)"),
    ("rope_twice", _rope_twice, "rotated twice"),
    ("rope_position_constant", _rope_one_position, "every position is the last one's"),
]  # fmt: skip


def _of_rope(part: int, wrong: RopeMistake) -> Operation:
    return lambda c: wrong(c, c.attended()[part])


for _what, _rope, _says in ROPE_MISTAKES:
    _ropes = {"q_post_rope": _of_rope(0, _rope), "k_post_rope": _of_rope(1, _rope)}
    _name = "rope_partial" if _what == "rope_partial_pairs" else _what
    _add("q_post_rope", _what, _ropes["q_post_rope"], f"q: {_says}", _name)
    _add("k_post_rope", _what, _ropes["k_post_rope"], f"k: {_says}", _name)
    _add("q_post_rope k_post_rope", _what, _ropes, f"q and k: {_says}", _name, label="qk_post_rope")


def _rotated_unnormed(part: int, c: Context) -> Array:
    return rotate(c.heads(c["qkv_matmul"])[part], *c.tables())


for _part, _stage in enumerate(("q_post_rope", "k_post_rope")):
    _add(
        _stage,
        "input_not_normed",
        partial(_rotated_unnormed, _part),
        "reads the projection, not the norm of it",
        head_norms=True,
    )


# --- attn_scores -----------------------------------------------------------------------------


def scores(
    c: Context,
    factor: float | None = None,
    q: Array | None = None,
    k: Array | None = None,
    groups: Array | None = None,
) -> Array:
    q = c["q_post_rope"] if q is None else q
    k = c.k if k is None else k
    return c.scores(q, k, groups) * _f32(c.shape.head**-0.5 if factor is None else factor)


def _softcap(x: Array, cap: float) -> Array:
    return _f32(cap) * np.tanh(x / _f32(cap))


def tiled(c: Context) -> Array:
    """Query head n reads key/value head n % K, not n // G."""
    return np.arange(c.shape.heads) % c.shape.kv_heads


def _raw_scores(engine: Engine, values: Mapping[Key, Array], key: Key) -> Array:
    layer, _ = key
    c = Context(engine, layer, {})
    q, k = values[layer, "q_post_rope"], values[layer, "k_post_rope"]
    return engine.arithmetic.store(c.scores(q, k))


def _masked_scores(fill: float, engine: Engine, values: Mapping[Key, Array], key: Key) -> Array:
    scores = values[key]
    return np.where(causal(scores.shape[-1]), scores, _f32(fill))


_add("attn_scores", "scale_missing", lambda c: scores(c, 1), "not scaled")
_add(
    "attn_scores",
    "scale_hidden",
    lambda c: scores(c, c.shape.hidden**-0.5),
    "over sqrt(D) instead of sqrt(H)",
)
_add(
    "attn_scores", "scale_head", lambda c: scores(c, 1 / c.shape.head), "over H instead of sqrt(H)"
)
_add(
    "attn_scores",
    "gqa_tiled",
    lambda c: scores(c, groups=tiled(c)),
    "query head n reads key head n % K",
)
_add(
    "attn_scores",
    "scores_q_unrotated",
    lambda c: scores(c, q=c.attended()[0]),
    "reads q before RoPE",
)
_add(
    "attn_scores",
    "scores_k_unrotated",
    lambda c: scores(c, k=c.attended()[1]),
    "reads k before RoPE",
)
_add("attn_scores", "softcap", lambda c: _softcap(scores(c), 50), "50 tanh(x / 50)")
_add_dump("attn_scores", "dump_before_scale", _raw_scores, "dumped before the scale")
_add_dump(
    "attn_scores",
    "dump_after_mask_inf",
    partial(_masked_scores, -np.inf),
    "dumped after a mask of minus infinity",
    None,
    clean=True,
)
_add_dump(
    "attn_scores",
    "dump_after_mask_lowest",
    partial(_masked_scores, float(np.finfo(np.float32).min)),
    "dumped after a mask of the lowest finite number",
    None,
    clean=True,
)


# --- attn_softmax ----------------------------------------------------------------------------


def _apart(c: Context) -> Array:
    """[T, S]: how many positions the key lies before the query."""
    return c.past + np.arange(len(c.positions))[:, None] - np.arange(c.keys)


def _softmax_strict(c: Context) -> Array:
    """Nobody sees itself, except the first position, which has nobody else."""
    weights = softmax(c["attn_scores"], _apart(c) > 0)
    weights[:, 0] = c.positions == c.positions[0]
    return weights


def _softmax_strict_uniform(c: Context) -> Array:
    """The same with a mask of the lowest finite number: the first row is then uniform."""
    weights = softmax(c["attn_scores"], _apart(c) > 0)
    weights[:, 0] = _f32(1 / len(c.positions))
    return weights


def _exponentials(c: Context) -> tuple[Array, Array]:
    scores = np.where(c.allowed, c["attn_scores"], _f32(-np.inf))
    high = scores.max(axis=-1, keepdims=True)
    return np.exp(scores - high), high


def _softmax_plus_one(c: Context) -> Array:
    weights, high = _exponentials(c)
    return weights / (np.exp(-high) + weights.sum(axis=-1, keepdims=True))


def _softmax_plus_one_late(c: Context) -> Array:
    weights, _ = _exponentials(c)
    return weights / (1 + weights.sum(axis=-1, keepdims=True))


def _softmax_wrong_axis(c: Context) -> Array:
    scores = np.where(c.allowed, c["attn_scores"], _f32(-np.inf))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _softmax_scaled(c: Context, factor: float) -> Array:
    return softmax(c["attn_scores"] * _f32(factor), c.allowed)


_add(
    "attn_softmax",
    "mask_missing",
    lambda c: softmax(c["attn_scores"], _apart(c) > -np.inf),
    "no mask",
)
_add(
    "attn_softmax",
    "mask_off_by_one",
    lambda c: softmax(c["attn_scores"], _apart(c) >= -1),
    "sees one position ahead",
)
_add("attn_softmax", "mask_strict", _softmax_strict, "does not see itself; the first position does")
_add(
    "attn_softmax",
    "mask_strict_uniform",
    _softmax_strict_uniform,
    "does not see itself; the first row is uniform over all positions",
    "mask_strict",
)
_add(
    "attn_softmax",
    "mask_strict_nan",
    lambda c: softmax(c["attn_scores"], _apart(c) > 0),
    "does not see itself; the first row is NaN",
    "mask_strict",
    shape="nan",
)
_add(
    "attn_softmax",
    "mask_windowed",
    lambda c: softmax(c["attn_scores"], (_apart(c) >= 0) & (_apart(c) < 16)),
    "a window of 16 that the config does not have",
)
_add("attn_softmax", "softmax_wrong_axis", _softmax_wrong_axis, "normalised over the queries")
_add(
    "attn_softmax",
    "softmax_base_2",
    lambda c: _softmax_scaled(c, np.log(2)),
    "powers of 2 instead of e",
)
_add("attn_softmax", "softmax_plus_one", _softmax_plus_one, "1 + the sum of exp(x) below")
_add(
    "attn_softmax",
    "softmax_plus_one_late",
    _softmax_plus_one_late,
    "1 + the sum of exp(x - max) below",
    "softmax_plus_one",
)
_add(
    "attn_softmax",
    "temperature",
    lambda c: _softmax_scaled(c, 1 / 1.01),
    "temperature 1.01",
    "softmax_temperature",
    shape="constant factor",
)
_add(
    "attn_softmax",
    "scale_twice",
    lambda c: _softmax_scaled(c, c.shape.head**-0.5),
    "scores scaled once more",
)


# --- attention -------------------------------------------------------------------------------


def attend(c: Context, v: Array | None = None, groups: Array | None = None) -> Array:
    """The right weighted sum, of this ``v``, still as [T, N, H]."""
    v = c.v if v is None else v
    return c.mix(c["attn_softmax"], v, groups)


def flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def _v_late(c: Context) -> Array:
    v = c.v
    return flat(attend(c, np.concatenate([0 * v[:1], v[:-1]])))


def _v_early(c: Context) -> Array:
    v = c.v
    return flat(attend(c, np.concatenate([v[1:], v[-1:]])))


def _dead_head(c: Context) -> Array:
    mixed = attend(c)
    mixed[:, 1] = 0
    return flat(mixed)


def _heads_permuted(c: Context) -> Array:
    s = c.shape
    mixed = attend(c).reshape(-1, s.kv_heads, s.heads // s.kv_heads, s.head)
    return flat(mixed.swapaxes(1, 2))


def _stale_position(c: Context) -> Array:
    mixed = flat(attend(c))
    mixed[POSITION] = mixed[POSITION - 1]
    return mixed


POSITION = 13  # the one that one-position faults spoil
_add(
    "attention",
    "gqa_tiled",
    lambda c: flat(attend(c, groups=tiled(c))),
    "query head n mixes value head n % K",
)
_add(
    "attn_scores attention",
    "gqa_tiled",
    {**FAULTS["attn_scores.gqa_tiled"].operations, **FAULTS["attention.gqa_tiled"].operations},
    "query head n reads key/value head n % K, twice",
    label="attn_scores_attention",
)
_add("attention", "v_from_k", lambda c: flat(attend(c, c["k_post_rope"])), "mixes the key cache")
_add(
    "attention",
    "v_from_k_unrotated",
    lambda c: flat(attend(c, c.attended()[1])),
    "mixes k before RoPE",
    "v_from_k",
)
_add("attention", "v_shifted", _v_late, "v of the position before; zero for the first")
_add(
    "attention",
    "v_shifted_early",
    _v_early,
    "v of the position after; the last one's twice",
    "v_shifted",
)
_add(
    "attention",
    "v_without_bias",
    lambda c: flat(attend(c, c.heads(c["qkv_matmul"])[2])),
    "v before its bias",
    bias=True,
)
_add(
    "attention",
    "heads_not_transposed",
    lambda c: np.ascontiguousarray(attend(c).transpose(1, 0, 2)).reshape(len(c.positions), -1),
    "[N, T, H] merged without a transpose",
)
_add("attention", "dead_head", _dead_head, "one head is zero", where={"heads": (1,)})
_add("attention", "heads_permuted", _heads_permuted, "heads in the order [G, K]")
_add(
    "attention",
    "stale_position",
    _stale_position,
    "one position has its predecessor's value",
    None,
    shape="one position",
    where={"positions": (POSITION,)},
)


# --- residuals -------------------------------------------------------------------------------


def _sum(source: str, factor: float, branch: str, sign: float, c: Context) -> Array:
    return _f32(factor) * c[source] + _f32(sign) * c[branch]


for _stage, _residual, _branch, _normed in [
    ("post_attn_residual", "layer_input", "attn_out", "attn_norm"),
    ("post_ffn_residual", "post_attn_residual", "ffn_out", "ffn_norm"),
]:
    for _what, _factor, _source, _says in [
        ("residual_missing", 0, _residual, "the branch alone"),
        ("residual_normed", 1, _normed, "added to the norm instead of its input"),
        ("residual_doubled", 2, _residual, "the residual stream counted twice"),
    ]:
        _add(_stage, _what, partial(_sum, _source, _factor, _branch, 1), _says)
    for _what, _factor, _says in [
        ("residual_subtracted", -1, "the branch subtracted"),
        ("branch_missing", 0, "the residual stream alone"),
        ("branch_doubled", 2, "the branch added twice"),
    ]:
        _add(_stage, _what, partial(_sum, _residual, 1, _branch, _factor), _says)
_add(
    "post_ffn_residual",
    "residual_layer_input",
    lambda c: c["layer_input"] + c["ffn_out"],
    "added to the layer's input",
)


# --- feed-forward ----------------------------------------------------------------------------


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _gelu(x: Array) -> Array:
    return x * _f32(0.5) * (1 + _erf(x / _f32(2**0.5)))


def _gelu_tanh(x: Array) -> Array:
    inner = _f32((2 / np.pi) ** 0.5) * (x + _f32(0.044715) * x**3)
    return x * _f32(0.5) * (1 + np.tanh(inner))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _activated(activation: Callable[[Array], Array], c: Context) -> Array:
    return activation(c["ffn_gate"])


for _what, _act, _says in [
    ("act_gelu", _gelu, "GELU (erf)"),
    ("act_gelu_tanh", _gelu_tanh, "GELU (tanh)"),
    ("act_relu", lambda x: np.maximum(x, 0), "ReLU"),
    ("act_sigmoid", _sigmoid, "sigmoid without the factor x"),
    ("act_quick_gelu", lambda x: x * _sigmoid(_f32(1.702) * x), "x sigmoid(1.702 x)"),
    ("act_missing", lambda x: x, "the gate as it is"),
    ("act_tanh", np.tanh, "tanh"),
    ("silu_hard", lambda x: x * np.clip(x / 6 + _f32(0.5), 0, 1), "hard SiLU"),
    ("silu_tanh_form", lambda x: 1.702 * _gelu_tanh(x / _f32(1.702)), "GELU (tanh), narrower"),
    ("silu_softsign", lambda x: x * (x / (1 + np.abs(x)) + 1) / 2, "x softsign's sigmoid"),
]:
    _add("ffn_silu", _what, partial(_activated, _act), _says)
_add("ffn_silu", "silu_of_up", lambda c: _silu(c["ffn_up"]), "SiLU of up instead of gate")
_add("ffn_swigl", "swigl_no_silu", lambda c: c["ffn_gate"] * c["ffn_up"], "gate times up")
_add("ffn_swigl", "swigl_added", lambda c: c["ffn_silu"] + c["ffn_up"], "silu(gate) plus up")
_add("ffn_swigl", "swigl_up_missing", lambda c: c["ffn_silu"], "silu(gate) alone")
_add("ffn_swigl", "swigl_silu_of_up", lambda c: c["ffn_gate"] * _silu(c["ffn_up"]), "gate silu(up)")


# --- lm_head ---------------------------------------------------------------------------------


def _logits(c: Context) -> Array:
    return c.linear(c["final_norm"], c.weight("lm_head.weight"))


def _previous_logits(c: Context) -> Array:
    logits = _logits(c)
    return np.concatenate([logits[:1], logits[:-1]])


def _probabilities(c: Context) -> Array:
    logits = _logits(c)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


_add(
    "lm_head",
    "head_tied",
    lambda c: c.linear(c["final_norm"], c.weight(TABLE)),
    "the embedding used as the head",
)
_add("lm_head", "logits_wrong_position", _previous_logits, "the position before")
_add("lm_head", "logits_softmaxed", _probabilities, "softmax applied")
_add("lm_head", "logits_log_softmaxed", lambda c: np.log(_probabilities(c)), "log-softmax applied")
_add(
    "lm_head",
    "input_not_normed",
    partial(_linear_from, "lm_head", "post_ffn_residual"),
    "reads the residual stream, not the norm of it",
)
_add("lm_head", "softcap", lambda c: _softcap(_logits(c), 30), "30 tanh(x / 30)")


# --- layouts of the dump ---------------------------------------------------------------------


def _move(*order: int) -> Redump:
    return lambda engine, values, key: values[key].transpose(order)


def _heads_first(engine: Engine, values: Mapping[Key, Array], key: Key) -> Array:
    x = values[key]
    return x.reshape(len(x), -1, engine.shape.head).transpose(1, 0, 2)


def _channels_first(engine: Engine, values: Mapping[Key, Array], key: Key) -> Array:
    x = values[key]
    return x.reshape(len(x), -1, engine.shape.head).transpose(0, 2, 1)


def _backwards(engine: Engine, values: Mapping[Key, Array], key: Key) -> Array:
    return values[key][::-1]


def _from_neighbour(engine: Engine, values: Mapping[Key, Array], key: Key) -> Array:
    layer, stage = key
    assert layer is not None
    return values[(layer - 1) % engine.shape.layers, stage]


for _stage in (
    "embedding",
    "attn_norm",
    "qkv_matmul",
    "attn_out",
    "ffn_gate",
    "post_ffn_residual",
    "final_norm",
):
    _add_dump(_stage, "layout_transposed", _move(1, 0), "dumped with its two axes exchanged")
for _stage in (*HEAD_NORMS, "q_post_rope", "k_post_rope", "attention"):
    _add_dump(_stage, "layout_heads_first", _heads_first, "dumped with the heads in front")
for _stage in ("k_post_rope", "attention"):
    _add_dump(_stage, "layout_channels_first", _channels_first, "dumped as [T, H, heads]")
_add_dump("ffn_up", "positions_permuted", _backwards, "dumped from the last position to the first")
for _stage in ("attn_scores", "attn_softmax"):
    _add_dump(_stage, "layout_tokens_first", _move(1, 0, 2), "dumped as [T, N, S]")
    _add_dump(_stage, "layout_keys_first", _move(0, 2, 1), "dumped as [N, S, T]")
for _stage in ("attn_norm", "k_post_rope", "ffn_out"):
    _add_dump(
        _stage,
        "layer_off_by_one",
        _from_neighbour,
        "dumped under the next layer's number; the last one's under 0",
    )


_add_dump(
    "q_norm",
    "stage_swapped",
    lambda engine, values, key: values[key[0], "q_post_rope"],
    "dumped after RoPE",
)
_add_dump(
    "k_norm",
    "dump_before_norm",
    lambda engine, values, key: Context(
        engine, key[0], {"qkv_matmul": values[key[0], "qkv_matmul"]}
    ).normed("k_norm"),
    "dumped before the norm",
    "norm_skipped",
)


# --- numbers ---------------------------------------------------------------------------------


def _changed(stage: str, change: Callable[[Array], Array]) -> Operation:
    """The right value, changed afterwards."""
    return lambda c: change(OPERATIONS[stage](c).copy())


def _largest(to: float) -> Callable[[Array], Array]:
    def change(x: Array) -> Array:
        seen = np.tril(x) if x.ndim == 3 else x  # scores above the diagonal are never read
        x.flat[np.abs(seen).argmax()] = to
        return x

    return change


def _clamped(x: Array) -> Array:
    limit = _f32(0.6) * np.abs(x).max()
    return np.clip(x, -limit, limit)


def _raised(x: Array) -> Array:
    return x + _f32(0.05) * np.sqrt(np.mean(x * x))


def _one_element_nan(x: Array) -> Array:
    x[POSITION, 17] = np.nan
    return x


def _position_zero(x: Array) -> Array:
    x[POSITION] = 0
    return x


def _channel_scaled(x: Array) -> Array:
    x[:, ROW] *= _f32(1.01)
    return x


_add(
    "ffn_silu",
    "nan",
    _changed("ffn_silu", _one_element_nan),
    "one element is NaN",
    None,
    shape="nan",
    where={"positions": (POSITION,), "channels": (17,)},
)
_add(
    "ffn_out",
    "inf",
    _changed("ffn_out", _largest(np.inf)),
    "the largest element overflowed to infinity",
    None,
    shape="inf",
)
_add(
    "attn_scores",
    "inf",
    _changed("attn_scores", _largest(np.inf)),
    "the largest element overflowed to infinity",
    None,
    shape="inf",
)
_add(
    "ffn_out",
    "saturation",
    _changed("ffn_out", _clamped),
    "clamped at 60 % of the largest",
    None,
    shape="saturation",
)
_add(
    "ffn_swigl",
    "saturation",
    _changed("ffn_swigl", _clamped),
    "clamped at 60 % of the largest",
    None,
    shape="saturation",
)
_add(
    "attn_out",
    "constant",
    _changed("attn_out", _raised),
    "a constant of 5 % of the rms added",
    None,
    shape="constant",
)
_add(
    "post_attn_residual",
    "constant",
    _changed("post_attn_residual", _raised),
    "a constant of 5 % of the rms added",
    None,
    shape="constant",
)
_add(
    "ffn_up",
    "position_zero",
    _changed("ffn_up", _position_zero),
    "one position is zero",
    None,
    shape="one position",
    where={"positions": (POSITION,)},
)
_add(
    "ffn_swigl",
    "channel_scaled",
    _changed("ffn_swigl", _channel_scaled),
    "one channel times 1.01",
    "row_scaled",
    where=_at_row,
)
_add(
    "ffn_out",
    "bf16_in_one_layer",
    lambda c: bf16(c.linear(bf16(c["ffn_swigl"]), c.weight("mlp.down_proj.weight"))),
    "computed in bfloat16 in one layer of an f32 engine",
    None,
    shape="precision",
    one_layer=True,
)
_add(
    "ffn_out",
    "act8_in_one_layer",
    lambda c: c.linear(q8_0(c["ffn_swigl"]), c.weight("mlp.down_proj.weight")),
    "activations rounded to 8 bits in one layer",
    None,
    shape="precision",
    one_layer=True,
)


# --- weights that a converter has rearranged or made coarser -----------------------------------


def _rows_reversed(w: Array) -> Array:
    return w[::-1]


def _rows_shuffled(w: Array) -> Array:
    return w[np.random.default_rng(5).permutation(len(w))]


def _rows_dealt(w: Array) -> Array:
    """First half and second half in turns."""
    return np.stack(np.split(w, 2), 1).reshape(w.shape)


def _columns_swapped(w: Array) -> Array:
    """The two halves of what it multiplies exchanged."""
    return np.concatenate(np.split(w, 2, axis=1)[::-1], axis=1)


def _columns_dealt(w: Array) -> Array:
    left, right = np.split(w, 2, axis=1)
    return np.stack([left, right], 2).reshape(w.shape)


def _eight_bits_a_row(w: Array) -> Array:
    step = np.abs(w).max(axis=1, keepdims=True) / _f32(127)
    return np.rint(w / step) * step


def _four_bits_a_block(w: Array) -> Array:
    """Blocks of 32 with a float16 step: the extreme value is -8 of them."""
    blocks = w.reshape(len(w), -1, 32)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    step = np.take_along_axis(blocks, at, axis=-1) / _f32(-8)
    codes = np.clip(np.floor(blocks * (1 / step) + _f32(8.5)), 0, 15) - 8
    return (codes * f16(step)).reshape(w.shape)


for _stage in LINEARS:
    for _what, _change, _says in [
        ("rows_reversed", _rows_reversed, "rows from last to first"),
        ("rows_shuffled", _rows_shuffled, "rows in any order"),
    ]:
        _add(
            _stage,
            _what,
            partial(_with_weight, _stage, _change),
            _says,
            "rows_permuted",
            accept=("vocabulary_rolled",),
        )
_coarse: list[tuple[str, str, Callable[[Array], Array], str, str]] = [
    ("ffn_up", "rows_dealt", _rows_dealt, "rows of both halves in turns", "rows_permuted"),
    ("attn_out", "columns_swapped", _columns_swapped, "halves exchanged", "columns_permuted"),
    ("ffn_out", "columns_dealt", _columns_dealt, "halves in turns", "columns_permuted"),
    ("attn_out", "weight_q8_0", q8_0, "the weight in Q8_0", "weight_requantised"),
    ("ffn_out", "weight_q4_0", _four_bits_a_block, "the weight in Q4_0", "weight_requantised"),
    ("ffn_gate", "weight_f16", f16, "the weight in float16", "weight_requantised"),
    ("ffn_up", "weight_bf16", bf16, "the weight in bfloat16", "weight_requantised"),
    ("lm_head", "weight_int8", _eight_bits_a_row, "int8 by row", "weight_requantised"),
]
for _stage, _what, _spoilt, _says, _name in _coarse:
    _add(_stage, _what, partial(_with_weight, _stage, _spoilt), _says, _name, one_layer=True)
_add(
    "qkv_matmul",
    "v_rows_reversed",
    partial(_qkv_one, 2, _rows_reversed),
    "rows of v from last to first",
    "rows_permuted",
)
_add(
    "lm_head",
    "vocabulary_rolled",
    lambda c: c.linear(c["final_norm"], np.roll(c.weight("lm_head.weight"), 3, axis=0)),
    "the head's rows three further on",
)
_add(
    "embedding",
    "vocabulary_rolled",
    lambda c: np.roll(c.weight(TABLE), -2, axis=0)[c["tokens"]],
    "the table's rows two further on",
)
_add(
    "embedding",
    "weight_q8_0",
    lambda c: q8_0(c.weight(TABLE))[c["tokens"]],
    "the table in Q8_0",
    "weight_requantised",
)


# --- one thing forgotten -----------------------------------------------------------------------


def _bias_of_shard(c: Context) -> Array:
    """The first of two shards' bias."""
    parts = []
    for name in QKV:
        bias = c.weight(f"{name}.bias").copy()
        bias[len(bias) // 2 :] = 0
        parts.append(bias)
    return c["qkv_matmul"] + np.concatenate(parts)


def _bias_late(part: int, c: Context) -> Array:
    heads = c.heads(c["qkv_matmul"])[part]
    bias = c.weight(f"{QKV[part]}.bias").reshape(-1, c.shape.head)
    return rotate(heads, *c.tables()) + bias


_add("qkv_bias", "bias_shard_only", _bias_of_shard, "bias of the first half of the channels")
_add(
    "q_post_rope k_post_rope",
    "bias_after_rope",
    {"q_post_rope": partial(_bias_late, 0), "k_post_rope": partial(_bias_late, 1)},
    "bias added to what has been rotated",
    label="qk_post_rope",
    bias=True,
)
_add(
    "qkv_bias q_post_rope k_post_rope",
    "bias_after_rope",
    {
        "qkv_bias": partial(_biased, factors=(0, 0, 1)),
        "q_post_rope": partial(_bias_late, 0),
        "k_post_rope": partial(_bias_late, 1),
    },
    "bias of v alone before RoPE, those of q and k after",
    label="qkv_bias_rope",
)


def _rope_first_head(c: Context, x: Array) -> Array:
    x = x.copy()
    x[:, :1] = rotate(x[:, :1], *c.tables())
    return x


def _rope_narrow_pairs(c: Context, x: Array) -> Array:
    """Channel i turns with i + H/4 inside each half of a head, pair for pair as before."""
    left, right = (np.split(x, 2, axis=-1)[n] for n in (0, 1))
    tables = c.tables()
    halves = [tuple(np.split(t, 2, axis=-1)[n] for t in tables) for n in (0, 1)]
    return np.concatenate([rotate(left, *halves[0]), rotate(right, *halves[1])], axis=-1)


for _what, _rope, _says in [
    ("rope_first_head_only", _rope_first_head, "one head alone rotated"),
    ("rope_pair_offset", _rope_narrow_pairs, "pairs a quarter of a head apart"),
    (
        "positions_not_shifted",
        lambda c, x: rotate(x, *_table(c, c.positions + 7)),
        "seven positions of padding counted",
    ),
]:
    _add(
        "q_post_rope k_post_rope",
        _what,
        {"q_post_rope": _of_rope(0, _rope), "k_post_rope": _of_rope(1, _rope)},
        f"q and k: {_says}",
        label="qk_post_rope",
    )

_add(
    "attn_scores",
    "scale_rounded",
    lambda c: scores(c, bf16(np.array([c.shape.head**-0.5], np.float32)).item()),
    "the scale rounded to bfloat16",
    accept=("constant_factor",),
)


def _norm_half(c: Context, x: Array, w: Array) -> Array:
    """The mean square added up in bfloat16, one value after the other."""
    total = np.zeros(x.shape[:-1], np.float32)
    for channel in range(x.shape[-1]):
        total = bf16(total + bf16(bf16(x[..., channel]) ** 2))
    mean = bf16(total / _f32(x.shape[-1]))[..., None]
    return x / np.sqrt(mean + _f32(c.shape.eps)) * w


for _stage in ("attn_norm", "q_norm", "final_norm"):
    _add(_stage, "norm_not_upcast", _of_norm(_stage, _norm_half), "mean square in bfloat16")
_add(
    "lm_head",
    "head_zero_initialised",
    lambda c: 0 * _logits(c),
    "a head that was never loaded",
)


def _tail_zero(x: Array) -> Array:
    x[-3:] = 0
    return x


def _tail_stale(x: Array) -> Array:
    x[-2:] = x[-3]
    return x


def _saturated(x: Array) -> Array:
    return np.clip(x, _f32(-65504), _f32(65504))


_add("attention", "tail_zero", _changed("attention", _tail_zero), "last rows 0", "tail_not_written")
_add("ffn_up", "tail_stale", _changed("ffn_up", _tail_stale), "old last rows", "tail_not_written")
_add(
    "ffn_swigl",
    "saturated_to_65504",
    _changed("ffn_swigl", _saturated),
    "clamped to the largest float16; nothing on models whose values are small",
)
