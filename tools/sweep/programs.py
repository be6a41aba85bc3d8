"""The programs that a sweep runs: the layer-wise engine that traces, and the whole model at once.

Each gives every stage with its batch axis: ``{(stage, layer): [B, ...]}``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from qwen_jax import params
from qwen_jax.engine import JaxEngine, Want
from qwen_jax.model import forward, make_env, run_stages
from qwen_jax.weights import Weights
from stages.table import END_STAGES, LAYER_INPUT, LAYER_STAGES, START_STAGES, TOKENS, Stage
from stages.trace import numpy_dtype
from tools.sweep.variants import Variant

Key = tuple[str, int | None]
Values = dict[Key, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Sequences of one or more lengths in one array, padded on the left.

    Attributes:
        tokens: [B, T] int32.
        valid: [B, T] bool, False at padding.
    """

    tokens: np.ndarray
    valid: np.ndarray

    @property
    def lengths(self) -> list[int]:
        return [int(n) for n in self.valid.sum(1)]


def make_batch(tokens: tuple[int, ...], length: int, batch: int) -> Batch:
    """``batch`` different sequences cut from ``tokens`` (repeated as often as needed); every second
    one is half as long, and padded."""
    stream = np.resize(np.array(tokens, np.int32), length + batch)
    ids, valid = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
    for row in range(batch):
        count = -(-length // 2) if row % 2 else length
        ids[row, length - count :] = stream[row : row + count]  # padding is token 0
        valid[row, length - count :] = True
    return Batch(ids, valid)


class Layers(JaxEngine):
    """The engine that traces, with stages replaced as ``variant`` says."""

    def __init__(
        self, model: Weights, dtype: str, backend: str, device: Any, variant: Variant
    ) -> None:
        self.variant = variant
        super().__init__(model, dtype, backend, device)

    def _program(self, rows: tuple[Stage, ...]) -> Any:
        if rows != LAYER_STAGES:
            return super()._program(rows)
        return partial(
            run_stages,
            self.variant.rows,
            self.model.config,
            dtype=self.dtype,
            functions=self.variant.functions,
        )

    def values(self, batch: Batch, want: Want = lambda stage, layer: True) -> Values:
        """Every wanted stage, and always the logits of all positions."""
        found: Values = {}
        self.run_batch(
            batch.tokens,
            batch.valid,
            "all",
            want,
            lambda stage, layer, value: found.__setitem__((stage, layer), value),
        )
        return found


class Whole:
    """The whole model as one compiled program.

    Arguments:
        form: "program" (the layers one after another), "scan" (a loop over stacked weights), or
            "unobserved" (as "program", but only the logits come out, so XLA may fuse at will).
    """

    def __init__(self, model: Weights, dtype: str, device: Any, form: str) -> None:
        self.model, self.device, self.form = model, device, form
        function = {"program": _unrolled, "scan": _scan, "unobserved": _logits}[form]
        self.program = jax.jit(partial(function, model.config, dtype=numpy_dtype(dtype)))

    def values(self, batch: Batch) -> Values:
        config, put = self.model.config, partial(jax.device_put, device=self.device)
        positions = np.maximum(np.cumsum(batch.valid, axis=1) - 1, 0)
        envs = {
            sliding: put(make_env(config, positions, batch.valid, sliding))
            for sliding in set(config.sliding_layers) | {False}
        }
        weights = params.load(self.model)
        if self.form == "scan":
            stacked = jax.tree.map(lambda *layers: np.stack(layers), *weights.layers)
            weights = replace(weights, layers=stacked)
        found = jax.device_get(self.program(put(weights), put(batch.tokens), envs))
        if self.form == "unobserved":
            return {("lm_head", None): found}
        start, layers, end = found
        values: Values = {("embedding", 0): start["embedding"]}
        for number in range(config.num_hidden_layers):
            for name in (stage.name for stage in LAYER_STAGES):
                stacked = self.form == "scan"
                values[name, number] = layers[name][number] if stacked else layers[number][name]
        return values | {(s.name, None): end[s.name] for s in END_STAGES}


def _unrolled(config: Any, *args: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """``model.forward``: (start, layers, end)."""
    found = forward(config, *args, dtype)
    return found.start, found.layers, found.end


def _logits(*args: Any, **kwargs: Any) -> Array:
    return _unrolled(*args, **kwargs)[2]["lm_head"]


def _scan(
    config: Any, weights: params.Params, tokens: Array, envs: Any, dtype: Any
) -> tuple[Any, Any, Any]:
    """``model.forward`` with ``lax.scan`` over ``weights.layers``, whose leaves are [L, ...]; so
    are those of the layers' values."""
    env = envs[False]
    start = run_stages(START_STAGES, config, weights.start, env, {TOKENS: tokens}, dtype)
    layer_env = envs[config.sliding_layers[0]]

    def body(x: Array, layer: params.LayerParams) -> tuple[Array, dict[str, Array]]:
        values = run_stages(LAYER_STAGES, config, layer, layer_env, {LAYER_INPUT: x}, dtype)
        return values["post_ffn_residual"], values

    x, layers = lax.scan(body, start["embedding"], weights.layers)
    end = run_stages(END_STAGES, config, weights.end, env, {"post_ffn_residual": x}, dtype)
    return start, layers, end
