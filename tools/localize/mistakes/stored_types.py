"""Weights in a coarser type than the one given: what a converter or a loader did."""

from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from stages import numbers
from tools.collect import ggml
from tools.localize.formats.registry import PLAIN_FORMAT, Format, choices, side_by_side
from tools.localize.mistakes.orders import Change, tried
from tools.localize.stage_case import StageReplay

Candidates = Iterator[tuple[str, Array]]


def _types(case: StageReplay) -> Iterator[tuple[numbers.NumberFormat, Change]]:
    """What a weight may be stored as, with each way to make that; some only ggml makes, where it is
    installed. An engine that computes in 16 bits rounds all weights to them."""
    library = ggml.installed()
    for f in numbers.used(numbers.WEIGHT):
        if f.name in ("float16", "bfloat16") and case.replay.dtype.itemsize <= 2:
            continue
        if not f.ways and library:
            yield f, partial(library.quantised, kind=f.of_weight)
        for way in f.ways:
            yield f, way


def requantised(case: StageReplay) -> Candidates:
    """A weight in a coarser type than the one given."""
    if not case.stage.linear:  # the embedding: its rows are the value
        for f, quantise in _types(case):
            if case.exact.shape[-1] % f.block == 0:
                yield f.of_weight, jnp.asarray(quantise(np.asarray(case.exact)), jnp.float64)
        return
    formats = {format.name: format for format in reversed(choices(case.stage, case.config))}
    width = case.inputs[0].shape[-1]
    for f, quantise in _types(case):
        if width % f.block == 0:
            yield from tried(case, iter([(f.of_weight, quantise)]))
            partner = formats.get("q8_1" if f.minimum else f.partner if f.block > 1 else "")
            for other, names in _with_partner(case, partner) if partner else ():
                yield from tried(other, iter([(f.of_weight, quantise)]), [names])


def _with_partner(case: StageReplay, format: Format) -> Iterator[tuple[StageReplay, list[str]]]:
    """The stage with the inputs of all weights in a format, then of each alone, and which."""
    every = list(case.weights)
    yield case.in_format(format), every
    own = case.format or PLAIN_FORMAT
    for place, name in enumerate(every if len(every) > 1 else ()):
        parts = list(own.parts or [own] * len(every))
        parts[place] = format
        yield case.in_format(side_by_side(parts)), [name]
