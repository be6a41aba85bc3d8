"""A whole trace against its model, a layer at a time: every stage measured as ``local_error`` has
it, or probed first and measured only where that leaves a doubt."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from qwen_jax import rope, runtime
from qwen_jax.estimate import head_tensor
from qwen_jax.local_error import Both, ErrorSums, compiled, compiler_options, cut_inputs
from qwen_jax.models.ops import positional_by_layer
from qwen_jax.probes import Estimate, Reading, Screen
from qwen_jax.weights.base import Weights
from stages.architecture import LAYER_INPUT, TOKENS, Key, Stage
from stages.trace import Trace

VOCABULARY_SLICE = 16384  # rows of the head in float64 at a time
PROBED = 2  # layers at once: a core calls the programs of one while another computes


@dataclass(frozen=True)
class Measured:
    """One stage of one layer, measured.

    Attributes:
        sums: NumPy arrays.
        segment: missing stages between this one and the dumps it was computed from, in
            computation order; empty where every input was dumped.
        rows: how many rows of the sequence, the last ones, were measured.
        estimated: the sums are those of ``Replay.probed``.
        read: those of each reading that was asked for there.
    """

    stage: Stage
    layer: int | None
    sums: ErrorSums
    segment: tuple[Key, ...]
    rows: int
    estimated: bool = False
    read: tuple[ErrorSums, ...] = ()


# What can be done of a layer's dumps before their turn: for ``Step``, by name.
Ahead = Callable[[tuple[Stage, ...], int | None, Mapping[str, Any]], Mapping[str, Any]]
Step = Callable[
    [
        tuple[Stage, ...],
        int | None,
        Mapping[str, Any],
        Mapping[str, Any],
        Mapping[str, Both | None],
    ],
    Iterator[Measured],
]


class Replay:
    """Measures a whole trace, one layer's weights and stages in memory at a time.

    Arguments:
        trace: the dumps.
        weights: the model that made them.
        dtype: the precision of the trace, for what a gap's rounding does.
        unoptimised: compile in half the time and run slower: for many small traces.
    """

    def __init__(
        self, trace: Trace, weights: Weights, dtype: np.dtype, unoptimised: bool = False
    ) -> None:
        self.trace, self.weights, self.dtype = trace, weights, dtype
        self.config, self.arch = weights.config, trace.arch
        self._compiled = partial(
            compiled, config=weights.config, dtype=dtype, unoptimised=unoptimised
        )
        self.unoptimised = unoptimised
        self._options = compiler_options(unoptimised)
        self.device = runtime.pick_device("cpu")
        self.positions = np.asarray(trace.positions)[None]
        frequencies, _ = rope.inverse_frequencies(self.config)
        angles = self.positions[0][:, None] * frequencies.astype(np.float64)
        self.host_pos = positional_by_layer(self.config, self.positions)
        self._host_angles = angles
        with self.numerics():
            self.pos = jax.device_put(self.host_pos)
            self.angles = jax.device_put(angles)
        # What the first dumped stage after a gap was computed through.
        self._carried: dict[str, Both | None] = {}
        self._chain: dict[str, tuple[Key, ...]] = {}

    @contextmanager
    def numerics(self) -> Iterator[None]:
        """float64 on the CPU, whatever the process's own settings."""
        with runtime.numerics(), jax.default_device(self.device):
            yield

    def load(self, stage: str, layer: int | None) -> np.ndarray | None:
        """A dump in the stage's axes with a batch axis, or None where the trace lacks
        it."""
        if (stage, layer) not in self.trace.entries:
            return None
        return self.trace.read_rows(stage, layer)[None]

    def start_parameters(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The embedding rows in use, and the tokens renumbered to them."""
        rows, index = np.unique(np.array([self.trace.tokens], np.int32), return_inverse=True)
        table = self.arch.embedding
        gathered = self.weights.gather(table.tensor, rows)
        return {table.name: gathered}, index.reshape(1, -1).astype(np.int32)

    def layer_dumps(self, layer: int) -> dict[str, np.ndarray]:
        """Everything dumped of one layer, and its input if that was dumped."""
        found = {s.name: self.load(s.name, layer) for s in self.arch.layer_stages}
        count = self.config.num_hidden_layers
        found[LAYER_INPUT] = self.load(*self.arch.stored_as(LAYER_INPUT, layer, count))
        return {name: dump for name, dump in found.items() if dump is not None}

    def __iter__(self) -> Iterator[Measured]:
        """Every dumped stage that can be replayed, in computation order."""
        return self._locked(self._measure(self._parameters, self._step, 1))

    def probed(self, readings: Mapping[str, Sequence[Reading]] | None = None) -> Iterator[Measured]:
        """Every dumped stage that can be replayed, at the cost of reading it.

        Products are estimated by random probes, and elements that are zero or not finite are not
        counted; see ``qwen_jax.probes``. Stages with missing ones before them are measured exactly.
        ``readings``: arithmetics in which a linear stage is measured as well.
        """
        screen = Screen(
            self.weights, self.host_pos, self._host_angles, self.dtype, self._options, readings
        )
        return self._locked(self._measure(partial(self._estimates, screen), self._probe, PROBED))

    def exactly(self, keys: Collection[Key]) -> Iterator[Measured]:
        """Some of the stages that were ``probed``, as by iteration."""
        return self._locked(self._measure_some(keys))

    def _locked(self, measuring: Iterator[Measured]) -> Iterator[Measured]:
        while True:
            with self.numerics():  # not while the caller goes on with what it was given
                found = next(measuring, None)
            if found is None:
                return
            yield found

    def _measure(self, ahead: Ahead, step: Step, threads: int) -> Iterator[Measured]:
        """``threads``: as many layers are read, and ``ahead`` is done, before their turn."""
        arch, layers = self.arch, self.config.num_hidden_layers

        def fetch(layer: int) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
            dumps = self.layer_dumps(layer)
            with self.numerics():  # which is of a thread
                return ahead(arch.layer_stages, layer, dumps), dumps

        with ThreadPoolExecutor(threads) as pool:
            ready = deque(pool.submit(fetch, layer) for layer in range(min(threads, layers)))
            table, tokens = self.start_parameters()
            start = {stage.name: self.load(stage.name, 0) for stage in arch.start_stages}
            dumps = {n: dump for n, dump in start.items() if dump is not None} | {TOKENS: tokens}
            yield from self._step(arch.start_stages, 0, table, dumps, {})
            for layer in range(layers):
                found, dumps = ready.popleft().result()
                if layer + threads < layers:
                    ready.append(pool.submit(fetch, layer + threads))
                carried = self._take(arch.first if layer == 0 else arch.layer_output)
                yield from step(arch.layer_stages, layer, found, dumps, carried)
        yield from self._finish(ahead, step)

    def _parameters(
        self, stages: tuple[Stage, ...], layer: int | None, dumps: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        tensors = self.config.tensor_names(stages[0].scope, layer)
        return {
            name: self.weights.read(tensors[name]) for stage in stages for name in stage.parameters
        }

    def _take(self, before: Stage) -> dict[str, Both | None]:
        """The layer input, where it was not dumped but computed."""
        if before.name not in self._carried:
            return {}
        self._chain[LAYER_INPUT] = self._chain[before.name]
        return {LAYER_INPUT: self._carried[before.name]}

    def _step(
        self,
        stages: tuple[Stage, ...],
        layer: int | None,
        parameters: Mapping[str, Any],
        dumps: Mapping[str, Any],
        given: Mapping[str, Both | None],
    ) -> Iterator[Measured]:
        sliding = layer is not None and self.config.sliding_layers[layer]
        needed = {name: parameters[name] for stage in stages for name in stage.parameters}
        program = self._compiled(stages)
        found, computed = program(needed, self.pos[sliding], self.angles, dumps, given)
        chain = {name: self._chain[name] for name in given}
        for stage in stages:
            behind = [link for name in stage.inputs for link in chain.get(name, ())]
            segment = tuple(dict.fromkeys(behind))
            if stage.name in found:
                sums = jax.tree.map(np.asarray, found[stage.name])
                yield self._measured(stage, layer, sums, segment)
            elif stage.name not in dumps:
                chain[stage.name] = (*segment, (stage.name, layer))
        last = stages[-1].name
        self._carried = {last: computed[last]} if last in computed else {}
        self._chain = {last: chain[last]} if last in computed else {}

    def _measured(
        self,
        stage: Stage,
        layer: int | None,
        sums: ErrorSums,
        segment: tuple[Key, ...] = (),
        estimated: bool = False,
    ) -> Measured:
        heads = stage.heads(self.config.dims(1)) if stage.heads_lead else 1
        return Measured(
            stage, layer, sums, segment, len(sums.error_rows) // (heads or 1), estimated
        )

    def _estimates(
        self,
        screen: Screen,
        stages: tuple[Stage, ...],
        layer: int | None,
        dumps: Mapping[str, Any],
    ) -> dict[str, Estimate]:
        """Estimates of every stage that is dumped together with all its inputs."""
        sliding = layer is not None and self.config.sliding_layers[layer]
        there = [stage for stage in stages if {stage.name, *stage.inputs} <= dumps.keys()]
        length = len(self.trace.tokens)
        ready = [
            stage
            for stage in there
            if cut_inputs(self.arch, stage, [dumps[name] for name in stage.inputs], length)
            and screen.possible(stage, sliding, dumps)
        ]
        tensors = self.config.tensor_names(stages[0].scope, layer)
        return screen.measure(ready, sliding, dumps, tensors)

    def _probe(
        self,
        stages: tuple[Stage, ...],
        layer: int | None,
        sums: Mapping[str, Estimate],
        dumps: Mapping[str, Any],
        given: Mapping[str, Both | None],
    ) -> Iterator[Measured]:
        """The estimates ``sums``, and ``_step`` of the rest: what has missing stages before it."""
        whole = tuple(stage for stage in stages if stage.name not in sums)
        left = {}
        if whole:
            needed = self._parameters(whole, layer, dumps)
            left = {m.stage: m for m in self._step(whole, layer, needed, dumps, given)}
        else:
            self._carried, self._chain = {}, {}
        for stage in stages:
            if stage in left:
                yield left[stage]
            elif stage.name in sums:
                plain, read = sums[stage.name]
                found = self._measured(stage, layer, plain, estimated=True)
                yield replace(found, read=read)

    def _finish(self, ahead: Ahead, step: Step) -> Iterator[Measured]:
        """The stages after the layers."""
        arch, before = self.arch, self.arch.layer_output.name
        *middle, head = arch.end_stages
        dump = self.load(before, self.config.num_hidden_layers - 1)
        dumps = {} if dump is None else {before: dump}
        given = dict(self._carried)
        dumps |= {s.name: d for s in middle if (d := self.load(s.name, None)) is not None}
        if not dumps and not given:
            return
        yield from step(tuple(middle), None, ahead(tuple(middle), None, dumps), dumps, given)
        if (logits := self.load(head.name, None)) is None:
            return
        if step != self._step and head.inputs[0] in dumps:
            dumps |= {head.name: logits}
            yield from step((head,), None, ahead((head,), None, dumps), dumps, {})
        else:
            yield from self._head(dumps, logits)

    def _head(self, dumps: Mapping[str, np.ndarray], logits: np.ndarray) -> Iterator[Measured]:
        """The head in slices of the vocabulary."""
        head = self.arch.head
        parameter, source = head.parameters[0], head.inputs[0]
        # Only the rows that are there: all of them would be [T, V] in float64.
        count = logits.shape[1]
        given: dict[str, Both | None] = {}
        if source in dumps:
            dumps = {source: dumps[source][:, -count:]}
        else:
            both = self._carried.get(source)
            dumps, given = {}, {source: both and (both[0][:, -count:], both[1][:, -count:])}
            self._chain.setdefault(source, ())
        parts: list[Measured] = []
        for first, rows in self.weights.blocks(head_tensor(self.config), VOCABULARY_SLICE):
            some = {**dumps, head.name: logits[..., first : first + len(rows)]}
            kept = dict(self._carried), dict(self._chain)
            parts += self._step((head,), None, {parameter: rows}, some, given)
            self._carried, self._chain = kept
        if parts:
            yield _join(parts)

    def _measure_some(self, keys: Collection[Key]) -> Iterator[Measured]:
        layers = self.config.num_hidden_layers
        for stage, layer in self.arch.computation_order(layers):
            if (stage.name, layer) not in keys:
                continue
            of = {name: self.arch.stored_as(name, layer, layers) for name in stage.inputs}
            of[stage.name] = stage.name, layer
            dumps = {n: d for n, key in of.items() if (d := self.load(*key)) is not None}
            if stage is self.arch.head:
                yield from self._head(dumps, dumps[stage.name])
                continue
            parameters = self._parameters((stage,), layer, dumps)
            yield from self._step((stage,), layer, parameters, dumps, {})


def _join(parts: list[Measured]) -> Measured:
    """One head from its slices of the vocabulary: rows add up, columns stand side by side."""

    def joined(name: str) -> np.ndarray:
        values = [getattr(part.sums, name) for part in parts]
        return np.concatenate(values) if name.endswith("columns") else np.sum(values, 0)

    sums = ErrorSums(**{field.name: joined(field.name) for field in fields(ErrorSums)})
    return Measured(parts[0].stage, None, sums, parts[0].segment, parts[0].rows)
