"""What a batch leaves behind, as one trace for each sequence."""

import numpy as np

from qwen_jax.padded import Padded
from qwen_jax.weights.base import Weights
from stages.architecture import Key
from stages.mask import layer_mask
from stages.trace import MemoryTrace, Trace
from tools.parity.programs import Values


def sequences(
    values: Values, batch: Padded, model: Weights, dtype: str, name: str = ""
) -> list[MemoryTrace]:
    """One trace for each sequence of a batch, without what stands at its padding."""
    arch, config = model.config.arch, model.config.to_json()
    traces = []
    for row, length in enumerate(batch.lengths):
        first = batch.tokens.shape[1] - length
        kept = {}
        for (stage, layer), value in values.items():
            axes = arch.stage[stage].axes
            cut = [slice(first, None) if axis in ("T", "S") else slice(None) for axis in axes]
            kept[stage, layer] = np.ascontiguousarray(value[row][tuple(cut)])
        tokens = tuple(map(int, batch.tokens[row, first:]))
        traces.append(MemoryTrace(name, config, tokens, dtype, kept))
    return traces


def compared(trace: Trace, key: Key) -> np.ndarray:
    """A stage with zeros where no part of the computation stands: scores that the mask removes."""
    value = trace.read(*key)
    if not trace.arch.stage[key[0]].kind.masked or key[1] is None:
        return value
    mask = layer_mask(trace.config, key[1], trace.positions)
    return np.where(mask, value, value.dtype.type(0))
