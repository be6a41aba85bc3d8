"""Weights that are right but for their order or their type: what a converter or a loader did."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from stages.architecture import ADD
from tools.collect import ggml
from tools.localize.formats import roundings
from tools.localize.formats.registry import PLAIN_FORMAT, Format, choices, side_by_side
from tools.localize.stage_case import StageReplay

Candidates = Iterator[tuple[str, Array]]

# Rows from which on the nearest of 150 000 channels is nearest by more than chance: in four rows
# the best of them agrees to 4 bits, and 6.7 are asked of the coarsest engine.
ROWS = 4
SEARCHED = 16384  # channels, every one of which is compared with every other
TRIED = 64  # output channels on which a change of the whole weight is tried first
GAIN = 2.0  # bits that it has to bring there


# --- orders


def _blocks(width: int) -> list[int]:
    return [size for size in (8, 16, 32, 64, 128, 256) if width % size == 0 and width > size]


def orders(width: int, head: int, groups: int) -> Iterator[tuple[str, np.ndarray]]:
    """Orders that people put channels into by mistake: (what it is, where each one comes from).

    ``head`` is the size of a head if the channels are those of heads, ``groups`` the number of
    key/value heads; else 0.
    """
    all_of_them = np.arange(width)
    if width % 2 == 0:
        yield "halves exchanged", np.roll(all_of_them, width // 2)
        yield "halves interleaved", all_of_them.reshape(2, -1).T.ravel()
        yield "even ones first", all_of_them.reshape(-1, 2).T.ravel()
        yield "pairs exchanged", all_of_them.reshape(-1, 2)[:, ::-1].ravel()
    yield "reversed", all_of_them[::-1]
    if head and width % head == 0 and head % 2 == 0:
        heads = all_of_them.reshape(-1, head)
        yield "halves of every head interleaved", _within(heads, (2, -1))
        yield "even ones of every head first", _within(heads, (-1, 2))
        yield "halves of every head exchanged", np.roll(heads, head // 2, 1).ravel()
        yield "heads reversed", heads[::-1].ravel()
        if groups and len(heads) % groups == 0:
            grouped = heads.reshape(groups, -1, head)
            yield "heads by their place in a group", grouped.swapaxes(0, 1).ravel()
            other = heads.reshape(-1, groups, head)
            yield "heads by their group", other.swapaxes(0, 1).ravel()
    for size in _blocks(width):
        yield f"blocks of {size} reversed", all_of_them.reshape(-1, size)[::-1].ravel()
        yield f"reversed in blocks of {size}", all_of_them.reshape(-1, size)[:, ::-1].ravel()


def _within(heads: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Every head [heads, H] read as a matrix of that shape, transposed."""
    return heads.reshape(len(heads), *shape).swapaxes(1, 2).ravel()


def described(order: np.ndarray, head: int, groups: int) -> str:
    width = len(order)
    for says, known in orders(width, head, groups):
        if np.array_equal(order, known):
            return says
    step = int(-order[0] % width)
    if np.array_equal(order, (np.arange(width) - step) % width):
        return f"rolled by {step if step <= width // 2 else step - width}"
    moved = np.flatnonzero(order != np.arange(width))
    shown = ", ".join(f"{place} holds {order[place]}" for place in moved[:3])
    return f"{len(moved)} moved ({shown}{', ...' if len(moved) > 3 else ''})"


# --- the weight of a norm


def norm_weight(
    case: StageReplay, weight: Array, normed_with: Callable[[Array], Array]
) -> Candidates:
    """The weight [C] that a norm was multiplied by, if it is the right one in another order: its
    values are read off the dump and matched by size."""
    plain, dump = (np.asarray(x).reshape(-1, len(weight)) for x in (
        normed_with(jnp.ones_like(weight)), case.dump
    ))  # fmt: skip
    if not np.isfinite(dump).all():
        return
    found = (dump * plain).sum(0) / np.maximum((plain * plain).sum(0), 1e-300)
    right, width = np.asarray(weight), len(weight)
    order = np.empty(width, int)
    order[found.argsort()] = right.argsort()
    moved = right[order]  # of equal values any order will do
    known = (says for says, other in orders(width, width, 0) if (right[other] == moved).all())
    if (moved != right).any():
        yield next(known, described(order, width, 0)), normed_with(jnp.asarray(moved))


# --- rows


def _nearest(found: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """Which channel of ``right`` [rows, C] each channel of ``found`` is; None where that is no
    order of theirs."""
    width = found.shape[1]
    own = np.square(found - right).sum(0)
    size = np.square(right).sum(0)
    order = np.arange(width)
    for first in range(0, width, 512):
        part = slice(first, first + 512)
        distance = size - 2 * found[:, part].T @ right + np.square(found[:, part]).sum(0)[:, None]
        best = distance.argmin(1)
        closer = distance[np.arange(len(best)), best] < 0.5 * own[part]
        order[part] = np.where(closer, best, order[part])
    moved = order != np.arange(width)
    # what is no order repeats a third of the channels
    repeated = width - len(set(order.tolist()))
    return order if moved.any() and repeated <= 0.1 * moved.sum() else None


def _row_order(case: StageReplay) -> dict[str, np.ndarray]:
    """Weight -> where each of its rows comes from, of those that have moved."""
    dump, exact = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (case.dump, case.exact))
    if len(dump) < ROWS or not np.isfinite(dump).all():
        return {}
    found, first = {}, 0
    for name, weight in case.weights.items():
        part = slice(first, first + len(weight))
        first += len(weight)
        order = _nearest(dump[:, part], exact[:, part]) if len(weight) <= SEARCHED else None
        if order is not None:
            found[name] = order
    return found


def _moved(case: StageReplay, value: Array, moved: dict[str, np.ndarray]) -> Array:
    """``value`` [..., C] with the channels of the moved weights in their order."""
    parts, first = [], 0
    for name, weight in case.weights.items():
        part = np.arange(first, first + len(weight))
        first += len(weight)
        parts.append(part[moved[name]] if name in moved else part)
    return value[..., np.concatenate(parts)]


def rows(case: StageReplay) -> Candidates:
    """The rows of a linear stage's weights in another order; its biases in the same."""
    linear = case.other(case.stage.inputs[0]) if case.stage.kind is ADD else case
    stored = (linear.stage.name, linear.layer) in case.replay.trace.entries
    if not linear.stage.linear or not stored or not linear.replayable:
        return
    moved = _row_order(linear)
    if not moved:
        return
    config = case.config
    says = []
    for name, order in moved.items():
        inside = linear.stage.name == "qkv_matmul"
        head, groups = (config.head_dim, config.num_key_value_heads) if inside else (0, 0)
        says.append(f"{name} {described(order, head, groups)}")
    if linear is case:
        yield ", ".join(says), _moved(case, case.exact, moved)
        return
    names = dict(zip(linear.weights, case.weights, strict=True))
    bias = jnp.concatenate([jnp.asarray(b) for b in case.weights.values()])
    orders_of_biases = {names[name]: order for name, order in moved.items()}
    yield ", ".join(says), case.inputs[0] + _moved(case, bias, orders_of_biases)


# --- the whole weight


Change = Callable[[np.ndarray], np.ndarray]


def _tried(
    case: StageReplay,
    changes: Iterator[tuple[str, Change]],
    of: Sequence[Sequence[str]] | None = None,
) -> Candidates:
    """Changes of all weights, and of each alone, that bring bits to a few output channels. ``of``:
    of these weights only."""
    small = case.sampled(TRIED)
    base = small.scored(small.exact)
    every = list(case.weights)
    for says, change in changes:
        for names in of or [every, *([name] for name in every if len(every) > 1)]:
            few = {name: change(np.asarray(small.weights[name])) for name in names}
            if small.scored(small.run(weights=few)) >= base + GAIN:
                whole = {name: change(np.asarray(case.weights[name])) for name in names}
                yield (
                    says if names == every else f"{says}, of {', '.join(names)}",
                    case.run(weights=whole),
                )


def columns(case: StageReplay) -> Candidates:
    """The columns of a linear stage's weights in another order: its inputs are taken for others."""
    width = case.inputs[0].shape[-1]
    config = case.config
    inside = case.stage.name == "attn_out"
    head, groups = (config.head_dim, config.num_key_value_heads) if inside else (0, 0)

    def changes() -> Iterator[tuple[str, Change]]:
        for says, order in orders(width, head, groups):
            yield says, partial(np.take, indices=order, axis=1)
        for step in (1, -1):
            yield f"rolled by {step}", partial(np.roll, shift=step, axis=1)

    yield from _tried(case, changes())


def _q8_0_of_weights(x: np.ndarray) -> np.ndarray:
    """``quantize_row_q8_0_ref``: codes by the inverse of the scale, a half away from zero. Those of
    activations (``roundings.q8_0``) differ where 16-bit weights lie on a half, which many do."""
    blocks = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = blocks * inverse
    codes = np.sign(codes) * np.floor(np.abs(codes) + np.float32(0.5))
    return (codes * roundings.f16(scale)).reshape(x.shape)


# The types of llama.cpp that it alone can quantise to, where it is installed.
BY_GGML = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS")


@dataclass(frozen=True)
class _Type:
    """What a weight may be stored as: rows are multiples of ``block``. ``partner`` is the format
    that llama.cpp then rounds the other operand to."""

    name: str
    block: int
    quantise: Change
    partner: str = ""


def _types(case: StageReplay) -> Iterator[_Type]:
    if case.replay.dtype.itemsize > 2:  # an engine that computes in 16 bits rounds weights to them
        yield _Type("F16", 1, roundings.f16)
        yield _Type("BF16", 1, roundings.bf16)
    for name, quantise, partner in (
        ("Q8_0", _q8_0_of_weights, "q8_0"), ("Q8_0", roundings.q8_0, "q8_0"),
        ("Q5_0", roundings.q5_0, "q8_0"), ("Q5_1", roundings.q5_1, "q8_1"),
        ("Q4_0", roundings.q4_0, "q8_0"), ("Q4_1", roundings.q4_1, "q8_1"),
        ("IQ4_NL", roundings.iq4_nl, "q8_0"),
    ):  # fmt: skip
        yield _Type(name, 32, quantise, partner)
    library = ggml.installed()
    if library:
        for name in BY_GGML:
            yield _Type(name, 256, partial(library.quantised, kind=name), "q8_K")
    yield _Type("int8 per row", 1, roundings.symmetric)
    yield _Type("uint8 per row", 1, roundings.affine_row)
    yield _Type("int4 per row", 1, partial(roundings.symmetric, most=7))
    for size in (32, 64, 128):
        yield _Type(f"int8 in blocks of {size}", size, partial(roundings.symmetric, block=size))
        four = partial(roundings.symmetric, block=size, most=7)
        yield _Type(f"int4 in blocks of {size}", size, four)
    yield _Type("float8 (e4m3)", 1, roundings.e4m3)
    yield _Type("float8 (e5m2)", 1, roundings.e5m2)
    yield _Type("float8 (e4m3) per row", 1, roundings.scaled_e4m3)


def requantised(case: StageReplay) -> Candidates:
    """A weight in a coarser type than the one given."""
    if not case.stage.linear:  # the embedding: its rows are the value
        for each in _types(case):
            if case.exact.shape[-1] % each.block == 0:
                found = each.quantise(np.asarray(case.exact))
                yield each.name, jnp.asarray(found, jnp.float64)
        return
    formats = {format.name: format for format in choices(case.stage, case.config)}
    width = case.inputs[0].shape[-1]
    for each in _types(case):
        if width % each.block == 0:
            yield from _tried(case, iter([(each.name, each.quantise)]))
            if each.partner in formats:
                for partner, names in _with_partner(case, formats[each.partner]):
                    yield from _tried(partner, iter([(each.name, each.quantise)]), [names])


def _with_partner(case: StageReplay, format: Format) -> Iterator[tuple[StageReplay, list[str]]]:
    """The stage with the inputs of all weights in a format, then of each alone, and which."""
    every = list(case.weights)
    yield case.in_format(format), every
    own = case.format or PLAIN_FORMAT
    for place, name in enumerate(every if len(every) > 1 else ()):
        parts = list(own.parts or [own] * len(every))
        parts[place] = format
        yield case.in_format(side_by_side(parts)), [name]


# --- the vocabulary


def _signed(step: int, size: int) -> int:
    step %= size
    return step if step <= size // 2 else step - size


def vocabulary(case: StageReplay) -> Candidates:
    """The rows of the embedding or of the head, all of them so many further on."""
    size = case.config.vocab_size
    if case.stage.linear:
        dump, exact = (np.asarray(x).reshape(-1, size)[-8:] for x in (case.dump, case.exact))
        if np.isfinite(dump).all():
            match = np.fft.rfft(dump) * np.conj(np.fft.rfft(exact))
            step = int(np.fft.irfft(match.sum(0), size).argmax())
            if step:
                yield f"{_signed(step, size):+d}", jnp.roll(case.exact, step, -1)
        return
    table = case.model.read(case.tables.table.tensor)
    tokens = np.array(case.replay.trace.tokens)[-case.rows :]
    row = np.asarray(case.dump)[0, 0].astype(np.float32)
    wide = np.asarray(table, np.float32)
    place = int((np.square(wide).sum(1) - 2 * wide @ row).argmin())
    step = _signed(int(tokens[0]) - place, len(table))
    if step:
        found = wide[(tokens - step) % len(table)].astype(np.float64)
        yield f"{step:+d}", jnp.asarray(found)[None]
