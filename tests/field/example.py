"""``python -m tests.field.example`` writes two GGUFs of the demo: right.gguf, and wrong.gguf as a
converter writes it that takes the model for a LLaMA."""

from pathlib import Path
from typing import Any

from tests.field import models


def permute(tensors: models.Tensors, raw: dict[str, Any]) -> None:
    """Rows of q and k as LLaMA's converter reorders them."""
    heads = {"q": raw["num_attention_heads"], "k": raw["num_key_value_heads"]}
    for layer in range(raw["num_hidden_layers"]):
        for part, count in heads.items():
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            tensors[name] = models.permuted(tensors[name], count)


def main() -> None:
    raw, tensors = models.padded_demo()
    models.write_gguf(Path("right.gguf"), raw, tensors, "Q8_0")
    permute(tensors, raw)
    models.write_gguf(Path("wrong.gguf"), raw, tensors, "Q8_0")
    print("right.gguf, and wrong.gguf: rows of q and k in LLaMA's order")


if __name__ == "__main__":
    main()
