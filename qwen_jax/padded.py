"""What an engine is given, and what it hands back: sequences computed together, and their stages
one by one. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Want = Callable[[str, int | None], bool]  # is this stage of this layer to be fetched?
Emit = Callable[[str, int | None, np.ndarray], None]  # stage, layer, value
EmitRows = Callable[[str, int | None, np.ndarray, int], None]  # ... and the first row of them
Resume = tuple[int, np.ndarray] | None  # the first layer to compute, and its input


@dataclass(frozen=True)
class Padded:
    """Sequences of one or more lengths in one array, padded on the left.

    Attributes:
        tokens: [B, P] int32: all of their tokens, or where more are to be picked the prompts.
        positions: [B, T] int32, T at least P: those of all rows.
        valid: [B, T] bool, False at padding, which may hold any token.
    """

    tokens: np.ndarray
    positions: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(
        cls, tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]] | None = None
    ) -> Padded:
        """Sequences by their tokens; without ``positions`` each is from 0 on."""
        given = [range(len(each)) for each in tokens] if positions is None else positions
        valid = _left([[True] * len(each) for each in given], bool)
        return cls(_left(tokens, np.int32), _left(given, np.int32), valid)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return [int(n) for n in self.valid.sum(1)]


def _left(rows: Sequence[Sequence[int]], dtype: type) -> np.ndarray:
    """The rows side by side, zeros before the shorter ones."""
    found: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype)
    for row, values in zip(found, rows, strict=True):
        row[len(row) - len(values) :] = values
    return found
