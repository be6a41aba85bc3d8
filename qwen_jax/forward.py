"""The forward pass: an architecture's stages one after the other, each from values before it.

Weights are pytrees under the names of the architecture's parameters and in their layout: a linear
weight is [out, in] as it lies in the checkpoint; nothing is transposed on the way in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qwen_jax.config import Config
from qwen_jax.models import FUNCTIONS, StageFunction
from qwen_jax.models.ops import Positional
from qwen_jax.weights.base import Weights
from stages.architecture import LAYER_INPUT, TOKENS, Scope, Stage

Parameters = Mapping[str, Any]  # parameter name -> jax.Array, np.ndarray or jax.ShapeDtypeStruct


class Params(struct.PyTreeNode):
    """All weights of a model.

    Attributes:
        start, end: parameter name -> weight. A tied head is the embedding itself.
        layers: the same, one a layer.
    """

    start: dict[str, Array]
    layers: tuple[dict[str, Array], ...]
    end: dict[str, Array]


class Stages(struct.PyTreeNode):
    """Every named sub-stage of one forward pass. Values carry the batch axis in front.

    Attributes:
        start: {"embedding"}.
        layers: one dictionary per layer, by stage name.
        end: {"final_norm", "lm_head"}.
    """

    start: dict[str, Array]
    layers: tuple[dict[str, Array], ...]
    end: dict[str, Array]


def read_parameters(weights: Weights, scope: Scope, layer: int | None = None) -> dict[str, Any]:
    """The weights of one layer, or of the start or the end, in the dtype they are stored in."""
    names = weights.config.tensor_names(scope, layer)
    return {parameter: weights.read(tensor) for parameter, tensor in names.items()}


def load(weights: Weights) -> Params:
    """All weights at once, for ``forward`` on a model that fits into memory."""
    layers = range(weights.config.num_hidden_layers)
    return Params(
        start=read_parameters(weights, "start"),
        layers=tuple(read_parameters(weights, "layer", layer) for layer in layers),
        end=read_parameters(weights, "end"),
    )


def abstract(config: Config, dtype: Any) -> Params:
    """Parameters as ``jax.ShapeDtypeStruct``: shapes and dtypes without weights."""

    def shapes(scope: Scope, layer: int | None = None) -> dict[str, Any]:
        names = config.tensor_names(scope, layer)
        return {
            p: jax.ShapeDtypeStruct(config.shapes[tensor], dtype) for p, tensor in names.items()
        }

    layers = range(config.num_hidden_layers)
    return Params(
        start=shapes("start"),
        layers=tuple(shapes("layer", layer) for layer in layers),
        end=shapes("end"),
    )


def run_stages(
    stages: Sequence[Stage],
    config: Config,
    parameters: Parameters,
    pos: Positional,
    given: Mapping[str, Array],
    dtype: Any,
    functions: Mapping[str, StageFunction] | None = None,
) -> dict[str, Array]:
    """Compute the stages of ``stages`` in order, from ``given`` values and from each other.

    Parameters may come in any dtype and are first cast to ``dtype``, as ``from_pretrained`` does.
    Returns the stages alone, each rounded to ``dtype``, with a batch axis in front.
    """
    functions = FUNCTIONS[config.architecture] if functions is None else functions
    values, unrounded = dict(given), dict[str, Array]()
    for stage in stages:
        inputs = [
            unrounded[name] if name in stage.unrounded else values[name] for name in stage.inputs
        ]
        weights = [parameters[name].astype(dtype) for name in stage.parameters]
        with jax.named_scope(stage.name):
            unrounded[stage.name] = functions[stage.name](config, pos, *inputs, *weights)
            values[stage.name] = unrounded[stage.name].astype(dtype)
    return {stage.name: values[stage.name] for stage in stages}


def forward(
    config: Config,
    params: Params,
    tokens: Array | np.ndarray,
    pos: Mapping[bool, Positional],
    dtype: Any,
) -> Stages:
    """The whole model in one pure function. tokens [B, T] int32; logits are ``end["lm_head"]``.

    ``pos`` is of ``ops.positional_by_layer``.
    """
    arch, full = config.arch, pos[False]
    given = {TOKENS: jnp.asarray(tokens)}
    start = run_stages(arch.start_stages, config, params.start, full, given, dtype)
    x, layers = start[arch.first.name], []
    for weights, sliding in zip(params.layers, config.sliding_layers, strict=True):
        given = {LAYER_INPUT: x}
        layers.append(run_stages(arch.layer_stages, config, weights, pos[sliding], given, dtype))
        x = layers[-1][arch.layer_output.name]
    given = {arch.layer_output.name: x}
    end = run_stages(arch.end_stages, config, params.end, full, given, dtype)
    return Stages(start=start, layers=tuple(layers), end=end)
