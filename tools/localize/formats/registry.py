"""The number formats that engines compute in, as things to try: a stage is judged against what
its engine's own arithmetic would give, where that explains its error.

A ``Format`` says what is done to the operands of a stage, to its RoPE tables, or to the whole of
it. ``choices`` lists the ones that a kind of arithmetic may have; ``find`` in ``fitting`` tries
them. The roundings themselves are in ``emulated``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from qwen_jax.config import Config
from qwen_jax.models.ops import split_heads
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
from stages.verdict import coarsest
from tools.localize.formats import roundings
from tools.localize.formats.roundings import CACHE, PARTNER, WITH_MINIMUM, Rounding

# (configuration, operand in float64 with a batch axis, nudge) -> what is left of it
Operand = Callable[[Config, Array, float], Array]
Angles = Callable[[np.ndarray, int, float], np.ndarray]
Whole = Callable[[Any], Array | None]  # of a StageReplay

# How far an engine's float32 arithmetic may have moved a code before it was rounded: a factor and
# a product, made in one order or another.
NUDGE = 2.0**-22


@dataclass(frozen=True)
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

    def inputs(self, config: Config, given: Sequence[Array], nudge: float = 0.0) -> list[Array]:
        """The operands as the engine reads them."""
        return [
            self.operands[place](config, x, nudge) if place in self.operands else x
            for place, x in enumerate(given)
        ]

    def weight(self, w: Array) -> Array:
        """A weight as the engine reads it, in float64."""
        return w if self.weights is None else _as_array(self.weights(np.asarray(w)))

    def tables(self, config: Config, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """cos and sin, [..., T, H/2], of these positions; None where they are made as always."""
        if self.angles is None or config.yarn is not None:
            return None
        found = [self.angles(p, config.head_dim, config.rope_theta) for p in positions]
        angles = np.stack(found).astype(np.float64)
        keep = self.table or (lambda x: x.astype(np.float32))
        return keep(np.cos(angles)), keep(np.sin(angles))


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
    """An operand that is rounded along its last axis."""
    return lambda config, x, nudge: _as_array(rounding(np.asarray(x), nudge=nudge))


def _of_v(rounding: Rounding) -> Operand:
    """The v of an input that holds q, k and v side by side, head by head; or v alone."""

    def rounded(config: Config, x: Array, nudge: float) -> Array:
        if x.ndim == 4:
            return _as_array(rounding(np.asarray(x), nudge=nudge))
        v = split_heads(config, x)[2]
        left = _as_array(rounding(np.asarray(v), nudge=nudge)).reshape(*v.shape[:2], -1)
        return jnp.concatenate([x[..., : -left.shape[-1]], left], -1)

    return rounded


def _turned(rounding: Rounding, size: int | None) -> Rounding:
    """A rounding in the basis of a Walsh-Hadamard matrix of ``size`` channels; None is the largest
    power of two that divides a head, as llama.cpp turns k (and q). The result stays turned: a
    product of q and k does not see it."""

    def rounded(x: np.ndarray, nudge: float = 0.0) -> np.ndarray:
        head = x.shape[-1]
        return rounding(roundings.hadamard(x, size or head & -head), nudge=nudge)

    return rounded


def _turned_back(rounding: Rounding, size: int) -> Rounding:
    def rounded(x: np.ndarray, nudge: float = 0.0) -> np.ndarray:
        return roundings.hadamard(_turned(rounding, size)(x, nudge), size)

    return rounded


# --- linear layers

_BITS8 = "inputs rounded to 8 bits "


def _blocks_of(size: int) -> Format:
    return Format(
        f"int8 in blocks of {size}",
        f"{_BITS8}in blocks of {size}",
        "8-bit",
        {0: _plain(partial(roundings.symmetric, block=size))},
        block=size,
    )


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


def _one(name: str, says: str, rounding: Rounding, level: str = "8-bit", **more: Any) -> Format:
    return Format(name, says, level, {0: _plain(rounding)}, **more)


def _sixteen(name: str, level: str, rounding: Rounding) -> list[Format]:
    """The inputs alone, and inputs and weights."""
    return [
        _one(name, f"inputs rounded to {name}", rounding, level),
        _one(name, f"inputs and weights rounded to {name}", rounding, level, weights=rounding),
    ]


def _cut(x: np.ndarray, nudge: float = 0.0) -> np.ndarray:
    """TF32 by cutting mantissas off, as tensor cores do with what they are given."""
    x = np.ascontiguousarray(x, np.float32) * np.float32(1 + nudge)
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


LINEAR_FORMATS = [
    _one("q8_0", f"{_BITS8}in blocks of 32 with a float16 scale (Q8_0)", roundings.q8_0, block=32),
    _one(
        "q8_1",
        f"{_BITS8}in blocks of 32 with a float16 sum (Q8_1)",
        roundings.q8_0,
        plus=_low_sums,
        unsure=_unsure_sums,
        block=32,
    ),
    _one("q8_K", f"{_BITS8}in blocks of 256 (Q8_K)", roundings.q8_k, block=256),
    *map(_blocks_of, (32, 64, 128, 256)),
    _one("int8 per row", f"{_BITS8}per row", roundings.symmetric),
    # torchao divides by half of the 255 steps
    _one("int8 per row", f"{_BITS8}per row", partial(roundings.symmetric, half=0.5)),
    _one("int8 per row", f"{_BITS8}per row", partial(roundings.symmetric, half=1.0)),
    _one("int8 per tensor", f"{_BITS8}per tensor", roundings.symmetric_tensor),
    _one("uint8 per row", f"{_BITS8}per row with a zero point", roundings.affine_row),
    _one("uint8 per tensor", f"{_BITS8}per tensor with a zero point", roundings.affine_tensor),
    _one(
        "uint7 per tensor",
        "inputs rounded to 7 bits per tensor with a zero point",
        partial(roundings.affine_tensor, levels=127),
    ),
    _one("float8_e4m3", "inputs rounded to float8_e4m3", roundings.e4m3, "lower"),
    _one("float8_e5m2", "inputs rounded to float8_e5m2", roundings.e5m2, "lower"),
    _one(
        "float8_e4m3 per row",
        "inputs rounded to float8_e4m3 per row",
        roundings.scaled_e4m3,
        "lower",
    ),
    _one(
        "float8_e4m3 in blocks of 128",
        "inputs rounded to float8_e4m3 in blocks of 128",
        partial(roundings.scaled_e4m3, block=128),
        "lower",
        block=128,
    ),
    _one(
        "float8_e4m3 per tensor",
        "inputs rounded to float8_e4m3 per tensor",
        roundings.scaled_e4m3_tensor,
        "lower",
    ),
    *_sixteen("bfloat16", "bf16", roundings.bf16),
    *_sixteen("float16", "tf32/f16", roundings.f16),
    *_sixteen("tf32", "tf32/f16", roundings.tf32),
    *_sixteen("tf32 cut off", "tf32/f16", _cut),
]  # fmt: skip


# --- attention


def _level(cache: str) -> str:
    return {"f16": "tf32/f16", "bf16": "bf16", "q8_0": "8-bit", "int8": "8-bit"}.get(cache, "lower")


NAMES = {"f16": "float16", "bf16": "bfloat16"}


def _block(name: str) -> int:
    """How many channels of a head share a scale in the format of a cache."""
    return 32 if name.split()[1].partition("_")[2] in ("0", "1", "nl") else 1


def _named(cache: str) -> str:
    return NAMES.get(cache, cache)


def _low_scores(config: Config, inputs: Sequence[Array], weights: Sequence[Array], kept: Rounding,
                turn: bool) -> Array:  # fmt: skip
    """q8_1 again, of a K cache whose blocks have a minimum."""
    q, k = (np.asarray(x)[0] for x in inputs)
    if turn:
        q, k = (roundings.hadamard(x, x.shape[-1] & -x.shape[-1]) for x in (q, k))
    low = np.asarray(kept(k), np.float64)
    low = low.reshape(*low.shape[:2], -1, 32).min(-1)
    low = np.repeat(low, q.shape[1] // low.shape[1], 1)
    value = np.einsum("tnb,snb->nts", roundings.q8_1_excess(q), low)
    return _as_array(value[None] * config.head_dim**-0.5)


def _score_formats(name: str, says: str, q: Rounding | None, k: Rounding, level: str,
                   minimum: bool = False) -> list[Format]:  # fmt: skip
    """A cache of k, and the same in a turned basis where that makes a difference."""
    found = []
    for turn in (False, True) if level in ("8-bit", "lower") else (False,):
        wrap = partial(_turned, size=None) if turn else (lambda rounding: rounding)
        operands = {1: _plain(wrap(k))}
        if q is not None:
            operands[0] = _plain(wrap(q))
        elif turn:
            operands[0] = _plain(wrap(roundings.f32))
        plus = partial(_low_scores, kept=k, turn=turn) if minimum else None
        leaves = 20.0 if minimum else None
        more = ", turned by a Hadamard matrix" if turn else ""
        block = 64 if turn else 32 if level in ("8-bit", "lower") else 1
        found.append(
            Format(name, says + more, level, operands, plus=plus, leaves=leaves, block=block)
        )
    return found


def _of_scores() -> list[Format]:
    found: list[Format] = []
    for cache, kept in CACHE.items():
        level, name = _level(cache), f"kv {_named(cache)}"
        minimum = cache in WITH_MINIMUM
        found += _score_formats(name, f"a {_named(cache)} key cache", PARTNER[cache], kept, level,
                                minimum)  # fmt: skip
        # kernels that widen the cache before they multiply
        found += _score_formats(name, f"a {_named(cache)} key cache", None, kept, level)
        if level in ("8-bit", "lower"):
            found += _score_formats(name, f"a {_named(cache)} key cache, q in float16",
                                    roundings.f16, kept, level)  # fmt: skip
    for q in (None, roundings.f16, roundings.bf16):
        found += [
            Format(
                name,
                f"a key cache in {_put(name)}",
                _level(name[3:7]),
                _pair(q, rounding),
                block=_block(name),
            )
            for name, rounding in OTHER_CACHES
        ]
    for name, level, rounding in (
        ("tf32", "tf32/f16", roundings.tf32), ("tf32 cut off", "tf32/f16", _cut)
    ):  # fmt: skip
        found.append(Format(name, f"q and k rounded to {name}", level, _pair(rounding, rounding)))
    found.append(_f16_query())
    return found


def _pair(first: Rounding | None, second: Rounding) -> dict[int, Operand]:
    return ({} if first is None else {0: _plain(first)}) | {1: _plain(second)}


def _f16_query() -> Format:
    return Format("float16", "q rounded to float16", "tf32/f16", {0: _plain(roundings.f16)})


def _put(name: str) -> str:
    """The format of a cache, for people. A scale of 1 may be one that was never loaded."""
    return f"{name[3:]} at scale 1" if name in ("kv float8_e4m3", "kv float8_e5m2") else name[3:]


def _read_back(kept: Rounding, grid: Rounding, x: np.ndarray, nudge: float = 0.0) -> np.ndarray:
    return grid(kept(x, nudge=nudge))


OTHER_CACHES: list[tuple[str, Rounding]] = [
    ("kv int8 per token and head", roundings.symmetric),
    ("kv int8 per token and head, with a zero point", roundings.affine_row),
    ("kv int4 per token and head", partial(roundings.symmetric, most=7)),
    ("kv int4 per token and head, with a zero point", partial(roundings.affine_row, levels=15)),
    ("kv float8_e4m3", roundings.e4m3),
    ("kv float8_e5m2", roundings.e5m2),
    ("kv float8_e4m3 per tensor", roundings.scaled_e4m3_tensor),
    ("kv float8_e4m3 per token and head", roundings.scaled_e4m3),
    # of models in 16 bits: what is read back is rounded to those
    *(
        (f"kv {name} read in {back}", partial(_read_back, kept, grid))
        for name, kept in (
            ("q8_0", roundings.q8_0),
            ("q4_0", roundings.q4_0),
            ("int8 per token and head", roundings.symmetric),
        )
        for back, grid in (("bfloat16", roundings.bf16), ("float16", roundings.f16))
    ),
]


def _of_weighted_sums() -> list[Format]:
    found = [_flash_f16()]
    for cache, kept in CACHE.items():
        level, name = _level(cache), f"kv {_named(cache)}"
        says = f"a {_named(cache)} value cache"
        block = 1 if cache in ("f16", "bf16") else 32
        found.append(Format(name, says, level, {1: _of_v(kept)}, block=block))
        if cache in ("f16", "bf16"):  # softmax's weights are converted to the cache's type
            found.append(Format(name, says, level, {0: _plain(kept), 1: _of_v(kept)}))
        else:
            turned = _of_v(_turned_back(kept, 64))
            more = ", turned by a Hadamard matrix"
            found.append(Format(name, says + more, level, {1: turned}, block=64))
            both = {0: _plain(roundings.f16), 1: _of_v(kept)}
            found.append(Format(name, says, level, both, block=32))
    for name, rounding in OTHER_CACHES:
        says = f"a value cache in {_put(name)}"
        operands = {1: _of_v(rounding)}
        found.append(Format(name, says, _level(name[3:7]), operands, block=_block(name)))
    for name, level, rounding in (
        ("tf32", "tf32/f16", roundings.tf32), ("tf32 cut off", "tf32/f16", _cut)
    ):  # fmt: skip
        operands = {0: _plain(rounding), 1: _of_v(rounding)}
        found.append(Format(name, f"weights and v rounded to {name}", level, operands))
    return found


def _unrounded_at_first(base: Format | None, first: bool) -> Format:
    """Attention that reads keys and values of its own call before the cache rounds them, and those
    of earlier calls from there; with ``first`` in the first call alone. ``base`` is the format of a
    cache that was not dumped."""
    when = "the first call" if first else "their own call"
    if base is None:
        base = Format(f"kv unrounded in {when}", f"keys and values read unrounded in {when}", "f32")
    else:
        base = replace(base, says=f"{base.says}, but read unrounded in {when}")

    def whole(case: Any) -> Array | None:
        plain, rounded = case.in_format(None), case.in_format(base)
        put: Array | None = None  # k or v before the cache
        if stored := {"k_cache", "v_cache"} & {*case.stage.inputs}:
            cache = case.other(*stored).last(None)
            if not cache.replayable:
                return None
            put = cache.in_format(None).exact
        start, _ = case.bounds
        own = np.arange(case.pos.mask.shape[-1]) >= start
        own = jnp.asarray(own & (start == 0) if first else own)[None, None]
        if case.stage.kind is SCORES:
            return jnp.where(own, plain.run(None, put), rounded.exact)
        weights = case.inputs[0]
        return plain.run(weights * own, put) + rounded.run(weights * ~own)

    return replace(base, whole=whole, calls=True)


@lru_cache
def _of_calls(kind: Kind) -> tuple[Format, ...]:
    """What attention may do in an engine that runs in calls, beyond ``_of_kind``."""
    kept = [f for f in _of_kind(kind) if [*f.operands] == [1] and f.name.startswith("kv")]
    bases = [None, *{f.name: f for f in reversed(kept)}.values()]
    return tuple(_unrounded_at_first(base, first) for base in bases for first in (True, False))


def _at_a_scale(dtype: Any, case: Any) -> Array | None:
    """A cache in an 8-bit float at a constant scale, one for all or one for each head. The scale is
    read off: values of one power of two have few steps."""
    plain = np.asarray(case.in_format(None).exact, np.float32)
    dump = np.asarray(case.dump, np.float32)
    found = np.empty_like(plain)
    for head in range(plain.shape[2]):
        scale = _scale_of(plain[:, :, head], dump[:, :, head], dtype)
        if scale is None:
            return None
        found[:, :, head] = _scaled(plain[:, :, head], scale, dtype)
    return _as_array(found)


def _scaled(x: np.ndarray, scale: np.float32, dtype: Any) -> np.ndarray:
    return roundings.saturated(x / scale, dtype) * scale


# Of values that are whole numbers of steps: how far from one rounding to float32 leaves them, and
# how many have to be.
OFF_STEP, ON_STEP = 1e-4, 0.98


def _scale_of(x: np.ndarray, dump: np.ndarray, dtype: Any) -> np.float32 | None:
    values = np.abs(dump[(dump != 0) & np.isfinite(dump)])
    if not values.size:
        return None
    info = ml_dtypes.finfo(dtype)
    steps = 2 ** (info.nmant + 1)
    tried = []
    for step in range(steps // 2, steps):  # that of the largest
        scale = values.max() / np.float32(step)
        part = np.frexp(values / scale)[0] * steps
        on = np.abs(part - np.rint(part)) < OFF_STEP * steps
        if on.mean() >= ON_STEP:
            tried += [scale * np.float32(2.0**power) for power in range(-18, 12)]
    largest = values.max() / float(info.max)
    tried = [scale for scale in tried if scale >= largest * (1 - 1e-5)]
    off = [np.square(_scaled(x, scale, dtype) - dump).sum() for scale in tried]
    return tried[int(np.argmin(off))] if tried else None


def _of_caches() -> list[Format]:
    """What is read back of k, or of the v of q, k and v side by side."""
    known = [
        (f"kv {_named(cache)}", _level(cache), kept) for cache, kept in roundings.CACHE.items()
    ]
    known += [(name, _level(name[3:7]), rounding) for name, rounding in OTHER_CACHES]
    return [
        Format(
            name,
            f"a cache in {_put(name)}",
            level,
            {0: _of_v(rounding)},
            block=_block(name),
        )
        for name, level, rounding in known
    ] + [
        Format(
            f"kv {name} at a constant scale",
            f"a cache in {name} at a constant scale",
            "lower",
            whole=partial(_at_a_scale, dtype),
        )
        for name, dtype in (
            ("float8_e4m3", ml_dtypes.float8_e4m3fn), ("float8_e5m2", ml_dtypes.float8_e5m2)
        )
    ]  # fmt: skip


def _flash_f16() -> Format:
    """llama.cpp's flash attention with a float16 V cache. Each row is computed in one of two ways,
    by how many rows its call had: everything in float32 (q too), or a sum kept in float16. A
    foreign dump does not say how many, so the nearest counts, row by row."""
    says = "flash attention with a float16 value cache, summed in float16"
    # 16.1 to 17.3 measured: the last bit of a score decides a rounding to float16 now and then
    return Format(
        "flash float16", says, "tf32/f16", whole=_flash_rows, allows=_flash_flips, leaves=14.5
    )


def _flash_operands(case: Any) -> tuple[Any, np.ndarray] | None:
    """The scores' replay, and the cached v of each query head, where neither was dumped."""
    scored = case.other("attn_scores")
    if case.value("attn_softmax") is not None or not scored.replayable:
        return None
    v = case.inputs[1]
    v = roundings.f16(np.asarray(v if v.ndim == 4 else split_heads(case.config, v)[2])[0])
    return scored, np.repeat(v, case.config.num_attention_heads // v.shape[1], 1)


# A score's last bit decides, now and then, to which of two float16 values a running sum goes. It
# may be far larger than what is left of it at the end.
FLIP = 2.0**-13


def _flash_flips(case: Any) -> Array:
    found = _flash_operands(case)
    if found is None:
        return jnp.zeros(())
    scored, v = found
    return _as_array(FLIP * _softmaxed(_unmasked(case, scored.exact), np.abs(v))).reshape(
        case.dump.shape
    )


def _flash_rows(case: Any) -> Array | None:
    found = _flash_operands(case)
    if found is None:
        return None
    scored, v = found
    scores = [_unmasked(case, scored.exact)]
    loop = roundings.sum_in_f16(scores[0].astype(np.float32), v)
    if scored.format is not None and 0 in scored.format.operands:
        others = {place: f for place, f in scored.format.operands.items() if place != 0}
        alone = replace(scored.format, operands=others)
        scores.append(_unmasked(case, scored.in_format(alone).exact))
    ways = [loop, *(_softmaxed(score, v) for score in scores)]
    dump = np.asarray(case.dump).reshape(loop.shape)
    off = np.stack([np.square(way - dump).sum((1, 2)) for way in ways])
    nearest = off.argmin(0)
    found = np.stack(ways)[nearest, np.arange(len(nearest))]
    return _as_array(found.reshape(case.dump.shape))


def _unmasked(case: Any, scores: Array) -> np.ndarray:
    """[N, T, S] scores of the stage's rows, -inf where masked."""
    return np.where(np.asarray(case.pos.mask), np.asarray(scores)[0, :, -case.rows :], -np.inf)


def _softmaxed(scores: np.ndarray, v: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v.astype(np.float64))


# --- everything else


def _angle_formats() -> list[Format]:
    made = [
        ("rope recurrence f32", "RoPE angles multiplied up from pair to pair in float32",
         roundings.angles_by_recurrence),
        ("rope powers f32", "RoPE angles by powers of one float32 step",
         roundings.angles_by_powers),
        ("rope exp2 f32", "RoPE frequencies by exp2 in float32", roundings.angles_by_exp2),
        ("rope exp f32", "RoPE frequencies by exp in float32", roundings.angles_by_exp),
        ("rope f64", "RoPE angles in float64", roundings.angles_in_f64),
    ]  # fmt: skip
    found = [Format(name, says, "f32", angles=angles) for name, says, angles in made]
    for name, level, rounding in (
        ("float16", "tf32/f16", roundings.f16), ("bfloat16", "bf16", roundings.bf16)
    ):  # fmt: skip
        says = f"RoPE tables rounded to {name}"
        of_hf = roundings.angles_of_hugging_face
        found.append(Format(f"rope tables {name}", says, level, angles=of_hf, table=rounding))
    return found


# The angle of pair i after i products rounded to float32, each by at most half a unit in the last
# place; with those of the first angle and of the step.
ROPE_BY_PRODUCTS = Format(
    "rope products f32",
    "RoPE angles that rounding in float32 from pair to pair explains",
    "f32",
    allows=lambda case: case.turned(1.0 + 1.5 * np.arange(case.config.head_dim // 2)),
)


def _inputs_in(name: str, level: str, rounding: Rounding) -> list[Format]:
    """One input, or all of a stage's (at most two) inputs in a 16-bit format."""
    return [
        Format(name, f"inputs rounded to {name}", level, dict.fromkeys(places, _plain(rounding)))
        for places in ((0,), (1,), (0, 1))
    ]


def _in_half(x: Array, rounding: Rounding) -> Array:
    """SiLU with its exponential, its sum and its quotient rounded."""

    def keep(value: Any) -> np.ndarray:
        return rounding(np.asarray(value, np.float32))

    gate = keep(x)
    with np.errstate(over="ignore"):
        sigmoid = keep(1 / keep(1 + keep(np.exp(-gate))))
    return _as_array(keep(gate * sigmoid))


def _by_mlas(case: Any) -> Array:
    gate = np.asarray(case.inputs[0], np.float32)
    return _as_array(gate * roundings.mlas_logistic(gate))


MLAS_SILU = Format("silu mlas", "SiLU by onnxruntime's own sigmoid (MLAS)", "f32", whole=_by_mlas)


def _of_values(kind: Kind) -> list[Format]:
    found: list[Format] = [MLAS_SILU] if kind is ACTIVATION else []
    for name, level, rounding in (
        ("float16", "tf32/f16", roundings.f16), ("bfloat16", "bf16", roundings.bf16)
    ):  # fmt: skip
        if kind is not LOOKUP:  # its input is token ids
            found += _inputs_in(name, level, rounding)
        if kind is ACTIVATION:
            whole = partial(_activation_in, rounding=rounding)
            found.append(Format(name, f"computed in {name}", level, whole=whole))
        if kind is SOFTMAX:
            whole = partial(_softmax_in, rounding=rounding)
            found.append(Format(name, f"exponentials in {name}", level, whole=whole))
        if kind in (NORM, LOOKUP, ADD):
            found.append(Format(name, f"weight rounded to {name}", level, weights=rounding))
    return found


def _softmax_in(case: Any, rounding: Rounding) -> Array:
    """Softmax with its exponentials, and their arguments, rounded."""
    mask = np.asarray(case.pos.mask)[:, None]
    scores = np.where(mask, np.asarray(case.inputs[0]), -np.inf)
    depth = rounding((scores - scores.max(-1, keepdims=True)).astype(np.float32))
    weights = rounding(np.exp(depth)).astype(np.float64)
    return _as_array(weights / weights.sum(-1, keepdims=True))


def _activation_in(case: Any, rounding: Rounding) -> Array:
    return _in_half(case.inputs[0], rounding)


def choices(stage: Stage, config: Config, calls: bool = True) -> list[Format]:
    """The formats that a stage may have; of an engine that runs in calls, if it is one."""
    width = config.head_dim
    if stage.linear:
        width = axis_size(config.arch.cached.axes_of(stage.inputs[0])[-1], config.dims(1))
    every = _of_kind(stage.kind)
    if calls and stage.kind in (SCORES, WEIGHTED_SUM):
        every += _of_calls(stage.kind)
    return [format for format in every if width % format.block == 0]


@lru_cache
def _of_kind(kind: Kind) -> tuple[Format, ...]:
    if kind is LINEAR:
        return tuple(LINEAR_FORMATS)
    if kind is SCORES:
        return tuple(_of_scores())
    if kind is WEIGHTED_SUM:
        return tuple(_of_weighted_sums())
    if kind is STORED:
        return tuple(_of_caches())
    if kind is ROTATION:
        return (*_angle_formats(), *_of_values(kind))
    if kind in (NORM, SOFTMAX, ACTIVATION, ADD, PRODUCT, LOOKUP):
        return tuple(_of_values(kind))
    return ()


GRIDS: dict[str, tuple[str, type]] = {
    "bfloat16": ("bf16", ml_dtypes.bfloat16),
    "float16": ("tf32/f16", np.float16),
}


def on_grid(x: Array, grid: str | None) -> Array:
    """Rounded to the format that a dump lies on; None is no such format."""
    if grid not in GRIDS:
        return x
    with np.errstate(over="ignore"):
        return _as_array(np.asarray(x, np.float32).astype(GRIDS[grid][1]).astype(np.float64))
