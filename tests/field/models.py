"""Small models that the engines are run on, made on the spot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests import ggml
from tests.conftest import ROOT
from tests.planted.checkpoints import CONFIG, random_weights
from tests.planted.checkpoints import write_checkpoint as write_directory

Tensors = dict[str, np.ndarray]
DEMO = ROOT / "qwen_jax" / "demo"
# Sizes by the size of a head: D is N*H, as llama.cpp demands of a Qwen2, and a multiple of 256.
SIZES: dict[int, dict[str, Any]] = {
    64: dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512),
    128: dict(hidden_size=512, num_attention_heads=4, num_key_value_heads=2, intermediate_size=768),
}


def config(head: int = 64, theta: float = 1e6, **changes: Any) -> dict[str, Any]:
    """What ``config.json`` holds; a Qwen3's with ``model_type="qwen3"``."""
    found = CONFIG | SIZES[head] | {"head_dim": head, "rope_theta": theta, "vocab_size": 320}
    if changes.get("model_type") == "qwen3":
        found |= {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False}
    return found | changes


def weights(raw: dict[str, Any], seed: int = 0) -> Tensors:
    return random_weights(raw, np.random.default_rng(seed))


def write_gguf(
    path: Path,
    raw: dict[str, Any],
    tensors: Tensors,
    kind: str,
    kinds: dict[str, str] | None = None,
    **metadata: Any,
) -> Path:
    """A file with matrices of one type; ``kinds`` names others, ``metadata`` is of
    ``ggml.writer``."""
    into = ggml.writer(path, raw, **metadata)
    into.add_tokenizer_model("none")  # llama.cpp insists on being told
    for name, value in tensors.items():
        ggml.add_tensors(into, raw, {name: value}, (kinds or {}).get(name, kind))
    ggml.finish(into)
    return path


def padded_demo() -> tuple[dict[str, Any], Tensors]:
    """The trained demo with D = N*H: 224 channels more that are always 0. A mean over twice as many
    is half of what it was, which norms and eps make up for."""
    raw = json.loads((DEMO / "config.json").read_text("utf-8"))
    before, after = raw["hidden_size"], raw["num_attention_heads"] * raw["head_dim"]
    share = before / after
    tensors = {}
    for name, value in load_file(DEMO / "model.safetensors").items():
        wide = value.astype(np.float32)
        more = [(0, after - before if size == before else 0) for size in wide.shape]
        if name.endswith("norm.weight"):
            wide = wide * np.float32(share**0.5)
        tensors[name] = np.pad(wide, more)
    changed = {"hidden_size": after, "rms_norm_eps": raw["rms_norm_eps"] * share}
    return raw | changed, tensors


class Models:
    """Models in a directory, each made once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def gguf(self, head: int, theta: float, kind: str) -> Path:
        """``head`` 32 is the padded demo."""
        path = self.directory / f"h{head}-theta{theta:g}-{kind}.gguf"
        if path.exists():
            return path
        if head == 32:
            raw, tensors = padded_demo()
        else:
            raw = config(head, theta)
            tensors = weights(raw)
        return write_gguf(path, raw, tensors, kind)

    def checkpoint(self, architecture: str = "qwen2", head: int = 64, theta: float = 1e6) -> Path:
        """A Hugging Face directory."""
        path = self.directory / f"{architecture}-h{head}-theta{theta:g}"
        if not path.exists():
            raw = config(head, theta, model_type=architecture)
            write_directory(path, raw, weights(raw))
        return path


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as LLaMA's converter lays them: (pair, half) where (half, pair) was."""
    turned = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2)
    return turned.reshape(value.shape)
