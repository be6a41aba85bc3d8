"""The programs that a sweep runs: the layer-wise engine that traces, and the whole model at once.

Each gives every stage with its batch axis: ``{(stage, layer): [B, ...]}``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.tree_util import tree_leaves_with_path

from qwen_jax import runtime
from qwen_jax.config import Config
from qwen_jax.engine import JaxEngine
from qwen_jax.forward import Params, forward, load, run_stages
from qwen_jax.models import FUNCTIONS
from qwen_jax.models.ops import positional_by_layer
from qwen_jax.padded import Padded, Want
from qwen_jax.weights.base import Weights
from stages.architecture import LAYER_INPUT, TOKENS, Key, Scope, Stage
from stages.files import numpy_dtype
from tools.parity.variants import Variant

Values = dict[Key, np.ndarray]


def make_batch(tokens: tuple[int, ...], length: int, batch: int) -> Padded:
    """``batch`` different sequences cut from ``tokens`` (repeated as often as needed); every second
    one is half as long, and padded."""
    stream = np.resize(np.array(tokens, np.int32), length + batch)
    lengths = [-(-length // 2) if row % 2 else length for row in range(batch)]
    return Padded.of([stream[row : row + count].tolist() for row, count in enumerate(lengths)])


@dataclass(frozen=True)
class Part:
    """One program as it is compiled.

    Attributes:
        name: "start", "layer", "norm" or "head" of the layer-wise engine, else the whole's form.
        function: of ``jax.jit``.
        arguments: pytrees of ``jax.ShapeDtypeStruct``.
        stages: what it is to return.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    stages: tuple[str, ...]

    @cached_property
    def returns(self) -> list[tuple[Any, jax.ShapeDtypeStruct]]:
        """(path in the pytree, shape) of every array, in the order of the compiled outputs."""
        with runtime.numerics(None):
            return tree_leaves_with_path(jax.eval_shape(self.function, *self.arguments))


def shapes_of(tree: Any) -> Any:
    """A pytree of arrays as one of ``jax.ShapeDtypeStruct``."""
    return jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), tree)


def stored(model: Weights, scope: Scope, layer: int | None = None) -> dict[str, Any]:
    """Weights as shapes: parameter -> ``jax.ShapeDtypeStruct`` in the dtype of the checkpoint."""
    names = model.config.tensor_names(scope, layer)
    return {p: jax.ShapeDtypeStruct(model.shapes[n], model.dtype(n)) for p, n in names.items()}


class Layers(JaxEngine):
    """The engine that traces, with stages replaced as ``variant`` says."""

    def __init__(
        self, model: Weights, dtype: str, backend: str, device: Any, variant: Variant
    ) -> None:
        self.variant = variant
        # The sweep varies the precision of products, from outside.
        super().__init__(model, dtype, backend, device, precision=None)

    def _compiled(
        self, stages: tuple[Stage, ...], how: Callable[..., Any] = run_stages
    ) -> Callable[..., Any]:
        functions, usual = self.variant.functions, FUNCTIONS[self.arch.name]
        if stages == self.arch.layer_stages:
            stages = self.variant.stages
        elif all(functions.get(row.name) is usual.get(row.name) for row in stages):
            return super()._compiled(stages, how)
        own = partial(run_stages, stages, self.model.config, dtype=self.dtype, functions=functions)
        if self.backend == "eager":
            return own
        return jax.jit(own, compiler_options=runtime.compiler_options())

    def programs(self, batch: Padded) -> Iterator[Part]:
        """Its programs, with weights in the dtype that they are stored in."""
        config, arch = self.model.config, self.arch
        struct, (rows, length) = jax.ShapeDtypeStruct, batch.tokens.shape
        pos = shapes_of(positional_by_layer(config, batch.positions, batch.valid))
        weights = partial(stored, self.model)
        x = struct((rows, length, config.hidden_size), self.dtype)

        def part(name: str, function: Any, *arguments: Any, stages: tuple[Stage, ...]) -> Part:
            return Part(name, function, arguments, tuple(stage.name for stage in stages))

        table = weights("start")
        used = struct(
            (len(np.unique(batch.tokens)), config.hidden_size), table[arch.embedding.name].dtype
        )
        ids = {TOKENS: struct((rows, length), np.int32)}
        yield part(
            "start",
            self._start,
            {arch.embedding.name: used},
            pos[False],
            ids,
            stages=arch.start_stages,
        )
        for sliding in sorted(pos):
            layer = config.sliding_layers.index(sliding)
            yield part(
                "layer, sliding" if sliding else "layer",
                self._layer,
                weights("layer", layer),
                pos[sliding],
                {LAYER_INPUT: x},
                stages=self.variant.stages,
            )
        end = weights("end")
        norm, head = arch.end_stages[:-1], arch.head
        yield part(
            "norm",
            self._norm,
            {p: end[p] for stage in norm for p in stage.parameters},
            pos[False],
            {arch.layer_output.name: x},
            stages=norm,
        )
        yield part(
            "head",
            self._head,
            {p: end[p] for p in head.parameters},
            pos[False],
            {head.inputs[0]: x},
            stages=(head,),
        )

    def values(self, batch: Padded, want: Want = lambda stage, layer: True) -> Values:
        """Every wanted stage, and always the logits of all positions."""
        found: Values = {}
        self.run_batch(
            batch,
            "all",
            want,
            lambda stage, layer, value: found.__setitem__((stage, layer), value),
        )
        return found


class Whole:
    """The whole model as one compiled program.

    Arguments:
        form: "program" (the layers one after another), "scan" (a loop over stacked weights), or
            "unobserved" (as "program", but only the logits come out, so XLA may fuse at will).
    """

    def __init__(self, model: Weights, dtype: str, device: Any, form: str) -> None:
        self.model, self.device, self.form = model, device, form
        forms: dict[str, Callable[..., Any]] = {
            "program": _unrolled,
            "scan": _scan,
            "unobserved": _logits,
        }
        self.program = jax.jit(
            partial(forms[form], model.config, dtype=numpy_dtype(dtype)),
            compiler_options=runtime.compiler_options(),
        )

    def programs(self, batch: Padded) -> Iterator[Part]:
        """Its one program, with weights in the dtype that they are stored in."""
        config, arch = self.model.config, self.model.config.arch
        weights = partial(stored, self.model)
        layers = tuple(weights("layer", n) for n in range(config.num_hidden_layers))
        if self.form == "scan":
            count = len(layers)
            layers = jax.tree.map(
                lambda each: jax.ShapeDtypeStruct((count, *each.shape), each.dtype), layers[0]
            )
        params = Params(start=weights("start"), layers=layers, end=weights("end"))
        pos = shapes_of(positional_by_layer(config, batch.positions, batch.valid))
        stages = (arch.head.name,) if self.form == "unobserved" else arch.names
        yield Part(self.form, self.program, (params, shapes_of(batch.tokens), pos), stages)

    def values(self, batch: Padded) -> Values:
        with runtime.numerics(None):
            return self._values(batch)

    def _values(self, batch: Padded) -> Values:
        config, put = self.model.config, partial(jax.device_put, device=self.device)
        pos = put(positional_by_layer(config, batch.positions, batch.valid))
        weights = load(self.model)
        if self.form == "scan":
            stacked = jax.tree.map(lambda *layers: np.stack(layers), *weights.layers)
            weights = weights.replace(layers=stacked)
        found = jax.device_get(self.program(put(weights), put(batch.tokens), pos))
        if self.form == "unobserved":
            return {("lm_head", None): found}
        start, layers, end = found
        values: Values = {(name, 0): value for name, value in start.items()}
        for number in range(config.num_hidden_layers):
            for name in (stage.name for stage in config.arch.layer_stages):
                stacked = self.form == "scan"
                values[name, number] = layers[name][number] if stacked else layers[number][name]
        return values | {(s.name, None): end[s.name] for s in config.arch.end_stages}


def _unrolled(
    config: Config, weights: Params, tokens: Array, pos: Any, dtype: Any
) -> tuple[Any, Any, Any]:
    """``forward.forward``: (start, layers, end)."""
    found = forward(config, weights, tokens, pos, dtype)
    return found.start, found.layers, found.end


def _logits(*args: Any, **kwargs: Any) -> Array:
    return _unrolled(*args, **kwargs)[2]["lm_head"]


def _scan(
    config: Config, weights: Params, tokens: Array, pos: Any, dtype: Any
) -> tuple[Any, Any, Any]:
    """``forward.forward`` with ``lax.scan`` over ``weights.layers``, whose leaves are [L, ...]; so
    are those of the layers' values."""
    arch, full, layer = config.arch, pos[False], pos[config.sliding_layers[0]]
    output = arch.layer_output.name
    start = run_stages(arch.start_stages, config, weights.start, full, {TOKENS: tokens}, dtype)

    def body(x: Array, parameters: Any) -> tuple[Array, dict[str, Array]]:
        given = {LAYER_INPUT: x}
        values = run_stages(arch.layer_stages, config, parameters, layer, given, dtype)
        return values[output], values

    x, layers = lax.scan(body, start[arch.first.name], weights.layers)
    end = run_stages(arch.end_stages, config, weights.end, full, {output: x}, dtype)
    return start, layers, end
