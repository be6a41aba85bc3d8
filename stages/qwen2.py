"""Qwen2: Qwen2, Qwen2.5, Qwen2.5-Coder, DeepSeek-R1-Distill-Qwen.

Source: transformers ``modeling_qwen2`` and ``Qwen2Config``; the GGUF names are those of the
``gguf`` package's ``TENSOR_NAMES``.
"""

from stages.architecture import (
    ACTIVATION,
    ADD,
    CACHE,
    LAYER_INPUT,
    LINEAR,
    LOOKUP,
    NORM,
    PRODUCT,
    QKV,
    ROTATION,
    SCORES,
    SOFTMAX,
    TOKENS,
    WEIGHTED_SUM,
    Architecture,
    parameter,
    stage,
)

# fmt: off
START = (
    stage("embedding", TOKENS, "T D", LOOKUP, "row lookup of the token ids",
          parameters="embed_tokens", scope="start"),
)
PROJECTION = (
    stage("attn_norm", LAYER_INPUT, "T D", NORM, "RMSNorm before attention",
          parameters="input_layernorm"),
    stage("qkv_matmul", "attn_norm", f"T {QKV}", LINEAR,
          "q, k, v projections side by side, before any bias", parameters="q_proj k_proj v_proj"),
)
ROPE = (
    stage("qkv_bias", "qkv_matmul[unrounded]", f"T {QKV}", ADD, "after the bias",
          parameters="q_bias k_bias v_bias"),
    stage("q_post_rope", "qkv_bias", "T N H", ROTATION, "rotated q (half-split pairs)"),
    stage("k_post_rope", "qkv_bias", "T K H", ROTATION, "rotated k (half-split pairs)"),
)
CACHED = (
    stage("k_cache", "k_post_rope", "S K H", CACHE, "k as attention reads it back from the cache"),
    stage("v_cache", "qkv_bias", "S K H", CACHE, "v as attention reads it back from the cache"),
)
SCORED = (
    stage("attn_scores", "q_post_rope k_post_rope[S]", "N T S", SCORES,
          "q.k / sqrt(H), before the mask"),
    stage("attn_softmax", "attn_scores", "N T S", SOFTMAX, "softmax of the masked scores"),
)
MIXED = (
    stage("attention", "attn_softmax qkv_bias[S]", "T N*H", WEIGHTED_SUM,
          "weighted sum of v, before the output projection"),
)
REST = (
    stage("attn_out", "attention", "T D", LINEAR, "output projection", parameters="o_proj"),
    stage("post_attn_residual", f"{LAYER_INPUT} attn_out", "T D", ADD, "layer input + attn_out"),
    stage("ffn_norm", "post_attn_residual", "T D", NORM, "RMSNorm before the feed-forward block",
          parameters="post_attention_layernorm"),
    stage("ffn_gate", "ffn_norm", "T F", LINEAR, "gate projection", parameters="gate_proj"),
    stage("ffn_up", "ffn_norm", "T F", LINEAR, "up projection", parameters="up_proj"),
    stage("ffn_silu", "ffn_gate", "T F", ACTIVATION, "silu(gate)"),
    stage("ffn_swigl", "ffn_silu ffn_up", "T F", PRODUCT, "silu(gate) * up"),
    stage("ffn_out", "ffn_swigl", "T D", LINEAR, "down projection", parameters="down_proj"),
    stage("post_ffn_residual", "post_attn_residual ffn_out", "T D", ADD, "the layer's output"),
)
END = (
    stage("final_norm", "post_ffn_residual", "T D", NORM, "RMSNorm of the last layer's output",
          parameters="norm", scope="end"),
    stage("lm_head", "final_norm", "T V", LINEAR, "logits; of the last position by default",
          parameters="lm_head", scope="end", last=True),
)

EMBEDDING = (
    parameter("embed_tokens", "V D", "model.embed_tokens.weight", "token_embd.weight", "start"),
)
ATTENTION_WEIGHTS = (
    parameter("input_layernorm", "D", "input_layernorm.weight", "attn_norm.weight"),
    parameter("q_proj", "N*H D", "self_attn.q_proj.weight", "attn_q.weight"),
    parameter("k_proj", "K*H D", "self_attn.k_proj.weight", "attn_k.weight"),
    parameter("v_proj", "K*H D", "self_attn.v_proj.weight", "attn_v.weight"),
)
BIASES = (
    parameter("q_bias", "N*H", "self_attn.q_proj.bias", "attn_q.bias"),
    parameter("k_bias", "K*H", "self_attn.k_proj.bias", "attn_k.bias"),
    parameter("v_bias", "K*H", "self_attn.v_proj.bias", "attn_v.bias"),
)
OTHER_WEIGHTS = (
    parameter("o_proj", "D N*H", "self_attn.o_proj.weight", "attn_output.weight"),
    parameter("post_attention_layernorm", "D", "post_attention_layernorm.weight",
              "ffn_norm.weight"),
    parameter("gate_proj", "F D", "mlp.gate_proj.weight", "ffn_gate.weight"),
    parameter("up_proj", "F D", "mlp.up_proj.weight", "ffn_up.weight"),
    parameter("down_proj", "D F", "mlp.down_proj.weight", "ffn_down.weight"),
    parameter("norm", "D", "model.norm.weight", "output_norm.weight", "end"),
    parameter("lm_head", "V D", "lm_head.weight", "output.weight", "end", tied_to="embed_tokens"),
)
# fmt: on


def size(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **more: object
) -> dict[str, object]:
    """What published sizes differ in, under the names of ``config.json``."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        **more,
    }


def _size(*sizes: int, eps: float = 1e-6, positions: int = 131072) -> dict[str, object]:
    tied = sizes[0] <= 2048  # models up to the 3B tie their head
    vocabulary = 151936 if tied else 152064
    return size(
        *sizes,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        rms_norm_eps=eps,
        max_position_embeddings=positions,
        sliding_window=positions,
    )


QWEN2 = Architecture(
    name="qwen2",
    stages=(*START, *PROJECTION, *ROPE, *SCORED, *MIXED, *REST, *END),
    parameters=(*EMBEDDING, *ATTENTION_WEIGHTS, *BIASES, *OTHER_WEIGHTS),
    cache=CACHED,
    aliases={"layer_output": "post_ffn_residual"},
    defaults={"num_key_value_heads": 32, "max_window_layers": 28},
    fixed={"attention_bias": True},  # q, k and v have biases whatever the file says
    # of the base models of Qwen2.5
    published={
        "0.5b": _size(896, 24, 14, 2, 4864, positions=32768),
        "1.5b": _size(1536, 28, 12, 2, 8960),
        "3b": _size(2048, 36, 16, 2, 11008, positions=32768),
        "7b": _size(3584, 28, 28, 4, 18944),
        "14b": _size(5120, 48, 40, 8, 13824, eps=1e-5),
        "32b": _size(5120, 64, 40, 8, 27648, eps=1e-5),
        "72b": _size(8192, 80, 64, 8, 29568, eps=1e-5),
    },
)
