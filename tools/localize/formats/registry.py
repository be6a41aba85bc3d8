"""The arithmetics that engines compute in, as things to try: a stage is judged against what its
engine's own arithmetic would give, where that explains its error.

A ``Format`` says what is done to the operands of a stage, to its RoPE tables, or to the whole of
it. ``choices`` lists the ones that a kind of operation may have, from the number formats of
``stages.numbers``; ``fit`` tries them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from qwen_jax.config import Config
from qwen_jax.models.ops import split_heads
from stages import numbers, roundings
from stages.architecture import (
    ACTIVATION,
    ADD,
    LINEAR,
    LOOKUP,
    NORM,
    PRODUCT,
    ROTATION,
    SCORES,
    SOFTMAX,
    WEIGHTED_SUM,
    Kind,
    Stage,
    axis_size,
)
from stages.architecture import CACHE as STORED
from stages.numbers import NumberFormat, Rounding
from stages.verdict import coarsest
from tools.localize.formats import arithmetic, attention

# (configuration, operand with a batch axis, nudge) -> what is left of it
Operand = Callable[[Config, np.ndarray, float], np.ndarray]
Angles = Callable[[np.ndarray, int, float], np.ndarray]
Whole = Callable[[Any], Array | None]  # of a StageReplay

# How far an engine's float32 arithmetic may have moved a code before it was rounded: a factor and
# a product, made in one order or another.
NUDGE = 2.0**-22


@dataclass(frozen=True, eq=False)
class Format:
    """One way to compute a kind of stage.

    Attributes:
        name: for ``--json``.
        says: for people.
        level: the precision class that it is, see ``stages.verdict.CLASSES``.
        operands: what is done to the inputs, by their place.
        weights: what is done to the weights.
        angles: the angles of RoPE, [T, H/2]; ``table`` is what cosines and sines are rounded to.
        plus: what is added to the stage's value: (configuration, unrounded inputs, weights).
        unsure: the square of what ``plus`` may be off by.
        whole: the stage's value as a whole, where roundings of operands do not describe it; None
            where it does not apply.
        allows: an error that may be there beyond rounding, in the shape of the value.
        leaves: the bits that the emulation has at best, where it cannot follow every rounding.
        parts: of a stage of several weights side by side, the format of each.
        block: the width of an operand is a multiple of it; of a head in attention.
        calls: it is of engines that run in calls alone.
        requantised: the weights are those of another type than was given: of an engine that does
            so in most of its linear layers.
    """

    name: str
    says: str
    level: str
    operands: Mapping[int, Operand] = field(default_factory=dict)
    weights: Rounding | None = None
    angles: Angles | None = None
    table: Rounding | None = None
    plus: Callable[[Config, Sequence[Array], Sequence[Array]], Array] | None = None
    unsure: Callable[[Config, Sequence[Array], Sequence[Array]], Array] | None = None
    whole: Whole | None = None
    allows: Callable[[Any], Array] | None = None
    leaves: float | None = None
    parts: tuple["Format", ...] = ()
    block: int = 1
    calls: bool = False
    requantised: bool = False

    def read(self, config: Config, place: int, x: Any, nudge: float = 0.0) -> Any:
        """An operand as the engine reads it, in NumPy; as it is where nothing is done to it."""
        operand = self.operands.get(place)
        return x if operand is None else operand(config, np.asarray(x), nudge).astype(np.float64)

    def inputs(self, config: Config, given: Sequence[Array], nudge: float = 0.0) -> list[Array]:
        """The operands as the engine reads them."""
        return [jnp.asarray(self.read(config, n, x, nudge)) for n, x in enumerate(given)]

    def weight(self, w: Array) -> Array:
        """A weight as the engine reads it, in float64."""
        if self.weights is None or not len(w):
            return w
        return _as_array(self.weights(np.asarray(w)))

    def tables(self, config: Config, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """cos and sin, [..., T, H/2], of these positions; None where they are made as always."""
        if self.angles is None or config.yarn is not None:
            return None
        found = [self.angles(p, config.head_dim, config.rope_theta) for p in positions]
        angles = np.stack(found).astype(np.float64)
        keep = self.table or (lambda x: x.astype(np.float32))
        return keep(np.cos(angles)), keep(np.sin(angles))

    @property
    def by_operands(self) -> bool:
        """Whether roundings of the first input and of the weights are all there is to it."""
        other = self.plus, self.whole, self.allows, self.leaves, self.angles, self.parts
        return set(self.operands) <= {0} and not any(other)


def side_by_side(parts: Sequence[Format]) -> Format:
    """One format for each weight of a stage."""
    names, says = (
        "; ".join(dict.fromkeys(words))
        for words in zip(*((f.name, f.says) for f in parts), strict=True)
    )
    return Format(
        names.replace(";", ","), says, coarsest(f.level for f in parts), parts=tuple(parts)
    )


# What an engine does that has no format of its own.
PLAIN_FORMAT = Format("float32", "float32", "f32")


def _as_array(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float64)


def _plain(rounding: Rounding) -> Operand:
    """An operand that is rounded along its last axis; of one sequence, so the batch is no call."""
    return lambda config, x, nudge: rounding(x, nudge=nudge)


def _of_v(rounding: Rounding) -> Operand:
    """The v of an input that holds q, k and v side by side, head by head; or v alone."""

    def rounded(config: Config, x: np.ndarray, nudge: float) -> np.ndarray:
        if x.ndim == 4:
            return rounding(x, nudge=nudge)
        v = np.asarray(split_heads(config, jnp.asarray(x))[2])
        left = rounding(v, nudge=nudge).reshape(*v.shape[:2], -1)
        return np.concatenate([x[..., : -left.shape[-1]], left], -1)

    return rounded


def _turned(rounding: Rounding, size: int | None, back: bool = False) -> Rounding:
    """A rounding in the basis of a Walsh-Hadamard matrix of ``size`` channels; None is the largest
    power of two that divides a head, as llama.cpp turns k (and q). The result stays turned, which a
    product of q and k does not see, unless it is turned ``back``."""

    def rounded(x: np.ndarray, nudge: float = 0.0) -> np.ndarray:
        found = rounding(roundings.hadamard(x, size or _turned_size(x)), nudge=nudge)
        return roundings.hadamard(found, size) if back and size else found

    return rounded


def _turned_size(x: np.ndarray) -> int:
    return x.shape[-1] & -x.shape[-1]


HALVES = [numbers.named(name) for name in ("bfloat16", "float16")]


# --- linear layers


def _low_sums(config: Config, inputs: Sequence[Array], weights: Sequence[Array]) -> Array:
    """q8_1: what its stored sums add, times the minima of the weight's blocks of 32. They are read
    off the weight: the smallest value of a block has code 0, but for blocks whose encoder found
    another scale to be better."""
    excess = _as_array(roundings.q8_1_excess(np.asarray(inputs[0])))
    lows = [w.reshape(len(w), w.shape[1] // 32, 32).min(-1) for w in weights]
    return jnp.concatenate([excess @ low.T for low in lows], -1)


def _unsure_sums(config: Config, inputs: Sequence[Array], weights: Sequence[Array]) -> Array:
    """The square of what a minimum may add that was not read off right: of a block whose values
    span fewer steps than its type has, by as many steps as are missing."""
    excess = jnp.square(_as_array(roundings.q8_1_excess(np.asarray(inputs[0]))))
    missing = [_as_array(np.square(_unread(np.asarray(w, np.float32)))) for w in weights]
    return jnp.concatenate([excess @ each.T for each in missing], -1)


def _unread(weight: np.ndarray) -> np.ndarray:
    """[out, in/32]: by how much the minimum of each block may lie below its smallest value."""
    blocks = np.sort(weight.reshape(len(weight), weight.shape[1] // 32, 32), -1)
    span = blocks[..., -1] - blocks[..., 0]
    gaps = np.diff(blocks, axis=-1)
    # steps that rounding to float32 made unequal are one step; equal values are none
    gaps = np.where(gaps > 1e-4 * span[..., None], gaps, np.inf)
    step = np.where(np.isfinite(gaps.min(-1)), gaps.min(-1), 0)
    steps = np.rint(np.divide(span, step, out=np.zeros_like(span), where=step > 0))
    return step * np.where(steps <= 15, 15 - steps, np.maximum(31 - steps, 0))


def _of_linear() -> Iterator[Format]:
    """Inputs in each format, inputs and weights in the floating ones; then weights of another type
    than was given, beside inputs in the format that a kernel for these reads."""
    for f in numbers.used(numbers.ACTIVATION):
        both = f.ways[:1] if f.partner == f.name and f.block == 1 else ()
        for way, weights in [*product(f.ways, [None]), *zip(both, both, strict=True)]:
            words = "inputs and weights" if weights else "inputs"
            yield Format(f.name, f"{words} rounded to {f.says}", f.level, {0: _plain(way)},
                         weights, block=f.block,
                         plus=_low_sums if f.name == "q8_1" else None,
                         unsure=_unsure_sums if f.name == "q8_1" else None)  # fmt: skip
    for f in numbers.used(numbers.WEIGHT):
        partner = numbers.named(f.partner).ways[:1] if f.block > 1 and f.partner else ()
        for way, inputs in product(f.ways if f not in HALVES else (), (None, *partner)):
            operands = {0: _plain(inputs)} if inputs else {}
            says = f"weights rounded to {f.says}"
            yield Format(f"weights {f.of_weight}", says, f.level, operands, way, block=f.block,
                         requantised=True)  # fmt: skip


# --- attention


def _held_in(f: NumberFormat) -> str:
    """The format of a cache, for people. A scale of 1 may be one that was never loaded."""
    name = f.of_cache.removeprefix("kv ")
    return f"{name} at scale 1" if f.keeps == "cache" else name


def _low_scores(config: Config, inputs: Sequence[Array], weights: Sequence[Array], kept: Rounding,
                turn: bool) -> Array:  # fmt: skip
    """q8_1 again, of a K cache whose blocks have a minimum."""
    q, k = (np.asarray(x)[0] for x in inputs)
    if turn:
        q, k = (roundings.hadamard(x, _turned_size(x)) for x in (q, k))
    low = np.asarray(kept(k), np.float64)
    low = low.reshape(*low.shape[:2], -1, 32).min(-1)
    low = np.repeat(low, q.shape[1] // low.shape[1], 1)
    value = np.einsum("tnb,snb->nts", roundings.q8_1_excess(q), low)
    return _as_array(value[None] * config.head_dim**-0.5)


def _of_scores() -> Iterator[Format]:
    """A cache of k beside a q in the partner's format, as it is, in 16 bits and in k's own; and of
    formats with blocks the same in a turned basis."""
    for f in numbers.caches():
        partner = [numbers.named(f.partner).round] if f.partner else []
        plain = [None, roundings.f16, roundings.bf16]
        own = [f.round] if f.block == 1 and f not in HALVES else []
        for turn, q in product((False, True) if f.block > 1 else (False,), partner + plain + own):
            wrap = partial(_turned, size=None) if turn else (lambda rounding: rounding)
            operands = {1: _plain(wrap(f.round))}
            if q or turn:
                operands[0] = _plain(wrap(q or roundings.f32))
            minimum = f.minimum and q in partner
            yield Format(
                f.of_cache,
                f"a key cache in {_held_in(f)}"
                + (f", q in {f.name}" if own and q is f.round else "")
                + (", turned by a Hadamard matrix" if turn else ""),
                f.level,
                operands,
                plus=partial(_low_scores, kept=f.round, turn=turn) if minimum else None,
                leaves=20.0 if minimum else None,
                block=64 if turn else f.block,
            )
    for f in map(numbers.named, ("tf32", "tf32 cut off")):
        both = dict.fromkeys((0, 1), _plain(f.round))
        yield Format(f.name, f"q and k rounded to {f.says}", f.level, both)
    yield Format("float16", "q rounded to float16", "tf32/f16", {0: _plain(roundings.f16)})


def _of_weighted_sums() -> Iterator[Format]:
    yield Format(
        "flash float16",
        "flash attention with a float16 value cache, summed in float16",
        "tf32/f16",
        whole=attention.flash_rows,
        allows=attention.flash_flips,
        # 16.1 to 17.3 measured: the last bit of a score decides a rounding to float16 now and then
        leaves=14.5,
    )
    for f in numbers.caches():
        says = f"a value cache in {_held_in(f)}"
        yield Format(f.of_cache, says, f.level, {1: _of_v(f.round)}, block=f.block)
        # the weights of the softmax are converted to the cache's type
        weights = f.round if f in HALVES else roundings.f16 if f.block > 1 else None
        if weights:
            operands = {0: _plain(weights), 1: _of_v(f.round)}
            yield Format(f.of_cache, says, f.level, operands, block=f.block)
        if f.block > 1:
            back = {1: _of_v(_turned(f.round, 64, back=True))}
            more = ", turned by a Hadamard matrix"
            yield Format(f.of_cache, says + more, f.level, back, block=64)
    for f in map(numbers.named, ("tf32", "tf32 cut off")):
        operands = {0: _plain(f.round), 1: _of_v(f.round)}
        yield Format(f.name, f"weights and v rounded to {f.says}", f.level, operands)


def _unrounded_at_first(base: Format | None, first: bool) -> Format:
    """Attention that reads keys and values of its own call before the cache rounds them, and those
    of earlier calls from there; with ``first`` in the first call alone. ``base`` is the format of a
    cache that was not dumped."""
    when = "the first call" if first else "their own call"
    if base is None:
        base = Format(f"kv unrounded in {when}", f"keys and values read unrounded in {when}", "f32")
    else:
        base = replace(base, says=f"{base.says}, but read unrounded in {when}")
    return replace(base, whole=partial(attention.unrounded, base=base, first=first), calls=True)


@cache
def _of_calls(kind: Kind) -> tuple[Format, ...]:
    """What attention may do in an engine that runs in calls, beyond ``_of_kind``."""
    kept = [f for f in _of_kind(kind) if [*f.operands] == [1] and f.name.startswith("kv")]
    bases = [None, *{f.name: f for f in reversed(kept)}.values()]
    return tuple(_unrounded_at_first(base, first) for base in bases for first in (True, False))


def _of_caches() -> Iterator[Format]:
    """What is read back of k, or of the v of q, k and v side by side."""
    for f in numbers.caches():
        for way in f.ways:
            says = f"a cache in {_held_in(f)}"
            yield Format(f.of_cache, says, f.level, {0: _of_v(way)}, block=f.block)
    for f in numbers.used(numbers.CACHE):
        if f.keeps == "cache":
            whole = partial(attention.at_a_scale, f.dtype)
            says = f"a cache in {f.name} at a constant scale"
            yield Format(f"{f.of_cache} at a constant scale", says, f.level, whole=whole)


# --- everything else


def _angle_formats() -> Iterator[Format]:
    for name, says, angles in (
        ("rope recurrence f32", "RoPE angles multiplied up from pair to pair in float32",
         arithmetic.angles_by_recurrence),
        ("rope powers f32", "RoPE angles by powers of one float32 step",
         arithmetic.angles_by_powers),
        ("rope exp2 f32", "RoPE frequencies by exp2 in float32", arithmetic.angles_by_exp2),
        ("rope exp f32", "RoPE frequencies by exp in float32", arithmetic.angles_by_exp),
        ("rope f64", "RoPE angles in float64", arithmetic.angles_in_f64),
    ):  # fmt: skip
        yield Format(name, says, "f32", angles=angles)
    for f in HALVES:
        says, of_hf = f"RoPE tables rounded to {f.name}", arithmetic.angles_of_hugging_face
        yield Format(f"rope tables {f.name}", says, f.level, angles=of_hf, table=f.round)


@cache
def half_angles() -> tuple[Format, ...]:
    """RoPE angles that were rounded to 16 bits before their cosine, which no engine means to do:
    neighbours share an angle from position 256 (bfloat16) or 2048 (float16) on. A mistake, where
    it is found."""
    parts = {
        "inv_freq": ("frequencies",),
        "inv_freq and positions": ("frequencies", "positions"),
        "inv_freq, positions and their product": ("frequencies", "positions", "angles"),
        "positions": ("positions",),
        "angles": ("angles",),
    }
    return tuple(
        Format(
            f"rope angles {f.name}",
            f"{words} in {f.name}{', and the tables' if table else ''}",
            f.level,
            angles=partial(arithmetic.angles_in_half, keep=f.round, rounded=which),
            table=table,
        )
        for f in HALVES
        for words, which in parts.items()
        for table in (None, f.round)
    )


# The angle of pair i after i products rounded to float32, each by at most half a unit in the last
# place; with those of the first angle and of the step.
ROPE_BY_PRODUCTS = Format(
    "rope products f32",
    "RoPE angles that rounding in float32 from pair to pair explains",
    "f32",
    allows=lambda case: case.turned(1.0 + 1.5 * np.arange(case.config.head_dim // 2)),
)


def _of_values(kind: Kind) -> Iterator[Format]:
    """Operations that sum no products: inputs, weights or steps of theirs in 16 bits."""
    if kind is ACTIVATION:
        says = "SiLU by onnxruntime's own sigmoid (MLAS)"
        yield Format("silu mlas", says, "f32", whole=_by_mlas)
    inside = {
        ACTIVATION: ("computed in {}", _activation_in),
        SOFTMAX: ("exponentials in {}", _softmax_in),
        NORM: ("rounded to {} before it is multiplied by its weight", _norm_in),
    }
    for f in HALVES[::-1]:
        for places in ((0,), (1,), (0, 1)) if kind is not LOOKUP else ():  # token ids are no input
            operands = dict.fromkeys(places, _plain(f.round))
            yield Format(f.name, f"inputs rounded to {f.name}", f.level, operands)
        if kind in inside:
            says, whole = inside[kind]
            yield Format(
                f.name, says.format(f.name), f.level, whole=partial(whole, rounding=f.round)
            )
        if kind in (NORM, LOOKUP, ADD):
            yield Format(f.name, f"weight rounded to {f.name}", f.level, weights=f.round)


def _by_mlas(case: Any) -> Array:
    gate = np.asarray(case.inputs[0], np.float32)
    return _as_array(gate * arithmetic.mlas_logistic(gate))


def _softmax_in(case: Any, rounding: Rounding) -> Array:
    """Softmax with its exponentials, and their arguments, rounded."""
    mask = np.asarray(case.pos.mask)[:, None]
    scores = np.where(mask, np.asarray(case.inputs[0]), -np.inf)
    depth = rounding((scores - scores.max(-1, keepdims=True)).astype(np.float32))
    weights = rounding(np.exp(depth)).astype(np.float64)
    return _as_array(weights / weights.sum(-1, keepdims=True))


def _activation_in(case: Any, rounding: Rounding) -> Array:
    """SiLU with its exponential, its sum and its quotient rounded."""
    gate = rounding(np.asarray(case.inputs[0], np.float32))
    with np.errstate(over="ignore"):
        sigmoid = rounding(1 / rounding(1 + rounding(np.exp(-gate))))
    return _as_array(rounding(gate * sigmoid))


def _norm_in(case: Any, rounding: Rounding) -> Array:
    """RMSNorm rounded before its weight, as Hugging Face has it in 16 bits; the weight then acts on
    values of that format."""
    ((name, weight),) = case.weights.items()
    normed = case.in_format(None).run(weights={name: jnp.ones_like(weight)})
    return _as_array(rounding(np.asarray(normed))) * weight


def choices(stage: Stage, config: Config, calls: bool = True) -> list[Format]:
    """The formats that a stage may have; of an engine that runs in calls, if it is one."""
    width = config.head_dim
    if stage.linear:
        width = axis_size(config.arch.cached.axes_of(stage.inputs[0])[-1], config.dims(1))
    every = _of_kind(stage.kind)
    if calls and stage.kind in (SCORES, WEIGHTED_SUM):
        every += _of_calls(stage.kind)
    return [format for format in every if width % format.block == 0]


@cache
def _of_kind(kind: Kind) -> tuple[Format, ...]:
    special = {
        LINEAR: _of_linear, SCORES: _of_scores, WEIGHTED_SUM: _of_weighted_sums,
        STORED: _of_caches,
    }  # fmt: skip
    if kind in special:
        return tuple(special[kind]())
    if kind is ROTATION:
        return (*_angle_formats(), *_of_values(kind))
    if kind in (NORM, SOFTMAX, ACTIVATION, ADD, PRODUCT, LOOKUP):
        return tuple(_of_values(kind))
    return ()


GRIDS: dict[str, tuple[str, type]] = {
    "bfloat16": ("bf16", ml_dtypes.bfloat16),
    "float16": ("tf32/f16", np.float16),
}


def on_grid(x: Any, grid: str | None) -> Any:
    """Rounded to the format that a dump lies on; None is no such format."""
    if grid not in GRIDS:
        return x
    with np.errstate(over="ignore"):
        return _as_array(np.asarray(x, np.float32).astype(GRIDS[grid][1]).astype(np.float64))
