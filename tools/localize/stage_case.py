"""One stage to be explained, with everything that is needed to try an explanation on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax import rope
from qwen_jax.config import Config
from qwen_jax.local_error import compiler_options, cut_inputs, last_rows, size_squared, stage_value
from qwen_jax.models.ops import Positional
from qwen_jax.replay import Replay
from qwen_jax.weights.base import Weights
from stages import verdict
from stages.architecture import CACHE, ROTATION, TOKENS, Architecture, Key, Stage
from tools.localize.formats.registry import NUDGE, Format

Weight = Array | np.ndarray

# An explanation must bring back what the right function would have, within this many bits, and
# must be better than the right function by at least as much.
SLACK = 2.5
WIDENED = 1 << 25  # elements of a weight in float64 at a time: the head of a 72B has 1.2 G


class NotDumped(LookupError):
    """Asked for the dump of a stage that the trace lacks."""


@dataclass
class StageReplay:
    """A stage of a layer: its dump and its inputs in float64 with a batch axis, and its weights.

    All values have the same rows: as many of the last ones as dump and inputs have.

    What is not dumped is computed. Every value is computed in its engine's own arithmetic, as far
    as ``formats`` knows it; so "exact" is what the engine should have found.

    Attributes:
        overrides: dumps replaced by other values: (stage, layer) -> array.
        formats: the number formats that stages are computed in.
        narrow: round what is computed for missing stages to the trace's precision.
        nudge: move every code of a format by that much before it is rounded.
        edits: what missing stages compute instead of their own value, by stage.
        most: of the last rows, no more than so many.
    """

    replay: Replay
    stage: Stage
    layer: int | None
    overrides: Mapping[Key, Array] = field(default_factory=dict)
    formats: Mapping[Key, Format] = field(default_factory=dict)
    narrow: bool = False
    nudge: float = 0.0
    most: int | None = None
    edits: Mapping[str, "Callable[[StageReplay], Array]"] = field(default_factory=dict)
    _known: dict[Key, Array | None] = field(default_factory=dict, repr=False)  # computed values

    @property
    def config(self) -> Config:
        return self.replay.config

    @property
    def arch(self) -> Architecture:
        return self.replay.arch

    @property
    def model(self) -> Weights:
        return self.replay.weights

    @property
    def last_layer(self) -> int:
        return self.config.num_hidden_layers - 1

    @property
    def key(self) -> Key:
        return self.stage.name, self.layer

    @property
    def format(self) -> Format | None:
        """The number format that the stage is computed in; None is float64."""
        return self.formats.get(self.key)

    def other(self, name: str, layer: int | None = None) -> "StageReplay":
        """Another name, of this layer or another."""
        stage = self.arch.stage[name]
        return self._at(stage, stage.layer_of(self.layer) if layer is None else layer)

    def _at(self, stage: Stage, layer: int | None) -> "StageReplay":
        return replace(self, stage=stage, layer=layer, most=None)

    def last(self, rows: int | None) -> "StageReplay":
        """The same stage, of the last rows alone; None is all of them."""
        return replace(self, most=rows)

    def in_format(self, format: Format | None) -> "StageReplay":
        """The same stage, itself computed in another format."""
        others = {key: f for key, f in self.formats.items() if key != self.key}
        changed = others if format is None else others | {self.key: format}
        return self._keeping(replace(self, formats=changed))

    def under(self, formats: Mapping[Key, Format]) -> "StageReplay":
        """The same stage, it or missing stages before it in other formats."""
        if set(formats) == {self.key}:
            return self.in_format(formats[self.key])
        return replace(self, formats={**self.formats, **formats}, _known={})

    def edited(self, edits: "Mapping[str, Callable[[StageReplay], Array]]") -> "StageReplay":
        """The same stage, computed from what missing stages would be if they computed that."""
        return replace(self, edits=edits, _known={})

    def _keeping(self, other: "StageReplay") -> "StageReplay":
        """``other``, which has the same inputs, without loading them again."""
        for name in ("_ready", "weights", "pos", "dump", "size", "finite"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def sampled(self, most: int) -> "StageReplay":
        """A linear stage with about ``most`` of its output channels, evenly spread."""
        widths = [len(w) for w in self.weights.values()]
        step = -(-sum(widths) // most)
        if not self.stage.linear or step <= 1 or not self.replayable:
            return self
        other = replace(self)
        other.__dict__["_ready"] = self._ready
        other.__dict__["weights"] = {name: w[::step] for name, w in self.weights.items()}
        starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
        kept = [s + np.arange(0, width, step) for s, width in zip(starts, widths, strict=True)]
        other.__dict__["dump"] = self.dump[..., np.concatenate(kept)]
        return other

    @property
    def sliding(self) -> bool:
        """Whether the layer sees its sliding window only."""
        return self.layer is not None and self.config.sliding_layers[self.layer]

    @cached_property
    def pos(self) -> Positional:
        return self.replay.pos[self.sliding].last(self.rows)

    @cached_property
    def positions(self) -> np.ndarray:
        """[1, rows] int."""
        return self.replay.positions[:, -self.rows :]

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """[rows, 1]: for each row the first row of its call, and the end of that."""
        steps = np.asarray(self.replay.trace.steps)
        ends = np.repeat(np.cumsum(steps), steps)
        starts = ends - np.repeat(steps, steps)
        return starts[-self.rows :, None], ends[-self.rows :, None]

    @property
    def has_calls(self) -> bool:
        """Whether the engine has a cache to make mistakes with."""
        stored = any(stage.kind is CACHE for stage in self.arch.stages)
        return stored or len(self.replay.trace.steps) > 1

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The stage's parameters: vectors in float64, matrices as they are stored."""
        if self.stage is self.arch.first:
            return {name: _exact(w) for name, w in self.replay.start_parameters()[0].items()}
        return {name: self.parameter(name) for name in self.stage.parameters}

    def parameter(self, name: str, layer: int | None = None) -> Weight:
        """A parameter of this layer, or of another; vectors in float64, matrices as stored."""
        stage = self.arch.parameter[name]
        number = self.layer if layer is None else layer
        tensor = self.config.tensor_names(stage.scope, number)[name]
        found = self.model.read(tensor)
        return _exact(found) if found.ndim == 1 else found

    def parameters_of(self, layer: int) -> dict[str, Weight]:
        """What ``weights`` has, of another layer."""
        return {name: self.parameter(name, layer) for name in self.stage.parameters}

    def _stored(self, name: str) -> Array | None:
        """The dump of any value as seen from this layer, or None where there is none."""
        if name == TOKENS:
            return jnp.asarray(self.replay.start_parameters()[1])
        key = self.arch.stored_as(name, self.layer, self.config.num_hidden_layers)
        if key in self.overrides:
            return self.overrides[key]
        found = self.replay.load(*key)
        return None if found is None else jnp.asarray(found, jnp.float64)

    def _computed(self, name: str) -> Array | None:
        """A value from its dump, or computed where it was not dumped."""
        found = self._stored(name)
        if found is not None or name == TOKENS:
            return found
        layers = self.config.num_hidden_layers
        key = self.arch.stored_as(name, self.layer, layers)
        if key not in self._known:
            for layer in self._layers_before(key):  # one after the other: not a deep recursion
                self._compute((self.arch.layer_output.name, layer))
            self._compute(key)
        return self._known[key]

    def _layers_before(self, key: Key) -> range:
        """The layers, from the first one, whose outputs are missing right before a value's."""
        name, layer = self.arch.layer_output.name, key[1]
        if layer is None:
            layer = self.config.num_hidden_layers
        first = layer
        entries = self.replay.trace.entries
        while (
            first > 0 and (name, first - 1) not in entries and (name, first - 1) not in self._known
        ):
            first -= 1
        return range(first, layer)

    def _compute(self, key: Key) -> None:
        if key in self._known or key in self.replay.trace.entries or key in self.overrides:
            return
        case = self._at(self.arch.stage[key[0]], key[1])
        edit = self.edits.get(key[0])
        value = (edit(case) if edit else case.exact) if case.replayable else None
        if value is not None and self.narrow:
            value = value.astype(self.replay.dtype).astype(jnp.float64)
        self._known[key] = value

    @cached_property
    def _ready(self) -> tuple[int, list[Array]] | None:
        """How many rows there are, and the inputs for them."""
        values = [self._computed(name) for name in self.stage.inputs]
        ready = cut_inputs(self.arch, self.stage, values, len(self.replay.trace.tokens))
        dump = self._stored(self.stage.name)
        if ready is None:
            return None
        held = ready[0]
        if dump is not None:
            held = dump.shape[1 + self.stage.axes.index(self.stage.row_axis)]
        rows = min(ready[0], held, self.most or held)
        return rows, [
            value if name in self.stage.keys else last_rows(self.arch, name, value, rows)
            for name, value in zip(self.stage.inputs, ready[1], strict=True)
        ]

    @property
    def rows(self) -> int:
        if self._ready is None:
            return self.replay.trace.rows_of(self.stage.name, self.layer)
        return self._ready[0]

    @property
    def replayable(self) -> bool:
        """Whether its inputs are to be had, from the dump or by computing them. Nothing but the
        dump is without that."""
        return self._ready is not None

    @property
    def inputs(self) -> Sequence[Array]:
        """The stage's inputs, if it is ``replayable``."""
        assert self._ready is not None
        return self._ready[1]

    def value(self, name: str) -> Array | None:
        """The dump of any value as seen from this layer, in this stage's rows."""
        return self._cut(name, self._stored(name))

    def at_keys(self, name: str) -> Array | None:
        """The same at every key position; None where some of those are not there."""
        found = self._stored(name)
        length = len(self.replay.trace.tokens)
        return found if found is not None and found.shape[1] == length else None

    def computed(self, name: str) -> Array | None:
        """The same, or computed within the layer where it was not dumped."""
        return self._cut(name, self._computed(name))

    def _cut(self, name: str, value: Array | None) -> Array | None:
        return None if value is None else last_rows(self.arch, name, value, self.rows)

    @property
    def dumped(self) -> bool:
        """Whether there is a dump to solve for something from."""
        return self._stored(self.stage.name) is not None

    @cached_property
    def dump(self) -> Array:
        found = self._stored(self.stage.name)
        if found is None:
            raise NotDumped(f"{self.stage.name} is not in the trace")
        return last_rows(self.arch, self.stage.name, found, self.rows)

    @cached_property
    def exact(self) -> Array:
        """What the stage should be, if it is ``replayable``."""
        return self.run()

    @cached_property
    def size(self) -> Array:
        return self.squared(self.inputs)

    def squared(self, inputs: Sequence[Array]) -> Array:
        """The square of what rounding can act on, of the stage of any inputs."""

        squared = partial(_sizes(self.stage, self.config), self.pos, inputs)
        return _applied(self.stage, squared, self.weights).astype(jnp.float64)

    def expected(self) -> Array:
        """The square of the error that the format leaves: codes that hang on the last bit of the
        arithmetic before them, and what the emulation cannot follow."""
        found = jnp.zeros_like(self.exact)
        format = self.format
        if format is None:
            return found
        if format.parts:
            ends = np.cumsum([len(w) for w in self.weights.values()])[:-1]
            parts = [self.in_format(part).expected() for part in format.parts]
            pieces = [jnp.split(part, ends, -1)[place] for place, part in enumerate(parts)]
            return jnp.concatenate(pieces, -1)
        for place in format.operands:
            if place >= len(self.inputs) or format.level not in ("8-bit", "lower"):
                continue  # a 16-bit format rounds a dump as it stands, whatever was before
            x = self.inputs[place]
            high, low = (format.read(self.config, place, x, n) for n in (NUDGE, -NUDGE))
            unsure = high - low
            if unsure.any():
                inputs = list(self.inputs)
                inputs[place] = jnp.asarray(unsure)
                found = found + self.squared(inputs)
        if format.unsure is not None:
            of_weights = partial(format.unsure, self.config, self.inputs)
            found = found + _applied(self.stage, of_weights, self.weights)
        if format.allows is not None:
            found = found + jnp.square(format.allows(self))
        if format.leaves is not None:
            found = found + (self.size + jnp.square(self.exact)) * 4.0**-format.leaves
        return found

    def turned(self, factors: np.ndarray) -> Array:
        """How far a rotated stage moves where the angle of each pair is off by as many units of
        2^-24 of itself as ``factors`` [H/2] say."""
        quarter = self.pos.replace(cos=-self.pos.sin, sin=self.pos.cos)  # a rotation's derivative
        moved = stage_value(self.stage, self.config, quarter, self.inputs, ())
        angle = jnp.tile(self.replay.angles[-self.rows :] * factors * 2.0**-24, 2)
        return jnp.abs(moved * angle[None, :, None, :])

    def cos_sin(self, config: Config, positions: np.ndarray) -> tuple[Any, Any]:
        """The RoPE tables [..., T, H/2] of any positions, made as the engine makes its own."""
        made = None if self.format is None else self.format.tables(config, positions)
        return rope.cos_sin(config, positions) if made is None else made

    def run(
        self,
        *inputs: Array | None,
        weights: Mapping[str, Weight] | None = None,
        pos: Positional | None = None,
        config: Config | None = None,
    ) -> Array:
        """The stage's own function in float64 with anything changed. Any of the inputs may be
        changed by position, None keeps it; ``weights`` are those that are changed."""
        format = self.format
        unchanged = all(x is None for x in (*inputs, weights, pos, config))
        if format is not None and format.whole is not None and unchanged:
            whole = format.whole(self)
            if whole is not None:
                return whole
        if format is not None and format.parts:
            ends = np.cumsum([len(w) for w in self.weights.values()])[:-1]
            parts = [
                self.in_format(part).run(*inputs, weights=weights, pos=pos, config=config)
                for part in format.parts
            ]
            pieces = [jnp.split(part, ends, -1)[place] for place, part in enumerate(parts)]
            return jnp.concatenate(pieces, -1)
        changed = [*inputs, *[None] * (len(self.inputs) - len(inputs))]
        given = [old if new is None else new for old, new in zip(self.inputs, changed, strict=True)]
        config = config or self.config
        tables = self.pos if pos is None else pos
        made = None if format is None or pos is not None else format.tables(config, self.positions)
        if made is not None:
            tables = tables.replace(cos=jnp.asarray(made[0]), sin=jnp.asarray(made[1]))
        read = given if format is None else format.inputs(config, given, self.nudge)

        program = _values(self.stage, config)

        def function(weights: Sequence[Array]) -> Array:
            if format is None:
                return program(tables, read, weights)
            value = program(tables, read, [format.weight(w) for w in weights])
            return value if format.plus is None else value + format.plus(config, given, weights)

        return _applied(self.stage, function, {**self.weights, **(weights or {})})

    def scored(self, candidate: Array, focus: Array | None = None, rotated: bool = False) -> float:
        """The significant bits that the dump has if ``candidate`` is what it should be.

        ``focus`` [1, ...] bool: where the error is. The worse of everywhere and there counts, so
        that a candidate cannot win on what was right before. ``rotated``: the candidate is, though
        the stage is no rotation.
        """
        # NumPy: XLA would compile a program for every operation and shape
        if candidate.shape != self.dump.shape:
            return -60.0
        value, dump, keep = np.asarray(candidate), np.asarray(self.dump), np.asarray(self.finite)
        if not keep.any() or (keep & ~np.isfinite(value)).any():
            return -60.0  # nothing to compare, or NaN where the dump has a number
        with np.errstate(all="ignore"):
            error = np.where(keep, np.square(dump - value), 0.0)
            scale = np.where(keep, np.asarray(self.size) + np.square(value), 0.0)
            turned = rotated or self.stage.kind is ROTATION
            allowed = np.where(keep, self._angle_error(value), 0.0) if turned else np.zeros(())
        found = float(verdict.lenient_bits(error.sum(), scale.sum(), allowed.sum()))
        if focus is not None:
            sums = [(x * np.asarray(focus)).sum() for x in (error, scale, allowed)]
            found = min(found, float(verdict.lenient_bits(*sums)))
        return found

    def _angle_error(self, value: np.ndarray) -> np.ndarray:
        """The squared error of rotated heads [1, rows, heads, H] that the rounding of their angles
        to float32 lets sound arithmetic have: much at late positions."""
        first, second = np.split(np.square(value), 2, -1)
        angles = np.asarray(self.replay.angles)[None, -self.rows :, None] * 2.0**-24
        return np.concatenate([(first + second) * np.square(angles)] * 2, -1)

    @property
    def certain(self) -> float:
        """The bits to which sound arithmetic agrees on the stage."""
        if self.stage.kind is not ROTATION:
            return verdict.EXACT_BITS
        exact = np.asarray(self.exact)
        scale = np.asarray(self.size).sum() + np.square(exact).sum()
        return float(verdict.bits(4 * self._angle_error(exact).sum(), scale))

    @cached_property
    def finite(self) -> Array:
        """Which elements of the dump are numbers, and part of the computation."""
        keep = jnp.isfinite(self.dump)
        return keep & self.pos.mask[:, None] if self.stage.kind.masked else keep

    @property
    def heads(self) -> int | None:
        return self.stage.heads(self.config.dims(1))


@cache
def _values(stage: Stage, config: Config) -> Callable[..., Array]:
    """A stage's function under jit: called as ``(pos, inputs, weights)``."""

    def program(pos: Positional, inputs: Sequence[Array], weights: Sequence[Array]) -> Array:
        return stage_value(stage, config, pos, inputs, weights)

    return jax.jit(program, compiler_options=compiler_options(unoptimised=True))


@cache
def _sizes(stage: Stage, config: Config) -> Callable[..., Array]:
    """The same of the square of what rounding can act on."""

    def program(pos: Positional, inputs: Sequence[Array], weights: Sequence[Array]) -> Array:
        value = stage_value(stage, config, pos, inputs, weights)
        return size_squared(stage, config, pos, inputs, weights, value)

    return jax.jit(program, compiler_options=compiler_options(unoptimised=True))


def _exact(weight: Weight) -> Array:
    return jnp.asarray(weight).astype(jnp.float64)


def _applied(
    stage: Stage, function: Callable[[Sequence[Any]], Array], weights: Mapping[str, Weight]
) -> Array:
    """``function(weights)``; of a linear stage for some output channels after the other, so that
    no matrix has to be in float64 as a whole."""
    matrices = [weights[name] for name in stage.parameters]
    if not stage.linear:
        return function(matrices)
    none = [jnp.zeros((0, matrix.shape[1])) for matrix in matrices]
    parts = []
    for place, matrix in enumerate(matrices):
        step = max(1, WIDENED // matrix.shape[1])
        for first in range(0, len(matrix), step):
            rows = _exact(matrix[first : first + step])
            parts.append(function([*none[:place], rows, *none[place + 1 :]]))
    return jnp.concatenate(parts, -1)


def _right_outside(case: StageReplay, focus: Array, needed: float) -> bool:
    """Whether the dump is right to ``needed`` bits everywhere but in ``focus``, and in each other
    position and channel: an error of the whole must not hide that of a slice."""
    exact = np.asarray(case.exact)
    outside = np.where(np.asarray(focus), exact, np.asarray(case.dump))
    with np.errstate(all="ignore"):
        error = np.square(outside - exact)
        scale = np.asarray(case.size) + np.square(exact)
    if not np.isfinite(error).all():
        return False
    for kept in range(1, case.dump.ndim):
        others = tuple(axis for axis in range(1, case.dump.ndim) if axis != kept)
        if float(verdict.bits(error.sum(others), scale.sum(others)).min()) < needed - 2.0:
            return False
    return True


def confine(
    case: StageReplay, masks: Mapping[str, np.ndarray], needed: float
) -> dict[str, np.ndarray]:
    """The same slices, without those that are low only because a wrong one crosses them.

    A wrong channel makes every position lower, and the other way round. The fewest elements win
    outside of which the dump is right to ``needed`` bits; the other axes are then marked whole.
    """
    confined = {a: m for a, m in masks.items() if m.any() and not m.all()}
    crossing = focus_of(case, confined) if len(confined) > 1 else None
    if crossing is not None and _right_outside(case, crossing, needed):
        return dict(masks)
    for axis, mask in sorted(confined.items(), key=lambda pair: pair[1].mean()):
        focus = focus_of(case, {axis: mask})
        if focus is not None and _right_outside(case, focus, needed):
            return {a: m if a == axis else np.ones_like(m) for a, m in masks.items()}
    return dict(masks)


def focus_of(case: StageReplay, masks: Mapping[str, np.ndarray]) -> Array | None:
    """Where a suspect's error is, as a mask of the dump's shape: its low slices, every axis that
    has some; None if there are none."""
    focus = None
    for axis, mask in masks.items():
        if mask.any() and not mask.all():
            here = case.stage.spread(axis, np.asarray(mask), case.dump.shape)
            focus = here if focus is None else focus & here
    return None if focus is None or not focus.any() else jnp.asarray(focus)


# A factor or an offset need not bring back everything: a factor that was in the weights when they
# were quantised comes out with their rounding, a float16 scale's at least.
SMOOTH = 10.0


def smooth_needed(base: float, expected: float) -> float:
    """The bits that a factor or an offset has to bring back."""
    return max(min(expected - SLACK, SMOOTH), base + SLACK)
