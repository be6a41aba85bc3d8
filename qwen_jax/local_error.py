"""Local error: each stage alone, in float64, on the dumped inputs of the engine under test.

The same stage functions as the forward pass are run with ``dtype=float64``; what differs from the
dump was created at that stage. Error is measured against what rounding can act on (``size``):

    err = dump - y*,   scale^2 = s^2 + y*^2,   bits = -log2(rms(err) / rms(scale))

Sources: "local error" as in Herbie (Panchekha et al. 2015), "significant bits" as in Verificarlo
and CADNA. The sizes s are the first-order bounds of each operation's rounding error.

A dump may hold fewer rows of a stage than the sequence has: the last ones. A value is then
computed for as many rows as its inputs allow.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qwen_jax import runtime
from qwen_jax.config import Config
from qwen_jax.forward import Parameters
from qwen_jax.models import FUNCTIONS
from qwen_jax.models.ops import Positional
from stages.architecture import SOFTMAX, Architecture, Stage

EXACT = jnp.float64

# One weight in float64 at a time. XLA on the CPU would rather widen all of them first, so that more
# could run at once: 2.7 GiB of temporary memory for a layer of the 7B, and with this 0.5 GiB.
FRUGAL = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

Both = tuple[Array, Array]  # a computed value: exactly, and in the engine's own precision


def stage_value(
    stage: Stage,
    config: Config,
    pos: Positional,
    inputs: Sequence[Array],
    weights: Sequence[Array],
) -> Array:
    """A stage by its own function, in whatever precision its arguments have.

    A softmax of scores that are not all finite is NaN: what becomes of an infinity depends on the
    number that masks.
    """
    value = FUNCTIONS[config.architecture][stage.name](config, pos, *inputs, *weights)
    if stage.kind is not SOFTMAX:
        return value
    finite = (jnp.isfinite(inputs[0]) | ~pos.mask[:, None]).all(-1, keepdims=True)
    return jnp.where(finite, value, jnp.nan)


def size_squared(
    stage: Stage,
    config: Config,
    pos: Positional,
    inputs: Sequence[Array],
    weights: Sequence[Array],
    value: Array,
) -> Array:
    """s^2, the square of what rounding can act on, in the shape of ``value``: see
    ``Kind.acts_on``. float32 is enough: the size is needed to a per cent."""
    narrow = [x.astype(jnp.float32) for x in inputs]
    weights = [w.astype(jnp.float32) for w in weights]
    of = partial(stage_value, stage, config, pos)
    acts_on = stage.kind.acts_on
    if acts_on == "terms":
        return of(_square(narrow), _square(weights)) * over_root(stage, config)
    if acts_on == "magnitudes":
        return jnp.square(of([jnp.abs(x) for x in narrow], [jnp.abs(w) for w in weights]))
    if acts_on == "rotated":
        # (a cos - b sin, b cos + a sin), of squares and with both signs +: the second half of the
        # function's value has those, and for the first half a and b change places.
        squared, tables = _square(narrow), pos.replace(cos=pos.cos**2, sin=pos.sin**2)
        second = of_half(stage, config, tables, squared, weights, 1)
        first = of_half(stage, config, tables.replace(sin=-tables.sin), squared, weights, 0)
        return jnp.concatenate([first, second], -1)
    return jnp.square(value)


def over_root(stage: Stage, config: Config) -> float:
    """The factor 1/sqrt(axis) that a stage's sum of squared terms lacks after the function was
    applied to squares: scores are divided by sqrt(H), their squares by H."""
    axis = stage.kind.over_root
    return config.dims(1)[axis] ** -0.5 if axis else 1.0


def smallest(dtype: Any) -> float:
    """The error of a value that is too small for a format: bfloat16 and float32 may flush to
    zero what is below their normal numbers."""
    found = jnp.finfo(dtype)
    return float(found.smallest_subnormal if dtype == np.float16 else found.smallest_normal)


def of_half(
    stage: Stage,
    config: Config,
    pos: Positional,
    inputs: Sequence[Array],
    weights: Sequence[Array],
    half: int,
) -> Array:
    """The first (0) or second (1) half of every head of a rotated stage."""
    return jnp.split(stage_value(stage, config, pos, inputs, weights), 2, -1)[half]


def allowance(
    stage: Stage,
    config: Config,
    pos: Positional,
    angles: Array,
    inputs: Sequence[Array],
    value: Array,
    dtype: Any,
) -> Array:
    """An error that sound arithmetic may have where the scale is too small to allow for it.

    Values below the smallest normal number of the trace's precision lose their last bits.
    An exponential turns the rounding of its argument x into a relative error |x| u. A rotation
    does so with its angle, so that an engine that makes its tables another way than Hugging Face
    is off at late positions, and is right. u is that of float32, 2^-24. angles: [T, H/2].
    """
    tiny, u = smallest(dtype), 2.0**-24
    allows = stage.kind.allows
    if allows == "depth":
        scores = jnp.where(pos.mask[:, None], inputs[0], -jnp.inf)
        depth = jnp.max(scores, -1, keepdims=True) - inputs[0]
        return value * jnp.where(pos.mask[:, None], depth, 0) * u + tiny
    if allows == "argument":
        return jnp.abs(value * inputs[0]) * u + tiny
    if allows == "angle":
        quarter_turn = pos.replace(cos=-pos.sin, sin=pos.cos)  # the derivative of a rotation
        turned = stage_value(stage, config, quarter_turn, inputs, ())
        angle = jnp.tile(angles[-turned.shape[1] :], 2)
        return jnp.abs(turned * angle[None, :, None, :]) * u + tiny
    return jnp.full_like(value, tiny)


def _square(arrays: Sequence[Array]) -> list[Array]:
    return [x * x for x in arrays]


class ErrorSums(struct.PyTreeNode):
    """Squared errors of one stage of one layer, summed over the rows and the columns of its matrix,
    see ``stages.architecture.Stage``.

    Attributes:
        error_rows, error_columns: sums of (dump - y*)^2 over finite, unmasked elements.
        scale_rows, scale_columns: sums of s^2 + y*^2 over the same elements.
        expected_rows, expected_columns: sums of a squared error that is there without any fault:
            after missing stages, what their rounding in the engine's own precision leads to; else
            see ``allowance``.
        born_rows, born_columns: how many elements are NaN or infinite though y* is finite.
        due_rows, due_columns: how many elements of y* are far from zero.
        lost_rows, lost_columns: how many of those are exactly zero in the dump.
    """

    error_rows: Any
    error_columns: Any
    scale_rows: Any
    scale_columns: Any
    born_rows: Any
    born_columns: Any
    expected_rows: Any
    expected_columns: Any
    due_rows: Any
    due_columns: Any
    lost_rows: Any
    lost_columns: Any


# Of the root mean square of a stage's scale: what is smaller may be zero on the grid of a format
# with one scale for everything, 8-bit ones with an outlier aside.
FAR_FROM_ZERO = 1e-4


def error_sums(
    stage: Stage, found: Array, exact: Array, size: Array, pos: Positional, expected: Array
) -> ErrorSums:
    """Compare a dump with the exact value. All arrays carry the batch axis, of size 1."""
    found = found.astype(EXACT)
    keep = jnp.isfinite(exact)
    if stage.kind.masked:
        keep &= pos.mask[:, None]
    born = keep & ~jnp.isfinite(found)
    keep &= jnp.isfinite(found)

    def both(x: Array) -> Both:
        x = stage.matrix(x)
        return x.sum(1), x.sum(0)

    error = both(jnp.where(keep, jnp.square(found - exact), 0))
    scales = jnp.where(keep, size.astype(EXACT) + jnp.square(exact), 0)
    known = both(jnp.where(keep & jnp.isfinite(expected), jnp.square(expected), 0))
    usual = scales.sum() / jnp.maximum(keep.sum(), 1)
    due = keep & (jnp.square(exact) > FAR_FROM_ZERO**2 * usual)
    counts = (both(x.astype(jnp.int32)) for x in (born, due, due & (found == 0)))
    born_sums, due_sums, lost_sums = counts
    return ErrorSums(*error, *both(scales), *born_sums, *known, *due_sums, *lost_sums)


def row_axis(arch: Architecture, name: str) -> int:
    """The axis of the rows of a value that carries a batch axis."""
    axes = arch.axes_of(name)
    return 1 + axes.index("T" if "T" in axes else "S")


def cut_inputs(
    arch: Architecture, stage: Stage, values: Sequence[Array | None], length: int
) -> tuple[int, list[Array]] | None:
    """The inputs of a stage for as many of the last rows as all of them have, and that number.

    None where an input is missing, or is needed at every key position and has fewer.
    """
    if any(value is None for value in values):
        return None
    found = dict(zip(stage.inputs, values, strict=True))
    have = {name: value.shape[row_axis(arch, name)] for name, value in found.items()}  # type: ignore[union-attr]
    if any(have[name] < length for name in stage.keys):
        return None
    rows = min(have[name] for name in stage.inputs if name not in stage.keys)

    def cut(name: str, value: Any) -> Array:
        if name in stage.keys or have[name] == rows:
            return value
        return value[(slice(None),) * row_axis(arch, name) + (slice(-rows, None),)]

    return rows, [cut(name, value) for name, value in found.items()]


def last_rows(arch: Architecture, name: str, value: Array, rows: int) -> Array:
    """The last rows of a value that carries a batch axis."""
    return value[(slice(None),) * row_axis(arch, name) + (slice(-rows, None),)]


def run(
    stages: Sequence[Stage],
    config: Config,
    parameters: Parameters,
    pos: Positional,
    angles: Array,
    dumps: Mapping[str, Array],
    given: Mapping[str, Both | None],
    dtype: Any,
) -> tuple[dict[str, ErrorSums], dict[str, Both | None]]:
    """Measure every stage of ``stages`` that is in ``dumps``.

    A stage that is missing is computed instead, twice: exactly, and in ``dtype``, the engine's
    own precision, so that what its rounding does to later stages is known too.

    Arguments:
        angles: [T, H/2] of RoPE, for ``allowance``.
        dumps: stage name -> dump with a batch axis, in any float dtype.
        given: values from before ``stages`` that are not in ``dumps``; None for one that cannot be
            computed.
        dtype: the precision of the trace.

    Returns:
        (sums by stage, the values of the stages that were missing).
    """
    arch, length = config.arch.cached, pos.mask.shape[-1]
    computed: dict[str, Both | None] = dict(given)
    measured: dict[str, ErrorSums] = {}

    def read(name: str, place: int) -> Array | None:
        if name in dumps:
            dump = dumps[name]
            as_float = jnp.issubdtype(dump.dtype, jnp.floating)
            return dump.astype(EXACT if place == 0 else dtype) if as_float else dump
        both = computed[name]
        return None if both is None else both[place]

    for stage in stages:
        ready = cut_inputs(arch, stage, [read(name, 0) for name in stage.inputs], length)
        if ready is None:
            if stage.name not in dumps:
                computed[stage.name] = None
            continue
        count, inputs = ready
        here = pos.last(count)
        weights = [parameters[name].astype(EXACT) for name in stage.parameters]
        exact = stage_value(stage, config, here, inputs, weights)
        gap = any(name in computed for name in stage.inputs)
        low = None
        if gap or stage.name not in dumps:
            again = cut_inputs(arch, stage, [read(name, 1) for name in stage.inputs], length)
            narrow = [parameters[name].astype(dtype) for name in stage.parameters]
            low = stage_value(stage, config, here, again[1], narrow).astype(dtype)  # type: ignore[index]
        if stage.name not in dumps:
            computed[stage.name] = exact, low  # type: ignore[assignment]
            continue
        if gap:
            expected = low.astype(EXACT) - exact  # type: ignore[union-attr]
        else:
            expected = allowance(stage, config, here, angles, inputs, exact, dtype)
        size = size_squared(stage, config, here, inputs, weights, exact)
        count = min(count, dumps[stage.name].shape[row_axis(arch, stage.name)])
        cut = partial(last_rows, arch, stage.name, rows=count)
        found, exact, size, expected = map(cut, (dumps[stage.name], exact, size, expected))
        measured[stage.name] = error_sums(stage, found, exact, size, pos.last(count), expected)
    return measured, {s.name: computed[s.name] for s in stages if s.name in computed}


@cache
def compiled(
    stages: tuple[Stage, ...], config: Config, dtype: np.dtype, unoptimised: bool = False
) -> Callable[..., Any]:
    """``run`` under jit: called as ``(parameters, pos, angles, dumps, given)``."""

    def program(parameters: Any, pos: Any, angles: Any, dumps: Any, given: Any) -> Any:
        return run(stages, config, parameters, pos, angles, dumps, given, dtype)

    return jax.jit(program, compiler_options=compiler_options(unoptimised))


def compiler_options(unoptimised: bool) -> dict[str, Any]:
    """XLA's options for programs that measure. Unoptimised ones compile in half the time and run
    slower."""
    fast = {"xla_backend_optimization_level": 0} if unoptimised else {}
    return runtime.compiler_options() | FRUGAL | fast
