"""Which positions a query attends to: one answer for computing and for comparing."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def causal_mask(length: int, window: int | None = None) -> np.ndarray:
    """[T, S] bool, True where position T may attend to position S: itself and what came before,
    ``window`` positions in all where the layer has a sliding window."""
    index = np.arange(length)
    distance = index[:, None] - index[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def layer_mask(config: Mapping[str, Any], layer: int, length: int) -> np.ndarray:
    """The mask of one layer of a model, by its configuration as plain data."""
    window = config["sliding_window"] if config["sliding_layers"][layer] else None
    return causal_mask(length, window)
