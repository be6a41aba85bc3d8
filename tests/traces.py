"""Traces in memory, and how far two of them are apart: what the differential tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_jax.config import Config
from qwen_jax.engine import JaxEngine
from qwen_jax.weights.huggingface import HuggingFaceWeights
from stages.architecture import Key
from stages.mask import layer_mask

Trace = dict[Key, np.ndarray]  # (stage, layer) -> value without batch axis


def collect(
    engine: Any,
    tokens: tuple[int, ...],
    logits: str = "all",
    want: Callable[[str, int | None], bool] = lambda stage, layer: True,
    positions: tuple[int, ...] | None = None,
) -> Trace:
    """The wanted stages of one run, in the order in which the engine emitted them. ``positions``
    None is from 0 on."""
    values: Trace = {}

    def emit(stage: str, layer: int | None, value: np.ndarray) -> None:
        assert (stage, layer) not in values, f"{stage} of layer {layer} was emitted twice"
        values[stage, layer] = value

    given = tuple(range(len(tokens))) if positions is None else positions
    engine.run(tokens, given, logits, want, emit)
    return values


def jax_trace(
    directory: Path,
    tokens: tuple[int, ...],
    dtype: str = "float32",
    backend: str = "xla",
    logits: str = "all",
    positions: tuple[int, ...] | None = None,
) -> Trace:
    """All stages of the JAX forward."""
    engine = JaxEngine(HuggingFaceWeights(directory), dtype, backend, jax.devices("cpu")[0])
    return collect(engine, tokens, logits, positions=positions)


def torch_trace(
    directory: Path,
    tokens: tuple[int, ...],
    dtype: str = "float32",
    logits: str = "all",
    positions: tuple[int, ...] | None = None,
) -> Trace:
    """All stages of the Hugging Face forward."""
    from oracle.recorder import TorchEngine  # seconds to import, and not every test needs it

    engine = TorchEngine(HuggingFaceWeights(directory), dtype, "cpu")
    return collect(engine, tokens, logits, positions=positions)


def visible(config: Config, stage: str, layer: int | None, value: np.ndarray) -> np.ndarray:
    """The elements of a stage that are part of the computation: all but the masked scores. The
    positions are one after the other."""
    if not config.arch.stage[stage].kind.masked or layer is None:
        return value
    return value[:, layer_mask(config.to_json(), layer, range(value.shape[1]))]


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    """|value - reference| / |reference|, infinite where anything is not finite."""
    value, reference = value.astype(np.float64), reference.astype(np.float64)
    error = np.linalg.norm(value - reference) / max(np.linalg.norm(reference), 1e-300)
    return float(error) if np.isfinite(error) else np.inf


def check_stages(config: Config, trace: Trace, reference: Trace, bound: float) -> None:
    """Every stage of every layer within ``bound`` in relative L2, in the order of the table.

    Fails with a table of all stages and layers, the first of them over the bound marked.
    """
    every = config.arch.computation_order(config.num_hidden_layers)
    order = [(stage.name, layer) for stage, layer in every]
    assert set(trace) == set(order) == set(reference)
    lines, over = [], 0
    for key in order:
        assert trace[key].shape == reference[key].shape, key
        error = relative_l2(*(visible(config, *key, each[key]) for each in (trace, reference)))
        over += error > bound
        mark = "" if error <= bound else "  <-- first" if over == 1 else "  <-- "
        lines.append(f"{key[0]:20}{'-' if key[1] is None else key[1]:>5}  {error:.2e}{mark}")
    assert not over, (
        f"{over} of {len(order)} stages are further than {bound:g} apart\n"
        f"{'stage':20}{'layer':>5}  relative L2\n" + "\n".join(lines)
    )


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many representable numbers of the arrays' own dtype lie between a and b, elementwise.
    NaN is as far from a number as its bits are."""

    def rank(x: np.ndarray) -> np.ndarray:
        bits = x.view(f"i{x.itemsize}").astype(np.int64)
        return np.where(bits < 0, np.iinfo(f"i{x.itemsize}").min - bits, bits)

    assert a.dtype == b.dtype
    return np.abs(rank(a) - rank(b))
