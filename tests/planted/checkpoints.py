"""Small checkpoints to plant faults in: random ones, 4-bit ones, and one that is hard.

Hard means what the published Qwen2 checkpoints are and small random ones are not: in the first and
last layer the bias of k is tens of times k itself, and a few channels of the residual stream are
hundreds of times the rest, above all at the first token. Either makes a cosine blind. In a Qwen3
the weight of k's norm stands for the bias, and q and k are small before their norms.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tools.numpy_engine.engine import BLOCK, Array, Context, Engine, Run, Weights, f16

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 160,
    "max_position_embeddings": 2048,
    "model_type": "qwen2",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 192,
}
QWEN3: dict[str, Any] = {  # what differs in one: N*H is not D
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "hidden_size": 64,
    "model_type": "qwen3",
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write_checkpoint(
    directory: str | Path, config: dict[str, Any], weights: Weights, dtype: str = "float32"
) -> Path:
    """Write config.json and model.safetensors as Hugging Face lays them out."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | {"torch_dtype": dtype}, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    stored = {k: np.ascontiguousarray(w).astype(DTYPES[dtype]) for k, w in weights.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def random_weights(config: dict[str, Any], random: np.random.Generator) -> Weights:
    """Weights under which every layer does something: projections keep the size of what they read
    and each branch adds about half of what the residual stream has."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    h = config.get("head_dim") or d // n

    def normal(*shape: int, rms: float = 1.0) -> Array:
        return (rms * random.standard_normal(shape)).astype(np.float32)

    def linear(rows: int, columns: int, rms: float = 1.0) -> Array:
        return normal(rows, columns, rms=rms / columns**0.5)

    # Published embeddings are this small, so that epsilon matters in the first layer.
    stream = 0.02
    weights = {"model.embed_tokens.weight": normal(v, d, rms=stream)}
    for layer in range(config["num_hidden_layers"]):
        part = {
            "input_layernorm.weight": 1 + normal(d, rms=0.2),
            "post_attention_layernorm.weight": 1 + normal(d, rms=0.2),
            "self_attn.o_proj.weight": linear(d, n * h, stream),
            "mlp.gate_proj.weight": linear(f, d, 1.5),
            "mlp.up_proj.weight": linear(f, d),
            "mlp.down_proj.weight": linear(d, f, stream),
        }
        for name, heads in (("q", n), ("k", k), ("v", k)):
            part[f"self_attn.{name}_proj.weight"] = linear(heads * h, d)
            if config["model_type"] == "qwen2":
                part[f"self_attn.{name}_proj.bias"] = normal(heads * h, rms=0.3)
            elif name != "v":
                part[f"self_attn.{name}_proj.weight"] *= np.float32(0.1)
                part[f"self_attn.{name}_norm.weight"] = 1.2 + normal(h, rms=0.4)
        weights |= {f"model.layers.{layer}.{name}": w for name, w in part.items()}
    weights["model.norm.weight"] = 1 + normal(d, rms=0.2)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = linear(v, d, 3.0)
    return weights


def random_checkpoint(
    directory: str | Path, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """A small random model; ``overrides`` are attributes of ``CONFIG``, or those of ``QWEN3``."""
    config = CONFIG | overrides
    weights = random_weights(config, np.random.default_rng(seed))
    return write_checkpoint(directory, config, weights, dtype)


MASSIVE = (40, 137, 201)  # the residual channels that become hundreds of times the rest
MARKER = 5  # the channel in which the first token's embedding says that it is the first
WRITERS = (100, 300)  # the neurons that read the marker and write the massive channels


def hard_checkpoint(
    directory: str | Path, seed: int = 0, dtype: str = "bfloat16", **overrides: Any
) -> Path:
    """A model of 4 layers with the statistics of a published one, at hidden size 256; ``overrides``
    may be ``QWEN3``, whose N*H is then 320.

    The prompt has to begin with token 0 (``hard_tokens``). Its embedding has a large value in one
    channel, on which two neurons of layer 1 fire; their columns of the down projection write the
    massive channels, where they stay. The other tokens excite the neurons a little, and so are
    some tens of times the rest there.
    """
    random = np.random.default_rng(seed)
    qwen3 = overrides.get("model_type") == "qwen3"
    config = (
        CONFIG
        | overrides
        | {
            "head_dim": 32,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 10 if qwen3 else 8,
            "num_hidden_layers": 4,
            "vocab_size": 512,
        }
    )
    weights = random_weights(config, random)
    head, last = 32, config["num_hidden_layers"] - 1
    weights["model.embed_tokens.weight"][0, MARKER] = 0.5

    def layer(number: int, name: str) -> Array:
        return weights[f"model.layers.{number}.{name}"]

    # k's bias: in published models it lies in the pairs that turn slowly, where it moves every
    # score of a row alike and the softmax takes it out again.
    slow = np.arange(head) % (head // 2) >= head // 4
    for number in range(last + 1) if not qwen3 else ():
        bias = layer(number, "self_attn.k_proj.bias")
        rms = 35.0 if number in (0, last) else 1.0
        loud = np.where(np.resize(slow, bias.shape), rms * 2**0.5, 0.3)
        bias[:] = loud * np.sign(bias) * random.uniform(0.8, 1.2, bias.shape)
        bias *= rms / np.sqrt(np.mean(bias**2))
    for number in (0, last) if qwen3 else ():
        layer(number, "self_attn.k_norm.weight")[slow] *= 8

    channels = list(MASSIVE)
    sign = np.array([1, -1, 1], np.float32)
    for neuron in WRITERS:
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            row = layer(1, name)[neuron]
            row *= 0.3
            row[MARKER] = 1.5
        layer(1, "mlp.down_proj.weight")[channels, neuron] = sign * random.uniform(0.05, 0.1, 3)
    # The later norms see little of them, as in published models.
    for number in range(2, last + 1):
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            layer(number, name)[channels] = 0.1
    weights["model.norm.weight"][channels] = 0.1
    return write_checkpoint(directory, config, weights, dtype)


def hard_tokens(length: int, seed: int = 0) -> list[int]:
    """Token ids for the hard checkpoint: 0, then any others."""
    return [0, *np.random.default_rng(seed).integers(1, 512, length - 1).tolist()]


def four_bit(weight: Array) -> Array:
    """Rounded as ggml's Q4_0 does: 32 values share a float16 scale, each has sixteen steps."""
    blocks = weight.astype(np.float32).reshape(len(weight), -1, BLOCK)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    scale = np.take_along_axis(blocks, at, axis=-1) / np.float32(-8)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    steps = np.clip(np.floor(blocks * inverse + np.float32(8.5)), 0, 15) - 8
    return (steps * f16(scale)).reshape(weight.shape)


def copy_checkpoint(
    source: str | Path, directory: str | Path, change: Callable[[Weights], None]
) -> Path:
    """A copy, stored as float32, after ``change`` has altered the float32 weights in place."""
    source, directory = Path(source), Path(directory)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(source / "model.safetensors")
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    change(weights)
    write_checkpoint(directory, config, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    return directory


def to_four_bit(weights: Weights) -> None:
    """Round every linear layer, lm_head included. Embedding, norms and biases are kept."""
    for name, weight in weights.items():
        if weight.ndim == 2 and "embed" not in name:
            weights[name] = four_bit(weight)


def four_bit_checkpoint(source: str | Path, directory: str | Path) -> Path:
    """A copy whose linear layers hold what 4-bit weights decode to, stored as float32."""
    return copy_checkpoint(source, directory, to_four_bit)


@dataclass(frozen=True)
class Hardness:
    """What makes one layer hard.

    Attributes:
        bias: root mean square of the bias of k, or of the weight of its norm.
        k: root mean square of k before it.
        first, others: the largest channel of the layer's output over the median magnitude, at the
            first token and at the others.
        score: the largest attention score.
    """

    bias: float
    k: float
    first: float
    others: float
    score: float


def hardness(engine: Engine, run: Run) -> list[Hardness]:
    """The statistics of every layer of a run."""
    rows, shape = [], engine.shape
    name = "k_proj.bias" if shape.architecture == "qwen2" else "k_norm.weight"
    for layer in range(shape.layers):
        stream = np.abs(run.stages[layer, "post_ffn_residual"])
        k = run.stages[layer, "qkv_matmul"].reshape(len(stream), -1, shape.head)
        k = k[:, shape.heads : shape.heads + shape.kv_heads]
        rows.append(
            Hardness(
                bias=rms(engine.weights[f"model.layers.{layer}.self_attn.{name}"]),
                k=rms(k),
                first=float(stream[0].max() / np.median(stream)),
                others=float(stream[1:].max() / np.median(stream)),
                score=float(np.tril(np.abs(run.stages[layer, "attn_scores"])).max()),
            )
        )
    return rows


def rms(x: Array) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# Where float16 ends: layer -> channels of its SwiGLU that go beyond 65504.
LARGE_SWIGLU = {1: [3, 40, 41], 3: [7]}


def overflowing(weights: Weights) -> None:
    """Make sound values of the hard checkpoint too large for float16, as those of Qwen2-7B are: the
    SwiGLU of early layers in a few channels and tokens, and q.k before the scale in the first and
    the last layer (Qwen3 has no bias)."""
    for layer, channels in LARGE_SWIGLU.items():
        for name in ("gate", "up"):
            weights[f"model.layers.{layer}.mlp.{name}_proj.weight"][channels] *= 400
    for layer in (0, 3):
        for name in ("q", "k"):
            bias = weights.get(f"model.layers.{layer}.self_attn.{name}_proj.bias")
            if bias is not None:
                bias[:64] *= 120 / np.abs(bias[:64]).mean()


def unscaled_scores(c: Context) -> Array:
    """q.k is rounded to float16 before it is scaled, as PyTorch's eager attention has it."""
    return f16(c.scores(c["q_post_rope"], c.k)) * np.float32(c.shape.head**-0.5)
