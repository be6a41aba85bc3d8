"""Local error: each stage alone, in float64, on the dumped inputs of the engine under test.

The same stage functions as the forward pass are run with ``dtype=float64``; what differs from the
dump was created at that stage. Error is measured against what rounding can act on (``size``):

    err = dump - y*,   scale^2 = s^2 + y*^2,   bits = -log2(rms(err) / rms(scale))

Sources: "local error" as in Herbie (Panchekha et al. 2015), "significant bits" as in Verificarlo
and CADNA. The sizes s are the first-order bounds of each operation's rounding error.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import register_dataclass

from qwen_jax import model, params, rope
from qwen_jax.config import Config
from qwen_jax.model import FUNCTIONS, Env
from qwen_jax.weights import EMBEDDING, NORM, Weights, head_name
from stages.table import END_STAGES, LAYER_INPUT, LAYER_STAGES, START_STAGES, TOKENS, Stage
from stages.trace import Trace

EXACT = jnp.float64
VOCABULARY_SLICE = 16384  # rows of the head in float64 at a time

# One weight in float64 at a time. XLA on the CPU would rather widen all of them first, so that more
# could run at once: 2.7 GiB of temporary memory for a layer of the 7B, and with this 0.5 GiB.
FRUGAL = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def size_squared(
    stage: Stage, config: Config, weights: Any, env: Env, inputs: Sequence[Array], value: Array
) -> Array:
    """s^2, the square of what rounding can act on, in the shape of ``value``.

    Products and sums of products: the squares of the terms, added up by the stage's own function.
    Additions: the sum of magnitudes, squared. Everything else: the value itself.
    float32 is enough: the size is needed to a per cent.
    """
    function = partial(FUNCTIONS[stage.name], config)
    inputs = [x.astype(jnp.float32) for x in inputs]
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    if stage.kind in ("matmul", "weighted_sum"):
        return function(_square(weights), env, *map(_square, inputs))
    if stage.kind == "scores":
        return function(weights, env, *map(_square, inputs)) * config.head_dim**-0.5
    if stage.kind == "add":
        return _square(function(jax.tree.map(jnp.abs, weights), env, *map(jnp.abs, inputs)))
    if stage.kind == "rotation":
        q, k, _ = model._split_qkv(config, _square(inputs[0]))
        first, second = jnp.split(q if stage.name == "q_post_rope" else k, 2, axis=-1)
        cos, sin = (_square(t)[:, :, None, :] for t in (env.cos, env.sin))
        return jnp.concatenate([first * cos + second * sin, second * cos + first * sin], -1)
    return _square(value)


def allowance(
    stage: Stage, config: Config, env: Env, inputs: Sequence[Array], value: Array, dtype: Any
) -> Array:
    """An error that sound arithmetic may have where the scale is too small to allow for it.

    Values below the smallest normal number of the trace's precision lose their last bits.
    An exponential turns the rounding of its argument x into a relative error |x| u. A rotation
    does so with its angle, so that an engine that makes its tables another way than Hugging Face
    is off at late positions, and is right. u is that of float32, 2^-24.
    """
    tiny = float(
        jnp.finfo(dtype).smallest_subnormal
        if dtype == np.float16
        else jnp.finfo(dtype).smallest_normal
    )  # bfloat16 and float32 may flush to zero
    u = 2.0**-24
    if stage.kind == "softmax":
        scores = jnp.where(env.mask[:, None], inputs[0], -jnp.inf)
        depth = jnp.max(scores, -1, keepdims=True) - inputs[0]
        return value * jnp.where(env.mask[:, None], depth, 0) * u + tiny
    if stage.kind == "silu":
        return jnp.abs(value * inputs[0]) * u + tiny
    if stage.kind == "rotation":
        quarter_turn = replace(env, cos=-env.sin, sin=env.cos)  # the derivative of a rotation
        turned = FUNCTIONS[stage.name](config, None, quarter_turn, inputs[0])
        frequencies, _ = rope.inverse_frequencies(config)
        angle = np.arange(turned.shape[1])[:, None] * np.tile(frequencies.astype(np.float64), 2)
        return jnp.abs(turned * angle[None, :, None, :]) * u + tiny
    return jnp.full_like(value, tiny)


def _square(tree: Any) -> Any:
    return jax.tree.map(lambda x: x * x, tree)


@register_dataclass
@dataclass(frozen=True)
class Sums:
    """What one stage of one layer leaves behind: squares added up over rows and over columns.

    The stage is seen as a matrix: [N*T, S] for scores and softmax, else [T, everything else].

    Attributes:
        error_rows, error_columns: sums of (dump - y*)^2 over finite, unmasked elements.
        scale_rows, scale_columns: sums of s^2 + y*^2 over the same elements.
        expected_rows, expected_columns: sums of a squared error that is there without any fault:
            after missing stages, what their rounding in the engine's own precision leads to; else
            see ``allowance``.
        born_rows, born_columns: how many elements are NaN or infinite though y* is finite.
    """

    error_rows: Array
    error_columns: Array
    scale_rows: Array
    scale_columns: Array
    born_rows: Array
    born_columns: Array
    expected_rows: Array
    expected_columns: Array


def _matrix(x: Array, stage: Stage) -> Array:
    """One sequence's stage [B=1, ...] as a matrix, see ``Sums``."""
    if stage.axes == ("N", "T", "S"):
        return x.reshape(-1, x.shape[-1])
    return x.reshape(x.shape[1] if x.ndim > 2 else 1, -1)


def sums(
    stage: Stage,
    found: Array,
    exact: Array,
    size: Array,
    env: Env,
    expected: Array,
) -> Sums:
    """Compare a dump with the exact value. All arrays carry the batch axis, of size 1."""
    found = found.astype(EXACT)
    keep = jnp.isfinite(exact)
    if stage.kind == "scores":  # entries that the mask removes are no part of the computation
        keep &= env.mask[:, None]
    born = keep & ~jnp.isfinite(found)
    keep &= jnp.isfinite(found)

    def both(x: Array) -> tuple[Array, Array]:
        x = _matrix(x, stage)
        return x.sum(1), x.sum(0)

    error = both(jnp.where(keep, jnp.square(found - exact), 0))
    scale = both(jnp.where(keep, size.astype(EXACT) + jnp.square(exact), 0))
    known = both(jnp.where(keep & jnp.isfinite(expected), jnp.square(expected), 0))
    return Sums(*error, *scale, *both(born.astype(jnp.int32)), *known)


def run(
    rows: Sequence[Stage],
    config: Config,
    weights: Any,
    env: Env,
    dumps: Mapping[str, Array],
    given: Mapping[str, tuple[Array, Array]],
    dtype: Any,
) -> tuple[dict[str, Sums], dict[str, tuple[Array, Array]]]:
    """Measure every stage of ``rows`` that is in ``dumps``.

    A stage that is missing is computed instead, twice: exactly, and in ``dtype``, the engine's
    own precision, so that what its rounding does to later stages is known too.

    Arguments:
        dumps: stage name -> dump with a batch axis, in any float dtype.
        given: values from before ``rows`` that are not in ``dumps``, as (exact, in ``dtype``).
        dtype: the precision of the trace.

    Returns:
        (sums by stage, (exact, low) values of the stages that were missing).
    """
    narrow_weights = jax.tree.map(lambda w: w.astype(dtype), weights)
    weights = jax.tree.map(lambda w: w.astype(EXACT), weights)
    missing = dict(given)
    measured: dict[str, Sums] = {}
    for stage in rows:
        function = FUNCTIONS[stage.name]
        inputs = [
            dumps[name].astype(EXACT) if name in dumps and _is_float(dumps[name])
            else dumps[name] if name in dumps
            else missing[name][0]
            for name in stage.inputs
        ]  # fmt: skip
        exact = function(config, weights, env, *inputs)
        gap = any(name in missing for name in stage.inputs)
        low = None
        if gap or stage.name not in dumps:
            narrow = [
                missing[name][1] if name in missing
                else dumps[name].astype(dtype) if _is_float(dumps[name])
                else dumps[name]
                for name in stage.inputs
            ]  # fmt: skip
            low = function(config, narrow_weights, env, *narrow).astype(dtype)
        if stage.name not in dumps:
            missing[stage.name] = (exact, low)
            continue
        if gap:
            expected = low.astype(EXACT) - exact
        else:
            expected = allowance(stage, config, env, inputs, exact, dtype)
        size = size_squared(stage, config, weights, env, inputs, exact)
        measured[stage.name] = sums(stage, dumps[stage.name], exact, size, env, expected)
    return measured, {s.name: missing[s.name] for s in rows if s.name in missing}


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


@cache
def compiled(
    rows: tuple[Stage, ...], config: Config, dtype: np.dtype, unoptimised: bool = False
) -> Any:
    """``run`` under jit: called as ``(weights, env, dumps, given)``."""
    return jax.jit(
        lambda weights, env, dumps, given: run(rows, config, weights, env, dumps, given, dtype),
        compiler_options=FRUGAL | ({"xla_backend_optimization_level": 0} if unoptimised else {}),
    )


@dataclass(frozen=True)
class Measured:
    """One stage of one layer, measured.

    Attributes:
        sums: NumPy arrays.
        segment: missing stages between this one and the dumps it was computed from, in
            computation order; empty where every input was dumped.
    """

    stage: str
    layer: int | None
    sums: Sums
    segment: tuple[tuple[str, int | None], ...]


class Replay:
    """Measures a whole trace, one layer's weights and stages in memory at a time.

    Arguments:
        trace: the dumps.
        source: the checkpoint whose weights made them.
        dtype: the precision of the trace, for what a gap's rounding does.
        unoptimised: compile in half the time and run slower: for many small traces.
    """

    def __init__(
        self, trace: Trace, source: Weights, dtype: np.dtype, unoptimised: bool = False
    ) -> None:
        self.trace, self.source, self.dtype = trace, source, dtype
        self._compiled = partial(
            compiled, config=source.config, dtype=dtype, unoptimised=unoptimised
        )
        config = source.config
        positions = np.arange(len(trace.tokens))[None]
        valid = np.ones_like(positions, bool)
        self.envs = {
            sliding: jax.device_put(model.make_env(config, positions, valid, sliding))
            for sliding in set(config.sliding_layers) | {False}
        }
        self._layer = self._compiled(LAYER_STAGES)
        # What the first dumped stage after a gap was computed through.
        self._carried: dict[str, tuple[Array, Array]] = {}
        self._chain: dict[str, tuple] = {}

    def load(self, stage: str, layer: int | None) -> np.ndarray | None:
        """A dump with a batch axis, or None where the trace lacks it."""
        if (stage, layer) not in self.trace.entries:
            return None
        return self.trace.read(stage, layer)[None]

    def start_params(self) -> tuple[params.StartParams, np.ndarray]:
        """The embedding rows in use, and the tokens renumbered to them."""
        rows, index = np.unique(np.array([self.trace.tokens], np.int32), return_inverse=True)
        table = self.source.gather(EMBEDDING, rows)
        return params.StartParams(embed_tokens=table), index.reshape(1, -1).astype(np.int32)

    def layer_dumps(self, layer: int) -> dict[str, np.ndarray]:
        """Everything dumped of one layer, and its input if that was dumped."""
        found = {s.name: self.load(s.name, layer) for s in LAYER_STAGES}
        before = ("embedding", 0) if layer == 0 else ("post_ffn_residual", layer - 1)
        found[LAYER_INPUT] = self.load(*before)
        return {name: dump for name, dump in found.items() if dump is not None}

    def __iter__(self) -> Iterator[Measured]:
        """Every dumped stage in computation order."""
        layers = self.source.config.num_hidden_layers
        table, tokens = self.start_params()
        start = {"embedding": self.load("embedding", 0), TOKENS: tokens}
        start = {name: dump for name, dump in start.items() if dump is not None}
        program = self._compiled(START_STAGES)
        yield from self._step(START_STAGES, 0, program, table, start, {})
        with ThreadPoolExecutor(1) as reader:

            def fetch(layer: int) -> tuple[params.LayerParams, dict[str, np.ndarray]]:
                return params.layer_params(self.source, layer), self.layer_dumps(layer)

            ready = reader.submit(fetch, 0)
            for layer in range(layers):
                weights, dumps = ready.result()
                if layer + 1 < layers:
                    ready = reader.submit(fetch, layer + 1)
                carried = self._take("embedding" if layer == 0 else "post_ffn_residual")
                yield from self._step(LAYER_STAGES, layer, self._layer, weights, dumps, carried)
        yield from self._finish()

    def _take(self, before: str) -> dict[str, tuple[Array, Array]]:
        """The layer input, where it was not dumped but computed."""
        if before not in self._carried:
            return {}
        self._chain[LAYER_INPUT] = self._chain[before]
        return {LAYER_INPUT: self._carried[before]}

    def _step(
        self,
        rows: tuple[Stage, ...],
        layer: int | None,
        program: Any,
        weights: Any,
        dumps: dict[str, np.ndarray],
        given: dict[str, tuple[Array, Array]],
    ) -> Iterator[Measured]:
        sliding = layer is not None and self.source.config.sliding_layers[layer]
        found, computed = program(weights, self.envs[sliding], dumps, given)
        chain = {name: self._chain[name] for name in given}
        for stage in rows:
            behind = [link for name in stage.inputs for link in chain.get(name, ())]
            segment = tuple(dict.fromkeys(behind))
            if stage.name in found:
                sums = jax.tree.map(np.asarray, found[stage.name])
                yield Measured(stage.name, layer, sums, segment)
            else:
                chain[stage.name] = (*segment, (stage.name, layer))
        last = rows[-1].name
        self._carried = {last: computed[last]} if last in computed else {}
        self._chain = {last: chain[last]} if last in computed else {}

    def _finish(self) -> Iterator[Measured]:
        """final_norm, and lm_head in slices of the vocabulary."""
        config, source = self.source.config, self.source
        before = "post_ffn_residual"
        dump = self.load(before, config.num_hidden_layers - 1)
        dumps = {} if dump is None else {before: dump}
        given = dict(self._carried)
        if (norm := self.load("final_norm", None)) is not None:
            dumps["final_norm"] = norm
        if not dumps and not given:
            return
        program = self._compiled(END_STAGES[:1])
        weights = params.EndParams(norm=source.read(NORM), lm_head=None)
        yield from self._step(END_STAGES[:1], None, program, weights, dumps, given)
        if (head := self.load("lm_head", None)) is None:
            return
        last_only = head.ndim == 2
        dumps, given = {}, dict(self._carried)
        if norm is not None:
            dumps["final_norm"] = norm[:, -1:] if last_only else norm
        elif last_only:
            given = {name: (a[:, -1:], b[:, -1:]) for name, (a, b) in given.items()}
        head = head[:, None] if last_only else head
        program = self._compiled(END_STAGES[1:])
        parts = []
        for first, rows in source.blocks(head_name(config), VOCABULARY_SLICE):
            cut = slice(first, first + len(rows))
            some = replace(weights, lm_head=rows)
            kept = dict(self._carried), dict(self._chain)
            parts += self._step(
                END_STAGES[1:], None, program, some, dumps | {"lm_head": head[..., cut]}, given
            )
            self._carried, self._chain = kept
        yield _join(parts)


def _join(parts: list[Measured]) -> Measured:
    """One lm_head from its slices of the vocabulary: rows add up, columns stand side by side."""

    def joined(name: str) -> np.ndarray:
        values = [getattr(part.sums, name) for part in parts]
        return np.concatenate(values) if name.endswith("columns") else np.sum(values, 0)

    names = [f.name for f in fields(Sums)]
    return Measured("lm_head", None, Sums(**{n: joined(n) for n in names}), parts[0].segment)
