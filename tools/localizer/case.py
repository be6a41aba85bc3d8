"""One suspect stage, with everything that is needed to try an explanation on it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import params
from qwen_jax.config import Config
from qwen_jax.model import FUNCTIONS, Env
from qwen_jax.replay import Replay, size_squared
from qwen_jax.weights import NORM, Weights, head_name, layer_names
from stages import verdict
from stages.slices import head_count
from stages.table import END_STAGES, LAYER_INPUT, STAGE, TOKENS, Stage

Array = Any

WIDENED = 1 << 25  # elements of a weight in float64 at a time: the head of a 72B has 1.2 G

# The matrices of a linear stage, in the order of their output channels.
LINEAR_WEIGHTS = {
    "qkv_matmul": ("q_proj", "k_proj", "v_proj"),
    "attn_out": ("o_proj",),
    "ffn_gate": ("gate_proj",),
    "ffn_up": ("up_proj",),
    "ffn_out": ("down_proj",),
    "lm_head": ("lm_head",),
}


def source_of(name: str, layer: int | None, last_layer: int) -> tuple[str, int | None]:
    """Where the value ``name`` that a stage of ``layer`` reads is stored."""
    if name == LAYER_INPUT:
        return ("embedding", 0) if layer == 0 else ("post_ffn_residual", (layer or 0) - 1)
    if STAGE[name].scope == "layer" and layer is None:
        return name, last_layer
    return name, layer


@dataclass
class Case:
    """A stage of a layer: its dump and its inputs in float64 with a batch axis, and its weights.

    Attributes:
        overrides: dumps replaced by other values: (stage, layer) -> array. What is not dumped is
            computed.
        last_only: ``lm_head`` was dumped for the last position only.
    """

    replay: Replay
    stage: Stage
    layer: int | None
    overrides: Mapping[tuple[str, int | None], Array] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.replay.source.config

    @property
    def model(self) -> Weights:
        return self.replay.source

    @property
    def last_layer(self) -> int:
        return self.config.num_hidden_layers - 1

    @property
    def env(self) -> Env:
        sliding = self.layer is not None and self.config.sliding_layers[self.layer]
        return self.replay.envs[sliding]

    @cached_property
    def weights(self) -> Any:
        """The parameters of the layer, or of the start or end of the model, see ``parameters``."""
        if self.stage.scope == "start":
            return jax.tree.map(_exact, self.replay.start_params()[0])
        return self.parameters(self.layer)

    def parameters(self, layer: int | None, stage: str | None = None) -> Any:
        """What a stage (default: this one) of any layer may need: vectors in float64, and its own
        matrices as they are stored. The other matrices are None."""
        if layer is None:
            kind, names = params.EndParams, {"norm": NORM, "lm_head": head_name(self.config)}
        else:
            kind, names = params.LayerParams, layer_names(layer)
        matrices = LINEAR_WEIGHTS.get(stage or self.stage.name, ())

        def read(field: str, name: str) -> Array | None:
            if len(self.model.shapes[name]) == 1:
                return _exact(self.model.read(name))
            return self.model.read(name) if field in matrices else None

        return kind(**{field: read(field, name) for field, name in names.items()})

    @cached_property
    def dump(self) -> Array:
        return self.value(self.stage.name)

    @cached_property
    def last_only(self) -> bool:
        entry = self.replay.trace.entries.get(("lm_head", None))
        return self.stage.name == "lm_head" and entry is not None and len(entry.axes) == 1

    def value(self, name: str) -> Array | None:
        """The dump of any stage as seen from this layer, or None where there is none."""
        if name == TOKENS:
            return self.replay.start_params()[1]
        key = source_of(name, self.layer, self.last_layer)
        if key in self.overrides:
            return self.overrides[key]
        found = self.replay.load(*key)
        return None if found is None else jnp.asarray(found, jnp.float64)

    @cached_property
    def inputs(self) -> tuple[Array, ...] | None:
        """The stage's inputs; None where one can be had neither from the dump nor by computing."""
        found = [self.computed(name) for name in self.stage.inputs]
        if any(value is None for value in found):
            return None
        if self.last_only:
            found = [value[:, -1:] for value in found]
        return tuple(found)

    def computed(self, name: str) -> Array | None:
        """A value from its dump, or computed within the layer where it was not dumped."""
        found = self.value(name)
        if found is not None or name in (LAYER_INPUT, TOKENS):
            return found
        row = STAGE[name]
        layer = self.layer if row.scope == "layer" else row.layer_of(self.layer)
        if row.scope == "layer" and self.layer is None:
            return None
        return Case(self.replay, row, layer, self.overrides).exact

    @cached_property
    def exact(self) -> Array | None:
        """What the stage should be: [1, ...]; ``lm_head`` of the last position is [1, V]."""
        if self.inputs is None:
            return None
        return self.shaped(self.run())

    @cached_property
    def size(self) -> Array:
        def squared(weights: Any) -> Array:
            value = FUNCTIONS[self.stage.name](self.config, weights, self.env, *self.inputs)
            return size_squared(self.stage, self.config, weights, self.env, self.inputs, value)

        found = _applied(self.stage.name, squared, self.weights)
        return self.shaped(found.astype(jnp.float64))

    def shaped(self, value: Array) -> Array:
        return value[:, -1] if self.last_only and value.ndim == 3 else value

    def run(
        self,
        *inputs: Array,
        stage: str | None = None,
        weights: Any = None,
        env: Env | None = None,
        config: Config | None = None,
    ) -> Array:
        """The stage's own function in float64 with anything changed. One of the inputs may be
        changed by position; None keeps it."""
        name = stage or self.stage.name
        given = list(self.inputs or ())
        for place, value in enumerate(inputs):
            if value is not None:
                given[place] = value

        def function(weights: Any) -> Array:
            return FUNCTIONS[name](config or self.config, weights, env or self.env, *given)

        return self.shaped(_applied(name, function, self.weights if weights is None else weights))

    def scored(self, candidate: Array, focus: Array | None = None) -> float:
        """The significant bits that the dump has if ``candidate`` is what it should be.

        ``focus`` [1, ...] bool: where the error is. The worse of everywhere and there counts, so
        that a candidate cannot win on what was right before.
        """
        if candidate.shape != self.dump.shape:
            return -60.0
        keep = jnp.isfinite(self.dump)
        if self.stage.kind == "scores":
            keep &= self.env.mask[:, None]
        if not bool(keep.any()) or bool((keep & ~jnp.isfinite(candidate)).any()):
            return -60.0  # nothing to compare, or NaN where the dump has a number
        error = jnp.where(keep, jnp.square(self.dump - candidate), 0.0)
        scale = jnp.where(keep, self.size + jnp.square(candidate), 0.0)
        found = float(verdict.bits(error.sum(), scale.sum()))
        if focus is not None:
            there = verdict.bits((error * focus).sum(), (scale * focus).sum())
            found = min(found, float(there))
        return found

    @property
    def heads(self) -> int | None:
        return head_count(self.stage.axes, self.config.to_json())


def _exact(weight: Array) -> Array:
    return jnp.asarray(weight).astype(jnp.float64)


def _applied(stage: str, function: Callable[[Any], Array], weights: Any) -> Array:
    """``function(weights)``; of a linear stage for some output channels after the other, so that
    no matrix has to be in float64 as a whole."""
    names = LINEAR_WEIGHTS.get(stage)
    if names is None:
        return function(weights)
    matrices = {name: getattr(weights, name) for name in names}
    none = {name: jnp.zeros((0, matrix.shape[1])) for name, matrix in matrices.items()}
    parts = []
    for name, matrix in matrices.items():
        step = max(1, WIDENED // matrix.shape[1])
        for first in range(0, len(matrix), step):
            rows = {name: _exact(matrix[first : first + step])}
            parts.append(function(replace(weights, **none | rows)))
    return jnp.concatenate(parts, -1)


def consumers(stage: str, layer: int | None, last_layer: int) -> Iterator[tuple[str, int | None]]:
    """The stages that read ``stage`` of ``layer``."""
    for row in STAGE.values():
        if stage in row.inputs and not (row in END_STAGES and layer not in (None, last_layer)):
            yield row.name, (row.layer_of(layer) if row.scope != "layer" else layer)
        if LAYER_INPUT in row.inputs:
            if stage == "embedding":
                yield row.name, 0
            elif stage == "post_ffn_residual" and layer is not None and layer < last_layer:
                yield row.name, layer + 1


def _right_outside(case: Case, focus: Array, needed: float) -> bool:
    """Whether the dump is right to ``needed`` bits everywhere but in ``focus``, and in each other
    position and channel: an error of the whole must not hide that of a slice."""
    outside = jnp.where(focus, case.exact, case.dump)
    error = jnp.square(outside - case.exact)
    scale = case.size + jnp.square(case.exact)
    if not bool(jnp.isfinite(error).all()):
        return False
    for kept in range(1, case.dump.ndim):
        others = [axis for axis in range(1, case.dump.ndim) if axis != kept]
        if float(verdict.bits(error.sum(others), scale.sum(others)).min()) < needed - 2.0:
            return False
    return True


def confine(case: Case, masks: Mapping[str, np.ndarray], needed: float) -> dict[str, np.ndarray]:
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


def focus_of(case: Case, masks: Mapping[str, np.ndarray]) -> Array | None:
    """Where a suspect's error is, as a mask of the dump's shape: its low slices, every axis that
    has some; None if there are none."""
    shape = case.dump.shape
    focus = None
    for axis, mask in masks.items():
        if mask.all() or not mask.any():
            continue
        grid = np.asarray(mask)
        if case.stage.axes == ("N", "T", "S"):
            place = {"head": (1, -1, 1, 1), "position": (1, 1, -1, 1), "channel": (1, 1, 1, -1)}
            here = grid.reshape(place[axis])
        else:
            rows = 1 if case.last_only or len(shape) < 3 else shape[1]
            if axis == "position":
                here = np.repeat(grid[:, None], int(np.prod(shape)) // rows, 1)
            else:
                width = int(np.prod(shape)) // rows // grid.size
                here = np.tile(np.repeat(grid, width), (rows, 1))
            here = here.reshape(shape)
        here = np.broadcast_to(here, shape)
        focus = here if focus is None else focus & here
    if focus is None or not focus.any():
        return None
    return jnp.asarray(focus)
