"""GGUFs as wrong converters make them: a right model, changed, and where that must show.

A change is of the float32 tensors before they are quantised, of the metadata, or of one tensor's
type. Each is of all layers that it names; the model has three.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.field.models import Tensors, permuted

Layer = int | str | None


@dataclass(frozen=True)
class Wrong:
    """One way to convert a model wrongly.

    Attributes:
        places: (stage, layer) at which it may be said to be; "all" is all layers.
        names: what it may be called, of ``tools.localize``'s names; none where it has no name.
        model: attributes of the right model's config.
        metadata: of the wrong file, other than the right one's.
        types: tensor -> a type of its own in the wrong file.
        held_out: written when the names of ``tools.localize`` were done, and none was changed for
            it.
    """

    name: str
    change: Callable[[Tensors], None]
    places: frozenset[tuple[str, Layer]]
    names: frozenset[str]
    model: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    held_out: bool = False


WRONG: list[Wrong] = []
LAYERS = range(3)
QWEN3 = {"model_type": "qwen3"}


def wrong(
    stages: str, layer: Layer, names: str = "", **more: Any
) -> Callable[[Callable[[Tensors], None]], Callable[[Tensors], None]]:
    def add(change: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
        places = frozenset((stage, layer) for stage in stages.split())
        name = change.__name__
        WRONG.append(Wrong(name, change, places, frozenset(names.split()), **more))
        return change

    return add


def at(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


def swap(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other].copy(), tensors[one].copy()


def swap_layers(tensors: Tensors, one: int, other: int) -> None:
    for name in [name for name in tensors if name.startswith(f"model.layers.{one}.")]:
        swap(tensors, name, name.replace(f".{one}.", f".{other}.", 1))


def in_all(tensors: Tensors, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for layer in LAYERS:
        tensors[at(layer, name)] = np.ascontiguousarray(change(tensors[at(layer, name)]))


Q, K, V, O = (f"self_attn.{part}_proj" for part in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
HEADS, KV_HEADS = 4, 2
QKV = "qkv_matmul qkv_bias"


@wrong(QKV, "all", "rows_rope_permuted")
def q_rows_permuted_as_for_llama(t: Tensors) -> None:
    in_all(t, f"{Q}.weight", lambda w: permuted(w, HEADS))


@wrong(QKV, "all", "rows_rope_permuted")
def k_rows_permuted_as_for_llama(t: Tensors) -> None:
    in_all(t, f"{K}.weight", lambda w: permuted(w, KV_HEADS))


@wrong(QKV, "all", "rows_rope_permuted")
def q_and_k_permuted_with_their_biases(t: Tensors) -> None:
    for name, heads in ((Q, HEADS), (K, KV_HEADS)):
        in_all(t, f"{name}.weight", lambda w, heads=heads: permuted(w, heads))
        in_all(t, f"{name}.bias", lambda w, heads=heads: permuted(w, heads))


@wrong("qkv_bias", "all", "bias_missing")
def biases_dropped(t: Tensors) -> None:
    for layer in LAYERS:
        for part in (Q, K, V):
            del t[at(layer, f"{part}.bias")]


@wrong("qkv_bias", "all", "bias_q_missing")
def q_bias_dropped(t: Tensors) -> None:
    in_all(t, f"{Q}.bias", np.zeros_like)


@wrong("qkv_bias", 1, "bias_v_missing")
def v_bias_dropped_in_one_layer(t: Tensors) -> None:
    t[at(1, f"{V}.bias")] *= 0


@wrong("qkv_bias", 2, "bias_other_layer")
def bias_of_another_layer(t: Tensors) -> None:
    for part in (Q, K, V):
        t[at(2, f"{part}.bias")] = t[at(1, f"{part}.bias")]


@wrong("qkv_bias", "all", "bias_kv_swapped")
def biases_of_k_and_v_exchanged(t: Tensors) -> None:
    for layer in LAYERS:
        swap(t, at(layer, f"{K}.bias"), at(layer, f"{V}.bias"))


@wrong("qkv_matmul", "all", "kv_swapped")
def k_and_v_exchanged(t: Tensors) -> None:
    for layer in LAYERS:
        swap(t, at(layer, f"{K}.weight"), at(layer, f"{V}.weight"))


@wrong("qkv_matmul", 1, "weight_other_layer")
def q_of_another_layer(t: Tensors) -> None:
    t[at(1, f"{Q}.weight")] = t[at(0, f"{Q}.weight")]


@wrong("qkv_matmul", "all", "heads_permuted")
def v_heads_exchanged(t: Tensors) -> None:
    in_all(t, f"{V}.weight", lambda w: np.roll(w, len(w) // 2, 0))


@wrong("qkv_matmul", "all", "row_scaled constant_factor")
def q_scaled_by_the_head_size(t: Tensors) -> None:
    """The softmax's factor folded into the weight, and applied again."""
    in_all(t, f"{Q}.weight", lambda w: w / 8)


@wrong("attn_out", "all", "weight_transposed")
def o_transposed(t: Tensors) -> None:
    in_all(t, f"{O}.weight", lambda w: w.T)


@wrong("attn_out", "all", "columns_permuted")
def o_columns_permuted(t: Tensors) -> None:
    in_all(t, f"{O}.weight", lambda w: permuted(w.T, HEADS).T)


@wrong("attn_out", "all", "columns_permuted")
def o_shards_in_the_wrong_order(t: Tensors) -> None:
    in_all(t, f"{O}.weight", lambda w: np.roll(w, w.shape[1] // 2, 1))


@wrong("attn_out", 1, "constant_factor")
def o_scaled(t: Tensors) -> None:
    t[at(1, f"{O}.weight")] *= np.float32(1.05)


@wrong("attn_norm ffn_norm", "all", "norm_weight_swapped")
def norms_of_a_layer_exchanged(t: Tensors) -> None:
    for layer in LAYERS:
        swap(t, at(layer, "input_layernorm.weight"), at(layer, "post_attention_layernorm.weight"))


@wrong("attn_norm ffn_norm", "all", "norm_one_plus_weight")
def norm_weights_plus_one(t: Tensors) -> None:
    """As for Gemma."""
    in_all(t, "input_layernorm.weight", lambda w: w + 1)
    in_all(t, "post_attention_layernorm.weight", lambda w: w + 1)
    t["model.norm.weight"] += 1


@wrong("attn_norm", 1, "norm_weight_other_layer")
def norm_of_another_layer(t: Tensors) -> None:
    t[at(1, "input_layernorm.weight")] = t[at(2, "input_layernorm.weight")]


@wrong("final_norm", None, "norm_weight_missing")
def final_norm_of_ones(t: Tensors) -> None:
    t["model.norm.weight"] = np.ones_like(t["model.norm.weight"])


@wrong(
    "attn_norm ffn_norm", "all", "norm_eps", metadata={"attention__layer_norm_rms_epsilon": 1e-5}
)
def wrong_eps(t: Tensors) -> None:
    pass


@wrong("q_post_rope k_post_rope", "all", "rope_theta", metadata={"rope__freq_base": 1e4})
def wrong_theta(t: Tensors) -> None:
    pass


@wrong(
    "q_post_rope k_post_rope",
    "all",
    "head_size",
    metadata={
        "attention__head_count": 8,
        "attention__head_count_kv": 4,
        "attention__key_length": 32,
        "attention__value_length": 32,
    },
)
def wrong_head_count(t: Tensors) -> None:
    pass


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
DROPPED = {f"rope__scaling__{n}": ... for n in ("type", "factor", "original_context_length")}


@wrong(
    "q_post_rope k_post_rope",
    "all",
    "rope_yarn_missing",
    model={"rope_scaling": YARN, "rope_theta": 1e4},
    metadata=DROPPED,
)
def rope_scaling_dropped(t: Tensors) -> None:
    pass


@wrong("ffn_gate ffn_up", "all", "gate_up_swapped")
def gate_and_up_exchanged(t: Tensors) -> None:
    for layer in LAYERS:
        swap(t, at(layer, GATE), at(layer, UP))


@wrong("ffn_gate", "all", "rows_permuted")
def gate_shards_in_the_wrong_order(t: Tensors) -> None:
    in_all(t, GATE, lambda w: np.roll(w, len(w) // 2, 0))


@wrong("ffn_up", 1, "row_scaled")
def up_rows_scaled(t: Tensors) -> None:
    t[at(1, UP)][:16] *= np.float32(0.5)


@wrong("ffn_out", 1, "zeros")
def down_rows_zeroed(t: Tensors) -> None:
    """3 % of them."""
    t[at(1, DOWN)][40:48] = 0


@wrong("ffn_out", "all", "weight_transposed")
def down_read_in_the_other_order(t: Tensors) -> None:
    """Transposed, and its bytes taken for the right shape."""
    in_all(t, DOWN, lambda w: w.T.reshape(w.shape))


@wrong("ffn_out", 1, "weight_requantised", types={at(1, DOWN): "Q2_K"})
def one_tensor_of_a_coarser_type(t: Tensors) -> None:
    pass


@wrong("ffn_out", 2, "weight_other_layer")
def down_of_another_layer(t: Tensors) -> None:
    t[at(2, DOWN)] = t[at(1, DOWN)]


@wrong("attn_norm", "0-1", "layers_exchanged")
def two_layers_exchanged(t: Tensors) -> None:
    swap_layers(t, 0, 1)


@wrong("attn_norm", 2, "norm_weight_other_layer")
def a_layer_written_twice(t: Tensors) -> None:
    for name in [name for name in t if name.startswith("model.layers.2.")]:
        t[name] = t[name.replace(".2.", ".1.", 1)]


@wrong("embedding", 0, "embedding_scaled_sqrt_d constant_factor")
def embedding_scaled(t: Tensors) -> None:
    """By the root of D, as for Gemma; nothing of it is left after the first norm."""
    t["model.embed_tokens.weight"] *= np.float32(16)


@wrong("embedding", 0, "embedding_id_off_by_one vocabulary_rolled")
def embedding_rows_rolled(t: Tensors) -> None:
    t["model.embed_tokens.weight"] = np.roll(t["model.embed_tokens.weight"], 1, 0)


@wrong("lm_head", None, "head_tied")
def head_tied_where_it_is_not(t: Tensors) -> None:
    del t["lm_head.weight"]


@wrong("lm_head", None, "vocabulary_rolled")
def head_rows_rolled(t: Tensors) -> None:
    t["lm_head.weight"] = np.roll(t["lm_head.weight"], 1, 0)


@wrong("lm_head", None, "zeros tail_not_written")
def last_head_rows_zero(t: Tensors) -> None:
    """Of tokens that were added to the vocabulary."""
    t["lm_head.weight"][-16:] = 0


@wrong("q_norm k_norm", "all", "norm_weight_swapped", model=QWEN3)
def q_norm_and_k_norm_exchanged(t: Tensors) -> None:
    for layer in LAYERS:
        swap(t, at(layer, "self_attn.q_norm.weight"), at(layer, "self_attn.k_norm.weight"))


@wrong("q_norm", "all", "norm_weight_missing", model=QWEN3)
def q_norm_of_ones(t: Tensors) -> None:
    in_all(t, "self_attn.q_norm.weight", np.ones_like)


@wrong("k_norm", "all", "norm_weight_permuted", model=QWEN3)
def k_norm_permuted_as_for_llama(t: Tensors) -> None:
    in_all(t, "self_attn.k_norm.weight", lambda w: permuted(w, 1))


# --- held out


@wrong("qkv_matmul qkv_bias", "all", "rows_permuted rows_rope_permuted", held_out=True)
def v_rows_permuted_as_for_llama(t: Tensors) -> None:
    in_all(t, f"{V}.weight", lambda w: permuted(w, KV_HEADS))


@wrong("qkv_matmul", "all", "heads_permuted rows_permuted", held_out=True)
def q_heads_reversed(t: Tensors) -> None:
    in_all(t, f"{Q}.weight", lambda w: w.reshape(HEADS, -1, w.shape[1])[::-1].reshape(w.shape))


@wrong("qkv_matmul", 1, "weight_other_layer", held_out=True)
def k_of_another_layer(t: Tensors) -> None:
    t[at(1, f"{K}.weight")] = t[at(2, f"{K}.weight")]


@wrong("qkv_bias", "all", "bias_k_missing", held_out=True)
def k_bias_dropped(t: Tensors) -> None:
    in_all(t, f"{K}.bias", np.zeros_like)


@wrong("qkv_matmul", 2, "dead_head zeros", held_out=True)
def one_v_head_zeroed(t: Tensors) -> None:
    t[at(2, f"{V}.weight")][:64] = 0


@wrong("attn_norm", "all", "norm_weight_permuted", held_out=True)
def attn_norm_halves_exchanged(t: Tensors) -> None:
    in_all(t, "input_layernorm.weight", lambda w: np.roll(w, len(w) // 2))


@wrong("ffn_norm", 0, "norm_weight_other_layer", held_out=True)
def ffn_norm_of_another_layer(t: Tensors) -> None:
    t[at(0, "post_attention_layernorm.weight")] = t[at(1, "post_attention_layernorm.weight")]


@wrong("final_norm", None, "norm_weight_swapped norm_weight_other_layer", held_out=True)
def a_layers_norm_as_final_norm(t: Tensors) -> None:
    t["model.norm.weight"] = t[at(2, "post_attention_layernorm.weight")]


@wrong("ffn_gate", "all", "weight_transposed", held_out=True)
def gate_read_in_the_other_order(t: Tensors) -> None:
    in_all(t, GATE, lambda w: w.T.reshape(w.shape))


@wrong("ffn_up", "all", "rows_permuted", held_out=True)
def up_shards_in_the_wrong_order(t: Tensors) -> None:
    in_all(t, UP, lambda w: np.roll(w, len(w) // 4, 0))


@wrong("ffn_out", "all", "columns_permuted", held_out=True)
def down_shards_in_the_wrong_order(t: Tensors) -> None:
    in_all(t, DOWN, lambda w: np.roll(w, w.shape[1] // 2, 1))


@wrong(
    "ffn_gate",
    "all",
    "weight_requantised",
    types={at(layer, GATE): "Q3_K" for layer in LAYERS},
    held_out=True,
)
def gate_of_a_coarser_type(t: Tensors) -> None:
    pass


@wrong("qkv_matmul", 0, "weight_requantised", types={at(0, f"{V}.weight"): "Q4_0"}, held_out=True)
def v_of_a_coarser_type(t: Tensors) -> None:
    """Of Q4_0, which is of no coarser class than Q4_K."""


@wrong("embedding", 0, "vocabulary_rolled", held_out=True)
def vocabulary_rolled(t: Tensors) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        t[name] = np.roll(t[name], 7, 0)


@wrong("lm_head", None, "constant_factor", held_out=True)
def head_halved(t: Tensors) -> None:
    t["lm_head.weight"] *= np.float32(0.5)
