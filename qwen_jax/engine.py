"""Running a model layer by layer, so that memory holds two layers however many there are.

The observer changes nothing: the compiled layer always returns all of its stages, and capturing
decides only which of them are fetched. So the logits are the same bytes whatever is captured.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import jax
import numpy as np

from qwen_jax import params, runtime
from qwen_jax.estimate import HEAD_BLOCK, host_dtype
from qwen_jax.model import Env, compute_dtype, make_env, run_stages
from qwen_jax.weights import EMBEDDING, NORM, Weights, aligned_empty, head_name, layer_names
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
Resume = tuple[int, np.ndarray] | None  # the first layer to compute, and its input


class JaxEngine:
    """The JAX forward over a checkpoint.

    Attributes:
        parts: over how many devices the head is split; one but for ``qwen_jax.mesh``.

    Arguments:
        model: weights are read from it one layer at a time.
        dtype: float32, bfloat16, float16 or float64.
        backend: "xla" compiles a layer once and runs it for every layer; "eager" runs the same
            functions un-jitted, one primitive at a time.
        device: of ``runtime.configure``.
        keep: weights stay on the device for the next run; otherwise two layers' are there at a
            time, and every run reads them all.
    """

    parts = 1

    def __init__(
        self, model: Weights, dtype: str, backend: str, device: Any, keep: bool = False
    ) -> None:
        self._kept: dict[Any, Any] | None = {} if keep else None
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

    def run(
        self,
        tokens: tuple[int, ...],
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None:
        """Compute one sequence and ``emit`` the wanted stages in computation order, without a
        batch axis.

        ``lm_head`` is always emitted; ``logits`` is "last" ([V]) or "all" ([T, V]). With
        ``resume`` nothing before that layer is computed or emitted.
        """
        ids = np.array([tokens], np.int32)
        self.run_batch(
            ids,
            np.ones_like(ids, bool),
            logits,
            want,
            lambda stage, layer, value: emit(stage, layer, value[0]),
            resume and (resume[0], resume[1][None]),
        )

    def run_batch(
        self,
        tokens: np.ndarray,
        valid: np.ndarray,
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None:
        """Compute sequences of one length: as ``run``, with the batch axis in every value.

        tokens [B, T] int32; valid [B, T] bool is False at padding, which is on the left and may
        hold any token.
        """
        config, put = self.model.config, self._put
        positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
        envs = {
            sliding: put(make_env(config, positions, valid, sliding))
            for sliding in set(config.sliding_layers) | {False}
        }
        numbers = range(resume[0] if resume else 0, config.num_hidden_layers)
        with _ahead(chain(self._layers(numbers), self._heads())) as weights:
            if resume:
                x, pending = put(resume[1]), []
            else:
                table, index = self._embedding(tokens)
                given = put({TOKENS: index})
                x = self._start(table, envs[False], given)["embedding"]
                pending = [("embedding", 0, x)]
            for layer in numbers:
                sliding = config.sliding_layers[layer]
                values = self._layer(next(weights), envs[sliding], {LAYER_INPUT: x})
                x = values["post_ffn_residual"]
                # JAX dispatches asynchronously: fetch the last layer while this one computes.
                self._fetch(pending, want, emit)
                # A jitted function returns a dictionary in another order.
                pending = [
                    (s.name, layer, values[s.name]) for s in LAYER_STAGES if s.name in values
                ]
                del values
                # Not earlier: this layer's weights make room for those after the next (_layers).
                jax.block_until_ready(x)
            end = self._place(params.EndParams(norm=self.model.read(NORM), lm_head=None))
            norm = self._norm(end, envs[False], {"post_ffn_residual": x})["final_norm"]
            self._fetch([*pending, ("final_norm", None, norm)], want, emit)
            if logits == "last":
                norm = put(self._host("final_norm", norm)[:, -1:])
            head = self._logits(weights, envs[False], norm)
        emit("lm_head", None, head[:, 0] if logits == "last" else head)

    def _put(self, values: Any) -> Any:
        """A pytree of host values on the device."""
        return jax.device_put(values, self.device)

    def _place(self, weights: Any) -> Any:
        """A parameter class of host arrays on the device."""
        return jax.device_put(weights, self.device)

    def _host(self, stage: str, value: Any) -> np.ndarray:
        """A stage's value in host memory."""
        return np.asarray(value)

    def _fetch(self, values: list, want: Want, emit: Emit) -> None:
        for stage, layer, value in values:
            if want(stage, layer):
                emit(stage, layer, self._host(stage, value))

    def _embedding(self, tokens: np.ndarray) -> tuple[params.StartParams, np.ndarray]:
        """The rows in use, for the embedding is most of a small model, and the tokens renumbered
        to them."""
        rows, index = np.unique(tokens, return_inverse=True)

        def load(key: tuple[str, bytes]) -> params.StartParams:
            return params.StartParams(embed_tokens=self.model.gather(EMBEDDING, rows))

        table = self._keep((EMBEDDING, rows.tobytes()), load)
        return table, index.reshape(tokens.shape).astype(np.int32)

    def _layers(self, numbers: Iterable[int]) -> Iterator[params.LayerParams]:
        """Each layer's weights on the device, on the host in memory that those of the layer after
        the next will have."""
        memory: dict[int, dict[str, np.ndarray]] = {}

        def load(layer: int) -> params.LayerParams:
            if layer % 2 not in memory or self._kept is not None:
                memory[layer % 2] = {
                    field: aligned_empty(self.model.shapes[name], self._host_dtype(name))
                    for field, name in layer_names(layer).items()
                }
            arrays = memory[layer % 2]
            for field, name in layer_names(layer).items():
                self.model.load(name, 0, arrays[field])
            return params.LayerParams(**arrays)

        for layer in numbers:
            yield self._keep(layer, load)

    def _keep(self, key: Any, load: Callable) -> Any:
        """The parameter class ``load(key)`` on the device; if weights are kept, from the second
        time on as it lies there."""
        if self._kept is None:
            return self._place(load(key))
        if key not in self._kept:
            self._kept[key] = self._place(load(key))
        return self._kept[key]

    def _host_dtype(self, name: str) -> np.dtype:
        """What the device is given: on a GPU the narrower, which is sooner there."""
        stored = self.model.dtype(name)
        return host_dtype(stored, self.dtype) if self.device.platform == "cpu" else stored

    def _logits(self, heads: Iterator[params.EndParams], env: Env, x: Any) -> np.ndarray:
        """[B, T, D] -> [B, T, V], the head applied in blocks of the vocabulary."""
        found = np.empty((*x.shape[:2], self.model.config.vocab_size), self.dtype)
        first = 0
        for end in heads:
            part = self._host("lm_head", self._head(end, env, {"final_norm": x})["lm_head"])
            found[..., first : first + part.shape[-1]] = part
            first += part.shape[-1]
        return found

    def _heads(self) -> Iterator[params.EndParams]:
        """The head in blocks of the vocabulary, as ``_layers`` gives layers."""
        name = head_name(self.model.config)
        count, width = self.model.shapes[name]
        most = HEAD_BLOCK // (width * compute_dtype(self.dtype).itemsize)
        step = self.parts * _even_step(count // self.parts, most // self.parts)
        memory: dict[int, np.ndarray] = {}

        def load(key: tuple[str, int]) -> params.EndParams:
            first = key[1]
            if (place := first // step % 2) not in memory or self._kept is not None:
                memory[place] = aligned_empty((step, width), self._host_dtype(name))
            rows = memory[place][: count - first]
            self.model.load(name, first, rows)
            return params.EndParams(norm=None, lm_head=rows)

        for first in range(0, count, step):
            yield self._keep((name, first), load)


def _even_step(count: int, most: int) -> int:
    """How many of ``count`` to take at a time, ``most`` at most; every time as many, where that
    needs at most twice the steps: another length is another program."""
    steps = -(-count // max(1, most))
    return -(-count // next((n for n in range(steps, 2 * steps + 1) if count % n == 0), steps))


@contextmanager
def _ahead(items: Iterator) -> Iterator[Iterator]:
    """The same items, each made while the one before it is in use, the first from now on."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)

        def each() -> Iterator:
            nonlocal following
            while (item := following.result()) is not None:
                following = pool.submit(next, items, None)
                yield item
                del item

        yield each()
