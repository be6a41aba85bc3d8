"""The weights that an engine really multiplies by, as a Hugging Face directory (``--weights``)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen_jax.weights import huggingface
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from tools.convert import refuse_existing, unfinished


class Effective(Weights):
    """Tensors in memory, with the config of the model that they stand for."""

    directory = None

    def __init__(self, model: Weights, tensors: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.name, self.config, self._model, self._tensors = (
            model.name,
            model.config,
            model,
            tensors,
        )
        wrong = [name for name, shape in self.shapes.items() if _shape(tensors, name) != shape]
        if wrong:
            raise UserError(f"--weights: the engine does not give {wrong[0]} as the model has it")

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

    def fill(self, name: str, start: int, out: np.ndarray) -> None:
        out[...] = self._tensors[name][start : start + len(out)]

    def companions(self) -> dict[str, bytes]:
        return self._model.companions()


def _shape(tensors: dict[str, np.ndarray], name: str) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def refuse(out: Path) -> None:
    """Before anything is computed.

    Raises:
        UserError: ``out`` is there, or cannot be made.
    """
    refuse_existing(out)


def write(
    out: Path, model: Weights, tensors: Iterator[tuple[str, np.ndarray]]
) -> huggingface.HuggingFaceWeights:
    """Write them, with the model's config.json and tokenizer, and open what was written.

    Raises:
        UserError: a tensor is missing or of another shape, or writing failed.
    """
    found = Effective(model, {name: np.ascontiguousarray(value) for name, value in tensors})
    with unfinished(out) as directory:
        for _ in huggingface.write(directory, found):
            pass
        for name, content in found.companions().items():
            (directory / name).write_bytes(content)
    return huggingface.HuggingFaceWeights(out)
