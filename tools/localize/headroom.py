"""How near a trace's values come to the end of float16, and why something is not finite.

A 16-bit engine overflows in what it rounds, which is more than what it stores: scores before they
are scaled, and the sum of squares of a norm. Both follow from values that are in the trace.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_jax.config import Config
from stages.architecture import NORM, Stage
from stages.mask import layer_mask
from stages.trace import Trace

FLOAT16 = 65504.0
NEAR = 0.25  # of the range: what is told; the largest stage of a trained model has a few per cent


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The largest value of one stage of one layer that is near the end of float16.

    Attributes:
        what: "value", "before the scale" (of scores) or "sum of squares" (of a norm).
        largest: its magnitude.
        channel, position: where it is; the channel None for a sum.
    """

    stage: str
    layer: int | None
    what: str
    largest: float
    position: int
    channel: int | None

    @property
    def float16(self) -> float:
        """The largest value as a part of float16's range; above 1 it overflows."""
        return self.largest / FLOAT16

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer, "stage": self.stage, "of": self.what, "largest": self.largest,
            "float16": self.float16, "position": self.position, "channel": self.channel,
        }  # fmt: skip


def measure(trace: Trace, config: Config, near: float = NEAR) -> list[Headroom]:
    """Everything in a trace that takes more than ``near`` of float16's range, in the order of
    computation."""
    return [found for found in _every(trace, config, near) if found.float16 > near]


def _every(trace: Trace, config: Config, near: float) -> Iterator[Headroom]:
    for stage, layer in trace.entries:
        row = trace.row(stage)
        value = trace.read_rows(stage, layer)
        root = config.dims(1)[row.kind.over_root] ** 0.5 if row.kind.over_root else 1
        if _peak(value) * root > near * FLOAT16:  # of few: the rest is read once, and not copied
            value = np.abs(value.astype(np.float32))
            if row.kind.masked and layer is not None:
                mask = layer_mask(trace.config, layer, trace.positions)[-value.shape[1] :]
                value = np.where(mask, value, 0)
            yield from _largest(trace, row, layer, "value", value)
            if row.kind.over_root:
                yield from _largest(trace, row, layer, "before the scale", value * root)
        if row.kind is NORM:
            key = trace.tables.stored_as(row.inputs[0], layer, config.num_hidden_layers)
            # of the stream: a head's norm is of far fewer terms, and reads a part of its input
            if row.heads(config.dims(1)) is None and key in trace.entries:
                sums = np.square(trace.read_rows(*key).astype(np.float64)).sum(-1, keepdims=True)
                yield from _largest(trace, row, layer, "sum of squares", sums)


def _peak(value: np.ndarray) -> float:
    """The largest magnitude; NaN is passed over."""
    if not value.size:
        return 0.0
    return max(float(np.fmax.reduce(value, None)), -float(np.fmin.reduce(value, None)))


def _largest(
    trace: Trace, row: Stage, layer: int | None, what: str, value: np.ndarray
) -> Iterator[Headroom]:
    if not value.size:
        return
    matrix = row.matrix(value) if what != "sum of squares" else value.reshape(-1, 1)
    finite = np.where(np.isfinite(matrix), matrix, -1)
    place, channel = np.unravel_index(int(finite.argmax()), matrix.shape)
    rows = value.shape[row.axes.index(row.row_axis)]
    yield Headroom(
        stage=row.name, layer=layer, what=what, largest=float(finite[place, channel]),
        position=len(trace.tokens) - rows + int(place) % rows,
        channel=None if what == "sum of squares" else int(channel),
    )  # fmt: skip


def cause(row: Stage, config: Config, exact: np.ndarray) -> str | None:
    """Why a stage of these right values [1, ...] has none in float16; None where it has. What the
    mask removes is 0."""
    size = np.abs(np.nan_to_num(exact))
    largest = float(size.max())
    if largest > FLOAT16:
        channel = int(row.matrix(size).max(0).argmax())
        where = f"in channel {channel} of {row.name}"
        return f"{largest:,.0f} {where}, and float16 ends at 65504"
    if row.kind.over_root:
        largest *= config.dims(1)[row.kind.over_root] ** 0.5
        if largest > FLOAT16:
            return f"a product is {largest:,.0f} before the scale, and float16 ends at 65504"
    return None
