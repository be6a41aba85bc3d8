"""A Qwen2 or Qwen3 checkpoint made in milliseconds: random weights of a trained model's sizes."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 -- teaches NumPy and safetensors bfloat16
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from qwen_jax.config import from_hf

# What a published config.json holds, at sizes that are all different, so that no two axes can be
# taken for each other: D 24, N*H 32, K*H 16, (N+2K)*H 64, F 40, V 48.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 48,
}
# What differs in that of a Qwen3: its head size is never D/N, and no projection has a bias.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "transformers_version": "4.51.0",
}
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "over", "mat", "hill", "and", "then"]


def hf_config(**overrides: Any) -> dict[str, Any]:
    """The content of a ``config.json``, a Qwen3's where ``model_type`` says so; an override of
    ``...`` leaves the attribute out."""
    base = CONFIG | (QWEN3 if overrides.get("model_type") == "qwen3" else {})
    return {name: v for name, v in (base | overrides).items() if v is not ...}


def random_tensors(config: dict[str, Any], seed: int = 0, dtype: Any = "float32") -> dict:
    """Tensor name -> values: norms near one, biases and projections of order one in effect."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in from_hf(config).shapes.items():
        values = random.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            values = 1 + values / 8
        elif len(shape) == 2 and "embed" not in name:
            values /= np.sqrt(shape[1])
        tensors[name] = values.astype(dtype)
    return tensors


def write_checkpoint(
    directory: Path, seed: int = 0, shards: int = 1, dtype: Any = "float32", **overrides: Any
) -> Path:
    """Write config, weights and a word-level tokenizer as Hugging Face lays them out.

    ``overrides`` are attributes of the config: ``model_type="qwen3"`` writes a Qwen3. Returns
    ``directory``.
    """
    config = hf_config(**overrides)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    write_tensors(directory, random_tensors(config, seed, dtype), shards)
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_tensors(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Write one ``model.safetensors``, or ``shards`` files and their index."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as published files do: indented, with a final newline."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
