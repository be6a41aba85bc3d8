"""The stages as a tape: slopes carried back through some of them, changes carried forward.

All values are in one precision, float64 where nothing else is said, with a batch axis in front, of
1 where nothing else is said. Stages that are not dumped are computed from what is.

Axis letters as in ``qwen_jax.models.ops``; Q quantities whose slopes are carried, P patches.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce
from itertools import accumulate
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax import runtime
from qwen_jax.config import Config
from qwen_jax.forward import Parameters
from qwen_jax.local_error import EXACT, FRUGAL, cut_inputs, last_rows, stage_value
from qwen_jax.models.ops import Positional
from stages.architecture import TOKENS, Architecture, Stage

Values = Mapping[str, Array | None]  # by name; None for what is not known
Point = tuple[float, Sequence[Array]]  # weight in a mean, and a stage's inputs

# Gauss's quadrature between 0 and 1: (place, weight). One point is exact for slopes that change
# evenly, as those of products do; of others three leave an error of seventh order.
HALF_WAY = [(0.5, 1.0)]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(3)
GAUSS = [*zip(((1 + NODES) / 2).tolist(), (WEIGHTS / 2).tolist(), strict=True)]


def _floats(stage: Stage) -> list[str]:
    return [name for name in stage.inputs if name != TOKENS]


class Layer:
    """The values of some stages: dumps, and what is missing computed."""

    def __init__(
        self,
        stages: Sequence[Stage],
        config: Config,
        parameters: Parameters,
        pos: Positional,
        dumps: Mapping[str, Array],
        given: Values,
        dtype: Any,
    ) -> None:
        self.config, self.pos = config, pos
        self.arch, self.length = config.arch.cached, pos.mask.shape[-1]
        self.weights = {name: weight.astype(dtype) for name, weight in parameters.items()}
        as_float = {n: x if n == TOKENS else x.astype(dtype) for n, x in dumps.items()}
        self.values: dict[str, Array | None] = {**given, **as_float}
        for stage in stages:
            if stage.name not in self.values:
                ready = self.ready(stage)
                self.values[stage.name] = None if ready is None else self.run(stage, *ready)

    def ready(self, stage: Stage) -> tuple[int, list[Array]] | None:
        """How many rows the stage can be computed for, and its inputs for them."""
        values = [self.values[name] for name in stage.inputs]
        return cut_inputs(self.arch, stage, values, self.length)

    def run(self, stage: Stage, count: int, inputs: Sequence[Array]) -> Array:
        weights = [self.weights[name] for name in stage.parameters]
        return stage_value(stage, self.config, self.pos.last(count), inputs, weights)

    def value(self, stage: Stage) -> Array:
        """The stage's value, which is known."""
        value = self.values[stage.name]
        assert value is not None
        return value

    def like(self, stage: Stage, count: int, values: Values) -> list[Array]:
        """Other values of the stage's inputs, with the rows that its own have for ``count``."""
        found = []
        for name in stage.inputs:
            value = values[name]
            assert value is not None
            whole = name in stage.keys
            found.append(value if whole else last_rows(self.arch, name, value, count))
        return found

    def created(self, stage: Stage, exact: Array, rows: int) -> Array:
        """The error that the stage created, in its last rows, beside its own value."""
        exact = last_rows(self.arch, stage.name, exact, rows)
        error = last_rows(self.arch, stage.name, self.value(stage), rows) - exact
        if stage.kind.masked:
            error = jnp.where(self.pos.last(rows).mask[:, None], error, 0)
        return error

    def rows_of(self, stage: Stage, count: int) -> int:
        """How many of its last rows both the value and what it is computed from have."""
        return min(count, self.value(stage).shape[1 + stage.positions_at])

    def pulled(
        self, stage: Stage, count: int, points: Sequence[Point], slope: Array
    ) -> dict[str, Array]:
        """What the inputs have of a ``slope`` [Q, ...] of the stage's value, in the mean of some
        points, each with as many rows as the layer has of it."""
        names = _floats(stage)

        def at(inputs: Sequence[Array]) -> tuple[Array, ...]:
            place = dict(zip(stage.inputs, inputs, strict=True))

            def function(*floats: Array) -> Array:
                changed = place | dict(zip(names, floats, strict=True))
                return self.run(stage, count, [changed[name] for name in stage.inputs])

            _, pull = jax.vjp(function, *(place[name] for name in names))
            return jax.vmap(pull)(slope)

        parts = [[weight * each for each in at(inputs)] for weight, inputs in points]
        found = [reduce(add, each) for each in zip(*parts, strict=True)]
        return {name: self.whole(name, each) for name, each in zip(names, found, strict=True)}

    def whole(self, name: str, slope: Array) -> Array:
        """A slope of some last rows of a value, of as many as the layer has of it."""
        value = self.values[name]
        assert value is not None
        return _padded(self.arch, name, slope, value.shape)

    def by_parameter(self, stage: Stage, values: Array) -> dict[str, Array]:
        """Values of the stage's columns, in the last axis, cut to those of each parameter."""
        ends = list(accumulate(len(self.weights[name]) for name in stage.parameters))
        return dict(zip(stage.parameters, jnp.split(values, ends[:-1], axis=-1), strict=True))


def _between(stage: Stage, inputs: Sequence[Array], there: Sequence[Array] | None) -> list[Point]:
    """Where slopes are taken on the way from other inputs, if there are any, to these."""
    if there is None:
        return [(1.0, inputs)]
    nodes = GAUSS if stage.kind.curved else HALF_WAY
    return [
        (weight, [place * a + (1 - place) * b for a, b in zip(inputs, there, strict=True)])
        for place, weight in nodes
    ]


def _axis(arch: Architecture, name: str) -> int:
    """The axis of the rows of a slope [Q, B, ...] of a value."""
    axes = arch.axes_of(name)
    return 2 + axes.index("T" if "T" in axes else "S")


def _padded(arch: Architecture, name: str, slope: Array, shape: tuple[int, ...]) -> Array:
    """A slope of the last rows of a value of ``shape``: of all of them, or of fewer."""
    axis = _axis(arch, name)
    rows = shape[axis - 1]
    if slope.shape[axis] >= rows:
        return jax.lax.slice_in_dim(slope, slope.shape[axis] - rows, slope.shape[axis], axis=axis)
    before = [(0, 0)] * slope.ndim
    before[axis] = (rows - slope.shape[axis], 0)
    return jnp.pad(slope, before)


def _by_rows(stage: Stage, slope: Array, value: Array) -> tuple[Array, Array]:
    """<slope, value> of every row and of every column of the stage's matrix: [Q, ...] each."""
    matrix = jax.vmap(lambda each: stage.matrix(each * value))(slope)
    return _sum(matrix, 2), _sum(matrix, 1)


def _sum(x: Array, axes: int | tuple[int, ...]) -> Array:
    """In float64: a share is what remains of terms that are much larger."""
    return x.sum(axes, dtype=EXACT)


def backward(
    stages: Sequence[Stage],
    config: Config,
    dtype: Any,
    parameters: Parameters,
    pos: Positional,
    dumps: Mapping[str, Array],
    given: Values,
    slopes: Mapping[str, Array],
    right: Values,
) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """Carry slopes back through some stages, and measure the dumped stages' shares.

    With exact arithmetic beside the dump a stage's slope is the mean of those on the way from one
    to the other, which is what it changes, divided by what its inputs change: but for what three
    points miss of that the shares add up to the whole change (integrated gradients, stage by stage:
    Sundararajan et al. 2017).

    Arguments:
        dumps: stage name -> dump.
        given: values from before ``stages`` that are not in ``dumps``.
        slopes: of the values that later stages read: [Q, 1, ...] each.
        right: what exact arithmetic has for all that ``stages`` read; empty where that is not
            known, and slopes are those at the dump.

    Returns:
        (shares by stage: (rows [Q, rows], columns [Q, columns], or None where those would take a
        product of their own, [Q] of each parameter where there are several), the slopes of the
        values from before ``stages``, those of the values that cannot be computed from others).
    """
    here = Layer(stages, config, parameters, pos, dumps, given, dtype)
    arch = here.arch
    slopes, shares, lost = dict(slopes), {}, {}
    for stage in reversed(stages):
        if stage.name not in slopes:
            continue
        slope = slopes.pop(stage.name)
        ready = here.ready(stage)
        if ready is None:
            lost[stage.name] = slope
            continue
        count, inputs = ready
        # y* has ``count`` rows, the dump maybe others; none but the last of both are compared.
        common = here.rows_of(stage, count)
        axis = _axis(arch, stage.name)
        slope = _padded(arch, stage.name, slope, (*slope.shape[1:axis], count))
        through: dict[str, Array] = {}  # what the input of a linear stage has, by each weight
        if stage.linear:
            (source,) = _floats(stage)
            cut = here.by_parameter(stage, slope)
            through = {name: part @ here.weights[name] for name, part in cut.items()}
            found = {source: here.whole(source, reduce(add, through.values()))}
        else:
            there = here.like(stage, count, right) if right else None
            found = here.pulled(stage, count, _between(stage, inputs, there), slope)
        if stage.name in dumps:
            value = last_rows(arch, stage.name, here.value(stage), common)
            kept = _padded(arch, stage.name, slope, value.shape)
            several: Mapping[str, Array] = {}
            if stage.linear:
                # <slope, x W'> = <slope W, x>, and slope W is there already
                x = last_rows(arch, source, inputs[0], common)
                parts = here.by_parameter(stage, kept * value)
                by_row = {
                    name: _sum(part, (1, 3)) - _sum(through[name][:, :, -common:] * x, (1, 3))
                    for name, part in parts.items()
                }
                ours, columns = reduce(add, by_row.values()), None
                if len(by_row) > 1:
                    several = {name: each.sum(-1) for name, each in by_row.items()}
            else:
                own = here.run(stage, count, inputs)
                ours, columns = _by_rows(stage, kept, here.created(stage, own, common))
                if len(stage.parameters) > 1:
                    parts = here.by_parameter(stage, columns)
                    several = {name: each.sum(-1) for name, each in parts.items()}
            shares[stage.name] = ours, columns, several
        for name, each in found.items():
            slopes[name] = slopes[name] + each if name in slopes else each
    return shares, slopes, lost


def forward(
    stages: Sequence[Stage],
    config: Config,
    dtype: Any,
    parameters: Parameters,
    pos: Positional,
    dumps: Mapping[str, Array],
    given: Values,
    moved: Values,
    keep: Mapping[str, Array],
) -> Array | None:
    """The last of ``stages`` where values from before, or some stages, are other than in the dump.

    Every stage is computed anew, and keeps the error that it created in the dump.

    Arguments:
        moved: the changed values from before ``stages``, [P, ...] each.
        keep: stage name -> [P], how much of its error it keeps: 0 is exact.
    """
    here = Layer(stages, config, parameters, pos, dumps, given, dtype)
    values = dict(here.values) | dict(moved)
    for stage in stages:
        value, ready = here.values[stage.name], here.ready(stage)
        if value is None or ready is None:
            continue
        count, inputs = ready
        common = here.rows_of(stage, count)
        # the dump's own inputs go with the others: a weight is widened once for both
        patches = len(keep[stage.name])
        others = [
            jnp.broadcast_to(x, (patches, *x.shape[1:])) for x in here.like(stage, count, values)
        ]
        both = [jnp.concatenate(each) for each in zip(inputs, others, strict=True)]
        anew = here.run(stage, count, both)
        own, now = anew[:1], last_rows(here.arch, stage.name, anew[1:], common)
        if stage.name in dumps:
            kept = keep[stage.name].reshape(-1, *[1] * (value.ndim - 1))
            now = now + kept * here.created(stage, own, common)
        axis = _axis(here.arch, stage.name) - 1
        before = jax.lax.slice_in_dim(value, 0, value.shape[axis] - common, axis=axis)
        before = jnp.broadcast_to(before, (now.shape[0], *before.shape[1:]))
        values[stage.name] = jnp.concatenate([before, now], axis)
    return values[stages[-1].name]


def values(
    stages: Sequence[Stage],
    config: Config,
    dtype: Any,
    parameters: Parameters,
    pos: Positional,
    dumps: Mapping[str, Array],
    given: Values,
) -> dict[str, Array | None]:
    """Every value of ``stages``, what is missing computed from what is there."""
    return Layer(stages, config, parameters, pos, dumps, given, dtype).values


def complete(stages: Sequence[Stage], *rest: Any) -> Array | None:
    """The last of ``values``."""
    return values(stages, *rest)[stages[-1].name]


@cache
def compiled(
    function: Callable[..., Any], stages: tuple[Stage, ...], config: Config, dtype: Any
) -> Any:
    """One of the above under jit: called with what follows ``dtype``. Always optimised: without,
    XLA's exponential made NaN of the lowest float64, which stands for a masked score."""

    def program(*arguments: Any) -> Any:
        return function(stages, config, dtype, *arguments)

    return jax.jit(program, compiler_options=runtime.compiler_options() | FRUGAL)


@partial(jax.jit, static_argnums=2)
def times(a: Array, b: Array, dtype: Any) -> Array:
    """The product of two matrices."""
    return a.astype(dtype) @ b.astype(dtype)
