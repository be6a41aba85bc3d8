"""The weights of a model as frozen pytrees, in the layout and under the names of Hugging Face.

A linear weight is [out, in] as it lies in the checkpoint; nothing is transposed on the way in.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import register_dataclass

from qwen_jax.config import Config
from qwen_jax.weights import EMBEDDING, NORM, Weights, expected_shapes, head_name, layer_names

Array = Any  # jax.Array, np.ndarray or jax.ShapeDtypeStruct


@register_dataclass
@dataclass(frozen=True)
class LayerParams:
    """One decoder layer."""

    input_layernorm: Array  # [D]
    q_proj: Array  # [N*H, D]
    k_proj: Array  # [K*H, D]
    v_proj: Array  # [K*H, D]
    q_bias: Array  # [N*H]
    k_bias: Array  # [K*H]
    v_bias: Array  # [K*H]
    o_proj: Array  # [D, N*H]
    post_attention_layernorm: Array  # [D]
    gate_proj: Array  # [F, D]
    up_proj: Array  # [F, D]
    down_proj: Array  # [D, F]


@register_dataclass
@dataclass(frozen=True)
class StartParams:
    embed_tokens: Array  # [V, D]


@register_dataclass
@dataclass(frozen=True)
class EndParams:
    norm: Array  # [D]
    lm_head: Array  # [V, D]; the embedding where the head is tied


@register_dataclass
@dataclass(frozen=True)
class Params:
    start: StartParams
    layers: tuple[LayerParams, ...]
    end: EndParams


def layer_params(source: Weights, layer: int) -> LayerParams:
    """One layer's weights, in the dtype in which they are stored."""
    return LayerParams(**source.read_group(layer_names(layer)))


def start_params(source: Weights) -> StartParams:
    return StartParams(embed_tokens=source.read(EMBEDDING))


def end_params(source: Weights) -> EndParams:
    return EndParams(norm=source.read(NORM), lm_head=source.read(head_name(source.config)))


def load(source: Weights) -> Params:
    """All weights at once, for ``forward`` on a model that fits into memory."""
    layers = range(source.config.num_hidden_layers)
    return Params(
        start=start_params(source),
        layers=tuple(layer_params(source, layer) for layer in layers),
        end=end_params(source),
    )


def abstract(config: Config, dtype: Any) -> Params:
    """The same tree of ``jax.ShapeDtypeStruct``: shapes without weights."""
    shapes = expected_shapes(config)

    class Shapes:
        def __init__(self) -> None:
            self.config = config

        def read(self, name: str) -> Any:
            return jax.ShapeDtypeStruct(shapes[name], dtype)

        def read_group(self, names: dict[str, str]) -> dict[str, Any]:
            return {field: self.read(name) for field, name in names.items()}

    return load(Shapes())  # type: ignore[arg-type]
