"""Mistake of which weight: another tensor's, another layer's, another type's, or none."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from stages.architecture import Stage
from stages.architectures import any_stage
from tools.localize.mistakes import stored_types
from tools.localize.mistakes.operands import (
    biases,
    embedding_rows,
    embedding_table,
    norm_weight,
    with_bias,
    with_norm,
)
from tools.localize.mistakes.registry import (
    BIASES,
    LAYER_LINEARS,
    LINEARS,
    NORMS,
    Candidates,
    mistake,
    simple,
)
from tools.localize.stage_case import StageReplay, Weight


@mistake("rows of the output head instead of the embedding", "embedding")
def embedding_from_lm_head(case: StageReplay) -> Candidates:
    if not case.config.tie_word_embeddings:
        head = case.parameter(case.arch.head.parameters[0])
        yield "", embedding_rows(case, np.asarray(head), np.array(case.replay.trace.tokens))


@mistake("embedding table read as [D, V]", "embedding")
def embedding_transposed(case: StageReplay) -> Candidates:
    table = embedding_table(case)
    read = table.reshape(-1).reshape(table.shape[::-1]).T
    yield "", embedding_rows(case, read, np.array(case.replay.trace.tokens))


simple("norm_one_plus_weight", "multiplied by 1 + weight, as Gemma does", NORMS,
       lambda case: with_norm(case, 1 + norm_weight(case)), everywhere=True)  # fmt: skip


simple("norm_weight_missing", "norm weight not applied", NORMS,
       lambda case: with_norm(case, jnp.ones_like(norm_weight(case))))  # fmt: skip


@mistake("weight of another norm: {}", NORMS)
def norm_weight_swapped(case: StageReplay) -> Candidates:
    layer = case.last_layer if case.layer is None else case.layer
    for other in _norms_like(case.stage):
        if other is not case.stage:
            yield other.name, with_norm(case, case.parameter(other.parameters[0], layer))


def _norms_like(stage: Stage) -> list[Stage]:
    """The norms of any architecture over the same axis."""
    norms = [any_stage(name) for name in NORMS.split()]
    return [norm for norm in norms if norm.axes[-1] == stage.axes[-1]]


@mistake("norm weight of layer {}", NORMS, joined="moved")
def norm_weight_other_layer(case: StageReplay) -> Candidates:
    names = case.stage.parameters
    if case.layer is None:
        rows = [stage for stage in _norms_like(case.stage) if stage.scope == "layer"]
        names = tuple(name for stage in rows for name in stage.parameters)
    for layer in _other_layers(case):
        for name in names:
            yield str(layer), with_norm(case, case.parameter(name, layer))


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


@mistake("weight read transposed{}", LINEARS)
def weight_transposed(case: StageReplay) -> Candidates:
    yield "", _linear_with(case, _reread)
    yield "", _linear_with(case, _rewritten)
    for name, weight in case.weights.items() if len(case.weights) > 1 else ():
        yield f" ({name} alone)", case.run(weights={name: _reread(weight)})


@mistake("weight of layer {}", LAYER_LINEARS, joined="moved")
def weight_other_layer(case: StageReplay) -> Candidates:
    for layer in _other_layers(case):
        others = case.parameters_of(layer)
        yield str(layer), case.run(weights=others)
        for name in others if len(others) > 1 else ():
            yield f"{layer} ({name} alone)", case.run(weights={name: others[name]})


def _exchanged(case: StageReplay, a: str, b: str) -> Array:
    return case.run(weights={a: case.weights[b], b: case.weights[a]})


simple("kv_swapped", "k and v projections swapped", "qkv_matmul",
       lambda case: _exchanged(case, *case.stage.parameters[1:]), everywhere=True)  # fmt: skip


@mistake(
    "the weight of {}",
    "ffn_gate ffn_up",
    dump_only=None,
    rest=("gate_up_swapped",),
    together="gate and up projections exchanged",
    everywhere=True,
)
def gate_up_swapped(case: StageReplay) -> Candidates:
    other = case.arch.stage["ffn_up" if case.stage.name == "ffn_gate" else "ffn_gate"]
    yield (
        other.parameters[0],
        case.run(weights={case.stage.parameters[0]: case.parameter(other.parameters[0])}),
    )


@mistake("the embedding used as the output head, which this model does not tie", "lm_head")
def head_tied(case: StageReplay) -> Candidates:
    if not case.config.tie_word_embeddings:
        yield "", case.run(weights={case.stage.parameters[0]: embedding_table(case)})


@mistake("the same number for every token: the head is empty", "lm_head")
def head_zero_initialised(case: StageReplay) -> Candidates:
    first = case.dump[..., :1]
    if bool((case.dump == first).all()):
        yield "", jnp.broadcast_to(first, case.exact.shape)


@mistake("bias of layer {}", BIASES, joined="moved")
def bias_other_layer(case: StageReplay) -> Candidates:
    for layer in _other_layers(case):
        yield str(layer), with_bias(case, *map(jnp.asarray, case.parameters_of(layer).values()))


simple("bias_kv_swapped", "biases of k and v swapped", BIASES,
       lambda case: with_bias(case, *(biases(case)[place] for place in (0, 2, 1))))  # fmt: skip


mistake(
    "weight in another type: {}",
    f"embedding {LINEARS}",
    "weight_requantised",
    priority=2,
    near=True,
    lenient=True,
    joined="file",
    room="weight",
)(stored_types.requantised)
