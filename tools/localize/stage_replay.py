"""One stage to be explained, with everything that is needed to try an explanation on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.config import Config
from qwen_jax.models.ops import Positional
from qwen_jax.replay import Replay, cut_inputs, last_rows, size_squared, stage_value
from qwen_jax.weights.base import Weights
from stages import verdict
from stages.architecture import LAYER_INPUT, ROTATION, TOKENS, Architecture, Key, Stage

Weight = Array | np.ndarray

WIDENED = 1 << 25  # elements of a weight in float64 at a time: the head of a 72B has 1.2 G


@dataclass
class StageReplay:
    """A stage of a layer: its dump and its inputs in float64 with a batch axis, and its weights.

    All values have the same rows: as many of the last ones as dump and inputs have.

    Attributes:
        overrides: dumps replaced by other values: (stage, layer) -> array. What is not dumped is
            computed.
    """

    replay: Replay
    stage: Stage
    layer: int | None
    overrides: Mapping[Key, Array] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.replay.config

    @property
    def tables(self) -> Architecture:
        return self.replay.tables

    @property
    def model(self) -> Weights:
        return self.replay.weights

    @property
    def last_layer(self) -> int:
        return self.config.num_hidden_layers - 1

    def other(self, stage: str, layer: int | None = None) -> "StageReplay":
        """Another stage, of this layer or another."""
        row = self.tables.stage[stage]
        here = row.layer_of(self.layer) if layer is None else layer
        return StageReplay(self.replay, row, here, self.overrides)

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
    def weights(self) -> dict[str, Weight]:
        """The stage's parameters: vectors in float64, matrices as they are stored."""
        if self.stage is self.tables.first:
            return {name: _exact(w) for name, w in self.replay.start_parameters()[0].items()}
        return {name: self.parameter(name) for name in self.stage.parameters}

    def parameter(self, name: str, layer: int | None = None) -> Weight:
        """A parameter of this layer, or of another; vectors in float64, matrices as stored."""
        row = self.tables.parameter[name]
        number = self.layer if layer is None else layer
        tensor = self.config.tensor_names(row.scope, number)[name]
        found = self.model.read(tensor)
        return _exact(found) if found.ndim == 1 else found

    def parameters_of(self, layer: int) -> dict[str, Weight]:
        """What ``weights`` has, of another layer."""
        return {name: self.parameter(name, layer) for name in self.stage.parameters}

    def _stored(self, name: str) -> Array | None:
        """The dump of any value as seen from this layer, or None where there is none."""
        if name == TOKENS:
            return jnp.asarray(self.replay.start_parameters()[1])
        key = self.tables.stored_as(name, self.layer, self.config.num_hidden_layers)
        if key in self.overrides:
            return self.overrides[key]
        found = self.replay.load(*key)
        return None if found is None else jnp.asarray(found, jnp.float64)

    def _computed(self, name: str) -> Array | None:
        """A value from its dump, or computed within the layer where it was not dumped."""
        found = self._stored(name)
        if found is not None or name in (LAYER_INPUT, TOKENS):
            return found
        row = self.tables.stage[name]
        if row.scope == "layer" and self.layer is None:
            return None
        case = StageReplay(self.replay, row, row.layer_of(self.layer), self.overrides)
        return case.exact if case.replayable else None

    @cached_property
    def _ready(self) -> tuple[int, list[Array]] | None:
        """How many rows there are, and the inputs for them."""
        values = [self._computed(name) for name in self.stage.inputs]
        ready = cut_inputs(self.tables, self.stage, values, len(self.replay.trace.tokens))
        dump = self._stored(self.stage.name)
        if ready is None or dump is None:
            return ready
        rows = min(ready[0], dump.shape[1 + self.stage.axes.index("T")])
        return rows, [
            value if name in self.stage.keys else last_rows(self.tables, name, value, rows)
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
        return None if value is None else last_rows(self.tables, name, value, self.rows)

    @cached_property
    def dump(self) -> Array:
        found = self._stored(self.stage.name)
        assert found is not None, "only dumped stages are explained"
        return last_rows(self.tables, self.stage.name, found, self.rows)

    @cached_property
    def exact(self) -> Array:
        """What the stage should be, if it is ``replayable``."""
        return self.run()

    @cached_property
    def size(self) -> Array:
        def squared(weights: Sequence[Array]) -> Array:
            value = stage_value(self.stage, self.config, self.pos, self.inputs, weights)
            return size_squared(self.stage, self.config, self.pos, self.inputs, weights, value)

        return _applied(self.stage, squared, self.weights).astype(jnp.float64)

    def run(
        self,
        *inputs: Array | None,
        weights: Mapping[str, Weight] | None = None,
        pos: Positional | None = None,
        config: Config | None = None,
    ) -> Array:
        """The stage's own function in float64 with anything changed. Any of the inputs may be
        changed by position, None keeps it; ``weights`` are those that are changed."""
        changed = [*inputs, *[None] * (len(self.inputs) - len(inputs))]
        given = [old if new is None else new for old, new in zip(self.inputs, changed, strict=True)]

        def function(weights: Sequence[Array]) -> Array:
            return stage_value(self.stage, config or self.config, pos or self.pos, given, weights)

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
