"""Traces that never were on disk: one a sequence, with its padding cut off."""

from pathlib import Path

import numpy as np

from qwen_jax.weights import Weights
from stages.manifest import FileEntry
from stages.mask import layer_mask
from stages.table import STAGE
from stages.trace import Trace
from tools.sweep.programs import Batch, Key, Values


class MemoryTrace(Trace):
    """A trace held in memory; everything that works on a ``Trace`` works on it.

    Arguments:
        values: {(stage, layer): array in the axes of the stage table}, without a batch axis.
    """

    def __init__(
        self, name: str, model: Weights, tokens: tuple[int, ...], dtype: str, values: Values
    ) -> None:
        entries = {
            (stage, layer): FileEntry(
                path="",
                stage=stage,
                layer=layer,
                axes=STAGE[stage].axes,
                shape=value.shape,
                dtype=str(value.dtype),
                xxh3="",
            )
            for (stage, layer), value in values.items()
        }
        super().__init__(Path(name), None, entries, model.config.to_json(), tokens)
        self.dtype = dtype
        self.values = values

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        return self.values[stage, layer]


def sequences(
    values: Values, batch: Batch, model: Weights, dtype: str, name: str = ""
) -> list[MemoryTrace]:
    """One trace for each sequence of a batch, without what stands at its padding."""
    traces = []
    for row, length in enumerate(batch.lengths):
        first = batch.tokens.shape[1] - length
        kept = {}
        for (stage, layer), value in values.items():
            cut = tuple(
                slice(first, None) if axis in ("T", "S") else slice(None)
                for axis in STAGE[stage].axes
            )
            kept[stage, layer] = np.ascontiguousarray(value[row][cut])
        tokens = tuple(map(int, batch.tokens[row, first:]))
        traces.append(MemoryTrace(name, model, tokens, dtype, kept))
    return traces


def compared(trace: Trace, key: Key) -> np.ndarray:
    """A stage with zeros where no part of the computation stands: scores that the mask removes."""
    value = trace.read(*key)
    if key[0] != "attn_scores":
        return value
    mask = layer_mask(trace.config, key[1], len(trace.tokens))
    return np.where(mask, value, value.dtype.type(0))
