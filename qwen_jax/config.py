"""The configuration of one model, read from a Hugging Face ``config.json``.

Imports neither jax nor torch: the oracle and the tools read configurations too.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from stages.architecture import MOST_LAYERS, SIZES, Architecture, Scope
from stages.architectures import ARCHITECTURES
from stages.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023, arXiv 2309.00071), as in transformers'
    ``modeling_rope_utils._compute_yarn_parameters``. It acts on every position, short ones too."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """One model of an architecture. Field names are those of transformers' ``Qwen2Config``.

    ``sliding_layers`` has one flag a layer: whether it attends to the last ``sliding_window``
    positions only.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    tie_word_embeddings: bool
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    max_position_embeddings: int

    @property
    def arch(self) -> Architecture:
        """The stages and parameters of the architecture."""
        return ARCHITECTURES[self.architecture]

    def tensor_names(self, scope: Scope, layer: int | None = None) -> dict[str, str]:
        """Parameter name -> Hugging Face tensor, of one layer, or of the start or the end."""
        return self.arch.tensor_names(scope, layer, self.tie_word_embeddings)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model has, by its Hugging Face name."""
        dims = self.dims(1)
        tensors = self.arch.tensors(self.num_hidden_layers, self.tie_word_embeddings)
        return {
            name: self.arch.parameter_shape(parameter.name, dims)
            for name, (parameter, _) in tensors.items()
        }

    def dims(self, length: int) -> dict[str, int]:
        """Axis letter -> size for one sequence of ``length`` tokens."""
        sizes = {letter: getattr(self, name) for letter, name in SIZES.items()}
        return {"T": length, "S": length} | sizes

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``from_json`` turns back into an equal Config."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Config":
        yarn = Yarn(**data["yarn"]) if data["yarn"] else None
        return cls(**{**data, "yarn": yarn, "sliding_layers": tuple(data["sliding_layers"])})


# Every setting of a config.json is handled by ``from_hf``, ignored because it cannot change a
# forward pass, or must have the value under which it changes nothing. Anything else is refused by
# name: a setting that we do not know could be one that changes every number.
_HANDLED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "use_sliding_window",
    "sliding_window", "max_window_layers", "layer_types", "max_position_embeddings",
}  # fmt: skip
_IGNORED = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "initializer_range", "use_cache", "transformers_version", "_name_or_path",
    "id2label", "label2id", "task_specific_params", "name_or_path", "auto_map",
    "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset", "problem_type",
}  # fmt: skip
_MUST_EQUAL: dict[str, Any] = {
    "mlp_bias": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "chunk_size_feed_forward": 0,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "torchscript": False,
    "use_bfloat16": False,
    "quantization_config": None,
    "use_mrope": False,
}


def from_hf(raw: dict[str, Any], where: str = "config.json") -> Config:
    """The Config of a Hugging Face configuration, in either spelling of the RoPE settings.

    Raises:
        UserError: another architecture, or a setting that this project does not know, cannot
            handle or finds at a value that would change the forward pass.
    """
    arch = ARCHITECTURES.get(str(raw.get("model_type")))  # which may be anything
    if arch is None:
        raise UserError(
            f"{where}: model_type is {raw.get('model_type')!r}; this tool knows "
            f"{' and '.join(map(repr, ARCHITECTURES))} (Qwen2, Qwen2.5, Qwen3 and models distilled "
            "into them)"
        )
    fixed = {**_MUST_EQUAL, **arch.fixed}
    for name, value in raw.items():
        if name in fixed:
            if value != fixed[name]:
                raise UserError(f"{where}: {name} is {value!r}; only {fixed[name]!r} is supported")
        elif name not in _HANDLED | _IGNORED:
            raise UserError(
                f"{where}: unknown attribute {name!r} ({value!r}) may change the forward pass; "
                "remove it if it does not"
            )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")

    def size(name: str, default: int | None = None) -> int:
        return _size(raw, name, default, where)

    heads, layers = size("num_attention_heads"), size("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {layers}; at most {MOST_LAYERS} are read")
    # transformers takes null for as many as there are query heads, and no such line for another
    absent = arch.defaults["num_key_value_heads"]
    kv_heads = size("num_key_value_heads", heads if "num_key_value_heads" in raw else absent)
    if heads % kv_heads:
        raise UserError(
            f"{where}: {heads} query heads cannot share {kv_heads} key/value heads evenly"
        )
    head_dim = size("head_dim", arch.defaults.get("head_dim", size("hidden_size") // heads))
    if head_dim % 2:
        raise UserError(f"{where}: head_dim is {head_dim}; RoPE rotates pairs, so it must be even")
    max_positions = size("max_position_embeddings", 32768)
    theta, yarn = _rope(raw, max_positions, where)
    window, sliding = _sliding(raw, arch.defaults["max_window_layers"], layers, where)
    return Config(
        architecture=arch.name,
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6, where),
        rope_theta=theta,
        yarn=yarn,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", False, where),
        sliding_window=window,
        sliding_layers=sliding,
        max_position_embeddings=max_positions,
    )


def _size(raw: dict[str, Any], name: str, default: int | None, where: str) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} is {value!r}; expected a positive integer")
    return value


def _number(raw: dict[str, Any], name: str, default: float | None, where: str) -> float:
    value: Any = raw.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{where}: {name} is {value!r}; expected a positive number")
    return float(value)


def _flag(raw: dict[str, Any], name: str, default: bool, where: str) -> bool:
    value = raw.get(name, default)
    if type(value) is not bool:
        raise UserError(f"{where}: {name} is {value!r}; expected true or false")
    return value


def _rope(raw: dict[str, Any], max_positions: int, where: str) -> tuple[float, Yarn | None]:
    """theta and YaRN settings from ``rope_parameters`` (transformers 5) or from ``rope_theta``
    and ``rope_scaling`` (transformers 4, and every published Qwen2 checkpoint). Where both are
    given ``rope_scaling`` counts, as in transformers' ``convert_rope_params_to_dict``."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: RoPE settings {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    # transformers falls back to 10000, not to Qwen's 1000000, when no theta is given
    theta = _number({"rope_theta": 10000.0} | raw | rope, "rope_theta", None, where)
    if kind == "default":
        known, yarn = {"factor"}, None
    elif kind == "yarn":
        known, yarn = set(Yarn.__dataclass_fields__), _yarn(rope, max_positions, where)
    else:
        raise UserError(f"{where}: rope_type is {kind!r}; 'default' and 'yarn' are supported")
    if unknown := sorted(rope.keys() - known - {"rope_type", "type", "rope_theta"}):
        raise UserError(f"{where}: unknown RoPE settings {unknown}")
    return theta, yarn


def _yarn(rope: dict[str, Any], max_positions: int, where: str) -> Yarn:
    """YaRN settings; null is the default, for the factor the growth of the context."""
    given = {name: value for name, value in rope.items() if value is not None}
    original = _size(given, "original_max_position_embeddings", max_positions, where)
    factor = max_positions / original if "factor" in rope else None
    attention = "attention_factor" in given
    return Yarn(
        factor=_number(given, "factor", factor, where),
        original_max_position_embeddings=original,
        beta_fast=_number(given, "beta_fast", 32.0, where),
        beta_slow=_number(given, "beta_slow", 1.0, where),
        attention_factor=_number(given, "attention_factor", None, where) if attention else None,
        truncate=_flag(given, "truncate", True, where),
    )


def _sliding(
    raw: dict[str, Any], absent: int, layers: int, where: str
) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which layers use it, as transformers' ``Qwen2Config.__post_init__``."""
    window = None
    if _flag(raw, "use_sliding_window", False, where):
        given = raw.get("sliding_window", 4096)
        window = None if given is None else _size(raw, "sliding_window", 4096, where)
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", absent)
        if type(first) is not int or first < 0:
            raise UserError(f"{where}: max_window_layers is {first!r}; expected a layer number")
        sliding = tuple(window is not None and layer >= first for layer in range(layers))
    else:
        types = types if isinstance(types, list) else [types]
        unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
        if unknown or len(types) != layers:
            raise UserError(
                f"{where}: layer_types must name full_attention or sliding_attention for each of "
                f"the {layers} layers; found {len(types)} entries, unknown: {unknown[:3]}"
            )
        sliding = tuple(kind == "sliding_attention" for kind in types)
        if any(sliding) and window is None:
            raise UserError(
                f"{where}: layer_types has sliding_attention, but use_sliding_window is false or "
                "sliding_window null"
            )
    return (window if any(sliding) else None), sliding
