"""Weights in a coarser type than the one given: what a converter or a loader did."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from tools.collect import ggml
from tools.localize.formats import roundings
from tools.localize.formats.registry import PLAIN_FORMAT, Format, choices, side_by_side
from tools.localize.mistakes.orders import Change, tried
from tools.localize.stage_case import StageReplay

Candidates = Iterator[tuple[str, Array]]


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
            yield from tried(case, iter([(each.name, each.quantise)]))
            if each.partner in formats:
                for partner, names in _with_partner(case, formats[each.partner]):
                    yield from tried(partner, iter([(each.name, each.quantise)]), [names])


def _with_partner(case: StageReplay, format: Format) -> Iterator[tuple[StageReplay, list[str]]]:
    """The stage with the inputs of all weights in a format, then of each alone, and which."""
    every = list(case.weights)
    yield case.in_format(format), every
    own = case.format or PLAIN_FORMAT
    for place, name in enumerate(every if len(every) > 1 else ()):
        parts = list(own.parts or [own] * len(every))
        parts[place] = format
        yield case.in_format(side_by_side(parts)), [name]
