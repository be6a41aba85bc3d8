"""The arithmetic of linear layers, found on a sample: some rows and channels of a few layers.

It is looked for before anything is measured, so that the one pass over the weights measures every
layer as it is and as that arithmetic has it. What such an estimate explains is not multiplied out;
what it does not is left to ``fit``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from qwen_jax.config import Config
from qwen_jax.local_error import ErrorSums
from qwen_jax.probes import Reading
from qwen_jax.replay import Measured, Replay
from stages import verdict
from stages.architecture import Stage
from stages.files import coarsest_dtype
from stages.verdict import LocalError
from tools.localize.formats.registry import (
    GRIDS,
    NUDGE,
    PLAIN_FORMAT,
    Format,
    choices,
    side_by_side,
)

POSITIONS, CHANNELS = 64, 32  # of a layer, and of each of its weights
LAYERS = 3  # of a stage: the first, the middle and the last one
# Of sums of products: what float32 leaves, the bits that a format must bring back to be believed,
# and those that it must reach; see ``fit``.
PLAIN, CLEAR, REACHED = 21.0, 3.0, 19.0
TIE = 0.5  # formats may differ in what does not occur: the first that is as good as the best counts

Guesses = Mapping[str, Sequence[Format]]  # linear stage -> what it may be computed in


def guess(replay: Replay) -> dict[str, list[Format]]:
    """The formats that explain a sample of the linear stages of a float32 trace."""
    arch, found = replay.arch, {}
    for stage in (*arch.layer_stages, *arch.end_stages):
        if stage.linear:
            known: list[Format] = []
            for sample in _samples(replay, stage):
                if sample.low and not any(sample.explained(f) for f in known):
                    known += sample.search()
            if known:
                found[stage.name] = known
    return found


def readings(replay: Replay, guesses: Guesses) -> dict[str, list[Reading]]:
    """The same for ``Replay.probed``."""
    return {
        name: [_reading(replay, replay.arch.stage[name], f) for f in formats]
        for name, formats in guesses.items()
    }


def _reading(replay: Replay, stage: Stage, format: Format) -> Reading:
    parts = format.parts or (format,) * len(stage.parameters)

    def read(part: Format, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def moved(nudge: float) -> np.ndarray:
            found: np.ndarray = np.asarray(part.read(replay.config, 0, x, nudge), np.float64)[0]
            return found

        # a 16-bit format rounds a dump as it stands, whatever was before
        hangs = part.operands and part.level in ("8-bit", "lower")
        unsure = np.square(moved(NUDGE) - moved(-NUDGE)) if hangs else np.zeros(x.shape[1:])
        return moved(0.0), unsure

    def inputs(x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        made = {part: read(part, np.asarray(x)[None]) for part in dict.fromkeys(parts)}
        return [made[part] for part in parts]

    return Reading(inputs, [part.weights for part in parts])


def explained(
    replay: Replay, measured: Measured, item: LocalError, formats: Sequence[Format], dtype: str
) -> tuple[LocalError, Format] | None:
    """A stage judged against the best of the formats that it was measured in, if one explains it;
    its bits stay those that it has against exact arithmetic."""
    if item.level >= PLAIN or item.born:
        return None
    base = _scores(measured.sums)
    tried = [(_scores(sums), sums, f) for sums, f in zip(measured.read, formats, strict=False)]
    good = [each for each in tried if believed(each[0], base)]
    if not good:
        return None
    _, sums, format = max(good, key=lambda each: each[0].sum())
    m, dims = measured, replay.config.dims(1)
    before = len(replay.trace.tokens) - m.rows
    heads = m.stage.heads(dims)
    judged = verdict.judge(m.stage, m.layer, sums, (), heads, before, dtype, estimated=True)
    return replace(judged, exact_bits=item.bits), format


def believed(scores: np.ndarray, base: np.ndarray, reached: float = REACHED) -> bool:
    """Whether one of some scores is clearly better than without a format, and good enough."""
    return bool((scores >= np.maximum(reached, base + CLEAR)).any())


def _scores(sums: ErrorSums) -> np.ndarray:
    """Bits of the whole, and of the middle row and channel: a fault in a few of those does not hide
    the format of the others."""
    found = [float(verdict.bits(sums.error_rows.sum(), sums.scale_rows.sum()))]
    for error, scale in (
        (sums.error_columns, sums.scale_columns), (sums.error_rows, sums.scale_rows),
    ):  # fmt: skip
        some = verdict.bits(error, scale)[np.asarray(scale) > 0]
        found.append(float(np.median(some)) if len(some) else -60.0)
    return np.array(found)


@dataclass
class _Sample:
    """Some rows of one linear stage, and some channels of each of its weights.

    Attributes:
        x: [1, T, in] all of its input, in float64; rows: which of it count.
        weights: [channels, in] of each weight; dumps [rows, channels] what the engine made.
        formats: all that it may have.
    """

    config: Config
    x: np.ndarray
    rows: np.ndarray
    weights: list[np.ndarray]
    dumps: list[np.ndarray]
    formats: list[Format]

    @cached_property
    def sizes(self) -> list[np.ndarray]:
        """What rounding acts on, squared: as the dumps."""
        squares = np.square(self.x[0, self.rows])
        return [squares @ np.square(w).T for w in self.weights]

    def read(self, format: Format) -> np.ndarray:
        """[rows, in] of the input as a format has it."""
        return np.asarray(format.read(self.config, 0, self.x))[0, self.rows]

    def values(self, formats: Sequence[Format]) -> list[list[np.ndarray]]:
        """For each weight the values [rows, channels] in each of some formats. Few large products:
        many small ones keep threads busy with waiting."""
        inputs = np.concatenate([self.read(f) for f in formats])
        found = []
        for plain in self.weights:
            made = np.split(inputs @ plain.T, len(formats))
            for n, f in enumerate(formats):
                if f.weights:
                    w = np.asarray(f.weights(plain.astype(np.float32)), np.float64)
                    made[n] = np.einsum("ti,ci->tc", self.read(f), w)
            found.append(made)
        return found

    def scores(self, values: Mapping[int, np.ndarray]) -> np.ndarray:
        """As ``_scores``, of the sample's values: of some or all weights, by place."""
        error = np.concatenate([np.square(v - self.dumps[n]) for n, v in values.items()], 1)
        scale = np.concatenate([np.square(v) + self.sizes[n] for n, v in values.items()], 1)
        found = [float(verdict.bits(error.sum(), scale.sum()))]
        for axis in (0, 1):
            found.append(float(np.median(verdict.bits(error.sum(axis), scale.sum(axis)))))
        return np.array(found)

    def of(self, format: Format) -> np.ndarray:
        """The scores of a format."""
        parts = format.parts or (format,) * len(self.weights)
        return self.scores({n: self.values([part])[n][0] for n, part in enumerate(parts)})

    @cached_property
    def base(self) -> np.ndarray:
        return self.of(PLAIN_FORMAT)

    @property
    def low(self) -> bool:
        return bool(self.base[0] < PLAIN)

    def explained(self, format: Format) -> bool:
        return believed(self.of(format), self.base)

    def search(self) -> list[Format]:
        """What explains the sample, one format or one for each weight: their types may differ."""
        options = [PLAIN_FORMAT, *(f for f in self.formats if f.by_operands)]
        chosen = []
        for place, values in enumerate(self.values(options)):
            sums = [self.scores({place: value}).sum() for value in values]
            chosen.append(options[next(n for n, s in enumerate(sums) if s >= max(sums) - TIE)])
        format = chosen[0] if len({*chosen}) == 1 else side_by_side(chosen)
        return [format] if format is not PLAIN_FORMAT and self.explained(format) else []


def _samples(replay: Replay, stage: Stage) -> Iterator[_Sample]:
    """Of a few layers that have the stage and its input, each by itself and not on a 16-bit grid;
    a middle one first: a fault lies at the ends."""
    count = replay.config.num_hidden_layers
    layers = [count // 2, 0, count - 1] if stage.scope == "layer" else [None]
    for layer in dict.fromkeys(layers):
        keys = [(stage.name, layer), replay.arch.stored_as(stage.inputs[0], layer, count)]
        loaded = [replay.load(*key) for key in keys]
        if any(value is None for value in loaded):
            continue
        y, x = (value[:, -min(v.shape[1] for v in loaded) :] for value in loaded)  # type: ignore
        sample = _sample(replay, stage, layer, x, y[0])
        grid = coarsest_dtype(np.concatenate([d.ravel() for d in sample.dumps]).astype(np.float32))
        if grid not in GRIDS and all(np.isfinite(d).all() for d in (x, *sample.dumps)):
            yield sample


def _sample(
    replay: Replay, stage: Stage, layer: int | None, x: np.ndarray, y: np.ndarray
) -> _Sample:
    tensors = replay.config.tensor_names(stage.scope, layer)
    rows = np.unique(np.linspace(0, x.shape[1] - 1, POSITIONS).astype(int))
    weights, dumps, first = [], [], 0
    for parameter in stage.parameters:
        width = replay.weights.shapes[tensors[parameter]][0]
        some = np.unique(np.linspace(0, width - 1, CHANNELS).astype(int))
        weights.append(replay.weights.some(tensors[parameter], some).astype(np.float64))
        dumps.append(y[np.ix_(rows, first + some)].astype(np.float64))
        first += width
    wide = np.asarray(x, np.float64)
    formats = choices(stage, replay.config)
    return _Sample(replay.config, wide, rows, weights, dumps, formats)
