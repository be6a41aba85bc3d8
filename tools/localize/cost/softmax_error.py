"""What a softmax feels: the absolute error of the scores, in nats.

Significant bits are blind to a large common term: with Qwen2's K bias a 4-bit K cache has the same
4 bits in every layer, and moves the scores of the last one by 9 nats. The error is that of the
dumped scores against those of the dumped q and k, as they were before any cache, over the keys that
a query sees.
"""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax import runtime
from qwen_jax.config import Config
from qwen_jax.local_error import FRUGAL, stage_value
from qwen_jax.models.ops import Positional
from qwen_jax.replay import Replay
from stages.architecture import SCORES, Stage
from tools.localize.cost.result import Nats
from tools.localize.stage_case import StageReplay


def compare(
    scores: Stage, config: Config, pos: Positional, inputs: Sequence[Array], dump: Array
) -> tuple[Array, ...]:
    """(rms, max, where that is as a flat index of [N, T, S], mean and largest total variation)."""
    softmax = next(s for s in config.arch.layer_stages if s.inputs == (scores.name,))
    exact = stage_value(scores, config, pos, inputs, ())
    seen = jnp.broadcast_to(pos.mask[:, None], exact.shape)
    error = jnp.where(seen, jnp.abs(dump - exact), 0)
    p, q = (stage_value(softmax, config, pos, [x], ()) for x in (exact, dump))
    variation = jnp.where(seen, jnp.abs(p - q), 0).sum(-1) / 2
    rms = jnp.sqrt(jnp.square(error).sum() / seen.sum())
    return rms, error.max(), error.argmax(), variation.mean(), variation.max()


@cache
def _compiled(scores: Stage, config: Config, unoptimised: bool) -> Any:
    def program(pos: Positional, inputs: Sequence[Array], dump: Array) -> Any:
        return compare(scores, config, pos, inputs, dump)

    fast = {"xla_backend_optimization_level": 0} if unoptimised else {}
    return jax.jit(program, compiler_options=runtime.compiler_options() | FRUGAL | fast)


SAMPLE = 64  # query rows


def measure(replay: Replay, sound: Collection[int | None] = ()) -> list[Nats]:
    """Every layer whose scores are dumped and finite, and whose inputs are there or can be
    computed. sound: layers whose scores are plainly sound as a stage."""
    found = []
    # the stage of the architecture without a cache: what a cache rounds is to be seen
    scores = next(s for s in replay.config.arch.layer_stages if s.kind is SCORES)
    with replay.numerics():
        for layer in range(replay.config.num_hidden_layers):
            if (scores.name, layer) not in replay.trace.entries:
                continue
            # a cache is part of the error here, but not of the stage's
            sampled = layer in sound and scores in replay.arch.stages
            given = _sample(replay, scores, layer) if sampled else _all(replay, scores, layer)
            if given is None:
                continue
            positions, pos, inputs, dump = given
            program = _compiled(scores, replay.config, replay.unoptimised)
            rms, most, place, mean, largest = program(pos, inputs, dump)
            if not np.isfinite([rms, largest]).all():
                continue
            head, row, _ = np.unravel_index(int(place), dump.shape[1:])
            found.append(
                Nats(
                    layer=layer, rms=float(rms), max=float(most), head=int(head),
                    position=int(positions[row]), variation=float(mean),
                    variation_max=float(largest),
                )
            )  # fmt: skip
    return found


# row numbers, and of these rows what positions decide, the inputs and the dump
Given = tuple[np.ndarray, Positional, list[Any], Any]


def _all(replay: Replay, scores: Stage, layer: int) -> Given | None:
    case = StageReplay(replay, scores, layer)
    if not case.replayable:
        return None
    rows = len(replay.trace.tokens) - case.rows + np.arange(case.rows)
    return rows, case.pos, list(case.inputs), case.dump


def _sample(replay: Replay, scores: Stage, layer: int) -> Given:
    """Rows spread evenly, the last one among them. The inputs are dumped: what is plainly sound
    was measured by them."""
    q, k, dump = (replay.load(name, layer) for name in (*scores.inputs, scores.name))
    assert q is not None and k is not None and dump is not None
    count = min(q.shape[1], dump.shape[2])
    chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(int)) - count
    pos = replay.host_pos[replay.config.sliding_layers[layer]]
    some = Positional(pos.cos[:, chosen], pos.sin[:, chosen], pos.mask[:, chosen])
    rows = len(replay.trace.tokens) + chosen
    q, k, dump = (x.astype(np.float64) for x in (q[:, chosen], k, dump[:, :, chosen]))
    return rows, some, [q, k], dump
