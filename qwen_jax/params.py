"""The weights of a model as frozen pytrees, in the layout and under the names of Hugging Face.

A linear weight is [out, in] as it lies in the checkpoint; nothing is transposed on the way in.
"""

from typing import Any

import jax
from flax import struct

from qwen_jax import checkpoint
from qwen_jax.config import Config

Array = Any  # jax.Array, np.ndarray or jax.ShapeDtypeStruct


@struct.dataclass
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


@struct.dataclass
class StartParams:
    embed_tokens: Array  # [V, D]


@struct.dataclass
class EndParams:
    norm: Array  # [D]
    lm_head: Array  # [V, D]; the embedding where the head is tied


@struct.dataclass
class Params:
    start: StartParams
    layers: tuple[LayerParams, ...]
    end: EndParams


def layer_params(source: "checkpoint.Checkpoint", layer: int) -> LayerParams:
    """One layer's weights, read from the checkpoint in its own dtype."""
    return LayerParams(**source.read_group(checkpoint.layer_names(layer)))


def start_params(source: "checkpoint.Checkpoint") -> StartParams:
    return StartParams(**source.read_group(checkpoint.START_NAMES))


def end_params(source: "checkpoint.Checkpoint") -> EndParams:
    return EndParams(**source.read_group(checkpoint.end_names(source.config)))


def load(source: "checkpoint.Checkpoint") -> Params:
    """All weights at once, for ``forward`` on a model that fits into memory."""
    layers = range(source.config.num_hidden_layers)
    return Params(
        start=start_params(source),
        layers=tuple(layer_params(source, layer) for layer in layers),
        end=end_params(source),
    )


def abstract(config: Config, dtype: Any) -> Params:
    """The same tree of ``jax.ShapeDtypeStruct``: shapes without weights."""

    class Shapes:
        def __init__(self) -> None:
            self.config = config

        def read_group(self, names: dict[str, str]) -> dict[str, Any]:
            shapes = checkpoint.expected_shapes(config)
            return {f: jax.ShapeDtypeStruct(shapes[name], dtype) for f, name in names.items()}

    return load(Shapes())  # type: ignore[arg-type]
