"""Running a model layer by layer, so that memory holds two layers however many there are.

The observer changes nothing: the compiled layer always returns all of its stages, and capturing
decides only which of them are fetched. So the logits are the same bytes whatever is captured.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import jax
import numpy as np

from qwen_jax import runtime
from qwen_jax.cache import KeyValueCache, cached_in
from qwen_jax.config import Config
from qwen_jax.estimate import HEAD_BLOCK, head_tensor, host_dtype
from qwen_jax.forward import run_stages
from qwen_jax.models.ops import Positional, compute_dtype, positional_by_layer
from qwen_jax.padded import Emit, EmitRows, Padded, Resume, Want
from qwen_jax.rows import Rows, Values
from qwen_jax.weights.base import Weights, aligned_empty
from stages.architecture import LAYER_INPUT, TOKENS, Stage
from stages.errors import UserError
from stages.files import numpy_dtype

BACKENDS = ("xla", "eager")
Take = Callable[[int | None, Values], None]  # the layer, and what it has computed


class JaxEngine:
    """The JAX forward over a checkpoint.

    Attributes:
        parts: over how many devices the head is split; one but for ``qwen_jax.mesh``.

    Arguments:
        model: weights are read from it one layer at a time.
        dtype: float32, bfloat16, float16 or float64.
        backend: "xla" compiles a layer once and runs it for every layer; "eager" runs the same
            functions un-jitted, one primitive at a time.
        device: of ``runtime.pick_device``.
        keep: weights stay on the device for the next run; otherwise two layers' are there at a
            time, and every run reads them all.
        precision: of float32 products, as of ``jax.default_matmul_precision``; None leaves it to
            the caller.

    Raises:
        UserError: no such backend.
    """

    parts = 1

    def __init__(
        self,
        model: Weights,
        dtype: str,
        backend: str,
        device: jax.Device,
        keep: bool = False,
        precision: str | None = "highest",
    ) -> None:
        if backend not in BACKENDS:
            raise UserError(f"no backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        self._kept: dict[Any, Any] | None = {} if keep else None
        self.model = model
        self.arch = model.config.arch
        self.dtype = numpy_dtype(dtype)
        self.backend = backend
        self.device = device
        self.precision = precision
        arch = self.arch
        self._start = self._compiled(arch.start_stages)
        self._layer = self._compiled(arch.layer_stages)
        self._norm = self._compiled(arch.end_stages[:-1])
        self._head = self._compiled(arch.end_stages[-1:])

    def _compiled(
        self, stages: tuple[Stage, ...], how: Callable[..., Any] = run_stages
    ) -> Callable[..., Any]:
        """``how`` of these stages, called as (parameters, pos, given)."""
        if self.backend == "eager":
            return partial(how, stages, self.model.config, dtype=self.dtype)
        options = tuple(runtime.compiler_options().items())
        return _jitted(how, stages, self.model.config, self.dtype, options)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of its producer."""
        name = {"name": "qwen_jax", "backend": self.backend}
        return name | runtime.describe(self.device, self.precision or "default")

    def run(
        self,
        tokens: tuple[int, ...],
        positions: tuple[int, ...],
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
        self.run_batch(
            Padded.of([tokens], [positions]),
            logits,
            want,
            lambda stage, layer, value: emit(stage, layer, value[0]),
            resume and (resume[0], resume[1][None]),
        )

    def run_batch(
        self,
        batch: Padded,
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None:
        """Compute sequences together: as ``run``, with the batch axis in every value."""
        with self._numerics():
            found = positional_by_layer(self.model.config, batch.positions, batch.valid)
            pos = {kind: self._put(value) for kind, value in found.items()}
            embedded = None if resume else self._embedding(batch.tokens)
            fetch = partial(self._fetch, want, emit)
            head = self._call(embedded, pos, logits, fetch, resume=resume)
            emit(self.arch.head.name, None, head[:, 0] if logits == "last" else head)

    def run_calls(
        self,
        batch: Padded,
        steps: tuple[int, ...],
        cache: str,
        logits: str,
        want: Want,
        emit: EmitRows,
    ) -> np.ndarray:
        """Compute sequences together, in several calls, through a key/value cache: the prompts,
        then greedily picked tokens, until there are T rows.

        Emits rows with the number of the first, see ``rows.Rows``; scores have as many columns as
        there are rows by then. ``logits`` "last" is of the rows after which a token is picked.

        Arguments:
            steps: how many rows each call computes; T in all, and P at the end of one of them.
            cache: a format of ``qwen_jax.cache``.

        Returns:
            The picked tokens, [B, T - P + 1] int32; the last of them is in no row.
        """
        config, arch = self.model.config, self.arch
        tokens, (size, length) = batch.tokens, batch.valid.shape
        prompt = tokens.shape[1]
        with self._numerics():
            whole = positional_by_layer(config, batch.positions, batch.valid)
            held = KeyValueCache(config, self.dtype, size, length, self._put_stage)
            layer = self._compiled(arch.cached.layer_stages, cached_in(cache))
            rows, first = Rows(arch.cached, held, self._host, want, emit), 0
            for count in steps:
                end = first + count
                pos = self._put(
                    {
                        sliding: Positional(
                            all_rows.cos[:, first:end],
                            all_rows.sin[:, first:end],
                            held.mask(sliding, np.asarray(all_rows.mask), first, end),  # type: ignore[arg-type]
                        )
                        for sliding, all_rows in whole.items()
                    }
                )
                rows.begin(count)
                picks = end >= prompt
                which = "all" if logits == "all" else "last" if picks else "none"
                embedded = self._embedding_of(tokens[:, first:end])
                call = _Call(held, self._put(np.int32(first)), layer)
                head = self._call(embedded, pos, which, rows.take, call)
                rows.finish(head)
                if picks:
                    best = head[:, -1:].argmax(-1).astype(np.int32)
                    tokens = np.concatenate([tokens, best], 1)
                first = end
            rows.flush()
        return tokens[:, prompt:]

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        # Un-jitted constants would otherwise lie on a GPU that is the default device.
        where = jax.default_device(self.device) if self.backend == "eager" else nullcontext()
        with runtime.numerics(self.precision), where:
            yield

    def _call(
        self,
        embedded: tuple[Any, np.ndarray] | None,
        pos: Mapping[bool, Positional],
        logits: str,
        take: Take,
        cached: "_Call | None" = None,
        resume: Resume = None,
    ) -> Any:
        """Every stage of some rows: of a whole sequence, or of one of the calls that compute it.

        ``embedded`` is the embedding and the rows of it, where the call does not ``resume``.
        ``take`` is given the stages, a layer at a time. Returns the logits [B, rows, V] on the
        host, of the rows that ``logits`` says, which may be "none": None.
        """
        config = self.model.config
        arch = self.arch.cached if cached else self.arch
        output = arch.layer_output.name
        pending: tuple[int, Values] = 0, {}
        numbers = range(resume[0] if resume else 0, config.num_hidden_layers)
        heads = () if logits == "none" else self._heads()
        with self._ahead(chain(self._layers(numbers), heads)) as weights:
            if resume:
                x = self._put(resume[1])
            else:
                table, index = embedded  # type: ignore[misc]
                given = self._put({TOKENS: index})
                x = self._start(table, pos[False], given)[arch.first.name]
                pending = 0, {arch.first.name: x}
            for layer in numbers:
                sliding = config.sliding_layers[layer]
                if cached:
                    given = cached.cache.given(layer, cached.start) | {LAYER_INPUT: x}
                    values = cached.layer(next(weights), pos[sliding], given)
                    cached.cache.keep(layer, values)
                else:
                    values = self._layer(next(weights), pos[sliding], {LAYER_INPUT: x})
                x = values[output]
                # JAX dispatches asynchronously: fetch the last layer while this one computes.
                take(*pending)
                pending = layer, values
                del values
                # Not earlier: this layer's weights make room for those after the next (_layers).
                if self._kept is None:
                    jax.block_until_ready(x)
            end = self._keep("end", lambda key: self._end_parameters())
            before = self._norm(end, pos[False], {output: x})
            take(*pending)
            take(None, before)
            if logits == "none":
                return None
            x = before[arch.head.inputs[0]]
            if logits == "last" and x.shape[1] > 1:
                x = self._put(self._host(arch.head.inputs[0], x)[:, -1:])
            return self._logits(weights, pos[False], x)

    def _end_parameters(self) -> dict[str, np.ndarray]:
        """What the stages between the last layer and the head read."""
        needed = [name for stage in self.arch.end_stages[:-1] for name in stage.parameters]
        names = self.model.config.tensor_names("end")
        return {name: self.model.read(names[name]) for name in needed}

    def _put(self, values: Any) -> Any:
        """A pytree of host values on the device."""
        return jax.device_put(values, self.device)

    def _place(self, parameters: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Host arrays on the device."""
        with runtime.numerics(None):  # a thread that reads ahead has settings of its own
            return jax.device_put(parameters, self.device)

    def _host(self, stage: str, value: Any) -> np.ndarray:
        """A stage's value in host memory."""
        return np.asarray(value)

    def _fetch(self, want: Want, emit: Emit, layer: int | None, values: Values) -> None:
        for stage in self.arch.stages:  # a jitted function returns them in another order
            if stage.name in values and want(stage.name, layer):
                emit(stage.name, layer, self._host(stage.name, values[stage.name]))

    def _embedding(self, tokens: np.ndarray) -> tuple[dict[str, jax.Array], np.ndarray]:
        """The rows in use, for the embedding is most of a small model, and the tokens renumbered
        to them."""
        rows, index = np.unique(tokens, return_inverse=True)
        parameter = self.arch.embedding

        def load(key: tuple[str, bytes]) -> dict[str, np.ndarray]:
            return {parameter.name: self.model.gather(parameter.tensor, rows)}

        table = self._keep((parameter.name, rows.tobytes()), load)
        return table, index.reshape(tokens.shape).astype(np.int32)

    def _embedding_of(self, tokens: np.ndarray) -> tuple[dict[str, jax.Array], np.ndarray]:
        """A row for each token: calls of a length are one program, whatever their tokens."""
        parameter = self.arch.embedding
        rows = self.model.gather(parameter.tensor, tokens.ravel())
        index = np.arange(tokens.size, dtype=np.int32)
        return self._place({parameter.name: rows}), index.reshape(tokens.shape)

    def _put_stage(self, stage: Stage, value: np.ndarray) -> jax.Array:
        """A stage's value, with a batch axis, on the device."""
        return self._put(value)

    def _ahead(self, items: Iterator[Any]) -> Any:
        """``items``, read ahead in a thread unless the weights are kept on the device."""
        return _read_ahead(items) if self._kept is None else nullcontext(items)

    def _layers(self, numbers: Iterable[int]) -> Iterator[dict[str, jax.Array]]:
        """Each layer's weights on the device, on the host in memory that those of the layer after
        the next will have."""
        memory: dict[int, dict[str, np.ndarray]] = {}

        def load(layer: int) -> dict[str, np.ndarray]:
            names = self.model.config.tensor_names("layer", layer)
            if layer % 2 not in memory or self._kept is not None:
                memory[layer % 2] = {
                    parameter: aligned_empty(self.model.shapes[name], self._host_dtype(name))
                    for parameter, name in names.items()
                }
            arrays = memory[layer % 2]
            for parameter, name in names.items():
                self.model.load(name, 0, arrays[parameter])
            return arrays

        for layer in numbers:
            yield self._keep(layer, load)

    def _keep(self, key: Any, load: Callable[[Any], dict[str, np.ndarray]]) -> Any:
        """The weights ``load(key)`` on the device; if weights are kept, from the second time on as
        they lie there."""
        if self._kept is None:
            return self._place(load(key))
        if key not in self._kept:
            self._kept[key] = self._place(load(key))
        return self._kept[key]

    def _host_dtype(self, name: str) -> np.dtype:
        """The dtype in which a weight is sent to the device: on a GPU the stored one, where that is
        narrower and so sooner there."""
        stored = self.model.dtype(name)
        return host_dtype(stored, self.dtype) if self.device.platform == "cpu" else stored

    def _logits(self, heads: Iterator[dict[str, jax.Array]], pos: Positional, x: Any) -> np.ndarray:
        """[B, T, D] -> [B, T, V], the head applied in blocks of the vocabulary."""
        stage = self.arch.head
        found = np.empty((*x.shape[:2], self.model.config.vocab_size), self.dtype)
        first = 0
        for end in heads:
            part = self._host(stage.name, self._head(end, pos, {stage.inputs[0]: x})[stage.name])
            found[..., first : first + part.shape[-1]] = part
            first += part.shape[-1]
        return found

    def _heads(self) -> Iterator[dict[str, jax.Array]]:
        """The head in blocks of the vocabulary, as ``_layers`` gives layers."""
        name, parameter = head_tensor(self.model.config), self.arch.head.parameters[0]
        count, width = self.model.shapes[name]
        most = HEAD_BLOCK // (width * compute_dtype(self.dtype).itemsize)
        step = self.parts * runtime.even_step(count // self.parts, most // self.parts)
        memory: dict[int, np.ndarray] = {}

        def load(key: tuple[str, int]) -> dict[str, np.ndarray]:
            first = key[1]
            if (place := first // step % 2) not in memory or self._kept is not None:
                memory[place] = aligned_empty((step, width), self._host_dtype(name))
            rows = memory[place][: count - first]
            self.model.load(name, first, rows)
            return {parameter: rows}

        for first in range(0, count, step):
            yield self._keep((name, first), load)


@dataclass(frozen=True)
class _Call:
    """One of the calls that compute a sequence: its cache, its first row on the device, and the
    program of a layer."""

    cache: KeyValueCache
    start: jax.Array
    layer: Callable[..., dict[str, Any]]


@cache
def _jitted(
    how: Callable[..., Any],
    stages: tuple[Stage, ...],
    config: Config,
    dtype: np.dtype,
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., Any]:
    """One program for all engines of a process that need it: it is compiled once."""
    return jax.jit(partial(how, stages, config, dtype=dtype), compiler_options=dict(options))


@contextmanager
def _read_ahead(items: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """``items``, each computed in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)

        def each() -> Iterator[Any]:
            nonlocal following
            while (item := following.result()) is not None:
                following = pool.submit(next, items, None)
                yield item
                del item

        yield each()
