"""Local error at the cost of reading the values: products are probed, not made again.

Most of a replay in float64 is products of matrices, and a product y* = x A need not be made to be
judged. With a vector r of random signs, (y - x A) r = y r - x (A r), whose square has the squared
error of its row as mean; a vector of signs from the left does the same for columns. The sizes
that error is measured against factor exactly: summed over columns, x∘x times A∘A is x∘x times the
row sums of A∘A. So a weight is read once, in blocks, in the format it lies in. A query sees an
interval of the keys: there A r is a difference of two prefix sums.

All is in float64; what is random is the estimate of a slice's squared error, a mean of ``PROBES``
squares. Where the error is spread over many elements this has the distribution of chi^2: 0.36 bits
of deviation, and in one slice of a million 1.3 bits too many or 1.2 too few; where it is in few
elements, less. The error of a stage adds many slices up.

Stages that are no products are computed exactly, some rows at a time: their values stay in the
cache, and memory does not grow with the square of the length. NaN and infinity make sums that are
no numbers, and a slice of zeros an error as large as its values: what is odd in such a way has to
be measured again by ``replay.run``, which counts them.

Sources: Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Freivalds
1977, on checking a product with a random vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax import runtime
from qwen_jax.config import Config
from qwen_jax.local_error import (
    EXACT,
    ErrorSums,
    allowance,
    over_root,
    row_axis,
    size_squared,
    smallest,
    stage_value,
)
from qwen_jax.models.ops import Positional, linear
from qwen_jax.weights.base import Weights
from stages.architecture import SCORES, Stage

PROBES = 8  # vectors from each side
BLOCK = 1 << 19  # values of a weight that are probed at once, about
CHUNK = 1 << 19  # values of a stage that are measured at once, about: what a cache holds
FEWEST = 16  # rows of a chunk
LONG = 1024  # key positions from which on those that no query of a chunk sees are left out

Jit = Callable[..., Any]  # of a function of arrays


@dataclass(frozen=True)
class Reading:
    """What a linear stage multiplies in some arithmetic.

    Attributes:
        inputs: x [rows, in] -> for each of the stage's weights what is multiplied with it, and the
            square of what that may be off by, both in float64.
        weights: for each of them what is done to some of its rows; None is nothing.
    """

    inputs: Callable[[np.ndarray], Sequence[tuple[np.ndarray, np.ndarray]]]
    weights: Sequence[Callable[[np.ndarray], np.ndarray] | None]


class Estimate(NamedTuple):
    """The sums of a stage as it is, and as each of its readings has it."""

    plain: ErrorSums
    read: tuple[ErrorSums, ...] = ()


class Part(NamedTuple):
    """What the rows of a product are probed with.

    Attributes:
        signs: [k, columns], r.
        right: A r: [k, ...] in the axes of the first input without T; of scores, where A differs
            from row to row, [T, K, H, k].
        squares: the same of A∘A and one vector of ones: [...]; of scores [T, K, H].
        left: [k, T]; of scores [k, N, T].
    """

    signs: Any
    right: Any
    squares: Any
    left: Any


@lru_cache(maxsize=64)
def random_signs(purpose: int, *shape: int) -> np.ndarray:
    """-1 and 1 in float64, for each purpose and shape always the same."""
    random = np.random.default_rng([purpose, *shape])
    return 2.0 * random.integers(0, 2, shape) - 1


def interval(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(first, end) of the True entries in each row of [rows, columns]; None unless each row has
    some, side by side."""
    first = mask.argmax(1)
    end = mask.shape[1] - mask[:, ::-1].argmax(1)
    return (first, end) if (mask.sum(1) == end - first).all() else None


# --- some rows of some stages, under jit


def measure_rows(
    stages: Sequence[Stage],
    config: Config,
    dtype: Any,
    parameters: Mapping[str, Any],
    pos: Positional,
    angles: Array,
    dumps: Mapping[str, Array],
    parts: Mapping[str, Part],
    counted: Array,
) -> dict[str, dict[str, Array]]:
    """Sums of squares over the rows and columns of every stage of ``stages``, for some of its rows.

    Arguments:
        dumps: of the stages and their inputs, with a batch axis: these rows alone, and of keys
            those that one of them may see.
        counted: [rows], 0 for a row that another call has: it is no part of what is not by row.

    Returns:
        stage -> name -> sums: ``*_rows`` and ``*_columns`` as of ``ErrorSums``, those of the error
        of a product aside; for these ``error_probes`` [k], what each of the signs makes of the
        whole; ``left`` [k, columns], signs times the dump, and of a linear stage ``signed_rows``
        [k, rows], the dump times signs; ``inputs`` and ``input_squares``, signs
        times the first input and ones times its square.
    """
    found = {}
    for stage in stages:
        dump = dumps[stage.name]
        inputs = [dumps[name] for name in stage.inputs]
        if stage.name in parts:
            probe = _probe_scores if stage.kind is SCORES else _probe_rows
            found[stage.name] = probe(stage, config, pos, inputs, dump, parts[stage.name], counted)
            continue
        values = [x.astype(EXACT) for x in inputs]
        weights = [parameters[name].astype(EXACT) for name in stage.parameters]
        exact = stage_value(stage, config, pos, values, weights)
        size = size_squared(stage, config, pos, values, weights, exact).astype(EXACT)
        squares = {
            "error": jnp.square(dump.astype(EXACT) - exact),
            "scale": size + jnp.square(exact),
        }
        if stage.kind.allows:
            allowed = allowance(stage, config, pos, angles, values, exact, dtype)
            squares["expected"] = jnp.square(allowed)
        found[stage.name] = {}
        for name, square in squares.items():
            found[stage.name] |= _summed(name, stage.matrix(square), counted)
    return found


def _summed(name: str, matrix: Array, counted: Array) -> dict[str, Array]:
    """Sums over rows and columns, as products: one pass each."""
    weights = jnp.tile(counted, len(matrix) // len(counted))
    return {
        f"{name}_rows": matrix @ jnp.ones(matrix.shape[1], matrix.dtype),
        f"{name}_columns": weights.astype(matrix.dtype) @ matrix,
    }


def _probe_rows(
    stage: Stage, config: Config, pos: Positional, inputs: Sequence[Array], dump: Array, part: Part,
    counted: Array,
) -> dict[str, Array]:  # fmt: skip
    """A product that is the same for every row of its first input: linear, or a weighted sum."""
    x = jnp.moveaxis(inputs[0], row_axis(config.arch.cached, stage.inputs[0]), 1)[0]
    x, x2 = x.astype(EXACT), jnp.square(x.astype(jnp.float32))
    y = stage.matrix(dump.astype(EXACT))
    others = list(range(1, x.ndim))
    signed = y @ part.signs.T
    probed = signed - jnp.tensordot(x, part.right, (others, others))
    terms = jnp.tensordot(x2, part.squares.astype(jnp.float32), (others, [n - 1 for n in others]))
    left = part.left * counted
    found = _summed("scale", jnp.square(y), counted)
    found["scale_rows"] += terms
    return (
        found
        | {
            "error_rows": jnp.square(probed).mean(1),
            "error_probes": counted @ jnp.square(probed),
            "left": left @ y,
            "inputs": jnp.tensordot(left, x, 1),
            "input_squares": jnp.tensordot(counted.astype(jnp.float32), x2, 1),
        }
        | ({"signed_rows": signed.T} if stage.linear else {})
    )


def _probe_scores(
    stage: Stage, config: Config, pos: Positional, inputs: Sequence[Array], dump: Array, part: Part,
    counted: Array,
) -> dict[str, Array]:  # fmt: skip
    """Scores: every row is a product with the keys that it sees."""
    narrow = jnp.where(pos.mask[0], dump[0].astype(jnp.float32), 0)  # [N, T, S]
    y = narrow.astype(EXACT)
    q = inputs[0][0].astype(EXACT)

    def scores(q: Array, keys: Array) -> Array:
        """q [N, H] and keys [K, H, k] -> [N, k]"""
        keys = jnp.moveaxis(keys, 2, 0)
        return stage_value(stage, config, pos, [q[None, None], keys[None]], ())[0, :, 0]

    by_row = jax.vmap(scores, (0, 0), 1)
    probed = y @ part.signs.T - by_row(q, part.right)
    terms = by_row(jnp.square(q), part.squares[..., None])[..., 0] * over_root(stage, config)
    left = (part.left * counted).reshape(len(part.left), -1)
    found = _summed("scale", jnp.square(narrow).reshape(-1, y.shape[-1]), counted)
    found["scale_rows"] += terms.reshape(-1)
    return found | {
        "error_rows": jnp.square(probed).mean(-1).reshape(-1),
        "error_probes": jnp.tensordot(counted, jnp.square(probed).sum(0), 1),
        "left": left @ y.reshape(-1, y.shape[-1]),
    }


def gather(x: Array, left: Array) -> tuple[Array, Array]:
    """x [1, T, in] and left [k, T] -> its sketches [1, k, in] and the sum of its squares
    [1, 1, in]."""
    return (left @ x[0].astype(EXACT))[None], jnp.square(x.astype(jnp.float32)).sum(1)[:, None]


def probe_weight(weight: Array, x: Array, x2: Array, signs: Array) -> tuple[Array, ...]:
    """Some rows of a linear weight [out, in] from both sides: ``_left`` and ``_right`` of it."""
    narrow = weight.astype(jnp.float32)
    weight, squares = weight.astype(EXACT), narrow * narrow
    product, of_squares = (partial(linear, weight=w) for w in (weight, squares))
    return *_left(product, of_squares, x, x2), *_right(product, of_squares, x.shape, signs)


def _left(
    product: Callable[[Array], Array], of_squares: Callable[[Array], Array], x: Array, x2: Array
) -> tuple[Array, Array]:
    """x A [k, columns] and x2 (A∘A) [n, columns]. product, of_squares: x -> x A and x -> x (A∘A),
    of any number of rows; x [1, k, in], x2 [1, n, in]: sketches of the input, see ``gather``."""
    return product(x)[0], of_squares(x2)[0]


def _right(
    product: Callable[[Array], Array],
    of_squares: Callable[[Array], Array],
    shape: tuple[int, ...],
    signs: Array,
) -> tuple[Array, Array]:
    """A r [k, ...] and (A∘A) 1 [...], in the axes of x without its rows. shape: of x. signs:
    [k, columns], r."""

    def back(function: Callable[[Array], Array], signs: Array) -> Array:
        x = jax.ShapeDtypeStruct((*shape[:-2], len(signs), shape[-1]), signs.dtype)
        (found,) = jax.linear_transpose(function, x)(signs[None])
        return jnp.moveaxis(found, -2, 1)[0]

    return back(product, signs), back(of_squares, jnp.ones((1, signs.shape[1]), jnp.float32))[0]


def mix(
    stage: Stage, config: Config, values: Array
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """A weighted sum as a product of its first input, and the same of squares. values [1, S, ...]
    in float64."""

    def of(values: Array) -> Callable[[Array], Array]:
        nowhere = Positional(*[jnp.zeros(())] * 3)
        return lambda x: stage_value(stage, config, nowhere, [x, values], ())

    return of(values), of(jnp.square(values.astype(jnp.float32)))


def mix_right(stage: Stage, config: Config, values: Array, signs: Array) -> tuple[Array, Array]:
    """``_right`` of a weighted sum."""
    keys = config.num_attention_heads, 1, values.shape[1]
    return _right(*mix(stage, config, values.astype(EXACT)), (1, *keys), signs)


def mix_left(
    stage: Stage, config: Config, values: Array, inputs: Array, squares: Array
) -> tuple[Array, Array]:
    """``_left`` of a weighted sum. inputs [k, N, S], squares [N, S]."""
    product, of_squares = mix(stage, config, values.astype(EXACT))
    left = _left(product, of_squares, jnp.swapaxes(inputs, 0, 1)[None], squares[None, :, None])
    return left[0], left[1][0]


def score_columns(
    stage: Stage, config: Config, queries: Array, squares: Array, keys: Array
) -> tuple[Array, Array]:
    """What ``left`` of scores should be, [k, S], and the sizes of their columns, [S].

    Arguments:
        queries: [S, K, H, k], signs times q summed over the rows that see a key, and over the
            heads that share it; ``squares`` [S, K, H] the same of squares without signs.
        keys: [1, S, K, H].
    """

    def scores(q: Array, key: Array) -> Array:
        """q [K, H, k] and key [K, H] -> [k]"""
        inputs = [jnp.moveaxis(q, 2, 0)[None], key[None, None]]
        nowhere = Positional(*[jnp.zeros(())] * 3)
        return stage_value(stage, config, nowhere, inputs, ())[0, :, :, 0].sum(0)

    key = keys[0].astype(EXACT)
    by_key = jax.vmap(scores)
    sizes = by_key(squares[..., None], jnp.square(key))[:, 0] * over_root(stage, config)
    return by_key(queries, key).T, sizes


# --- all rows, from the host


@dataclass(frozen=True)
class Chunk:
    """Rows ``first`` to ``stop`` of a group's, of which those from ``counted`` on are new; and the
    keys that one of them may see."""

    first: int
    counted: int
    stop: int
    keys: slice


class Screen:
    """Measures stages of one layer that are dumped with all of their inputs.

    Arguments:
        pos: of ``ops.positional_by_layer``, in host memory. angles: [T, H/2].
        options: of the compiler.
        readings: linear stage -> arithmetics that it is measured in as well.
    """

    def __init__(
        self,
        weights: Weights,
        pos: Mapping[bool, Positional],
        angles: np.ndarray,
        dtype: np.dtype,
        options: Mapping[str, Any],
        readings: Mapping[str, Sequence[Reading]] | None = None,
    ) -> None:
        self.readings = readings or {}
        self.weights, self.config, self.pos, self.angles = weights, weights.config, pos, angles
        self.arch, self.dtype = weights.config.arch.cached, dtype
        self.options = tuple(options.items())
        self._seen: dict[tuple[bool, int], Any] = {}

    def _jit(self, function: Callable[..., Any], *static: Any) -> Jit:
        return _jitted(function, static, self.options)

    def possible(self, stage: Stage, sliding: bool, dumps: Mapping[str, np.ndarray]) -> bool:
        """Whether a stage can be measured so: of scores, each query has to see keys side by side,
        and each key queries; and in so few rows probes save nothing."""
        if stage.kind is not SCORES:
            return True
        count = self._count(stage, dumps)
        return count > PROBES and None not in self._visible(sliding, count)

    def _visible(self, sliding: bool, count: int) -> Any:
        """The keys that each of the last ``count`` rows sees, and the rows that see each key."""
        key = sliding, count
        if key not in self._seen:
            mask = np.asarray(self.pos[sliding].mask)[0, -count:]
            # in a sliding window the last rows do not see the first keys
            seen = np.flatnonzero(mask.any(0))
            rows = interval(mask.T[seen])
            if rows is not None:
                found = np.zeros((2, mask.shape[1]), int)
                found[:, seen] = rows
                rows = found[0], found[1]
            self._seen[key] = interval(mask), rows
        return self._seen[key]

    def _count(self, stage: Stage, dumps: Mapping[str, np.ndarray]) -> int:
        """How many rows there are of a stage and of its inputs."""
        names = [stage.name, *(name for name in stage.inputs if name not in stage.keys)]
        return min(dumps[name].shape[row_axis(self.arch, name)] for name in names)

    def measure(
        self,
        stages: Sequence[Stage],
        sliding: bool,
        dumps: Mapping[str, np.ndarray],
        tensors: Mapping[str, str],
    ) -> dict[str, Estimate]:
        """The sums of each stage, those of products estimated; nothing is counted in them.

        Arguments:
            dumps: stage -> dump with a batch axis, and their inputs.
            tensors: parameter -> name of its tensor.
        """
        groups: dict[tuple[int, bool], list[Stage]] = {}
        for stage in stages:
            at_keys = bool(stage.keys) or {"T", "S"} <= {*stage.axes}
            groups.setdefault((self._count(stage, dumps), at_keys), []).append(stage)
        found: dict[str, Estimate] = {}
        for (count, at_keys), some in groups.items():
            group = _Group(self, tuple(some), sliding, count, at_keys, dumps, tensors)
            with np.errstate(invalid="ignore", over="ignore"):  # of dumps that are not finite
                found |= group.measure()
        return found


@dataclass
class _Read:
    """A reading of one stage: for each weight its inputs (see ``Reading``), and the products with
    sketches, as ``_left`` [k, out], [out] and ``_right`` [k, in], [in] have them."""

    inputs: Sequence[tuple[np.ndarray, np.ndarray]]
    left: list[tuple[np.ndarray, np.ndarray]]
    right: list[tuple[np.ndarray, np.ndarray]]


@cache
def _jitted(function: Callable[..., Any], static: Any, options: Any) -> Jit:
    return jax.jit(partial(function, *static), compiler_options=dict(options))


class _Group:
    """Stages of one layer with as many rows, the last ones."""

    def __init__(
        self,
        screen: Screen,
        stages: tuple[Stage, ...],
        sliding: bool,
        count: int,
        at_keys: bool,
        dumps: Mapping[str, np.ndarray],
        tensors: Mapping[str, str],
    ) -> None:
        self.screen, self.stages, self.sliding, self.count = screen, stages, sliding, count
        self.at_keys, self.tensors = at_keys, tensors
        self.weights, self.config, self.arch = screen.weights, screen.config, screen.arch
        self.keyed = {name for stage in stages for name in stage.keys}
        self.dumps: dict[str, np.ndarray] = {}
        for stage in stages:
            for name in (stage.name, *stage.inputs):
                dump, axis = dumps[name], row_axis(self.arch, name)
                last = dump if name in self.keyed else _cut(dump, axis, -count, None)
                self.dumps[name] = last
        self.found: dict[str, dict[str, np.ndarray]] = {stage.name: {} for stage in stages}
        self.odd: dict[tuple[str, int], bool] = {}  # dump, first row -> see _nonzero_outside
        self.parts: dict[str, Part] = {}
        self.products: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.read: dict[str, list[_Read]] = {}

    def measure(self) -> dict[str, Estimate]:
        for stage in self.stages:
            if stage.kind.sums_products:
                self._prepare(stage)
        parameters = {
            name: self.weights.read(self.tensors[name])
            for stage in self.stages
            for name in stage.parameters
            if not stage.linear
        }
        program = self.screen._jit(measure_rows, self.stages, self.config, self.screen.dtype)
        angles = self.screen.angles[-self.count :]
        for chunk in self._chunks():
            here = slice(chunk.first, chunk.stop)
            counted = np.arange(chunk.first, chunk.stop) >= chunk.counted
            dumps = {name: self._cut(name, dump, chunk) for name, dump in self.dumps.items()}
            parts = {name: self._part(name, part, chunk) for name, part in self.parts.items()}
            found = program(
                parameters, self._positional(chunk), angles[here], dumps, parts,
                counted.astype(np.float64),
            )  # fmt: skip
            for stage in self.stages:
                self._add(stage, chunk, found[stage.name])
        return {stage.name: self._estimate(stage) for stage in self.stages}

    def _estimate(self, stage: Stage) -> Estimate:
        plain, found = self._sums(stage), self.found[stage.name]
        return Estimate(
            plain,
            tuple(self._of_reading(each, plain, found) for each in self.read.get(stage.name, ())),
        )

    def _of_reading(
        self, read: "_Read", plain: ErrorSums, found: Mapping[str, np.ndarray]
    ) -> ErrorSums:
        """The sums of a linear stage whose inputs and weights are read in another way."""
        made = (x @ right.T for (x, _), (right, _) in zip(read.inputs, read.right, strict=True))
        off = np.square(found["signed_rows"].T - sum(made))
        error = np.square(found["left"] - np.concatenate([left for left, _ in read.left], 1))
        unsure = (u @ of for (_, u), (_, of) in zip(read.inputs, read.right, strict=True))
        rows, columns = sum(unsure), np.concatenate([u for _, u in read.left])
        if self.count <= PROBES:
            of_rows, of_columns = error.sum(1), error.sum(0)
        else:
            of_columns = error.mean(0)
            of_rows = off.mean(1) * _better(off.sum(0), error.sum(1))
        return plain.replace(
            error_rows=of_rows,
            error_columns=of_columns,
            expected_rows=plain.expected_rows + rows,
            expected_columns=plain.expected_columns + columns,
        )

    # --- chunks

    def _chunks(self) -> Iterator[Chunk]:
        """All rows, as many at a time as the cache holds; every time as many, so that one program
        does: the last ones are not all new."""
        names = {name for stage in self.stages for name in (stage.name, *stage.inputs)}
        width = max(self.dumps[n].size // self.count for n in names if n not in self.keyed)
        count = self.count
        parts = -(-count // max(FEWEST, CHUNK // width))
        step = -(-count // parts)
        mask = np.asarray(self.screen.pos[self.sliding].mask)[0, -count:]
        for start in range(0, count, step):
            stop = min(start + step, count)
            first = max(0, stop - step)
            keys = _some_keys(mask[first:stop]) if self.at_keys else slice(0, 0)
            yield Chunk(first, start, stop, keys)

    def _cut(self, name: str, dump: np.ndarray, chunk: Chunk) -> np.ndarray:
        """The rows of a chunk, and the keys."""
        if name in self.keyed:
            return _cut(dump, row_axis(self.arch, name), chunk.keys.start, chunk.keys.stop)
        axes = self.arch.axes_of(name)
        if {"T", "S"} <= {*axes}:
            dump = _cut(dump, 1 + axes.index("S"), chunk.keys.start, chunk.keys.stop)
        return _cut(dump, row_axis(self.arch, name), chunk.first, chunk.stop)

    def _positional(self, chunk: Chunk) -> Positional:
        pos, here = self.screen.pos[self.sliding], slice(chunk.first, chunk.stop)
        cos, sin, mask = (np.asarray(x)[:, -self.count :][:, here] for x in
                          (pos.cos, pos.sin, pos.mask))  # fmt: skip
        return Positional(cos, sin, mask[:, :, chunk.keys])  # type: ignore[arg-type]

    def _part(self, name: str, part: Part, chunk: Chunk) -> Part:
        here, stage = slice(chunk.first, chunk.stop), self.arch.stage[name]
        signs, right, squares, left = part
        if stage.kind is SCORES:
            signs, right, squares = signs[:, chunk.keys], right[here], squares[here]
        elif stage.keys:
            right, squares = right[..., chunk.keys], squares[..., chunk.keys]
        return Part(signs, right, squares, left[..., here])

    def _add(self, stage: Stage, chunk: Chunk, sums: Mapping[str, Array]) -> None:
        """Put the rows of a chunk in their place, and add up the rest."""
        total = self.found[stage.name]
        new = chunk.counted - chunk.first
        length = len(self.screen.angles)
        for name, each in sums.items():
            value = np.asarray(each, np.float64)
            if name.endswith("_rows"):
                grid = value.reshape(-1, chunk.stop - chunk.first)  # [N or 1, rows]
                rows = total.setdefault(name, np.zeros((len(grid), self.count)))
                rows[:, chunk.counted : chunk.stop] = grid[:, new:]
                continue
            of = stage.inputs[0] if name.startswith("input") else stage.name
            if name != "error_probes" and "S" in self.arch.axes_of(of) and self.at_keys:
                whole = total.setdefault(name, np.zeros((*value.shape[:-1], length)))
                whole[..., chunk.keys] += value
            else:
                total[name] = total.get(name, 0) + value
        if stage.name in self.dumps and self._nonzero_outside(stage, chunk):
            total["error_rows"][:] = np.nan

    def _nonzero_outside(self, stage: Stage, chunk: Chunk) -> bool:
        """Whether weights of a sum are not zero where no query of a chunk sees a key."""
        for name in (stage.name, stage.inputs[0]):
            if not {"T", "S"} <= {*self.arch.axes_of(name)} or self.arch.stage[name].kind.masked:
                continue
            key = name, chunk.counted
            if key not in self.odd:
                axis = row_axis(self.arch, name)
                row = _cut(self.dumps[name], axis, chunk.counted, chunk.stop)
                outside = row[..., : chunk.keys.start], row[..., chunk.keys.stop :]
                self.odd[key] = any(x.size and not (x.max() == x.min() == 0) for x in outside)
            if self.odd[key]:
                return True
        return False

    # --- products

    def _left(self, *shape: int) -> np.ndarray:
        """Signs for rows; of few rows each is looked at by itself."""
        return np.eye(self.count) if self.count <= PROBES else random_signs(0, PROBES, *shape)

    def _prepare(self, stage: Stage) -> None:
        prepare = self._prepare_linear if stage.linear else self._prepare_mix
        if stage.kind is SCORES:
            prepare = self._prepare_scores
        prepare(stage)

    def _prepare_linear(self, stage: Stage) -> None:
        left = self._left(self.count)
        x = self.dumps[stage.inputs[0]]
        sketch, squares = 0, 0
        for start in range(0, self.count, step := max(FEWEST, CHUNK // x.shape[-1])):
            part = slice(start, start + step)
            gathered = self.screen._jit(gather)(x[:, part], left[:, part])
            sketch, squares = sketch + gathered[0], squares + gathered[1]
        signs = random_signs(1, PROBES, self.dumps[stage.name].shape[-1])
        readings = self.screen.readings.get(stage.name, ())
        read = [_Read(each.inputs(x[0]), [], []) for each in readings]
        self.read[stage.name] = read
        plain, first = _Read([], [], []), 0
        for place, parameter in enumerate(stage.parameters):
            sketches = [(np.asarray(sketch), np.asarray(squares))]
            sketches += [((left @ x)[None], u.sum(0)[None, None])
                         for x, u in (each.inputs[place] for each in read)]  # fmt: skip
            rounded = [None, *(each.weights[place] for each in readings)]
            count = self.weights.shapes[self.tensors[parameter]][0]
            found = self._probed(
                self.tensors[parameter], sketches, rounded, signs[:, first : first + count]
            )
            first += count
            for each, (of_left, of_right) in zip((plain, *read), found, strict=True):
                each.left.append(of_left)
                each.right.append(of_right)
        lefts, sizes = zip(*plain.left, strict=True)
        rights, squared = zip(*plain.right, strict=True)
        self.products[stage.name] = np.concatenate(lefts, 1), np.concatenate(sizes)
        self.parts[stage.name] = Part(signs, sum(rights), sum(squared), left)

    def _probed(
        self, tensor: str, sketches: Sequence[tuple[np.ndarray, np.ndarray]],
        rounded: Sequence[Callable[[np.ndarray], np.ndarray] | None], signs: np.ndarray,
    ) -> list[tuple[Any, Any]]:  # fmt: skip
        """A weight times each of some sketches of inputs, and times signs: (``_left``, ``_right``)
        for each. Those that read it as it is are multiplied together."""
        count, width = self.weights.shapes[tensor]
        probe, size = self.screen._jit(probe_weight), sketches[0][0].shape[1]
        groups = [[n for n, change in enumerate(rounded) if change is None]]
        groups += [[n] for n, change in enumerate(rounded) if change is not None]
        xs = [tuple(np.concatenate([sketches[n][i] for n in some], 1) for i in (0, 1))
              for some in groups]  # fmt: skip
        lefts: list[list[Any]] = [[] for _ in rounded]
        rights: list[Any] = [(0, 0) for _ in rounded]
        for start, block in self.weights.blocks(tensor, runtime.even_step(count, BLOCK // width)):
            some_signs = signs[:, start : start + len(block)]
            for some, (x, x2) in zip(groups, xs, strict=True):
                change = rounded[some[0]]
                read = block if change is None else change(np.asarray(block, np.float32))
                left, sizes, *right = map(np.asarray, probe(read, x, x2, some_signs))
                for place, n in enumerate(some):
                    lefts[n].append((left[place * size : (place + 1) * size], sizes[place]))
                    rights[n] = tuple(a + b for a, b in zip(rights[n], right, strict=True))
        made = []
        for parts, right in zip(lefts, rights, strict=True):
            products, squares = zip(*parts, strict=True)
            made.append(((np.concatenate(products, 1), np.concatenate(squares)), right))
        return made

    def _prepare_mix(self, stage: Stage) -> None:
        signs = random_signs(1, PROBES, self.dumps[stage.name].shape[-1])
        program = self.screen._jit(mix_right, stage, self.config)
        right, squares = program(self.dumps[stage.inputs[1]], signs)
        part = Part(signs, np.asarray(right), np.asarray(squares), self._left(self.count))
        self.parts[stage.name] = part

    def _prepare_scores(self, stage: Stage) -> None:
        """Prefix sums, over keys for queries and over queries for keys."""
        keys, queries = self.screen._visible(self.sliding, self.count)
        q, k = (self.dumps[name][0].astype(np.float64) for name in stage.inputs)
        length, shared, size = k.shape
        signs = random_signs(1, PROBES, length)
        left = random_signs(0, PROBES, q.shape[1], self.count)
        grouped = q.reshape(len(q), shared, -1, size)
        by_group = left.reshape(PROBES, shared, -1, len(q))
        mixed = np.einsum("tkgh,pkgt->tkhp", grouped, by_group)
        of_keys = _between(k[..., None] * signs.T[:, None, None], keys)
        of_squares = _between(np.square(k), keys)
        self.parts[stage.name] = Part(signs, of_keys, of_squares, left)
        q2 = _between(np.square(grouped).sum(2), queries)
        program = self.screen._jit(score_columns, stage, self.config)
        product, sizes = program(_between(mixed, queries), q2, self.dumps[stage.inputs[1]])
        self.products[stage.name] = np.asarray(product), np.asarray(sizes)

    def _sums(self, stage: Stage) -> ErrorSums:
        """The sums of a stage over all chunks."""
        found = self.found[stage.name]
        if stage.name in self.parts:
            if stage.name not in self.products:
                program = self.screen._jit(mix_left, stage, self.config)
                values = self.dumps[stage.inputs[1]]
                product, sizes = program(values, found["inputs"], found["input_squares"])
                self.products[stage.name] = np.asarray(product), np.asarray(sizes)
            product, sizes = self.products[stage.name]
            error = np.square(found["left"] - product)
            exact = self.count <= PROBES
            found["error_columns"] = error.sum(0) if exact else error.mean(0)
            if exact and not np.isnan(found["error_rows"]).any():
                found["error_rows"] = error.sum(1)
            else:
                found["error_rows"] = found["error_rows"] * _better(
                    found["error_probes"], error.sum(1)
                )
            found["scale_columns"] = found["scale_columns"] + sizes
        rows = {
            name: found[f"{name}_rows"].reshape(-1)
            for name in ("error", "scale", "expected") if f"{name}_rows" in found
        }  # fmt: skip
        columns = {name: found[f"{name}_columns"] for name in rows}
        if "expected" not in rows:
            tiny = smallest(self.screen.dtype) ** 2
            rows["expected"] = np.full(len(rows["error"]), tiny * len(columns["error"]))
            columns["expected"] = np.full(len(columns["error"]), tiny * len(rows["error"]))
        none = {
            f"{name}_{side}": np.zeros(len(like["error"]), np.int32)
            for name in ("born", "due", "lost")
            for side, like in (("rows", rows), ("columns", columns))
        }
        return ErrorSums(
            **{f"{name}_rows": value for name, value in rows.items()},
            **{f"{name}_columns": value for name, value in columns.items()},
            **none,
        )


def _better(by_row: np.ndarray, by_column: np.ndarray) -> float:
    """By what an estimate of the whole, a mean of squares from the right, has to be multiplied to
    be the mean of it and of that from the left, weighted by how far the squares of each agree."""
    means = by_row.mean(), by_column.mean()
    variances = by_row.var(), by_column.var()
    total = sum(variances)
    if not np.isfinite(total) or min(total, *means) <= 0:
        return 1.0
    return float((means[0] * variances[1] + means[1] * variances[0]) / total / means[0])


def _cut(value: np.ndarray, axis: int, start: int | None, stop: int | None) -> np.ndarray:
    return value[(slice(None),) * axis + (slice(start, stop),)]


def _between(values: np.ndarray, where: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Sums of ``values`` over the intervals of its first axis that ``where`` gives."""
    prefix = np.zeros((len(values) + 1, *values.shape[1:]))
    for place, value in enumerate(values):  # ``cumsum`` goes through memory along the first axis
        np.add(prefix[place], value, out=prefix[place + 1])
    return prefix[where[1]] - prefix[where[0]]


def _some_keys(mask: np.ndarray) -> slice:
    """The keys that one of some rows sees, and of a long sequence some more, in one of four
    widths."""
    length = mask.shape[1]
    if length < LONG:
        return slice(0, length)
    seen = np.flatnonzero(mask.any(0))
    quarter = -(-length // 4)
    width = min(length, -(-(seen[-1] + 1 - seen[0]) // quarter) * quarter)
    first = min(int(seen[0]), length - width)
    return slice(first, first + width)
