"""Whose fault it is: a stage may only suffer from what an earlier one wrote down."""

from dataclasses import dataclass

from jax import Array

from qwen_jax.replay import Replay
from stages import verdict
from stages.architecture import TOKENS, Key
from stages.verdict import LocalError, Suspect
from tools.localize.formats.registry import Format
from tools.localize.stage_case import SLACK, StageReplay, focus_of
from tools.localize.suspecting import Evidence

VAGUE = 4.0  # an input that lacks that many bits cannot show what a stage made of it


@dataclass(frozen=True)
class Blame:
    """Who is left.

    Attributes:
        suspects: those that are wrong themselves, in computation order.
        overrides: right values in place of wrong dumps that later stages did not read.
        dump_only: the suspects of which only the dump is wrong.
    """

    suspects: list[Suspect]
    overrides: dict[Key, Array]
    dump_only: set[Key]

    def case(self, evidence: Evidence, item: LocalError) -> StageReplay:
        """A suspect's stage, with right inputs and its own dump."""
        fitted = evidence.fitted
        return _case(evidence.replay, item, self.overrides, item.key, fitted.formats)


def clear(evidence: Evidence, suspects: list[Suspect]) -> Blame:
    """Leave out the stages that only suffer from an earlier one."""
    overrides, cleared, dump_only = _clear(
        evidence.replay, suspects, evidence.items, evidence.fitted.formats
    )
    return Blame([s for s in suspects if s.key not in cleared], overrides, dump_only)


def _case(
    replay: Replay,
    item: LocalError,
    overrides: dict[Key, Array],
    without: Key,
    formats: dict[Key, Format],
) -> StageReplay:
    others = {key: value for key, value in overrides.items() if key != without}
    return StageReplay(replay, item.stage, item.layer, others, formats)


def _clear(
    replay: Replay, suspects: list[Suspect], items: list[LocalError], formats: dict[Key, Format]
) -> tuple[dict[Key, Array], set[Key], set[Key]]:
    """Clear the stages that only suffer from the wrong *dump* of an earlier one.

    If a suspect's consumer is a suspect too, and is right once the suspect's dump is replaced by
    its exact value, then the engine went on from the right value: the consumer is cleared, and
    the mistake is one of the dump. The same where the earlier dump is merely too imprecise to
    replay from, though no suspect.
    """
    by_key = {suspect.key: suspect for suspect in suspects}
    overrides: dict[Key, Array] = {}
    cleared: set[Key] = set()
    dump_only: set[Key] = set()
    for suspect in suspects:
        if suspect.key in cleared or suspect.why == "nan":
            continue
        item = suspect.item
        readers = [
            key
            for key in replay.arch.readers(*item.key, replay.config.num_hidden_layers)
            if key in by_key and key not in cleared
        ]
        if not readers:
            continue
        case = _case(replay, item, overrides, suspect.key, formats)
        if not case.replayable:
            continue
        # as the engine would have handed it on: scores in the hundreds make a rounding matter
        exact = case.exact.astype(replay.dtype).astype(case.exact.dtype)
        certain = case.certain
        for key in readers:
            reader = by_key[key]
            stage = replay.arch.stage[key[0]]
            case = StageReplay(replay, stage, key[1], overrides | {suspect.key: exact}, formats)
            if not case.replayable:
                continue
            focus = focus_of(case, reader.masks) if reader.why == "slice" else None
            if case.scored(case.exact, focus) >= min(reader.expected, 24.0, certain) - SLACK:
                cleared.add(key)
                dump_only.add(suspect.key)
                overrides[suspect.key] = exact
    for suspect in suspects:
        key = suspect.key
        if key in cleared or suspect.why == "nan":
            continue
        vague = _vague_inputs(replay, suspect, items, by_key, formats)
        if vague:
            case = _case(replay, suspect.item, overrides | vague, key, formats)
            if not case.replayable:
                continue
            focus = focus_of(case, suspect.masks) if suspect.why == "slice" else None
            if case.scored(case.exact, focus) >= min(suspect.expected, 24.0) - SLACK:
                cleared.add(key)
    return overrides, cleared, dump_only


def _vague_inputs(
    replay: Replay,
    suspect: Suspect,
    items: list[LocalError],
    suspects: dict[Key, Suspect],
    formats: dict[Key, Format],
) -> dict[Key, Array]:
    """The exact values of a suspect's inputs whose dumps have far fewer bits than the trace's
    precision, though another one explains them: the engine may have gone on from better ones."""
    held = {item.key: item for item in items}
    vague = {}
    for name in suspect.item.stage.inputs:
        if name == TOKENS:
            continue
        key = replay.arch.stored_as(name, suspect.key[1], replay.config.num_hidden_layers)
        item = held.get(key)
        if item and key not in suspects and item.level < verdict.NOMINAL[replay.dtype.name] - VAGUE:
            case = StageReplay(replay, item.stage, key[1], formats=formats)
            if case.replayable:
                vague[key] = case.exact
    return vague
