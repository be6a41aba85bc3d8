"""What error costs the next token: each stage's share of a change of log-probability or margin.

The stage table is a tape. With lambda = d(quantity)/d(stage), all of them from one backward pass
over the dumped values, <lambda, dump - y*> is what the error created at that stage does to the
quantity, to first order; the shares add up to the change against exact arithmetic. Two quantities
go together, in nats both: the margin of the chosen token over a rival, and its log-probability.

Sources: reverse accumulation (Linnainmaa 1976, who did it for rounding errors), the dual-weighted
residual (Becker & Rannacher 2001), attribution patching (Syed et al. 2023, arXiv 2310.10348).

Axis letters as in ``qwen_jax.models.ops``; Q quantities.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax import runtime
from qwen_jax.config import Config
from qwen_jax.estimate import head_tensor
from qwen_jax.forward import Parameters, read_parameters
from qwen_jax.local_error import EXACT, FRUGAL, cut_inputs, last_rows, stage_value
from qwen_jax.models.ops import Positional
from qwen_jax.replay import Replay
from stages.architecture import LAYER_INPUT, TOKENS, Architecture, Key, Stage
from stages.errors import UserError
from tools.localize.question import Question

HEAD_ROWS = 4096  # rows of the head in float64 at a time
LARGEST = 5  # shares of which it is said where they come from
SLICES = 3  # heads, positions and channels that are named then


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the error created at one stage of one layer does, in nats.

    Attributes:
        margin, logprob: by how much the chosen token gains.
        slices: {"head" | "position" | "channel": margin of each slice}, as far as known.
        skipped_rows: how many rows of the sequence come before those of "position".
    """

    margin: float
    logprob: float
    slices: Mapping[str, np.ndarray]
    skipped_rows: int

    @property
    def where(self) -> dict[str, list[dict[str, Any]]]:
        """{"heads" | "positions" | "channels": the slices that have most of it, largest first}."""
        found = {}
        for axis, parts in self.slices.items():
            first = self.skipped_rows if axis == "position" else 0
            largest = np.argsort(-np.abs(parts))[:SLICES]
            rows = [{"index": first + int(i), "share": float(parts[i])} for i in largest]
            found[axis + "s"] = [row for row in rows if row["share"]]
        return found


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What the error of a trace does to one token.

    Attributes:
        row: of the sequence, from 0 on, after which the token comes.
        token, against: the chosen one, and its rival.
        text, against_text: what they stand for, where there is a tokenizer.
        margin, logprob: of the dump, in nats.
        shares: of every stage that was measured.
        lost: the first stage, from the end, that cannot be passed: what lies before it in the
            computation has no share. None where nothing is lost.
    """

    row: int
    token: int
    against: int
    text: str | None
    against_text: str | None
    margin: float
    logprob: float
    shares: dict[Key, Share]
    lost: Key | None

    @property
    def change(self) -> float:
        """Of the margin, from exact arithmetic to the dump: the sum of the shares."""
        return sum(share.margin for share in self.shares.values())

    @property
    def logprob_change(self) -> float:
        return sum(share.logprob for share in self.shares.values())

    @property
    def flips(self) -> bool:
        """Whether exact arithmetic puts the other of the two first."""
        return (self.margin - self.change) * self.margin < 0

    @property
    def largest(self) -> list[tuple[Key, Share]]:
        """Every share, the largest first."""
        return sorted(self.shares.items(), key=lambda pair: -abs(pair[1].margin))

    def to_json(self) -> dict[str, Any]:
        """The object ``harm`` of ``--json``."""
        result: dict[str, Any] = {
            "position": self.row,
            "token": self.token,
            "against": self.against,
            "margin": self.margin,
            "exact_margin": self.margin - self.change,
            "sum_of_shares": self.change,
            "flips": self.flips,
            "logprob": self.logprob,
            "logprob_change": self.logprob_change,
            "shares": [
                {"stage": stage, "layer": layer, "share": s.margin, "logprob": s.logprob}
                | ({"where": s.where} if place < LARGEST else {})
                for place, ((stage, layer), s) in enumerate(self.largest)
            ],
        }
        if self.lost:
            result["lost_before"] = {"stage": self.lost[0], "layer": self.lost[1]}
        return result


def _floats(stage: Stage) -> list[str]:
    return [name for name in stage.inputs if name != TOKENS]


class _Layer:
    """The values of some rows of the table, in float64: dumps, and what is missing computed."""

    def __init__(
        self,
        rows: Sequence[Stage],
        config: Config,
        parameters: Parameters,
        pos: Positional,
        dumps: Mapping[str, Array],
        given: Mapping[str, Array | None],
    ) -> None:
        self.config, self.pos = config, pos
        self.tables, self.length = config.tables.cached, pos.mask.shape[-1]
        self.weights = {name: weight.astype(EXACT) for name, weight in parameters.items()}
        as_float = {n: x if n == TOKENS else x.astype(EXACT) for n, x in dumps.items()}
        self.values: dict[str, Array | None] = {**given, **as_float}
        for stage in rows:
            if stage.name not in self.values:
                ready = self.ready(stage)
                self.values[stage.name] = None if ready is None else self.run(stage, *ready)

    def ready(self, stage: Stage) -> tuple[int, list[Array]] | None:
        """How many rows the stage can be computed for, and its inputs for them."""
        values = [self.values[name] for name in stage.inputs]
        return cut_inputs(self.tables, stage, values, self.length)

    def run(self, stage: Stage, count: int, inputs: Sequence[Array]) -> Array:
        weights = [self.weights[name] for name in stage.parameters]
        return stage_value(stage, self.config, self.pos.last(count), inputs, weights)

    def pulled(
        self, stage: Stage, count: int, inputs: Sequence[Array], slope: Array
    ) -> dict[str, Array]:
        """What the inputs have of a ``slope`` [Q, ...] of the stage's value, each with as many rows
        as it has itself."""
        names = _floats(stage)
        place = dict(zip(stage.inputs, inputs, strict=True))

        def function(*floats: Array) -> Array:
            changed = place | dict(zip(names, floats, strict=True))
            return self.run(stage, count, [changed[name] for name in stage.inputs])

        _, pull = jax.vjp(function, *(place[name] for name in names))
        found = jax.vmap(pull)(slope)
        whole = [self.values[name] for name in names]
        return {
            name: _padded(self.tables, name, each, value.shape)  # type: ignore[union-attr]
            for name, each, value in zip(names, found, whole, strict=True)
        }


def _axis(tables: Architecture, name: str) -> int:
    """The axis of the rows of a slope [Q, B, ...] of a value."""
    axes = tables.axes_of(name)
    return 2 + axes.index("T" if "T" in axes else "S")


def _padded(tables: Architecture, name: str, slope: Array, shape: tuple[int, ...]) -> Array:
    """A slope of the last rows of a value of ``shape``: of all of them, or of fewer."""
    axis = _axis(tables, name)
    rows = shape[axis - 1]
    if slope.shape[axis] >= rows:
        return jax.lax.slice_in_dim(slope, slope.shape[axis] - rows, slope.shape[axis], axis=axis)
    before = [(0, 0)] * slope.ndim
    before[axis] = (rows - slope.shape[axis], 0)
    return jnp.pad(slope, before)


def _by_rows(stage: Stage, slope: Array, value: Array) -> tuple[Array, Array]:
    """<slope, value> of every row and of every column of the stage's matrix: [Q, ...] each."""
    matrix = jax.vmap(lambda each: stage.matrix(each * value))(slope)
    return matrix.sum(2), matrix.sum(1)


def backward(
    rows: Sequence[Stage],
    config: Config,
    parameters: Parameters,
    pos: Positional,
    dumps: Mapping[str, Array],
    given: Mapping[str, Array | None],
    slopes: Mapping[str, Array],
) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """Carry slopes back through some rows of the table, and measure the dumped stages' shares.

    Arguments:
        dumps: stage name -> dump with a batch axis of 1.
        given: values from before ``rows`` that are not in ``dumps``; None for what is not known.
        slopes: of the values that later stages read: [Q, 1, ...] each.

    Returns:
        (shares by stage: (rows [Q, rows], columns [Q, columns], or None where those would take a
        product of their own), the slopes of the values from before ``rows``, those of the values
        that cannot be computed from others).
    """
    here = _Layer(rows, config, parameters, pos, dumps, given)
    tables = here.tables
    slopes, shares, lost = dict(slopes), {}, {}
    for stage in reversed(rows):
        if stage.name not in slopes:
            continue
        slope = slopes.pop(stage.name)
        ready = here.ready(stage)
        if ready is None:
            lost[stage.name] = slope
            continue
        count, inputs = ready
        # y* has ``count`` rows, the dump maybe others; none but the last of both are compared.
        value = here.values[stage.name]
        assert value is not None, "what has a slope was read"
        axis = 1 + stage.axes.index(stage.row_axis)
        common = min(count, value.shape[axis])
        shape = (*slope.shape[1 : axis + 1], count, *slope.shape[axis + 2 :])
        slope = _padded(tables, stage.name, slope, shape)
        found = here.pulled(stage, count, inputs, slope)
        if stage.name in dumps:
            cut = last_rows(tables, stage.name, value, common)
            kept = _padded(tables, stage.name, slope, cut.shape)
            if stage.linear:
                # <slope, x W'> = <slope W, x>, and slope W is there already
                ours, columns = _by_rows(stage, kept, cut)[0], None
                (source,) = _floats(stage)
                x = last_rows(tables, source, inputs[0], common)
                back = _padded(tables, source, found[source], x.shape)
                ours -= _by_rows(tables.layer_output, back, x)[0]
            else:
                exact = here.run(stage, count, inputs)
                error = cut - last_rows(tables, stage.name, exact, common)
                if stage.kind.masked:
                    error = jnp.where(pos.last(common).mask[:, None], error, 0)
                ours, columns = _by_rows(stage, kept, error)
            shares[stage.name] = ours, columns
        for name, each in found.items():
            slopes[name] = slopes[name] + each if name in slopes else each
    return shares, slopes, lost


def complete(
    rows: Sequence[Stage],
    config: Config,
    parameters: Parameters,
    pos: Positional,
    dumps: Mapping[str, Array],
    given: Mapping[str, Array | None],
) -> Array | None:
    """The value of the last of ``rows``, computed from what is there."""
    return _Layer(rows, config, parameters, pos, dumps, given).values[rows[-1].name]


@cache
def _compiled(
    function: Callable[..., Any], rows: tuple[Stage, ...], config: Config, unoptimised: bool
) -> Any:
    """One of the above under jit: called with what follows ``config``."""

    def program(*arguments: Any) -> Any:
        return function(rows, config, *arguments)

    fast = {"xla_backend_optimization_level": 0} if unoptimised else {}
    return jax.jit(program, compiler_options=runtime.compiler_options() | FRUGAL | fast)


def measure(replay: Replay, question: Question) -> Harm | None:
    """The shares of every stage of a trace, by one backward pass, one layer in memory at a time.

    None where the logits are not finite, or cannot be computed from the trace.

    Raises:
        UserError: a row that the trace does not have, or a token outside the vocabulary.
    """
    with replay.numerics():
        return _Backward(replay, question).run()


class _Backward:
    def __init__(self, replay: Replay, question: Question) -> None:
        self.replay, self.question = replay, question
        self.config, self.tables = replay.config, replay.tables
        self.shares: dict[Key, Share] = {}
        self.lost: Key | None = None

    def run(self) -> Harm | None:
        replay, tables, layers = self.replay, self.tables, self.config.num_hidden_layers
        inputs = self._missing_inputs()
        *middle, head = tables.end_stages
        names = self.config.tensor_names("end")
        end = {p: replay.weights.read(names[p]) for s in middle for p in s.parameters}
        before = tables.layer_output.name
        dumps = {s.name: d for s in middle if (d := replay.load(s.name, None)) is not None}
        if (output := replay.load(before, layers - 1)) is not None:
            dumps[before] = output
        given = {} if before in dumps else {before: inputs.get(layers)}
        source = head.inputs[0]
        x = dumps.get(source)
        if x is None:
            x = self._program(complete, tuple(middle))(end, replay.pos[False], dumps, given)
        if x is None:
            return None
        asked = self._head(head, np.asarray(x, np.float64))
        if asked is None:
            return None
        answer, slope = asked
        slopes = {source: slope}
        slopes = self._step(tuple(middle), None, end, dumps, given, slopes)
        with ThreadPoolExecutor(1) as reader:

            def fetch(layer: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
                return read_parameters(replay.weights, "layer", layer), replay.layer_dumps(layer)

            ready = reader.submit(fetch, layers - 1)
            for layer in reversed(range(layers)):
                parameters, dumps = ready.result()
                if layer:
                    ready = reader.submit(fetch, layer - 1)
                given = {} if LAYER_INPUT in dumps else {LAYER_INPUT: inputs.get(layer)}
                slopes = self._renamed(slopes, tables.layer_output)
                slopes = self._step(tables.layer_stages, layer, parameters, dumps, given, slopes)
        table, tokens = replay.start_parameters()
        dumps = {
            s.name: d for s in tables.start_stages if (d := replay.load(s.name, 0)) is not None
        }
        slopes = self._renamed(slopes, tables.first)
        self._step(tables.start_stages, 0, table, dumps | {TOKENS: tokens}, {}, slopes)
        if not all(np.isfinite(s.margin) for s in self.shares.values()):
            return None
        return Harm(shares=dict(reversed(self.shares.items())), lost=self.lost, **answer)

    def _program(self, function: Callable[..., Any], rows: tuple[Stage, ...]) -> Any:
        return _compiled(function, rows, self.config, self.replay.unoptimised)

    @staticmethod
    def _renamed(slopes: Mapping[str, Array], stage: Stage) -> dict[str, Array]:
        """The slope of what a layer reads, if there is one, under the name of who computed it."""
        return dict(zip([stage.name], slopes.values(), strict=False))

    def _missing_inputs(self) -> dict[int, Array | None]:
        """Layer -> its input, where that was not dumped; the number of layers stands for what comes
        after the last one. Computed from the layers before."""
        replay, tables, layers = self.replay, self.tables, self.config.num_hidden_layers
        found: dict[int, Array | None] = {}
        for layer in range(layers + 1):
            row = tables.first if layer == 0 else tables.layer_output
            key = (row.name, max(layer - 1, 0))
            if key in replay.trace.entries:
                continue
            if layer == 0:
                table, tokens = replay.start_parameters()
                start = {s.name: replay.load(s.name, 0) for s in tables.start_stages}
                dumps = {n: d for n, d in start.items() if d is not None} | {TOKENS: tokens}
                rows, parameters, given = tables.start_stages, table, {}
            else:
                dumps = replay.layer_dumps(layer - 1)
                rows, parameters = (
                    tables.layer_stages,
                    read_parameters(replay.weights, "layer", layer - 1),
                )
                given = {} if LAYER_INPUT in dumps else {LAYER_INPUT: found[layer - 1]}
            sliding = layer > 0 and self.config.sliding_layers[layer - 1]
            program = self._program(complete, rows)
            found[layer] = program(parameters, replay.pos[sliding], dumps, given)
        return found

    def _head(self, head: Stage, x: np.ndarray) -> tuple[dict[str, Any], Array] | None:
        """The answers of the logits alone, and the slope [Q, 1, rows, D] of the head's input."""
        length, rows = len(self.replay.trace.tokens), x.shape[1]
        dump = self.replay.load(head.name, None)
        there = rows if dump is None else min(rows, dump.shape[1])
        asked = self.question.row
        row = length - 1 if asked is None else asked + length if asked < 0 else asked
        if not length - there <= row < length:
            have = f"row {length - 1}" if there == 1 else f"rows {length - there} to {length - 1}"
            raise UserError(
                f"{self.replay.trace.path}: {head.name} of row {asked} is not in the trace, which "
                f"has {have}"
            )
        here = x[0, row - length]
        exact = np.empty(self.config.vocab_size)
        for first, weight in self._head_blocks():
            exact[first : first + len(weight)] = weight @ here
        logits = exact if dump is None else dump[0, row - length].astype(np.float64)
        if not np.isfinite(logits).all():
            return None
        question, size = self.question, self.config.vocab_size
        for token in (question.token, question.against):
            if token is not None and not 0 <= token < size:
                raise UserError(f"token {token}: the vocabulary has 0 to {size - 1}")
        token = int(logits.argmax()) if question.token is None else question.token
        others = logits.copy()
        others[token] = -np.inf
        against = int(others.argmax()) if question.against is None else question.against
        shifted = np.exp(logits - logits.max())
        probabilities = shifted / shifted.sum()
        slope = np.zeros((2, size))
        slope[0, token] += 1
        slope[0, against] -= 1
        slope[1] = -probabilities
        slope[1, token] += 1
        back = np.zeros((2, 1, rows, len(here)))
        for first, weight in self._head_blocks():
            back[:, 0, row - length] += slope[:, first : first + len(weight)] @ weight
        if dump is not None:
            by_token = slope * (logits - exact)
            self._keep(head, None, (by_token.sum(1, keepdims=True), by_token), ends=row + 1)
        tokenizer = self.replay.weights.tokenizer()

        def text(token: int) -> str | None:
            return tokenizer.decode([token]) if tokenizer else None

        answer = {
            "row": row,
            "token": token,
            "against": against,
            "text": text(token),
            "against_text": text(against),
            "margin": float(logits[token] - logits[against]),
            "logprob": float(np.log(probabilities[token])),
        }
        return answer, jnp.asarray(back)

    def _head_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        tensor = head_tensor(self.config)
        for first, rows in self.replay.weights.blocks(tensor, HEAD_ROWS):
            yield first, rows.astype(np.float64)

    def _step(
        self,
        rows: tuple[Stage, ...],
        layer: int | None,
        parameters: Mapping[str, Any],
        dumps: Mapping[str, Any],
        given: Mapping[str, Any],
        slopes: Mapping[str, Array],
    ) -> dict[str, Array]:
        needed = {name: parameters[name] for row in rows for name in row.parameters}
        sliding = layer is not None and self.config.sliding_layers[layer]
        program = self._program(backward, rows)
        found, slopes, lost = program(needed, self.replay.pos[sliding], dumps, given, slopes)
        for stage in reversed(rows):
            if stage.name in found:
                self._keep(stage, layer, found[stage.name], len(self.replay.trace.tokens))
            elif stage.name in lost and self.lost is None:
                self.lost = stage.name, layer
        return {name: slope for name, slope in slopes.items() if name not in found}

    def _keep(self, stage: Stage, layer: int | None, sums: tuple[Any, Any], ends: int) -> None:
        """The share of a stage, from sums over the rows and columns of its matrix. The positions
        end before ``ends``."""
        rows, columns = (None if x is None else np.asarray(x) for x in sums)
        assert rows is not None
        margin, logprob = rows.sum(-1)
        heads = stage.heads(self.config.dims(1))
        if columns is None:
            slices = {"position": rows[0]}
        else:
            slices = stage.fold(heads, rows[0], columns[0])
        self.shares[stage.name, layer] = Share(
            margin=float(margin),
            logprob=float(logprob),
            slices=slices,
            skipped_rows=ends - len(slices["position"]),
        )
