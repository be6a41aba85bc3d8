"""Running a model layer by layer, so that memory holds two layers however many there are.

The observer changes nothing: the compiled layer always returns all of its stages, and capturing
decides only which of them are fetched. So the logits are the same bytes whatever is captured.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from qwen_jax import params, runtime
from qwen_jax.checkpoint import Checkpoint
from qwen_jax.model import Env, make_env, run_stages
from stages.table import (
    END_STAGES,
    LAYER_INPUT,
    LAYER_STAGES,
    START_STAGES,
    TOKENS,
    Stage,
)
from stages.trace import numpy_dtype

Want = Callable[[str, int | None], bool]  # is this stage of this layer to be fetched?
Emit = Callable[[str, int | None, np.ndarray], None]  # stage, layer, value


class JaxEngine:
    """The JAX forward over a checkpoint.

    Arguments:
        model: weights are read from it one layer at a time.
        dtype: float32, bfloat16, float16 or float64.
        backend: "xla" compiles a layer once and runs it for every layer; "eager" runs the same
            functions un-jitted, one primitive at a time.
        device: of ``runtime.configure``.
    """

    def __init__(self, model: Checkpoint, dtype: str, backend: str, device: Any) -> None:
        self.model = model
        self.dtype = numpy_dtype(dtype)
        self.backend = backend
        self.device = device
        compiled = jax.jit if backend == "xla" else lambda function: function
        self._start = compiled(self._program(START_STAGES))
        self._layer = compiled(self._program(LAYER_STAGES))
        self._norm = compiled(self._program(END_STAGES[:1]))
        self._head = compiled(self._program(END_STAGES[1:]))

    def _program(self, rows: tuple[Stage, ...]) -> Callable:
        return partial(run_stages, rows, self.model.config, dtype=self.dtype)

    def describe(self) -> dict[str, Any]:
        return {"name": "qwen_jax", "backend": self.backend} | runtime.describe(self.device)

    def run(self, tokens: tuple[int, ...], logits: str, want: Want, emit: Emit) -> None:
        """Compute one sequence and ``emit`` the wanted stages in computation order, without a
        batch axis.

        ``lm_head`` is always emitted; ``logits`` is "last" ([V]) or "all" ([T, V]).
        """
        ids = np.array([tokens], np.int32)
        self.run_batch(
            ids,
            np.ones_like(ids, bool),
            logits,
            want,
            lambda stage, layer, value: emit(stage, layer, value[0]),
        )

    def run_batch(
        self, tokens: np.ndarray, valid: np.ndarray, logits: str, want: Want, emit: Emit
    ) -> None:
        """Compute sequences of one length: as ``run``, with the batch axis in every value.

        tokens [B, T] int32; valid [B, T] bool is False at padding, which is on the left and may
        hold any token.
        """
        model, put = self.model, partial(jax.device_put, device=self.device)
        rows, index = np.unique(tokens, return_inverse=True)
        positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
        envs = {
            sliding: put(make_env(model.config, positions, valid, sliding))
            for sliding in set(model.config.sliding_layers) | {False}
        }
        # The embedding is most of a small model: only the rows in use go to the device.
        table = params.start_params(model)
        table = put(table.replace(embed_tokens=table.embed_tokens[rows]))
        given = put({TOKENS: index.reshape(tokens.shape).astype(np.int32)})
        start = self._start(table, envs[False], given)
        x, pending = start["embedding"], [("embedding", 0, start["embedding"])]
        with ThreadPoolExecutor(1) as reader:
            weights = reader.submit(params.layer_params, model, 0)
            for layer, sliding in enumerate(model.config.sliding_layers):
                loaded = put(weights.result())
                if layer + 1 < model.config.num_hidden_layers:
                    weights = reader.submit(params.layer_params, model, layer + 1)
                values = self._layer(loaded, envs[sliding], {LAYER_INPUT: x})
                x = values["post_ffn_residual"]
                # JAX dispatches asynchronously: fetch the last layer while this one computes.
                _fetch(pending, want, emit)
                # A jitted function returns a dictionary in another order.
                pending = [
                    (s.name, layer, values[s.name]) for s in LAYER_STAGES if s.name in values
                ]
                del values
            end = put(params.end_params(model))
        _fetch(pending, want, emit)
        _fetch(self._finish(end, envs[False], x, logits), want, emit)

    def _finish(self, end: params.EndParams, env: Env, x: Any, logits: str) -> list:
        norm = self._norm(end, env, {"post_ffn_residual": x})["final_norm"]
        kept = norm[:, -1:] if logits == "last" else norm
        head = self._head(end, env, {"final_norm": kept})["lm_head"]
        head = head[:, 0] if logits == "last" else head
        return [("final_norm", None, norm), ("lm_head", None, head)]


def _fetch(values: list, want: Want, emit: Emit) -> None:
    for stage, layer, value in values:
        if stage == "lm_head" or want(stage, layer):
            emit(stage, layer, np.asarray(value))
