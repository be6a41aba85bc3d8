"""Whether a dump and a model belong together, and in which precision the dump was computed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.weights.base import Weights
from stages.errors import NotComparable
from stages.files import coarsest_dtype
from stages.trace import Trace


def trace_dtype(trace: Trace) -> str:
    """The precision that a trace was computed in: its manifest's, or the coarsest format that
    holds all values of its first dumped stages exactly."""
    if trace.dtype:
        return trace.dtype
    # not the embedding, which has the weights' format, nor scores, where a mask's fill may stand
    first = trace.arch.first.name
    telling = [k for k in trace.entries if k[0] != first and not trace.arch.stage[k[0]].kind.masked]
    values = [trace.read(*key).ravel()[:65536] for key in telling[:6]]
    return coarsest_dtype(np.concatenate(values)) if values else "float32"


def check_model(trace: Trace, weights: Weights) -> None:
    """The weights must be those that made the trace, or every number would be about the wrong
    model.

    Raises:
        NotComparable: the configuration is another one.
    """
    if trace.config != weights.config.to_json():
        raise NotComparable(
            f"not comparable: {trace.path} was made with another config than {weights.name}"
            f"{_how(trace.config, weights.config.to_json())}; give its own model with --model"
        )


def _how(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    differing = [k for k in ours if theirs.get(k) != ours[k] and k != "sliding_layers"]
    return "".join(f" ({k} {theirs.get(k)!r} / {ours[k]!r})" for k in differing[:1])


def check_weights(trace: Trace, weights: Weights) -> None:
    """Called when the replay has read, and so hashed, every weight.

    Raises:
        NotComparable: the trace was made with other weights, so nothing it shows is a fault.
    """
    if trace.manifest is None:
        return
    stated = trace.manifest.model.weights
    other = [n for n, w in weights.hashes.items() if n in stated and stated[n] != w]
    if other:
        raise NotComparable(
            f"not comparable: {trace.path} was made with other weights than {weights.name} "
            f"({len(other)} of {len(weights.hashes)} tensors differ, first {other[0]}); "
            "give its own model with --model"
        )
