"""Qwen3, the dense models: no biases, a norm on every head of q and k, and a head size of its own
(N*H is not D).

Source: transformers ``modeling_qwen3`` and ``Qwen3Config``.
"""

from stages import qwen2
from stages.architecture import (
    CACHE,
    NORM,
    ROTATION,
    WEIGHTED_SUM,
    Architecture,
    parameter,
    stage,
)

# fmt: off
ROPE = (
    stage("q_norm", "qkv_matmul", "T N H", NORM, "RMSNorm of every head of q over H",
          parameters="q_norm"),
    stage("k_norm", "qkv_matmul", "T K H", NORM, "RMSNorm of every head of k over H",
          parameters="k_norm"),
    stage("q_post_rope", "q_norm", "T N H", ROTATION, "rotated q (half-split pairs)"),
    stage("k_post_rope", "k_norm", "T K H", ROTATION, "rotated k (half-split pairs)"),
)
CACHED = (
    qwen2.CACHED[0],
    stage("v_cache", "qkv_matmul", "S K H", CACHE, qwen2.CACHED[1].value),
)
MIXED = (
    stage("attention", "attn_softmax qkv_matmul[S]", "T N*H", WEIGHTED_SUM,
          "weighted sum of v, before the output projection"),
)
HEAD_NORMS = (
    parameter("q_norm", "H", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    parameter("k_norm", "H", "self_attn.k_norm.weight", "attn_k_norm.weight"),
)
# fmt: on


def _size(*sizes: int) -> dict[str, object]:
    return qwen2.size(
        *sizes,
        head_dim=128,
        attention_bias=False,
        vocab_size=151936,
        tie_word_embeddings=sizes[0] <= 2560,  # models up to the 4B tie their head
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        sliding_window=None,
    )


QWEN3 = Architecture(
    name="qwen3",
    stages=(*qwen2.START, *qwen2.PROJECTION, *ROPE, *qwen2.SCORED, *MIXED, *qwen2.REST, *qwen2.END),
    parameters=(
        *qwen2.EMBEDDING,
        *qwen2.ATTENTION_WEIGHTS,
        *HEAD_NORMS,
        *qwen2.OTHER_WEIGHTS,
    ),
    cache=CACHED,
    aliases=qwen2.QWEN2.aliases,
    defaults={**qwen2.QWEN2.defaults, "head_dim": 128},
    fixed={"attention_bias": False},
    published={
        "0.6b": _size(1024, 28, 16, 8, 3072),
        "1.7b": _size(2048, 28, 16, 8, 6144),
        "4b": _size(2560, 36, 32, 8, 9728),
        "8b": _size(4096, 36, 32, 8, 12288),
        "14b": _size(5120, 40, 40, 8, 17408),
        "32b": _size(5120, 64, 64, 8, 25600),
    },
)
