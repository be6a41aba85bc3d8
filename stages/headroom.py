"""How near the values of a trace come to the end of a number format, and why something is not
finite.

A 16-bit engine overflows in what it rounds, which is more than what it stores: scores before they
are scaled, and the sum of squares of a norm. Both follow from values that are in the trace, so one
trace in float32 forecasts where an engine in another format overflows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from msgspec import UNSET, UnsetType

from stages import numbers
from stages.architecture import LINEAR, NORM, SIZES, Stage
from stages.entry import Axes, Entry
from stages.mask import layer_mask
from stages.numbers import Keeps
from stages.trace import Trace
from stages.verdict import ranges

NEAR = 0.25  # of the range: what is told; the largest stage of a trained model has a few per cent
BLOCK = 32  # values that share a sum in Q8_1
SUM = "sum of squares"


@dataclass(frozen=True)
class Format:
    """A number format that an engine keeps values in.

    Attributes:
        dtype: its numbers, or those of its sums.
        keeps: every value, what a key/value cache has (at scale 1), or the sum of each block of
            what linear layers read.
    """

    name: str
    dtype: np.dtype
    keeps: Keeps

    @property
    def most(self) -> float:
        """Its largest number."""
        return float(ml_dtypes.finfo(self.dtype).max)


FORMATS = {
    name: Format(name, np.dtype(f.dtype), f.keeps)
    for f in numbers.FORMATS
    if f.dtype is not None and (name := f.offered or f.name)
}
FLOAT16 = FORMATS["float16"]


class HeadroomRow(Entry, frozen=True):
    """What of a stage takes more than a quarter of a format's range: the largest "value", product
    "before the scale" of scores, "sum of squares" of a norm, or "sum of 32" of a Q8_1 block; and
    where it is (of scores the channel is the key's row, of a block its first).

    Attributes:
        part: the largest as a part of the format's largest number; float16: the same of 65504, in
            what localize says.
        where: what of it rounds to no number of the format.
    """

    layer: int | None
    stage: str
    of: Literal["value", "before the scale", "sum of squares", "sum of 32"]
    largest: float
    position: int
    channel: int | None
    head: int | None = None
    part: float | UnsetType = UNSET
    float16: float | UnsetType = UNSET
    where: Axes | UnsetType = UNSET


class HeadroomEntry(Entry, frozen=True):
    """Where an engine in a number format would overflow, as ``--headroom`` forecasts it.

    Attributes:
        most: the largest number of the format.
        overflows: something other than the sum of squares of a norm is beyond it.
        missing: stages that would have to be looked at and are not in the trace.
    """

    format: str
    most: float
    overflows: bool
    rows: list[HeadroomRow]
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The largest value of one stage of one layer.

    Attributes:
        what: "value", "before the scale" (of scores), "sum of squares" (of a norm) or "sum of 32"
            (of a block).
        largest: its magnitude.
        most: the largest number of the format.
        head, position, channel: where it is; the head and the channel None where there are none.
            Of scores the channel is the key's row, of a block its first channel.
        over: {"head" | "position" | "channel": which slices have something that rounds to no number
            of the format}; empty if nothing does.
        skipped_rows: how many rows of the sequence come before those of "position".
    """

    stage: str
    layer: int | None
    what: str
    largest: float
    most: float
    head: int | None
    position: int
    channel: int | None
    over: Mapping[str, np.ndarray]
    skipped_rows: int

    @property
    def part(self) -> float:
        """The largest value as a part of the format's range."""
        return self.largest / self.most

    @property
    def overflows(self) -> bool:
        """Whether an engine overflows here. Most compute norms in float32, whose sums have room."""
        return bool(self.over) and self.what != SUM

    @property
    def where(self) -> dict[str, str]:
        """{"heads" | "positions" | "channels": those that overflow, as ranges or "all"}."""
        first = {"position": self.skipped_rows}
        return {axis + "s": ranges(mask, first.get(axis, 0)) for axis, mask in self.over.items()}

    def to_json(self, part: str = "part") -> dict[str, Any]:
        """A row of ``--json``; ``part`` is what that is called there."""
        row = {
            "layer": self.layer, "stage": self.stage, "of": self.what, "largest": self.largest,
            part: self.part, "head": self.head, "position": self.position,
            "channel": self.channel,
        }  # fmt: skip
        return row | ({"where": self.where} if self.over else {})


def measure(trace: Trace, format: Format = FLOAT16, near: float = NEAR) -> list[Headroom]:
    """Everything in a trace that takes more than ``near`` of a format's range, in the order of
    computation."""
    return [found for found in _Reading(trace, format, near).every() if found.part > near]


def missing(trace: Trace, format: Format) -> list[str]:
    """The stages that would have to be looked at and are in no layer of a trace."""
    reading, there = _Reading(trace, format, NEAR), {stage for stage, _ in trace.entries}
    return [s.name for s in trace.arch.stages if reading.of(s) and s.name not in there]


class _Reading:
    """One trace and one format."""

    def __init__(self, trace: Trace, format: Format, near: float) -> None:
        self.trace, self.format, self.near = trace, format, near
        self.sizes = {letter: trace.config[name] for letter, name in SIZES.items()}
        arch = trace.arch
        self.read = {name for stage in arch.stages if stage.kind is LINEAR for name in stage.inputs}
        self.cached = {stage.inputs[0] for stage in arch.cache}

    def of(self, stage: Stage) -> bool:
        """Whether the format keeps anything of a stage."""
        keeps = self.format.keeps
        return keeps == "values" or stage.name in (self.read if keeps == "blocks" else self.cached)

    def every(self) -> Iterator[Headroom]:
        for name, layer in self.trace.entries:
            stage = self.trace.arch.stage[name]
            if self.of(stage):
                yield from self._values(stage, layer)
            if stage.kind is NORM and self.format.keeps == "values":
                yield from self._sums(stage, layer)

    def _values(self, stage: Stage, layer: int | None) -> Iterator[Headroom]:
        value = self.trace.read_rows(stage.name, layer)
        root = self.sizes[stage.kind.over_root] ** 0.5 if stage.kind.over_root else 1
        step = BLOCK if self.format.keeps == "blocks" else 1
        if _peak(value) * root * step <= self.near * self.format.most:
            return  # nearly all: it is read once, and not copied
        value = value.astype(np.float64)
        if stage.kind.masked and layer is not None:
            mask = layer_mask(self.trace.config, layer, self.trace.positions)
            value = np.where(mask[-value.shape[1] :], value, 0)
        matrix = stage.matrix(value)
        if self.format.keeps == "cache":  # of q, k and v side by side, v
            matrix[:, : -self.sizes["K"] * self.sizes["H"]] = 0
        if step > 1:
            blocks = np.pad(matrix, [(0, 0), (0, -matrix.shape[1] % step)])
            matrix = blocks.reshape(len(blocks), -1, step).sum(-1)
            yield from self._largest(stage, layer, f"sum of {step}", matrix, step)
            return
        yield from self._largest(stage, layer, "value", matrix)
        if stage.kind.over_root:
            yield from self._largest(stage, layer, "before the scale", matrix * root)

    def _sums(self, stage: Stage, layer: int | None) -> Iterator[Headroom]:
        """Sums of squares of norms over hidden channels. A head's norm is left out: it sums far
        fewer terms and reads a part of its input."""
        layers = self.trace.config["num_hidden_layers"]
        key = self.trace.arch.stored_as(stage.inputs[0], layer, layers)
        if stage.heads(self.sizes) is None and key in self.trace.entries:
            value = self.trace.read_rows(*key).astype(np.float64)
            yield from self._largest(stage, layer, SUM, np.square(value).sum(-1, keepdims=True))

    def _largest(
        self, stage: Stage, layer: int | None, what: str, matrix: np.ndarray, step: int = 1
    ) -> Iterator[Headroom]:
        """The largest entry of a stage's matrix, or of sums over ``step`` of its columns."""
        if not matrix.size:
            return
        size = np.abs(matrix)
        finite = np.isfinite(size)
        size[~finite] = -1
        place, column = (int(i) for i in np.unravel_index(int(size.argmax()), size.shape))
        with np.errstate(over="ignore"):
            over = finite & ~np.isfinite(size.astype(self.format.dtype))
        heads = stage.heads(self.sizes) if stage.heads_lead else None
        rows = len(matrix) // (heads or 1)
        masks = {}
        if over.any():
            masks = stage.fold(heads, over.sum(1), np.repeat(over.sum(0), step))
        if what == SUM:
            masks.pop("channel", None)
        skipped = len(self.trace.tokens) - rows
        yield Headroom(
            stage=stage.name, layer=layer, what=what, largest=float(size[place, column]),
            most=self.format.most, head=place // rows if heads else None,
            position=skipped + place % rows, channel=None if what == SUM else step * column,
            over={axis: mask > 0 for axis, mask in masks.items()}, skipped_rows=skipped,
        )  # fmt: skip


def _peak(value: np.ndarray) -> float:
    """The largest magnitude; NaN is passed over."""
    if not value.size:
        return 0.0
    return max(float(np.fmax.reduce(value, None)), -float(np.fmin.reduce(value, None)))


def cause(stage: Stage, config: Mapping[str, Any], exact: np.ndarray) -> str | None:
    """Why a stage of these right values [1, ...] has none in float16; None where it has. What the
    mask removes is 0. ``config``: as plain data."""
    size = np.abs(np.nan_to_num(exact))
    largest = float(size.max())
    if largest > FLOAT16.most:
        channel = int(stage.matrix(size).max(0).argmax())
        where = f"in channel {channel} of {stage.name}"
        return f"{largest:,.0f} {where}, and float16 ends at 65504"
    if stage.kind.over_root:
        largest *= config[SIZES[stage.kind.over_root]] ** 0.5
        if largest > FLOAT16.most:
            return f"a product is {largest:,.0f} before the scale, and float16 ends at 65504"
    return None
