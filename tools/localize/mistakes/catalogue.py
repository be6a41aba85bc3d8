"""Known mistakes of Qwen engines: for each, what a stage's dump would then be.

An entry is a function from a StageReplay to candidate values. The dump is compared with each; the
entry that restores its significant bits names the mistake. ``{}`` in what an entry says is replaced
by the detail of the candidate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from qwen_jax import rope
from qwen_jax.config import Config
from qwen_jax.models.ops import Positional, split_heads
from stages.architecture import (
    ADD,
    LAYER_INPUT,
    LINEAR,
    NORM,
    ROTATION,
    Kind,
    Stage,
)
from stages.architectures import ALL_NAMES, any_stage
from tools.localize.mistakes import caches, rearranged
from tools.localize.mistakes.approximations import (
    exponentials,
    tanh_by_fraction,
    tanh_by_long_fraction,
)
from tools.localize.stage_case import StageReplay, Weight

Candidates = Iterator[tuple[str, Array]]
Entry = Callable[[StageReplay], Candidates]


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
        rotated: the candidates are rotated, though the stage is no rotation.
    """

    name: str
    says: str
    stages: tuple[str, ...]
    candidates: Entry
    dump_only: bool | None
    near: bool
    rotated: bool


CATALOGUE: list[Mistake] = []


def of_kind(kind: Kind) -> str:
    """The names of the stages of one kind, of any architecture."""
    return " ".join(name for name in ALL_NAMES if any_stage(name).kind is kind)


NORMS = of_kind(NORM)
LINEARS = of_kind(LINEAR)
LAYER_LINEARS = " ".join(n for n in LINEARS.split() if any_stage(n).scope == "layer")
ROPES = of_kind(ROTATION)
BIASES = " ".join(n for n in of_kind(ADD).split() if any_stage(n).parameters)
ALL = " ".join(ALL_NAMES)
WITH_HEADS = " ".join(n for n in ALL_NAMES if any_stage(n).heads({"N": 1, "K": 1, "H": 1}))
HEADS_INSIDE = " ".join(n for n in WITH_HEADS.split() if not any_stage(n).heads_lead)


def mistake(
    name: str,
    says: str,
    stages: str,
    dump_only: bool | None = False,
    near: bool = False,
    rotated: bool = False,
) -> Callable[[Entry], Entry]:
    """Enter the decorated function into the catalogue."""

    def enter(
        candidates: Callable[[StageReplay], Candidates],
    ) -> Callable[[StageReplay], Candidates]:
        where = tuple(stages.split())
        CATALOGUE.append(Mistake(name, says, where, candidates, dump_only, near, rotated))
        return candidates

    return enter


def simple(
    name: str,
    says: str,
    stages: str,
    candidate: Callable[[StageReplay], Array | None],
    dump_only: bool | None = False,
    near: bool = False,
) -> None:
    """Enter a mistake with one candidate; None where it cannot be made."""

    def candidates(case: StageReplay) -> Candidates:
        value = candidate(case)
        if value is not None:
            yield "", value

    mistake(name, says, stages, dump_only, near)(candidates)


def _given(value: Array | None, function: Callable[[Array], Array]) -> Array | None:
    """``function`` of a value that may not be in the trace."""
    return None if value is None else function(value)


# --- embedding


simple("embedding_scaled_sqrt_d", "embedding multiplied by sqrt(D), as Gemma does", "embedding",
       lambda case: case.exact * np.sqrt(case.config.hidden_size))  # fmt: skip


def _embedding_table(case: StageReplay) -> np.ndarray:
    return case.model.read(case.tables.table.tensor)


def _rows(case: StageReplay, table: np.ndarray, tokens: np.ndarray) -> Array:
    rows = jnp.asarray(table[tokens % len(table)].astype(np.float64))[None]
    return rows[:, -case.rows :]


@mistake("embedding_id_off_by_one", "embedding row of token id {}", "embedding")
def _(case: StageReplay) -> Candidates:
    tokens = np.array(case.replay.trace.tokens)
    for step in (1, -1):
        yield f"{step:+d}", _rows(case, _embedding_table(case), tokens + step)


@mistake("embedding_shifted", "embedding of the token {} positions on", "embedding", None)
def _(case: StageReplay) -> Candidates:
    for step in (1, -1):
        yield f"{-step:+d}", jnp.roll(case.exact, step, 1)
        # the end of the prompt has no neighbour: some repeat the first or last token instead
        edge = jnp.roll(case.exact, step, 1)
        keep = 0 if step == 1 else -1
        yield f"{-step:+d}", edge.at[:, keep].set(case.exact[:, keep])
        yield f"{-step:+d}", edge.at[:, keep].set(0)


@mistake("embedding_from_lm_head", "rows of the output head instead of the embedding", "embedding")
def _(case: StageReplay) -> Candidates:
    if not case.config.tie_word_embeddings:
        head = case.parameter(case.tables.head.parameters[0])
        yield "", _rows(case, np.asarray(head), np.array(case.replay.trace.tokens))


@mistake("embedding_transposed", "embedding table read as [D, V]", "embedding")
def _(case: StageReplay) -> Candidates:
    table = _embedding_table(case)
    read = table.reshape(-1).reshape(table.shape[::-1]).T
    yield "", _rows(case, read, np.array(case.replay.trace.tokens))


# --- RMSNorm


def _norm_weight(case: StageReplay) -> Array:
    return jnp.asarray(case.weights[case.stage.parameters[0]])


def _with_norm(case: StageReplay, weight: Weight) -> Array:
    return case.run(weights={case.stage.parameters[0]: weight})


def _normed(case: StageReplay) -> Array:
    """What the norm is of: the input, or the heads that it is split into."""
    if case.stage.axes[-1] == "D":
        return case.inputs[0]
    q, k, _ = split_heads(case.config, case.inputs[0])
    return q if case.stage.axes[1] == "N" else k


@mistake("norm_eps", "eps {} instead of the model's", NORMS, near=True)
def _(case: StageReplay) -> Candidates:
    for eps in (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-4, 1e-7):
        if eps != case.config.rms_norm_eps:
            yield f"{eps:g}", case.run(config=replace(case.config, rms_norm_eps=eps))
    # 0 would divide by zero in a row of zeros; the smallest normal number does not
    yield "0", case.run(config=replace(case.config, rms_norm_eps=1e-300))


def _mean_square(case: StageReplay, x: Array) -> Array:
    return (x * x).mean(-1, keepdims=True) + case.config.rms_norm_eps


def _over(case: StageReplay, root: Callable[[Array], Array]) -> Array:
    """What is normed over any ``root`` of it, times the weight."""
    return _normed(case) / root(_normed(case)) * _norm_weight(case)


def _layer_norm(case: StageReplay) -> Array:
    x = _normed(case) - _normed(case).mean(-1, keepdims=True)
    return x / jnp.sqrt(_mean_square(case, x)) * _norm_weight(case)


simple("norm_layernorm", "LayerNorm (mean subtracted) instead of RMSNorm", NORMS, _layer_norm,
       near=True)  # fmt: skip
simple("norm_one_plus_weight", "multiplied by 1 + weight, as Gemma does", NORMS,
       lambda case: _with_norm(case, 1 + _norm_weight(case)))  # fmt: skip
simple("norm_weight_missing", "norm weight not applied", NORMS,
       lambda case: _with_norm(case, jnp.ones_like(_norm_weight(case))))  # fmt: skip


@mistake("norm_weight_swapped", "weight of another norm: {}", NORMS)
def _(case: StageReplay) -> Candidates:
    layer = case.last_layer if case.layer is None else case.layer
    for other in _norms_like(case.stage):
        if other is not case.stage:
            yield other.name, _with_norm(case, case.parameter(other.parameters[0], layer))


def _norms_like(stage: Stage) -> list[Stage]:
    """The norms of any architecture over the same axis."""
    rows = [any_stage(name) for name in NORMS.split()]
    return [row for row in rows if row.axes[-1] == stage.axes[-1]]


@mistake("norm_weight_other_layer", "norm weight of layer {}", NORMS)
def _(case: StageReplay) -> Candidates:
    names = case.stage.parameters
    if case.layer is None:
        rows = [row for row in _norms_like(case.stage) if row.scope == "layer"]
        names = tuple(name for row in rows for name in row.parameters)
    for layer in _other_layers(case):
        for name in names:
            yield str(layer), _with_norm(case, case.parameter(name, layer))


@mistake("norm_weight_permuted", "norm weight in another order: {}", NORMS)
def _(case: StageReplay) -> Candidates:
    yield from rearranged.norm_weight(case, _norm_weight(case), partial(_with_norm, case))


@mistake("norm_over_all_heads", "normalised over all heads together, not over each", NORMS)
def _(case: StageReplay) -> Candidates:
    if case.stage.axes[-1] == "H":
        x = _normed(case)
        mean = (x * x).mean((-2, -1), keepdims=True) + case.config.rms_norm_eps
        yield "", x / jnp.sqrt(mean) * _norm_weight(case)


@mistake("rope_before_norm", "RoPE applied before the norm", f"{NORMS} {ROPES}", rotated=True)
def _(case: StageReplay) -> Candidates:
    norm = _head_norm(case)
    if norm and (heads := _projected(case, norm)) is not None:
        x = _rotated(case, heads)
        yield "", x / jnp.sqrt(_mean_square(case, x)) * case.parameter(norm.parameters[0])


def _head_norm(case: StageReplay) -> Stage | None:
    """The norm over H of the heads that a norm or a rotated stage is made of, if it has one."""
    stage = case.stage
    row = stage if stage.kind is NORM else case.tables.stage[stage.inputs[0]]
    return row if row.kind is NORM and row.axes[-1] == "H" else None


def _projected(case: StageReplay, norm: Stage) -> Array | None:
    """The same heads before the norm."""
    value = case.computed(norm.inputs[0])
    if value is None:
        return None
    q, k, _ = split_heads(case.config, value)
    return q if case.stage.axes[1] == "N" else k


def _root_of_sum(case: StageReplay, x: Array) -> Array:
    return jnp.sqrt((x * x).sum(-1, keepdims=True) + case.config.rms_norm_eps)


simple("norm_sum_not_mean", "divided by the root of the sum of squares, not of the mean", NORMS,
       lambda case: _over(case, partial(_root_of_sum, case)))  # fmt: skip


@mistake("norm_skipped", "not normalised: {}", NORMS, None)
def _(case: StageReplay) -> Candidates:
    x = _normed(case)
    yield "the input itself", x
    yield "the input times the weight", x * _norm_weight(case)


def _root_less_eps(x: Array) -> Array:
    return jnp.sqrt((x * x).mean(-1, keepdims=True))


simple("norm_eps_outside", "eps added outside the square root", NORMS,
       lambda case: _over(case, lambda x: _root_less_eps(x) + case.config.rms_norm_eps),
       near=True)  # fmt: skip


def _mean_magnitude(x: Array) -> Array:
    return jnp.abs(x).mean(-1, keepdims=True)


@mistake("norm_mean_abs", "divided by the mean magnitude instead of the root mean square", NORMS)
def _(case: StageReplay) -> Candidates:
    yield "", _over(case, lambda x: _mean_magnitude(x) + case.config.rms_norm_eps)
    yield "", _over(case, _mean_magnitude)


# A mean square or a root that was kept in 16 bits is off by less: bfloat16 has lost 5 % of a sum.
NOT_UPCAST, ONE_UNIT = 0.1, 2.0**-12


@mistake("norm_not_upcast", "mean square kept in 16 bits: rows off by up to {}", NORMS, near=True)
def _(case: StageReplay) -> Candidates:
    exact = case.exact
    along = (case.dump * exact).sum(-1, keepdims=True)
    factor = along / jnp.maximum((exact * exact).sum(-1, keepdims=True), 1e-300)
    off = float(jnp.abs(factor - 1).max())
    # one factor for all rows is another mistake
    if ONE_UNIT < off < NOT_UPCAST and float(factor.max() - factor.min()) > ONE_UNIT:
        yield f"{off:.2g}", exact * factor


# --- linear layers


def _other_layers(case: StageReplay) -> list[int]:
    """Every other layer, the nearest first."""
    here = case.last_layer + 1 if case.layer is None else case.layer
    others = [n for n in range(case.config.num_hidden_layers) if n != case.layer]
    return sorted(others, key=lambda n: (abs(n - here), n))[:8]


def _linear_with(case: StageReplay, change: Callable[[Weight], Weight]) -> Array:
    return case.run(weights={name: change(weight) for name, weight in case.weights.items()})


def _reread(weight: Weight) -> Weight:
    """The weight's memory [out, in] read as [in, out]; shape [out, in]."""
    out, width = weight.shape
    return weight.reshape(-1).reshape(width, out).T


def _rewritten(weight: Weight) -> Weight:
    """The other way round: memory that is [in, out] read as [out, in]."""
    return weight.T.reshape(-1).reshape(weight.shape)


@mistake("weight_transposed", "weight read transposed{}", LINEARS)
def _(case: StageReplay) -> Candidates:
    yield "", _linear_with(case, _reread)
    yield "", _linear_with(case, _rewritten)
    for name, weight in case.weights.items() if len(case.weights) > 1 else ():
        yield f" ({name} alone)", case.run(weights={name: _reread(weight)})


@mistake("weight_other_layer", "weight of layer {}", LAYER_LINEARS)
def _(case: StageReplay) -> Candidates:
    for layer in _other_layers(case):
        others = case.parameters_of(layer)
        yield str(layer), case.run(weights=others)
        for name in others if len(others) > 1 else ():
            yield f"{layer} ({name} alone)", case.run(weights={name: others[name]})


def _exchanged(case: StageReplay, a: str, b: str) -> Array:
    return case.run(weights={a: case.weights[b], b: case.weights[a]})


simple("kv_swapped", "k and v projections swapped", "qkv_matmul",
       lambda case: _exchanged(case, *case.stage.parameters[1:]))  # fmt: skip


@mistake(
    "rows_rope_permuted",
    "rows of {} in the order of interleaved RoPE, as GGUF converters store them",
    f"qkv_matmul {BIASES} {ROPES}",
    None,
)
def _(case: StageReplay) -> Candidates:
    pairs = case.config.head_dim // 2

    def to_interleaved(heads: Array) -> Array:  # [..., H] on the last axis
        return heads.reshape(*heads.shape[:-1], 2, pairs).swapaxes(-1, -2).reshape(heads.shape)

    def to_halves(heads: Array) -> Array:
        return heads.reshape(*heads.shape[:-1], pairs, 2).swapaxes(-1, -2).reshape(heads.shape)

    n, k = case.config.num_attention_heads, case.config.num_key_value_heads
    exact = case.exact
    heads = exact.reshape(*exact.shape[:2], -1, case.config.head_dim)
    parts = {"q and k": slice(0, n + k), "q": slice(0, n), "k": slice(n, n + k)}
    if case.stage.kind is ROTATION:
        parts = {case.stage.name[0]: slice(None)}
    for what, part in parts.items():
        for permute in (to_interleaved, to_halves):
            moved = heads.at[:, :, part].set(permute(heads[:, :, part]))
            yield what, moved.reshape(exact.shape)
            if case.stage.kind is ADD:  # of the bias alone: what it is added to has that order
                bias = jnp.concatenate(_biases(case)).reshape(-1, case.config.head_dim)
                turned = bias.at[part].set(permute(bias[part]))
                yield what, case.inputs[0] + turned.ravel()


@mistake(
    "input_not_normed",
    "applied to {} instead of the normed value",
    "qkv_matmul ffn_gate ffn_up lm_head",
)
def _(case: StageReplay) -> Candidates:
    before = {"qkv_matmul": LAYER_INPUT, "lm_head": "post_ffn_residual"}
    name = before.get(case.stage.name, "post_attn_residual")
    value = case.value(name)
    if value is not None:
        yield name, case.run(value)


@mistake("bias_already_added", "dumped after the bias was added", "qkv_matmul", None, near=True)
def _(case: StageReplay) -> Candidates:
    if biased := next((row for row in case.tables.stages if row.name in BIASES.split()), None):
        yield "", case.exact + jnp.concatenate([case.parameter(p) for p in biased.parameters])


@mistake("gate_up_swapped", "the weight of {}", "ffn_gate ffn_up", None)
def _(case: StageReplay) -> Candidates:
    other = case.tables.stage["ffn_up" if case.stage.name == "ffn_gate" else "ffn_gate"]
    yield (
        other.parameters[0],
        case.run(weights={case.stage.parameters[0]: case.parameter(other.parameters[0])}),
    )


@mistake(
    "head_tied", "the embedding used as the output head, which this model does not tie", "lm_head"
)
def _(case: StageReplay) -> Candidates:
    if not case.config.tie_word_embeddings:
        yield "", case.run(weights={case.stage.parameters[0]: _embedding_table(case)})


@mistake("logits_wrong_position", "logits of {}", "lm_head", None)
def _(case: StageReplay) -> Candidates:
    norm = case.replay.load(case.stage.inputs[0], None)
    if case.rows == 1 and norm is not None:
        for place in (-2, 0):
            if norm.shape[1] > 1:
                name = "the first position" if place == 0 else "the position before the last"
                row = norm[:, place : place + 1 if place + 1 else None]
                yield name, case.run(jnp.asarray(row, jnp.float64))
    elif case.rows > 1:
        for step in (1, -1):
            rolled, edge = jnp.roll(case.exact, step, 1), 0 if step == 1 else -1
            yield f"the position {-step:+d}", rolled
            yield f"the position {-step:+d}", rolled.at[:, edge].set(case.exact[:, edge])


simple("logits_softmaxed", "probabilities instead of logits", "lm_head",
       lambda case: jax.nn.softmax(case.exact, -1))  # fmt: skip
simple("logits_log_softmaxed", "log-probabilities instead of logits", "lm_head",
       lambda case: jax.nn.log_softmax(case.exact, -1))  # fmt: skip


@mistake("softcap", "soft-capped at {}, as Gemma 2 does", "lm_head attn_scores", near=True)
def _(case: StageReplay) -> Candidates:
    for cap in (30.0, 50.0, 20.0, 15.0, 100.0):
        yield f"{cap:g}", cap * jnp.tanh(case.exact / cap)


@mistake("head_zero_initialised", "the same number for every token: the head is empty", "lm_head")
def _(case: StageReplay) -> Candidates:
    first = case.dump[..., :1]
    if bool((case.dump == first).all()):
        yield "", jnp.broadcast_to(first, case.exact.shape)


# --- bias


def _biases(case: StageReplay) -> tuple[Array, ...]:
    """Of q, k and v."""
    return tuple(jnp.asarray(case.weights[name]) for name in case.stage.parameters)


def _with_bias(case: StageReplay, *biases: Array) -> Array:
    return case.inputs[0] + jnp.concatenate(biases)


def _biased(case: StageReplay, *factors: float) -> Array:
    """With the biases of q, k and v times these."""
    pairs = zip(factors, _biases(case), strict=True)
    return _with_bias(case, *(factor * bias for factor, bias in pairs))


simple("bias_missing", "bias not added", BIASES, lambda case: case.inputs[0])
simple("bias_doubled", "bias added twice", BIASES, lambda case: _biased(case, 2, 2, 2))
simple("bias_subtracted", "bias subtracted", BIASES, lambda case: _biased(case, -1, -1, -1))


@mistake("bias_other_layer", "bias of layer {}", BIASES)
def _(case: StageReplay) -> Candidates:
    for layer in _other_layers(case):
        yield str(layer), _with_bias(case, *map(jnp.asarray, case.parameters_of(layer).values()))


simple("bias_kv_swapped", "biases of k and v swapped", BIASES,
       lambda case: _with_bias(case, *(_biases(case)[place] for place in (0, 2, 1))))  # fmt: skip
simple("bias_q_only", "bias added to q alone", BIASES, lambda case: _biased(case, 1, 0, 0))
simple("bias_q_missing", "bias of q not added", BIASES, lambda case: _biased(case, 0, 1, 1))
simple("bias_k_missing", "bias of k not added", BIASES, lambda case: _biased(case, 1, 0, 1))
simple("bias_v_missing", "bias of v not added", BIASES, lambda case: _biased(case, 1, 1, 0))


simple("bias_v_only", "bias added to v alone", BIASES, lambda case: _biased(case, 0, 0, 1))


@mistake("bias_shard_only", "bias added to the {} of the channels alone", BIASES)
def _(case: StageReplay) -> Candidates:
    biases = _biases(case)
    for shards in (2, 4, 8):
        for place in range(shards):
            kept = [_shard(b, shards, place) for b in biases]
            yield f"{_ordinal(place)} of {shards} shards", _with_bias(case, *kept)
    for shards in (2, 4):  # of the three side by side
        kept_whole = _shard(jnp.concatenate(biases), shards, 0)
        yield f"first of {shards} shards", case.inputs[0] + kept_whole


def _shard(x: Array, shards: int, place: int) -> Array:
    return jnp.where(np.arange(len(x)) * shards // len(x) == place, x, 0)


def _ordinal(place: int) -> str:
    return ("first", "second", "third")[place] if place < 3 else f"{place + 1}th"


# --- RoPE


def _table(case: StageReplay, positions: np.ndarray, **changes: Any) -> Positional:
    """What other positions or another configuration would decide."""
    cos, sin = case.cos_sin(replace(case.config, **changes), positions)
    return case.pos.replace(cos=jnp.asarray(cos), sin=jnp.asarray(sin))


def _rotated(case: StageReplay, x: Array) -> Array:
    """Heads [1, T, N, H] after RoPE."""
    cos, sin = (t.astype(jnp.float64)[:, :, None, :] for t in (case.pos.cos, case.pos.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _before_rope(case: StageReplay, rope: str, keys: bool = False) -> Array | None:
    """The heads that a rotated stage of this layer was made of, [1, T, N or K, H]."""
    row = case.tables.stage[rope]
    value = case.at_keys(row.inputs[0]) if keys else case.value(row.inputs[0])
    if value is None or value.ndim == 4:
        return value
    q, k, _ = split_heads(case.config, value)
    return q if row.axes[1] == "N" else k


def _unrotated(case: StageReplay) -> Array:
    found = case.inputs[0]
    if found.ndim == 4:
        return found
    q, k, _ = split_heads(case.config, found)
    return q if case.stage.axes[1] == "N" else k


@mistake("rope_interleaved", "RoPE pairs interleaved", ROPES)
def _(case: StageReplay) -> Candidates:
    x = _unrotated(case)
    cos, sin = (t.astype(jnp.float64)[:, :, None, :] for t in (case.pos.cos, case.pos.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    yield "", turned.reshape(x.shape)


def _other_heads(config: Config) -> Iterator[Config]:
    """The same channels as fewer or more heads."""
    for factor in (0.5, 2.0, 0.25, 4.0):
        size = config.head_dim * factor
        q, k = (n / factor for n in (config.num_attention_heads, config.num_key_value_heads))
        if size >= 2 and size % 2 == 0 and k >= 1 and q % 1 == k % 1 == 0:
            yield replace(
                config,
                head_dim=int(size),
                num_attention_heads=int(q),
                num_key_value_heads=int(k),
            )


@mistake("head_size", "heads of {} channels", f"{ROPES} attention")
def _(case: StageReplay) -> Candidates:
    for config in _other_heads(case.config):
        size = config.head_dim

        def heads(x: Array, size: int = size) -> Array:
            return x.reshape(*x.shape[:2], -1, size) if x.ndim == 4 else x

        if case.stage.kind is ROTATION:
            found = case.run(
                heads(case.inputs[0]),
                pos=_table(case, case.positions, head_dim=size),
                config=config,
            )
        else:
            scores, softmax = case.other("attn_scores"), case.other("attn_softmax")
            if not (scores.replayable and softmax.replayable):
                return
            if any(f and size % f.block for f in (scores.format, case.format)):
                continue  # a cache in blocks that do not divide such heads
            weights = softmax.run(scores.run(*map(heads, scores.inputs), config=config))
            weights = weights[:, :, -case.rows :]
            found = case.run(weights, heads(case.inputs[1]), config=config)
        yield str(size), found.reshape(case.exact.shape)


@mistake("input_not_normed", "RoPE of the projection instead of the norm of it", ROPES)
def _(case: StageReplay) -> Candidates:
    norm = _head_norm(case)
    if norm and (heads := _projected(case, norm)) is not None:
        yield "", _rotated(case, heads)


@mistake("rope_theta", "RoPE with theta {}", ROPES, near=True)
def _(case: StageReplay) -> Candidates:
    for theta in (10000.0, 1e6, 5e5, 1e5, 1e7):
        if theta != case.config.rope_theta:
            yield f"{theta:g}", case.run(pos=_table(case, case.positions, rope_theta=theta))


@mistake("rope_position_off_by_one", "RoPE positions off by {}", ROPES)
def _(case: StageReplay) -> Candidates:
    first = int(case.replay.positions[0, 0])  # some count from 0 wherever they begin
    for step in dict.fromkeys((1, -1, -first or 1)):
        yield f"{step:+d}", case.run(pos=_table(case, case.positions + step))


simple("rope_sign", "RoPE turns the other way", ROPES,
       lambda case: case.run(pos=case.pos.replace(sin=-case.pos.sin)))  # fmt: skip
simple("rope_missing", "not rotated", ROPES, lambda case: _unrotated(case))


@mistake("rope_partial", "only {} rotated", ROPES)
def _(case: StageReplay) -> Candidates:
    x, half = _unrotated(case), case.config.head_dim // 2
    whole = case.run()
    first = replace(case.config, head_dim=half)
    if half % 2 == 0:
        for config in (first, case.config):
            cos, sin = rope.cos_sin(config, case.positions)
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


simple("rope_cos_sin_swapped", "cos and sin swapped", ROPES,
       lambda case: case.run(pos=case.pos.replace(cos=case.pos.sin, sin=case.pos.cos)))  # fmt: skip


@mistake("rope_frequency_step", "RoPE frequencies theta^(-{}) instead of theta^(-2i/H)", ROPES)
def _(case: StageReplay) -> Candidates:
    index = np.arange(case.config.head_dim // 2)
    for says, exponent in (("i/H", 1.0), ("4i/H", 4.0)):
        frequency = case.config.rope_theta ** (-exponent * index / case.config.head_dim)
        angle = case.positions[..., None] * frequency
        yield says, case.run(pos=case.pos.replace(cos=jnp.cos(angle), sin=jnp.sin(angle)))


simple("rope_twice", "rotated twice", ROPES,
       lambda case: case.run(pos=_table(case, 2 * case.positions)))  # fmt: skip


@mistake("rope_position_constant", "every position rotated as position {}", ROPES)
def _(case: StageReplay) -> Candidates:
    last = case.positions[0, -1]
    first = case.positions[0, 0]
    for place in (last, 1, last + 1, first, first - 1):  # of decoded tokens, that of the first
        yield str(place), case.run(pos=_table(case, np.full_like(case.positions, place)))


@mistake("rope_scaled", "RoPE positions {}", ROPES)
def _(case: StageReplay) -> Candidates:
    for factor in (1 / 2, 1 / 4, 1 / 8, 2, 4, 8):
        cos, sin = case.cos_sin(case.config, case.positions * factor)
        yield (
            f"divided by {1 / factor:g}" if factor < 1 else f"multiplied by {factor}",
            case.run(pos=case.pos.replace(cos=jnp.asarray(cos), sin=jnp.asarray(sin))),
        )


@mistake("rope_yarn_missing", "YaRN not applied{}", ROPES, near=True)
def _(case: StageReplay) -> Candidates:
    if case.config.yarn is not None:
        yield "", case.run(pos=_table(case, case.positions, yarn=None))
        plain = replace(case.config.yarn, attention_factor=1.0)
        yield " to the magnitude", case.run(pos=_table(case, case.positions, yarn=plain))


@mistake("bias_after_rope", "bias added after RoPE instead of before", ROPES)
def _(case: StageReplay) -> Candidates:
    biased = case.tables.stage.get("qkv_bias")
    if biased is None or biased.name not in case.stage.inputs:
        return
    parts = [jnp.asarray(case.parameter(name)) for name in biased.parameters]
    q, k, _ = split_heads(case.config, jnp.concatenate(parts)[None, None])
    bias, given = q if case.stage.axes[1] == "N" else k, _unrotated(case)
    yield "", _rotated(case, given - bias) + bias
    yield "", _rotated(case, given) + bias  # where the dump before it has no bias either


@mistake("rope_first_head_only", "only the {} head rotated", ROPES)
def _(case: StageReplay) -> Candidates:
    heads = np.arange(case.exact.shape[2])[:, None]
    yield "first", jnp.where(heads == 0, case.exact, _unrotated(case))
    yield "last", jnp.where(heads == heads.max(), case.exact, _unrotated(case))


@mistake("rope_pair_offset", "RoPE pairs channels {} apart, not H/2", ROPES)
def _(case: StageReplay) -> Candidates:
    x = _unrotated(case)
    cos, sin = (t.astype(jnp.float64)[:, :, None, :] for t in (case.pos.cos, case.pos.sin))
    for parts in (2, 4, 8):  # pairs lie within so many parts of a head
        size = case.config.head_dim // parts
        if size % 2:
            continue
        says = f"H/{2 * parts}"
        grid = x.reshape(*x.shape[:-1], parts, size)
        for tables in (_in_parts(cos, sin, parts), _first_part(cos, sin, size // 2)):
            c, s = tables
            a, b = jnp.split(grid, 2, -1)
            yield says, jnp.concatenate([a * c - b * s, b * c + a * s], -1).reshape(x.shape)


def _in_parts(cos: Array, sin: Array, parts: int) -> tuple[Array, Array]:
    """The frequencies go on from part to part."""
    shape = *cos.shape[:-1], parts, cos.shape[-1] // parts
    return cos.reshape(shape), sin.reshape(shape)


def _first_part(cos: Array, sin: Array, pairs: int) -> tuple[Array, Array]:
    """Every part has the first frequencies."""
    return cos[..., None, :pairs], sin[..., None, :pairs]


@mistake(
    "positions_not_shifted",
    "RoPE positions off by {}, as if padding or a cached prefix were not counted",
    ROPES,
)
def _(case: StageReplay) -> Candidates:
    for step in _offsets(case):
        yield f"{step:+d}", case.run(pos=_table(case, case.positions + step))


def _offsets(case: StageReplay) -> list[int]:
    """By how many positions the dump's angles are off, if all by as many."""
    (a, b), (c, d) = (jnp.split(jnp.asarray(x), 2, -1) for x in (case.exact, case.dump))
    finite = jnp.isfinite(c) & jnp.isfinite(d)
    turn = jnp.where(finite, (c + 1j * d) * (a - 1j * b), 0).sum((0, 1, 2))
    frequency, _ = rope.inverse_frequencies(case.config)
    longest = case.config.max_position_embeddings
    steps = np.arange(-min(longest, 4096), min(longest, 4096) + 1)
    phase = np.exp(-1j * steps[:, None] * frequency.astype(np.float64))
    best = int(steps[(phase @ np.asarray(turn)).real.argmax()])
    return [best] if best else []


@mistake("rope_mscale_twice", "YaRN's factor on cos and sin applied twice", ROPES, near=True)
def _(case: StageReplay) -> Candidates:
    _, factor = rope.inverse_frequencies(case.config)
    if factor != 1:
        yield "", case.exact * factor


@mistake("rope_factor_twice", "YaRN's stretching of positions applied twice", ROPES, near=True)
def _(case: StageReplay) -> Candidates:
    if case.config.yarn is not None:
        _, magnitude = rope.inverse_frequencies(case.config)
        twice = replace(
            case.config.yarn, factor=case.config.yarn.factor**2, attention_factor=magnitude
        )
        yield "", case.run(pos=_table(case, case.positions, yarn=twice))


# --- attention


def _scale(case: StageReplay) -> float:
    return case.config.head_dim**-0.5


@mistake("dump_before_scale", "dumped before the scale 1/sqrt(H)", "attn_scores", True)
@mistake("scale_missing", "scale 1/sqrt(H) missing", "attn_scores")
def _(case: StageReplay) -> Candidates:
    yield "", case.exact / _scale(case)


@mistake("scale_rounded", "scale 1/sqrt(H) rounded to {}", "attn_scores", near=True)
def _(case: StageReplay) -> Candidates:
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        rounded = float(np.asarray(_scale(case)).astype(dtype))
        if rounded != _scale(case):
            yield name, case.exact * (rounded / _scale(case))


simple("scale_hidden", "scaled by 1/sqrt(D) instead of 1/sqrt(H)", "attn_scores",
       lambda case: case.exact / _scale(case) * case.config.hidden_size**-0.5)  # fmt: skip
simple("scale_head", "scaled by 1/H instead of 1/sqrt(H)", "attn_scores",
       lambda case: case.exact * _scale(case))  # fmt: skip
simple("scale_twice", "scale applied twice", "attn_softmax",
       lambda case: case.run(case.inputs[0] * _scale(case)))  # fmt: skip
simple("scale_missing", "softmax of scores without the scale 1/sqrt(H)", "attn_softmax",
       lambda case: case.run(case.inputs[0] / _scale(case)))  # fmt: skip


def _tiled(case: StageReplay, heads: Array) -> Array:
    """Key/value heads [B, S, K, H] as N of them, so that query head n reads n % K."""
    return jnp.tile(heads, (1, 1, case.config.num_attention_heads // heads.shape[2], 1))


@mistake(
    "gqa_tiled",
    "key/value heads tiled (n % K) instead of repeated (n // G)",
    "attn_scores attention",
)
def _(case: StageReplay) -> Candidates:
    if case.stage.name == "attn_scores":
        yield "", case.run(None, _tiled(case, case.inputs[1]))
    else:
        yield "", _mixed(case, _tiled(case, caches.kept(case)))


def _mixed(case: StageReplay, v: Array) -> Array:
    """The weighted sum of any v [B, S, N or K, H]."""
    weights = case.inputs[0]
    v = jnp.repeat(v, weights.shape[1] // v.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v)
    return out.reshape(*out.shape[:2], -1)


@mistake("scores_q_unrotated", "scores of q before RoPE", "attn_scores")
def _(case: StageReplay) -> Candidates:
    rotated_q, rotated_k = ROPES.split()
    q, k = _before_rope(case, rotated_q), _before_rope(case, rotated_k, keys=True)
    if q is not None and k is not None:
        yield "", case.run(q)
        yield "", case.run(q, k)


simple("scores_k_unrotated", "scores of k before RoPE", "attn_scores",
       lambda case: _given(_before_rope(case, ROPES.split()[1], keys=True),
                           lambda k: case.run(None, k)))  # fmt: skip


def _masked_softmax(case: StageReplay, allowed: np.ndarray) -> Array:
    return case.run(pos=case.pos.replace(mask=jnp.asarray(allowed)[None]))


def _distance(case: StageReplay) -> np.ndarray:
    """[rows, S]: how far a key lies before a query."""
    positions = case.replay.positions[0]
    return positions[-case.rows :, None] - positions[None, :]


@mistake("mask_missing", "no causal mask: attends to the future", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    yield "", _masked_softmax(case, np.ones_like(_distance(case), bool))
    if len(case.replay.trace.steps) > 1:  # what there was of it in each call
        _, end = case.bounds
        yield "", _masked_softmax(case, np.arange(_distance(case).shape[1]) < end)


@mistake("mask_top_left", "causal mask aligned at the first key: row {}", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    if len(case.replay.trace.steps) > 1:
        start, _ = case.bounds
        rows = np.arange(len(start)) + _distance(case).shape[1] - len(start)
        allowed = np.arange(_distance(case).shape[1]) <= rows[:, None] - start
        yield "i of a call sees keys 0 to i", _masked_softmax(case, allowed)


@mistake("mask_past_missing", "a call sees its own keys alone, not the cache", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    if len(case.replay.trace.steps) > 1:
        start, _ = case.bounds
        own = np.arange(_distance(case).shape[1]) >= start
        yield "", _masked_softmax(case, (_distance(case) >= 0) & own)


@mistake("mask_unfilled_slots", "empty slots of the cache, {}, not masked", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    slots = caches.empty_slots(case)
    if slots is not None:
        _, end = case.bounds
        kept = case.pos.mask[:, None]
        scores = jnp.where(kept, case.inputs[0], -jnp.inf)
        high = jnp.maximum(scores.max(-1, keepdims=True), 0)
        weights = jnp.exp(scores - high)
        total = weights.sum(-1, keepdims=True) + (slots - end) * jnp.exp(-high)
        yield f"{slots} in all", weights / total
    if (left := caches.left_by_others(case)) is not None:
        yield "with what memory held in them", case.exact * left


@mistake("mask_off_by_one", "causal mask off by one: sees {} future token", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    for ahead in (1, 2):
        yield str(ahead), _masked_softmax(case, _distance(case) >= -ahead)


@mistake("mask_strict", "causal mask too strict: a token does not see itself", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    strict = _distance(case) >= 1
    yield "", _masked_softmax(case, strict)  # the first row is then uniform
    strict[0, 0] = True
    yield "", _masked_softmax(case, strict)
    yield "", jnp.where(np.arange(len(strict))[:, None] == 0, 0.0, _masked_softmax(case, strict))


@mistake("mask_windowed", "sliding window of {} positions", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    seen = int(np.median((np.asarray(case.dump)[0, :, -1] > 0).sum(-1)))
    for window in dict.fromkeys((seen, seen - 1, seen + 1, case.config.sliding_window or seen)):
        if window >= 1:
            allowed = (_distance(case) >= 0) & (_distance(case) < window)
            yield str(window), _masked_softmax(case, allowed)


simple("mask_window_missing", "the layer's sliding window not applied", "attn_softmax",
       lambda case: (_masked_softmax(case, _distance(case) >= 0)
                     if case.sliding else None))  # fmt: skip


@mistake("softmax_wrong_axis", "softmax over queries instead of keys", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    lowest = jnp.finfo(jnp.float64).min
    masked = jnp.where(case.pos.mask[:, None], case.inputs[0], lowest)
    over = jax.nn.softmax(masked, 2)
    yield "", over
    yield "", jnp.where(case.pos.mask[:, None], over, 0)


simple("softmax_base_2", "powers of 2 instead of e", "attn_softmax",
       lambda case: case.run(case.inputs[0] * np.log(2)))  # fmt: skip


@mistake("softmax_plus_one", "1 added to the denominator of the softmax", "attn_softmax")
def _(case: StageReplay) -> Candidates:
    kept = case.pos.mask[:, None]
    scores = jnp.where(kept, case.inputs[0], -jnp.inf)
    high = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - high)
    total = weights.sum(-1, keepdims=True)
    yield "", weights / (total + 1)  # after the maximum was subtracted
    yield "", weights / (total + jnp.exp(-high))


@mistake("softmax_temperature", "softmax at temperature {}", "attn_softmax", near=True)
def _(case: StageReplay) -> Candidates:
    # log p is linear in the scores: its slope within rows is 1 / temperature
    kept = np.asarray(case.pos.mask)[:, None] & (np.asarray(case.dump) > 1e-4)
    scores = np.where(kept, np.asarray(case.inputs[0]), 0.0)
    logs = np.log(np.where(kept, np.asarray(case.dump), 1.0))
    count = np.maximum(kept.sum(-1, keepdims=True), 1)
    x = np.where(kept, scores - scores.sum(-1, keepdims=True) / count, 0.0)
    y = np.where(kept, logs - logs.sum(-1, keepdims=True) / count, 0.0)
    if (x * x).sum() > 0 and (x * y).sum() > 0:
        slope = float((x * y).sum() / (x * x).sum())
        yield f"{1 / slope:.4g}", case.run(case.inputs[0] * slope)


@mistake("v_from_k", "k used in the place of v", "attention")
def _(case: StageReplay) -> Candidates:
    if case.inputs[1].ndim != 4:
        yield "", _mixed(case, split_heads(case.config, case.inputs[1])[1])
    rotated = ROPES.split()[1]
    for k in (case.at_keys(rotated), _before_rope(case, rotated, keys=True)):
        if k is not None:
            yield "", _mixed(case, k)


@mistake("v_shifted", "v of the position {}", "attention")
def _(case: StageReplay) -> Candidates:
    v = caches.kept(case)
    for step in (1, -1):
        rolled, edge = jnp.roll(v, step, 1), 0 if step == 1 else -1
        yield f"{-step:+d}", _mixed(case, rolled)
        yield f"{-step:+d}", _mixed(case, rolled.at[:, edge].set(v[:, edge]))
        yield f"{-step:+d}", _mixed(case, rolled.at[:, edge].set(0))


@mistake("v_without_bias", "v before its bias", "v_cache attention")
def _(case: StageReplay) -> Candidates:
    read = case.tables.stage[case.stage.inputs[-1]]
    before = case.at_keys(read.inputs[0]) if read.name in BIASES.split() else None
    if before is not None:
        yield "", caches.with_rows(case, split_heads(case.config, before)[2])


@mistake("cache_before_rope", "k put into the cache before RoPE", "k_cache")
def _(case: StageReplay) -> Candidates:
    k = _before_rope(case, ROPES.split()[1], keys=True)
    if k is not None:
        yield "", caches.with_rows(case, k)


@mistake(
    "heads_not_transposed", "heads merged without transposing [N, T, H] to [T, N, H]", "attention"
)
def _(case: StageReplay) -> Candidates:
    grid = case.exact.reshape(1, case.exact.shape[1], case.config.num_attention_heads, -1)
    yield "", grid.swapaxes(1, 2).reshape(case.exact.shape)


# --- residual additions


RESIDUALS = "post_attn_residual post_ffn_residual"


simple("residual_missing", "residual not added", RESIDUALS, lambda case: case.inputs[1])
simple("branch_missing", "only the residual; the block's output not added", RESIDUALS,
       lambda case: case.inputs[0])  # fmt: skip


@mistake("residual_normed", "residual taken after the norm", RESIDUALS)
def _(case: StageReplay) -> Candidates:
    first, second = (name for name in NORMS.split() if name in ("attn_norm", "ffn_norm"))
    value = case.computed(first if case.stage.inputs[0] == LAYER_INPUT else second)
    if value is not None:
        yield "", value + case.inputs[1]


simple("residual_doubled", "residual added twice", RESIDUALS,
       lambda case: 2 * case.inputs[0] + case.inputs[1])  # fmt: skip
simple("branch_doubled", "the block's output added twice", RESIDUALS,
       lambda case: case.inputs[0] + 2 * case.inputs[1])  # fmt: skip


@mistake("residual_subtracted", "{}", RESIDUALS)
def _(case: StageReplay) -> Candidates:
    residual, branch = case.inputs
    yield "the block's output subtracted from the residual", residual - branch
    yield "the residual subtracted from the block's output", branch - residual


simple("residual_layer_input", "residual taken from the layer's input", "post_ffn_residual",
       lambda case: _given(case.value(LAYER_INPUT), lambda x: x + case.inputs[1]))  # fmt: skip


# --- feed-forward


def _activation(name: str, says: str, function: Callable[[Array], Array]) -> None:
    def candidates(case: StageReplay) -> Candidates:
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


@mistake("exp_approximate", "exponentials by {}", "ffn_silu attn_softmax", near=True)
def _(case: StageReplay) -> Candidates:
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


simple("silu_of_up", "SiLU of up instead of gate", "ffn_silu",
       lambda case: _given(case.value("ffn_up"), case.run))  # fmt: skip
simple("swigl_no_silu", "gate * up without SiLU", "ffn_swigl",
       lambda case: _given(case.value("ffn_gate"), lambda gate: gate * case.inputs[1]))  # fmt: skip
simple("swigl_silu_of_up", "gate * silu(up)", "ffn_swigl",
       lambda case: _given(case.value("ffn_gate"),
                           lambda gate: gate * jax.nn.silu(case.inputs[1])))  # fmt: skip
simple("swigl_added", "silu(gate) + up instead of their product", "ffn_swigl",
       lambda case: case.inputs[0] + case.inputs[1])  # fmt: skip
simple("swigl_up_missing", "not multiplied by up", "ffn_swigl", lambda case: case.inputs[0])


# --- a key/value cache


caches.enter(mistake)


# --- layout of the dump, and anything else that can happen to any stage


def _grid(case: StageReplay) -> Array:
    """The exact value as [T, heads, rest], [N, T, S] or [T, C], without the batch."""
    exact, heads = case.exact[0], case.heads
    if case.stage.heads_lead or exact.ndim != 2 or not heads:
        return exact
    return exact.reshape(exact.shape[0], heads, -1)


@mistake("layout_transposed", "dumped with its axes transposed", ALL, None)
def _(case: StageReplay) -> Candidates:
    exact = case.exact[0]
    if exact.ndim == 2:
        yield "", exact.T.reshape(case.exact.shape)


@mistake(
    "layout_heads_first",
    "dumped heads first, [heads, T, H]",
    HEADS_INSIDE,
    True,
)
def _(case: StageReplay) -> Candidates:
    grid = _grid(case)
    if grid.ndim == 3:
        yield "", grid.swapaxes(0, 1).reshape(case.exact.shape)


@mistake(
    "layout_channels_first",
    "dumped with head and channel exchanged",
    HEADS_INSIDE,
    None,
)
def _(case: StageReplay) -> Candidates:
    grid = _grid(case)
    if grid.ndim == 3:
        yield "", grid.swapaxes(1, 2).reshape(case.exact.shape)


simple("layout_tokens_first", "dumped tokens first, [T, N, S]", "attn_scores attn_softmax",
       lambda case: case.exact[0].swapaxes(0, 1).reshape(case.exact.shape),
       dump_only=None)  # fmt: skip
simple("layout_keys_first", "dumped keys first, [N, S, T]", "attn_scores attn_softmax",
       lambda case: case.exact.swapaxes(2, 3), dump_only=None)  # fmt: skip


@mistake("layer_off_by_one", "the dump of layer {}", ALL, None)
def _(case: StageReplay) -> Candidates:
    if case.layer is None or case.stage.scope != "layer":
        return
    count = case.config.num_hidden_layers
    for layer in {(case.layer - 1) % count, (case.layer + 1) % count} - {case.layer}:
        other = case.other(case.stage.name, layer)
        if other.replayable:
            yield str(layer), other.exact


@mistake("stage_swapped", "the dump of {}", ALL, True)
def _(case: StageReplay) -> Candidates:
    for row in case.tables.layer_stages if case.layer is not None else ():
        if row is not case.stage and row.axes == case.stage.axes:
            # of the right value of this stage, which the other may be made of
            right = {**case.overrides, (case.stage.name, case.layer): case.exact}
            other = StageReplay(case.replay, row, case.layer, right, case.formats)
            if other.replayable:
                yield row.name, other.exact


@mistake("positions_permuted", "positions in another order: {}", ALL, None)
def _(case: StageReplay) -> Candidates:
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
def _(case: StageReplay) -> Candidates:
    """Match every head of the dump to the head of the exact value that it is nearest to."""
    heads = case.heads
    if not heads or heads < 2:
        return

    def by_head(x: Array) -> np.ndarray:
        kept = np.where(np.asarray(case.finite), np.asarray(x), 0)
        grid = case.stage.by_head(heads, kept).reshape(heads, -1)
        return np.nan_to_num(grid, posinf=0.0, neginf=0.0)

    found, exact = by_head(case.dump), by_head(case.exact)
    distance = (found**2).sum(1)[:, None] + (exact**2).sum(1)[None] - 2 * found @ exact.T
    order = distance.argmin(1)
    if sorted(order) == list(range(heads)) and not np.array_equal(order, np.arange(heads)):
        moved = case.stage.by_head(heads, np.asarray(case.exact))[order]
        says = ",".join(map(str, order)) if heads <= 16 else "of a permutation"
        yield says, jnp.asarray(case.stage.from_heads(moved, case.exact.shape))


@mistake("tail_not_written", "the last {}", ALL, None)
def _(case: StageReplay) -> Candidates:
    dump = np.asarray(case.dump)
    for axis, what in _tails(case):
        rows = np.moveaxis(dump, axis, 0).reshape(dump.shape[axis], -1)
        for count, says in (
            (_trailing((rows == 0).all(1)), "zero"),
            (_repeated(rows), "as before them"),
        ):
            if 0 < count < len(rows):
                kept = len(rows) - count
                exact = jnp.moveaxis(case.exact, axis, 0)
                end = 0 if says == "zero" else exact[kept - 1]
                yield f"{count} {what} {says}", jnp.moveaxis(exact.at[kept:].set(end), 0, axis)


def _tails(case: StageReplay) -> Iterator[tuple[int, str]]:
    """The axes whose end may be left unwritten: positions, and channels that are no heads."""
    if "T" in case.stage.axes:
        yield 1 + case.stage.axes.index("T"), "positions"
    if case.stage.linear:
        yield case.dump.ndim - 1, "channels"


def _trailing(marks: Any) -> int:
    """How many marks in a row stand at the end."""
    return len(marks) if marks.all() else int(marks[::-1].argmin())


def _repeated(rows: np.ndarray) -> int:
    """How many rows at the end are the same as the one before them."""
    return _trailing(np.concatenate([[False], (rows[1:] == rows[:-1]).all(1)]))


LARGEST_F16 = 65504.0


@mistake("saturated_to_65504", "{} elements clamped to 65504, where float16 ends", ALL, None)
def _(case: StageReplay) -> Candidates:
    beyond = int((jnp.abs(case.exact) > LARGEST_F16).sum())
    if beyond:
        yield str(beyond), jnp.clip(case.exact, -LARGEST_F16, LARGEST_F16)


# --- weights in another order or type: the last, as what has a name of its own is also one of these

mistake("vocabulary_rolled", "rows of the vocabulary moved by {}", "embedding lm_head")(
    rearranged.vocabulary
)
mistake("weight_requantised", "weight in another type: {}", f"embedding {LINEARS}", near=True)(
    rearranged.requantised
)
mistake("columns_permuted", "columns in another order: {}", LINEARS)(rearranged.columns)
mistake("rows_permuted", "rows of {}", f"{LINEARS} {BIASES}", None)(rearranged.rows)
