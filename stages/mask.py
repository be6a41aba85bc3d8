"""Which positions a query attends to: one answer for computing and for comparing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def attention_mask(positions: np.ndarray, window: int | None = None) -> np.ndarray:
    """[..., T, S] bool, True where a query may attend to a key: itself and what came before it in
    the sequence, in a layer with a sliding window no more than ``window`` positions back, itself
    included.

    positions: [..., T] int. They decide how far apart two rows are; their order is that of the
    rows.
    """
    rows = np.arange(positions.shape[-1])
    allowed = rows[:, None] >= rows[None, :]
    if window is None:
        return np.broadcast_to(allowed, (*positions.shape, positions.shape[-1]))
    return allowed & (positions[..., :, None] - positions[..., None, :] < window)


def layer_mask(config: Mapping[str, Any], layer: int, positions: Sequence[int]) -> np.ndarray:
    """[T, S]: the mask of one layer of a model, by its configuration as plain data."""
    window = config["sliding_window"] if config["sliding_layers"][layer] else None
    return attention_mask(np.asarray(positions), window)
