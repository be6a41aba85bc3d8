"""A change of basis that an engine makes and undoes: said, and no fault.

Scores are products of q and k, so that the channels of a head may stand in any order, if it is the
same in both: rows of the weights and biases, the norms' weights and RoPE's pairs are then all in
that order, and each of these stages looks wrong by itself. What shows that it is a layout is that q
and k, computed in the engine's arithmetic from what stands before all of them, are what was dumped
but for one order, and that the scores are right.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen_jax.replay import Replay
from stages.architecture import LINEAR, ROTATION, SCORES, Architecture, Key, Stage
from stages.verdict import Suspect
from tools.localize.mistakes import orders
from tools.localize.schema import LayoutEntry
from tools.localize.stage_case import SLACK, StageReplay
from tools.localize.suspecting import Evidence


def take_out(
    evidence: Evidence, suspects: list[Suspect]
) -> tuple[list[Suspect], tuple[LayoutEntry, ...]]:
    """The suspects that no layout explains, and the layouts."""
    arch, found = evidence.replay.arch, []
    scores = next(stage for stage in arch.layer_stages if stage.kind is SCORES)
    path = _path(arch, scores)
    names = {stage.name for stage in path}
    for layer in range(evidence.replay.config.num_hidden_layers):
        mine = {s.key[0] for s in suspects if s.key[1] == layer}
        # a fault of the rotation alone makes scores wrong, or is of one of them
        if len(mine & names) < 2 or scores.name in mine:
            continue
        if says := _order(evidence, path, layer):
            stages = tuple(stage.name for stage in path if stage.name in mine)
            found.append(LayoutEntry(layer=layer, says=says, stages=stages))
    explained = {(stage, layout.layer) for layout in found for stage in layout.stages}
    return [s for s in suspects if s.key not in explained], tuple(found)


def _path(arch: Architecture, scores: Stage) -> list[Stage]:
    """From the projection of q and k to what scores read of them, in computation order."""
    wanted, found = {*scores.inputs}, []
    for stage in reversed(arch.layer_stages):
        if stage.name in wanted:
            found.append(stage)
            if stage.kind is not LINEAR:
                wanted |= {*stage.inputs}
    return found[::-1]


def _order(evidence: Evidence, path: list[Stage], layer: int) -> str | None:
    """What the order within every head of q and k is called; None where they are in none."""
    replay, right = evidence.replay, _right(evidence, path, layer)
    rotated = [stage for stage in path if stage.kind is ROTATION]
    order: np.ndarray | None = None
    for stage in rotated:
        case = _case(evidence, stage, layer, right)
        if case is None:
            return None
        exact, dump = np.asarray(case.exact), np.asarray(case.dump)
        if order is None:
            width = exact.shape[-1]
            order = orders.match(dump.reshape(-1, width), exact.reshape(-1, width))
            if order is None or sorted(order) != [*range(width)]:
                return None
        bits = case.scored(jnp.asarray(exact[..., order]))
        if bits < min(_usual(replay), case.certain) - SLACK:
            return None
    if order is None or not rotated:
        return None
    described = orders.described(order)
    return described[0] if described else orders.moves(order)


def _usual(replay: Replay) -> float:
    return 24.0 if replay.dtype == np.float32 else -float(np.log2(jnp.finfo(replay.dtype).eps))


def _right(evidence: Evidence, path: list[Stage], layer: int) -> dict[Key, Array]:
    """What the stages of the path should be, each computed from the one before and not from a
    dump, rounded as the engine would hand it on."""
    right: dict[Key, Array] = {}
    for stage in path:
        case = _case(evidence, stage, layer, right)
        if case is not None and stage.kind is not ROTATION:
            exact = case.exact
            right[stage.name, layer] = exact.astype(evidence.replay.dtype).astype(exact.dtype)
    return right


def _case(
    evidence: Evidence, stage: Stage, layer: int, right: dict[Key, Array]
) -> StageReplay | None:
    """A dumped stage with right inputs; None where there is none to be had."""
    if (stage.name, layer) not in evidence.replay.trace.entries:
        return None
    case = StageReplay(evidence.replay, stage, layer, right, evidence.fitted.formats)
    return case if case.replayable else None
