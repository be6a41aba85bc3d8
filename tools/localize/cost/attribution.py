"""What error costs the next token: each stage's share of a change of log-probability or margin.

The list of stages is a tape. With lambda = d(quantity)/d(stage), all of them from one backward pass
over the dumped values, <lambda, dump - y*> is what the error created at that stage does to the
quantity, to first order; the shares add up to the change against exact arithmetic. Two quantities
go together, in nats both: the margin of the chosen token over a rival, and its log-probability.

``Question.checked`` asks for the truth beside it: an exact forward, the mean of the slopes on the
way from it to the dump, with which the shares all but add up to the change, and the largest shares
tried by making that stage of the dump exact and computing what comes after it anew.

Sources: reverse accumulation (Linnainmaa 1976, who did it for rounding errors), the dual-weighted
residual (Becker & Rannacher 2001), attribution patching (Syed et al. 2023, arXiv 2310.10348).

Axis letters as in ``qwen_jax.models.ops``; Q quantities.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.estimate import head_tensor
from qwen_jax.forward import read_parameters
from qwen_jax.replay import Replay
from stages.architecture import LAYER_INPUT, TOKENS, Key, Stage
from stages.errors import UserError
from tools.localize.cost import autodiff
from tools.localize.cost.query import CHECKED, Question, work
from tools.localize.cost.result import PATCHED, SEEN, Harm, Share, Truth

HEAD_ROWS = 4096  # rows of the head at a time


def measure(replay: Replay, question: Question, clean: bool = True) -> Harm | None:
    """The shares of every stage of a trace, one layer in memory at a time.

    Arguments:
        clean: whether every stage of the trace may have the bits of float32. Its shares are then
            as small as what float32 rounds in a product (some 1e-6 nats).

    None where the logits or a slope are not finite, or cannot be computed from the trace.

    Raises:
        UserError: a row that the trace does not have, or a token outside the vocabulary.
    """
    with replay.numerics():
        return _Measuring(replay, question, clean).run()


class _Measuring:
    """One trace and one question.

    Attributes:
        missing: layer -> its input, where that was not dumped and so computed; the number of layers
            stands for what comes after the last one. None where it cannot be.
        right: the same of exact arithmetic; empty where that is not asked for.
    """

    def __init__(self, replay: Replay, question: Question, clean: bool) -> None:
        self.replay, self.question = replay, question
        self.config, self.arch = replay.config, replay.arch
        # Of coarser arithmetic float32 is enough, at half the time and memory. It is off by some
        # 1e-6 nats; a model that is small enough is checked without that.
        small = question.checked and work(self.config, len(replay.trace.tokens)) <= CHECKED
        self.dtype = autodiff.EXACT if clean or small else jnp.float32
        self.layers = self.config.num_hidden_layers
        *middle, self.head = self.arch.end_stages
        self.middle = tuple(middle)
        self.shares: dict[Key, Share] = {}
        self.lost: Key | None = None
        self.missing = self._missing_inputs()
        self.right = self._right_inputs() if question.checked else {}

    def run(self) -> Harm | None:
        end, dumps, given = self._end()
        value = self._program(autodiff.complete, self.middle)
        x = value(end, self._pos(None), dumps, given)
        if x is None:
            return None
        exact = None
        if self.right:
            given_right = {self.arch.layer_output.name: self.right[self.layers]}
            exact = value(end, self._pos(None), {}, given_right)
        asked = self._ask(np.asarray(x), None if exact is None else np.asarray(exact))
        if asked is None:
            return None
        slopes: Mapping[str, Array]
        answer, slopes = asked
        slopes = self._back(self.middle, None, end, dumps, given, slopes)
        for layer, parameters, dumps, given in self._each(reversed(range(self.layers))):
            slopes = self._renamed(slopes, self.arch.layer_output)
            slopes = self._back(self.arch.layer_stages, layer, parameters, dumps, given, slopes)
        slopes = self._renamed(slopes, self.arch.first)
        table, dumps = self._start()
        self._back(self.arch.start_stages, 0, table, dumps, {}, slopes)
        if not all(np.isfinite(s.margin) for s in self.shares.values()):
            return None
        self.shares = dict(reversed(self.shares.items()))
        found = Harm(shares=self.shares, lost=self.lost, **answer)
        return self._patch(found) if self.right else found

    # Reading

    def _start(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The parameters of the start stages; their dumps and the tokens."""
        table, tokens = self.replay.start_parameters()
        there = {s.name: self.replay.load(s.name, 0) for s in self.arch.start_stages}
        return table, {n: d for n, d in there.items() if d is not None} | {TOKENS: tokens}

    def _end(self) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
        """The parameters of the stages between layers and head, their dumps, and what was computed
        for those that are missing."""
        names = self.config.tensor_names("end")
        needed = [name for stage in self.middle for name in stage.parameters]
        parameters = {name: self.replay.weights.read(names[name]) for name in needed}
        before = self.arch.layer_output.name
        there = {s.name: self.replay.load(s.name, None) for s in self.middle}
        there[before] = self.replay.load(before, self.layers - 1)
        dumps = {name: dump for name, dump in there.items() if dump is not None}
        return parameters, dumps, {} if before in dumps else {before: self.missing[self.layers]}

    def _each(self, layers: Iterable[int]) -> Iterator[tuple[int, Any, Any, Any]]:
        """(layer, its parameters, its dumps, what was computed for its input if that is missing);
        the next one is read while one is worked on."""

        def fetch(layer: int) -> tuple[Any, Any]:
            parameters = read_parameters(self.replay.weights, "layer", layer)
            return parameters, self.replay.layer_dumps(layer)

        order = list(layers)
        with ThreadPoolExecutor(1) as reader:
            ready = [reader.submit(fetch, layer) for layer in order[:1]]
            for layer, following in zip_longest(order, order[1:]):
                parameters, dumps = ready.pop().result()
                if following is not None:
                    ready.append(reader.submit(fetch, following))
                given = {} if LAYER_INPUT in dumps else {LAYER_INPUT: self.missing[layer]}
                yield layer, parameters, dumps, given

    def _head_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        return self.replay.weights.blocks(head_tensor(self.config), HEAD_ROWS)

    # Computing

    def _program(self, function: Callable[..., Any], stages: tuple[Stage, ...]) -> Any:
        """Waits for what it computes: or layers would be read faster than they are worked on, and
        all be in memory."""
        program = autodiff.compiled(function, stages, self.config, self.dtype)
        return lambda *arguments: jax.block_until_ready(program(*arguments))

    def _pos(self, layer: int | None) -> Any:
        return self.replay.pos[layer is not None and self.config.sliding_layers[layer]]

    def _missing_inputs(self) -> dict[int, Array | None]:
        found: dict[int, Array | None] = {}
        program = self._program(autodiff.complete, self.arch.start_stages)
        entries = self.replay.trace.entries
        if (self.arch.first.name, 0) not in entries:
            found[0] = program(self._start()[0], self._pos(None), self._start()[1], {})
        program = self._program(autodiff.complete, self.arch.layer_stages)
        for layer in range(self.layers):
            if (self.arch.layer_output.name, layer) in entries:
                continue
            dumps = self.replay.layer_dumps(layer)
            given = {} if LAYER_INPUT in dumps else {LAYER_INPUT: found[layer]}
            parameters = read_parameters(self.replay.weights, "layer", layer)
            found[layer + 1] = program(parameters, self._pos(layer), dumps, given)
        return found

    def _right_inputs(self) -> dict[int, Array]:
        table, dumps = self._start()
        program = self._program(autodiff.complete, self.arch.start_stages)
        found = {0: program(table, self._pos(None), {TOKENS: dumps[TOKENS]}, {})}
        program = self._program(autodiff.complete, self.arch.layer_stages)
        for layer in range(self.layers):
            parameters = read_parameters(self.replay.weights, "layer", layer)
            given = {LAYER_INPUT: found[layer]}
            found[layer + 1] = program(parameters, self._pos(layer), {}, given)
        return found

    def _ask(
        self, x: np.ndarray, right: np.ndarray | None
    ) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """The answers of the logits alone, and the slope of the head's input.

        x, right: [1, rows, D], the head's input in the dump and in exact arithmetic.
        """
        replay, size = self.replay, self.config.vocab_size
        dump = replay.load(self.head.name, None)
        row = self._row(x.shape[1] if dump is None else min(x.shape[1], dump.shape[1]))
        after = row - len(replay.trace.tokens)
        inputs = np.stack([x[0, after]] + ([] if right is None else [right[0, after]]), 1)
        products = np.empty((size, inputs.shape[1]))
        for first, weight in self._head_blocks():
            products[first : first + len(weight)] = autodiff.times(weight, inputs, self.dtype)
        logits = products[:, 0] if dump is None else dump[0, after].astype(np.float64)
        exact = products[:, 1] if right is not None else logits
        if not (np.isfinite(logits).all() and np.isfinite(exact).all()):
            return None
        token, against = self._tokens(logits, exact)
        slope = np.zeros((2, size))
        slope[0, against], slope[0, token] = -1, 1
        for place, weighs in autodiff.GAUSS:
            slope[1] -= weighs * np.exp(_log_softmax(exact + place * (logits - exact)))
        slope[1, token] += 1
        back = np.zeros((2, 1, x.shape[1], x.shape[2]))
        for first, weight in self._head_blocks():
            part = np.ascontiguousarray(slope[:, first : first + len(weight)])
            back[:, 0, after] += np.asarray(autodiff.times(part, weight, self.dtype))
        if dump is not None:
            by_token = slope * (logits - products[:, 0])
            self._keep(
                self.head, None, (by_token.sum(1, keepdims=True), by_token, {}), ends=row + 1
            )
        tokenizer = replay.weights.tokenizer()
        text, against_text = (
            tokenizer.decode([t]) if tokenizer else None for t in (token, against)
        )
        truth = None
        if right is not None:
            truth = Truth(
                margin=float(exact[token] - exact[against]),
                logprob=float(_log_softmax(exact)[token]),
                first=int(exact.argmax()),
            )
        answer = {
            "row": row,
            "token": token,
            "against": against,
            "text": text,
            "against_text": against_text,
            "margin": float(logits[token] - logits[against]),
            "logprob": float(_log_softmax(logits)[token]),
            "truth": truth,
        }
        return answer, {self.head.inputs[0]: jnp.asarray(back, self.dtype)}

    def _row(self, there: int) -> int:
        """The row that is asked for, of which the last ``there`` are in the trace.

        Raises:
            UserError: it is none of them.
        """
        length, asked = len(self.replay.trace.tokens), self.question.row
        row = length - 1 if asked is None else asked + length if asked < 0 else asked
        if not length - there <= row < length:
            have = f"row {length - 1}" if there == 1 else f"rows {length - there} to {length - 1}"
            raise UserError(
                f"{self.replay.trace.path}: {self.head.name} of row {asked} is not in the trace, "
                f"which has {have}"
            )
        return row

    def _tokens(self, logits: np.ndarray, exact: np.ndarray) -> tuple[int, int]:
        """The token, and its rival: the one that exact arithmetic puts first, if that is another,
        else the best of the others.

        Raises:
            UserError: the vocabulary has no such token, or both are one.
        """
        token, against = self.question.token, self.question.against
        for given in (token, against):
            if given is not None and not 0 <= given < len(logits):
                raise UserError(f"token {given}: the vocabulary has 0 to {len(logits) - 1}")
        token = int(logits.argmax()) if token is None else token
        if against is None:
            against = int(exact.argmax())
            if against == token:
                others = logits.copy()
                others[token] = -np.inf
                against = int(others.argmax())
        if token == against:
            raise UserError(f"token {token} has no margin over itself; give another --rival")
        return token, against

    @staticmethod
    def _renamed(slopes: Mapping[str, Array], stage: Stage) -> dict[str, Array]:
        """The slope of what a layer reads, if there is one, under the name of who computed it."""
        return dict(zip([stage.name], slopes.values(), strict=False))

    def _back(
        self,
        stages: tuple[Stage, ...],
        layer: int | None,
        parameters: Mapping[str, Any],
        dumps: Mapping[str, Any],
        given: Mapping[str, Any],
        slopes: Mapping[str, Array],
    ) -> Mapping[str, Array]:
        """Carry slopes back through some stages, and keep the shares. Returns the slopes of what
        came before."""
        right: dict[str, Array] = {}
        if self.right and stages is not self.arch.start_stages:
            before = self.arch.layer_output.name if layer is None else LAYER_INPUT
            right = {before: self.right[self.layers if layer is None else layer]}
        needed = {name: parameters[name] for stage in stages for name in stage.parameters}
        if right:
            # by itself, or every weight of a layer would be in memory in float32 or float64 at once
            right = self._program(autodiff.values, stages)(needed, self._pos(layer), {}, right)
        program = self._program(autodiff.backward, stages)
        found, left, lost = program(needed, self._pos(layer), dumps, given, slopes, right)
        for stage in reversed(stages):
            if stage.name in found:
                self._keep(stage, layer, found[stage.name], len(self.replay.trace.tokens))
            elif stage.name in lost and self.lost is None:
                self.lost = stage.name, layer
        return left

    def _keep(self, stage: Stage, layer: int | None, sums: tuple[Any, ...], ends: int) -> None:
        """The share of a stage, from sums over the rows and columns of its matrix. The positions
        end before ``ends``."""
        rows, columns = (None if x is None else np.asarray(x) for x in sums[:2])
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
            tensors={name: float(parts[0]) for name, parts in sums[2].items()},
            skipped_rows=ends - len(slices["position"]),
        )

    # Patching

    def _patch(self, found: Harm) -> Harm:
        """The largest shares, tried: everything after the stage is computed anew, with the error
        that each later stage created in the dump."""
        tried = [key for key, share in found.largest if abs(share.margin) >= SEEN][:PATCHED]
        if not tried:
            return found
        count = len(tried)

        def keep(stages: tuple[Stage, ...], layer: int | None) -> dict[str, np.ndarray]:
            return {
                s.name: np.array([(s.name, layer) != key for key in tried], self.dtype)
                for s in stages
            }

        def moved(value: Any) -> Array:
            return jnp.broadcast_to(value, (count, *value.shape[1:])).astype(self.dtype)

        stages, (table, dumps) = self.arch.start_stages, self._start()
        program = self._program(autodiff.forward, stages)
        x = moved(program(table, self._pos(None), dumps, {}, {}, keep(stages, 0)))
        stages = self.arch.layer_stages
        program = self._program(autodiff.forward, stages)
        for layer, parameters, dumps, given in self._each(range(self.layers)):
            pos, before = self._pos(layer), {LAYER_INPUT: x}
            x = program(parameters, pos, dumps, given, before, keep(stages, layer))
        parameters, dumps, given = self._end()
        program = self._program(autodiff.forward, self.middle)
        before = {self.arch.layer_output.name: x}
        x = program(parameters, self._pos(None), dumps, given, before, keep(self.middle, None))
        margins = self._margins(found, np.asarray(x), keep((self.head,), None)[self.head.name])
        shares = dict(found.shares)
        for key, margin in zip(tried, margins, strict=True):
            shares[key] = replace(shares[key], patched=found.margin - float(margin))
        return replace(found, shares=shares)

    def _margins(self, found: Harm, x: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """The margins [P] of the head's inputs x [P, rows, D], whose error of its own is kept."""
        after = found.row - len(self.replay.trace.tokens)
        two = [found.token, found.against]
        tensor = head_tensor(self.config)
        weight = self.replay.weights.gather(tensor, np.array(two)).astype(np.float64)
        own = self.shares.get((self.head.name, None))
        return x[:, after] @ (weight[0] - weight[1]) + keep * (own.margin if own else 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
