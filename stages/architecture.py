"""What an architecture is: its stages and its parameters, which everything else follows.

A stage is a pure function of earlier stages and parameters. A ``Stage`` says what it is called,
which values and parameters it is computed from, which axes its value has and what kind of
arithmetic makes it. *How* it is computed stands in ``qwen_jax/models/``, one function per stage,
under the same name. A ``Parameter`` says what checkpoints call it and which axes it has.

Forward pass, files, shapes, checkpoints, sharding, replay, diagnosis and documentation are derived
from these; none of them lists a stage or a parameter again.

Axis letters (used everywhere in this project):

    B batch, T query position, S key position, N query heads, K key/value heads, G = N/K,
    H head size, D hidden, F intermediate, V vocabulary
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

Key = tuple[str, int | None]  # a stage and the layer it is stored under; None for an end stage
Scope = Literal["start", "layer", "end"]

TOKENS = "tokens"
LAYER_INPUT = "layer_input"  # the embedding, or the output of the layer before
# axis letter -> what a configuration calls its size
SIZES = {
    "N": "num_attention_heads",
    "K": "num_key_value_heads",
    "H": "head_dim",
    "D": "hidden_size",
    "F": "intermediate_size",
    "V": "vocab_size",
}
MOST_LAYERS = 4096  # ten times the deepest; a count that nobody checks costs memory and minutes
QKV = "(N+2K)*H"  # q, k and v side by side on one axis


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of arithmetic.

    Attributes:
        name: for people.
        acts_on: what rounding can act on, and so the scale that error is measured against. Of a
            sum of products the "terms"; of a rotation its two terms ("rotated"); of an addition
            the "magnitudes" of what is added; of everything else the "value" itself.
        allows: what sound arithmetic may be off by beyond that: an exponential turns the rounding
            of its "argument" (of a softmax: how far that lies below the largest, its "depth") into
            relative error, a rotation that of its "angle". "" is nothing.
        sums_products: its operands may be held in another format (quantised activations, a cache).
        masked: entries that the attention mask removes are no part of the computation.
        over_root: the axis by whose square root a sum of products is divided.
        curved: it is no polynomial of second degree at most in what it reads.
    """

    name: str
    acts_on: Literal["terms", "rotated", "magnitudes", "value"]
    allows: Literal["", "argument", "depth", "angle"] = ""
    sums_products: bool = False
    masked: bool = False
    over_root: str = ""
    curved: bool = False


LOOKUP = Kind("lookup", "value")
NORM = Kind("norm", "value", curved=True)
LINEAR = Kind("linear", "terms", sums_products=True)
ADD = Kind("add", "magnitudes")
ROTATION = Kind("rotation", "rotated", allows="angle")
SCORES = Kind("scores", "terms", sums_products=True, masked=True, over_root="H")
SOFTMAX = Kind("softmax", "value", allows="depth", curved=True)
WEIGHTED_SUM = Kind("weighted sum", "terms", sums_products=True)
ACTIVATION = Kind("activation", "value", allows="argument", curved=True)
PRODUCT = Kind("product", "value")
CACHE = Kind("cache", "value")  # what was put away in a number format is read back


def place_of(stage: str, layer: int | None) -> str:
    """How a stage of a layer is written for people."""
    return stage if layer is None else f"layer {layer} {stage}"


def axis_size(axis: str, dims: Mapping[str, int]) -> int:
    """Size of an axis: a letter, or a product or sum of them such as ``(N+2K)*H``.

    ``dims`` maps letters to sizes.
    """
    size = 1
    for factor in axis.split("*"):
        terms = factor.strip("()").split("+")
        size *= sum(int(term[:-1] or 1) * dims[term[-1]] for term in terms)
    return size


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of an architecture.

    A stage is handled as a matrix everywhere: its rows are all axes up to T (positions, or heads x
    positions; of a cache up to S), its columns what follows.

    Attributes:
        name: what files, tables and command lines call it.
        scope: "start" (once, before the layers; stored under layer 0), "layer" (once a layer) or
            "end" (once, after the layers; stored outside the layer directories).
        inputs: the values it is a function of: earlier stages, or ``layer_input`` / ``tokens``.
        parameters: the parameters it is a function of.
        axes: its axes without the batch axis. A product such as ``N*H`` is one axis.
        kind: the arithmetic that makes it.
        value: one line for people.
        keys: those of the inputs whose T axis is read as S, at every key position.
        unrounded: those of the inputs that are read before they are rounded to the model's dtype.
        last: by default only the last position is kept.
    """

    name: str
    scope: Scope
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    axes: tuple[str, ...]
    kind: Kind
    value: str
    keys: tuple[str, ...] = ()
    unrounded: tuple[str, ...] = ()
    last: bool = False

    @property
    def row_axis(self) -> str:
        """The axis of the rows of the sequence: T, or S of a cache, which has keys alone."""
        return "T" if "T" in self.axes else "S"

    @property
    def linear(self) -> bool:
        """Whether it is a weight (or several, side by side) times its one input."""
        return self.kind is LINEAR

    def layer_of(self, layer: int | None) -> int | None:
        """The layer number that this stage is stored under: ``None`` for an end stage."""
        return {"start": 0, "layer": layer, "end": None}[self.scope]

    def stored_axes(self, logits: str = "all") -> tuple[str, ...]:
        """The axes of a file: without T where only the last position is kept."""
        return self.axes[1:] if self.last and logits == "last" else self.axes

    def shape(
        self, dims: Mapping[str, int], logits: str = "all", rows: int | None = None
    ) -> tuple[int, ...]:
        """The shape of one sequence's stage, without the batch axis; of its last ``rows`` only."""
        dims = dims if rows is None else {**dims, self.row_axis: rows}
        return tuple(axis_size(axis, dims) for axis in self.stored_axes(logits))

    def heads(self, dims: Mapping[str, int]) -> int | None:
        """How many heads lie on its axes; None where there are none."""
        single = {**dims, "H": 1}
        with_heads = [axis for axis in self.axes if set(axis) & {"N", "K"}]
        return axis_size(with_heads[0], single) if with_heads else None

    @property
    def heads_lead(self) -> bool:
        """Whether the heads are an axis before the positions: scores and their softmax."""
        return self.axes[0] == "N"

    @property
    def positions_at(self) -> int:
        """The place of ``row_axis`` among its axes."""
        return self.axes.index(self.row_axis)

    def row_axes(self) -> int:
        """How many leading axes are the rows of its matrix."""
        return self.positions_at + 1

    def matrix(self, value: Any) -> Any:
        """One sequence's value, in ``axes`` and with or without a batch axis of 1, as a matrix."""
        lead = value.ndim - len(self.axes) + self.row_axes()
        rows = 1
        for size in value.shape[:lead]:
            rows *= size
        return value.reshape(rows, -1)

    def fold(
        self, heads: int | None, rows: np.ndarray, columns: np.ndarray
    ) -> dict[str, np.ndarray]:
        """{"position", "head", "channel"} -> sums of that slice, as far as the stage has the axis.

        ``rows`` and ``columns`` have one entry per row and column of the matrix in their last
        dimension. Where the heads lead, "channel" is the key position.
        """
        lead = rows.shape[:-1]
        if self.heads_lead:
            grid = rows.reshape(*lead, heads or 1, -1)
            return {"position": grid.sum(-2), "head": grid.sum(-1), "channel": columns}
        found = {"position": rows}
        if heads:
            found["head"] = columns.reshape(*lead, heads, -1).sum(-1)
        return found | {"channel": columns}

    def spread(self, axis: str, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A mask of slices of "position", "head" or "channel" over a value of ``shape``, which is
        in ``axes``, with or without leading batch axes of 1."""
        if self.heads_lead:
            place = {"head": (-1, 1, 1), "position": (-1, 1), "channel": (-1,)}
            return np.broadcast_to(mask.reshape(place[axis]), shape)
        matrix = self.matrix(np.empty(shape, bool)).shape
        if axis == "position":
            grid = np.broadcast_to(mask[:, None], matrix)
        else:
            grid = np.broadcast_to(np.repeat(mask, matrix[1] // mask.size), matrix)
        return grid.reshape(shape)

    def by_head(self, heads: int, value: Any) -> Any:
        """A value in ``axes`` with a batch axis of 1 as [heads, positions, what is left]."""
        if self.heads_lead:
            return value[0]
        return value.reshape(value.shape[1], heads, -1).swapaxes(0, 1)

    def from_heads(self, grid: Any, shape: tuple[int, ...]) -> Any:
        """The value of ``shape`` that ``by_head`` gives as ``grid``."""
        return (grid if self.heads_lead else grid.swapaxes(0, 1)).reshape(shape)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an architecture.

    Attributes:
        name: what stage functions call it.
        scope: as of stages.
        axes: one for each dimension, as it lies in the checkpoint. A linear weight is [out, in].
        tensor: its name in Hugging Face checkpoints; within a layer, after ``model.layers.<n>.``.
        gguf: its name in GGUF files; within a layer, after ``blk.<n>.``.
        tied_to: the parameter that stands in for it where the model ties the two.
    """

    name: str
    scope: Scope
    axes: tuple[str, ...]
    tensor: str
    gguf: str
    tied_to: str | None = None

    def tensor_name(self, layer: int | None) -> str:
        """Its full Hugging Face name."""
        return f"model.layers.{layer}.{self.tensor}" if self.scope == "layer" else self.tensor

    def gguf_name(self, layer: int | None) -> str:
        """Its full GGUF name."""
        return f"blk.{layer}.{self.gguf}" if self.scope == "layer" else self.gguf

    @property
    def module(self) -> str:
        """The Hugging Face module that holds it; within a layer, below the layer's."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of models.

    Attributes:
        name: Hugging Face's ``model_type``, and GGUF's ``general.architecture``.
        stages, parameters: in computation order.
        cache: the stages that there are only where keys and values go through a cache, each of one
            input: see ``with_cache``.
        aliases: other names under which stages are accepted.
        defaults: what a ``config.json`` means by leaving a setting out.
        fixed: settings that are supported at one value only.
        published: size -> the ``config.json`` of a published model, but for what all share.
    """

    name: str
    stages: tuple[Stage, ...]
    parameters: tuple[Parameter, ...]
    aliases: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cache: tuple[Stage, ...] = ()

    def __hash__(self) -> int:
        return hash((self.name, len(self.stages)))

    def with_cache(self, names: Collection[str]) -> "Architecture":
        """This architecture with the ``cache`` stages of these names, each placed before the first
        stage that reads its input at key positions, which then reads the cache instead."""
        there = [stage for stage in self.cache if stage.name in names]
        stands_for = {stage.inputs[0]: stage.name for stage in there}
        stages: list[Stage] = []
        for stage in self.stages:
            read = {name: stands_for.get(name, name) for name in stage.keys}
            inputs = tuple(read.get(name, name) for name in stage.inputs)
            if inputs != stage.inputs:
                stages += there
                there = []
                stage = replace(stage, inputs=inputs, keys=tuple(read.values()))
            stages.append(stage)
        return replace(self, stages=tuple(stages))

    @cached_property
    def cached(self) -> "Architecture":
        """This architecture with all of its ``cache`` stages."""
        return self.with_cache([row.name for row in self.cache])

    @property
    def hf_class(self) -> str:
        """What Hugging Face calls its language model."""
        return f"{self.name.capitalize()}ForCausalLM"

    @cached_property
    def stage(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    @cached_property
    def parameter(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Stage names, in computation order."""
        return tuple(self.stage)

    @cached_property
    def start_stages(self) -> tuple[Stage, ...]:
        return tuple(s for s in self.stages if s.scope == "start")

    @cached_property
    def layer_stages(self) -> tuple[Stage, ...]:
        return tuple(s for s in self.stages if s.scope == "layer")

    @cached_property
    def end_stages(self) -> tuple[Stage, ...]:
        return tuple(s for s in self.stages if s.scope == "end")

    @property
    def first(self) -> Stage:
        """What the first layer's input is."""
        return self.start_stages[-1]

    @property
    def layer_output(self) -> Stage:
        """What the next layer's input is."""
        return self.layer_stages[-1]

    @property
    def head(self) -> Stage:
        """The stage whose value is the logits."""
        return self.end_stages[-1]

    @property
    def embedding(self) -> Parameter:
        """The embedding."""
        return self.parameter[self.first.parameters[0]]

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The axes of any value that a stage reads."""
        if name == TOKENS:
            return ("T",)
        return self.first.axes if name == LAYER_INPUT else self.stage[name].axes

    def computation_order(self, layers: int) -> Iterator[tuple[Stage, int | None]]:
        """Every (stage, layer it is stored under) of a model, in the order of computation."""
        yield from ((s, 0) for s in self.start_stages)
        yield from ((s, layer) for layer in range(layers) for s in self.layer_stages)
        yield from ((s, None) for s in self.end_stages)

    def stored_as(self, name: str, layer: int | None, layers: int) -> Key:
        """Where the value ``name`` that a stage of ``layer`` reads is stored."""
        if name == LAYER_INPUT:
            stage, before = (self.first, 0) if layer == 0 else (self.layer_output, layer - 1)  # type: ignore[operator]
            return stage.name, before
        if self.stage[name].scope == "layer" and layer is None:
            return name, layers - 1
        return name, layer

    def readers(self, stage: str, layer: int | None, layers: int) -> Iterator[Key]:
        """The stages that read ``stage`` of ``layer``."""
        for reader, number in self.computation_order(layers):
            for name in reader.inputs:
                if name != TOKENS and self.stored_as(name, number, layers) == (stage, layer):
                    yield reader.name, number

    def scope_parameters(self, scope: Scope) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.scope == scope)

    def tensor_names(self, scope: Scope, layer: int | None, tied: bool) -> dict[str, str]:
        """Parameter name -> full Hugging Face name, of one layer, or of the start or the end."""
        found = {}
        for parameter in self.scope_parameters(scope):
            held = self.parameter[parameter.tied_to] if tied and parameter.tied_to else parameter
            found[parameter.name] = held.tensor_name(layer)
        return found

    def tensors(self, layers: int, tied: bool) -> dict[str, tuple[Parameter, int | None]]:
        """Full Hugging Face name -> what it is, for every tensor of a model."""
        found: dict[str, tuple[Parameter, int | None]] = {}
        places: list[tuple[Scope, int | None]] = [("start", None)]
        places += [("layer", layer) for layer in range(layers)]
        for scope, layer in [*places, ("end", None)]:
            for parameter in self.scope_parameters(scope):
                if not (tied and parameter.tied_to):
                    found[parameter.tensor_name(layer)] = parameter, layer
        return found

    def parameter_shape(self, name: str, dims: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(axis_size(axis, dims) for axis in self.parameter[name].axes)

    def used_by(self, parameter: str) -> Stage:
        """The stage that reads a parameter."""
        return next(stage for stage in self.stages if parameter in stage.parameters)


def stage(
    name: str,
    inputs: str,
    axes: str,
    kind: Kind,
    value: str,
    *,
    parameters: str = "",
    scope: Scope = "layer",
    last: bool = False,
) -> Stage:
    """A row, its lists written as words. An input is marked ``[S]`` where it is read at every key
    position, and ``[unrounded]`` where it is read before it is rounded."""
    words = [word.rstrip("]").split("[") for word in inputs.split()]
    return Stage(
        name=name,
        scope=scope,
        inputs=tuple(word[0] for word in words),
        parameters=tuple(parameters.split()),
        axes=tuple(axes.split()),
        kind=kind,
        value=value,
        keys=tuple(word[0] for word in words if "S" in word[1:]),
        unrounded=tuple(word[0] for word in words if "unrounded" in word[1:]),
        last=last,
    )


def parameter(
    name: str, axes: str, tensor: str, gguf: str, scope: Scope = "layer", tied_to: str | None = None
) -> Parameter:
    """A row, its axes written as words."""
    return Parameter(name, scope, tuple(axes.split()), tensor, gguf, tied_to)
