"""Mistake of which value: another one stands for an input of a stage, or for its result."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.models.ops import split_heads
from stages.architecture import CACHE, LAYER_INPUT, Stage
from tools.localize.mistakes import cache_rows
from tools.localize.mistakes.operands import (
    attention_scale,
    before_rope,
    embedding_rows,
    embedding_table,
    head_norm,
    if_there,
    mean_square,
    mixed,
    norm_weight,
    normed,
    rotated,
    unrotated,
)
from tools.localize.mistakes.registry import (
    ALL,
    BIASES,
    NORMS,
    RESIDUALS,
    ROPES,
    Candidates,
    mistake,
    simple,
)
from tools.localize.stage_case import StageReplay


@mistake("embedding row of token id {}", "embedding")
def embedding_id_off_by_one(case: StageReplay) -> Candidates:
    tokens = np.array(case.replay.trace.tokens)
    for step in (1, -1):
        yield f"{step:+d}", embedding_rows(case, embedding_table(case), tokens + step)


@mistake(
    "RoPE applied before the norm",
    f"{NORMS} {ROPES}",
    rotated=True,
    rest=("rope_before_norm", "rope_missing"),
    everywhere=True,
)
def rope_before_norm(case: StageReplay) -> Candidates:
    norm = head_norm(case)
    if norm and (heads := _projected(case, norm)) is not None:
        x = rotated(case, heads)
        yield "", x / jnp.sqrt(mean_square(case, x)) * case.parameter(norm.parameters[0])


def _projected(case: StageReplay, norm: Stage) -> Array | None:
    """The same heads before the norm."""
    value = case.computed(norm.inputs[0])
    if value is None:
        return None
    q, k, _ = split_heads(case.config, value)
    return q if case.stage.axes[1] == "N" else k


@mistake("not normalised: {}", NORMS, dump_only=None, everywhere=True)
def norm_skipped(case: StageReplay) -> Candidates:
    x = normed(case)
    yield "the input itself", x
    yield "the input times the weight", x * norm_weight(case)


@mistake(
    "applied to {} instead of the normed value",
    "qkv_matmul ffn_gate ffn_up lm_head",
)
def input_not_normed(case: StageReplay) -> Candidates:
    before = {"qkv_matmul": LAYER_INPUT, "lm_head": "post_ffn_residual"}
    name = before.get(case.stage.name, "post_attn_residual")
    value = case.value(name)
    if value is not None:
        yield name, case.run(value)


@mistake("dumped after the bias was added", "qkv_matmul", dump_only=None, near=True)
def bias_already_added(case: StageReplay) -> Candidates:
    if biased := next((stage for stage in case.arch.stages if stage.name in BIASES.split()), None):
        yield "", case.exact + jnp.concatenate([case.parameter(p) for p in biased.parameters])


@mistake("RoPE of the projection instead of the norm of it", ROPES, "input_not_normed")
def _rotated_before_norm(case: StageReplay) -> Candidates:
    norm = head_norm(case)
    if norm and (heads := _projected(case, norm)) is not None:
        yield "", rotated(case, heads)


simple("rope_missing", "not rotated", ROPES, lambda case: unrotated(case), everywhere=True)


@mistake(
    "bias added after RoPE instead of before",
    ROPES,
    rest=("bias_missing", "bias_after_rope", "bias_v_only"),
)
def bias_after_rope(case: StageReplay) -> Candidates:
    biased = case.arch.stage.get("qkv_bias")
    if biased is None or biased.name not in case.stage.inputs:
        return
    parts = [jnp.asarray(case.parameter(name)) for name in biased.parameters]
    q, k, _ = split_heads(case.config, jnp.concatenate(parts)[None, None])
    bias, found = q if case.stage.axes[1] == "N" else k, unrotated(case)
    yield "", rotated(case, found - bias) + bias
    yield "", rotated(case, found) + bias  # where the dump before it has no bias either


@mistake("dumped before the scale 1/sqrt(H)", "attn_scores", dump_only=True)
def dump_before_scale(case: StageReplay) -> Candidates:
    yield "", case.exact / attention_scale(case)


@mistake("scores of q before RoPE", "attn_scores")
def scores_q_unrotated(case: StageReplay) -> Candidates:
    rotated_q, rotated_k = ROPES.split()
    q, k = before_rope(case, rotated_q), before_rope(case, rotated_k, keys=True)
    if q is not None and k is not None:
        yield "", case.run(q)
        yield "", case.run(q, k)


simple("scores_k_unrotated", "scores of k before RoPE", "attn_scores",
       lambda case: if_there(before_rope(case, ROPES.split()[1], keys=True),
                           lambda k: case.run(None, k)))  # fmt: skip


@mistake("k used in the place of v", "attention")
def v_from_k(case: StageReplay) -> Candidates:
    if case.inputs[1].ndim != 4:
        yield "", mixed(case, split_heads(case.config, case.inputs[1])[1])
    post_rope = ROPES.split()[1]
    for k in (case.at_keys(post_rope), before_rope(case, post_rope, keys=True)):
        if k is not None:
            yield "", mixed(case, k)


@mistake("v before its bias", "v_cache attention")
def v_without_bias(case: StageReplay) -> Candidates:
    read = case.arch.stage[case.stage.inputs[-1]]
    before = case.at_keys(read.inputs[0]) if read.name in BIASES.split() else None
    if before is not None:
        yield "", cache_rows.with_rows(case, split_heads(case.config, before)[2])


@mistake("k put into the cache before RoPE", "k_cache")
def cache_before_rope(case: StageReplay) -> Candidates:
    k = before_rope(case, ROPES.split()[1], keys=True)
    if k is not None:
        yield "", cache_rows.with_rows(case, k)


@mistake("residual taken after the norm", RESIDUALS)
def residual_normed(case: StageReplay) -> Candidates:
    first, second = (name for name in NORMS.split() if name in ("attn_norm", "ffn_norm"))
    value = case.computed(first if case.stage.inputs[0] == LAYER_INPUT else second)
    if value is not None:
        yield "", value + case.inputs[1]


simple("residual_layer_input", "residual taken from the layer's input", "post_ffn_residual",
       lambda case: if_there(case.value(LAYER_INPUT), lambda x: x + case.inputs[1]))  # fmt: skip


simple("silu_of_up", "SiLU of up instead of gate", "ffn_silu",
       lambda case: if_there(case.computed("ffn_up"), case.run))  # fmt: skip


simple("swigl_no_silu", "gate * up without SiLU", "ffn_swigl",
       lambda case: if_there(case.computed("ffn_gate"),
                             lambda gate: gate * case.inputs[1]))  # fmt: skip


simple("swigl_silu_of_up", "gate * silu(up)", "ffn_swigl",
       lambda case: if_there(case.computed("ffn_gate"),
                             lambda gate: gate * jax.nn.silu(case.inputs[1])))  # fmt: skip


@mistake("the dump of layer {}", ALL, dump_only=None, priority=1)
def layer_off_by_one(case: StageReplay) -> Candidates:
    if case.layer is None or case.stage.scope != "layer":
        return
    count = case.config.num_hidden_layers
    for layer in {(case.layer - 1) % count, (case.layer + 1) % count} - {case.layer}:
        other = case.other(case.stage.name, layer)
        if other.replayable:
            yield str(layer), other.exact


@mistake("the dump of {}", ALL, dump_only=True, priority=1)
def stage_swapped(case: StageReplay) -> Candidates:
    for stage in case.arch.layer_stages if case.layer is not None else ():
        if stage is not case.stage and stage.axes == case.stage.axes:
            # of the right value of this stage, which the other may be made of
            right = {**case.overrides, (case.stage.name, case.layer): case.exact}
            other = StageReplay(case.replay, stage, case.layer, right, case.formats)
            if other.replayable:
                yield stage.name, other.exact


@mistake(
    "k and v of the cache exchanged",
    "k_cache v_cache attn_scores",
    dump_only=None,
    rest=("v_from_k",),
)
def cache_kv_exchanged(case: StageReplay) -> Candidates:
    """v put away as k, k as v. Of a cache that was not dumped this shows in the scores; that the
    sum is of k, too, has a name of its own."""
    others = {"k_cache": "v_cache", "v_cache": "k_cache", "attn_scores": "attention"}
    if ("k_cache" in case.arch.stage) == (case.stage.kind is CACHE):
        other = case.other(others[case.stage.name]).last(None)
        if other.replayable:
            yield "", cache_rows.with_rows(case, cache_rows.kept(other))
