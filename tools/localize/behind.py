"""Mistakes of stages that were not dumped, seen in the next one that was.

A fused kernel shows what it makes of its inputs, an engine that shows its logits alone what all of
it makes of the tokens. The mistake is made in the missing stages, and everything up to the dump is
computed from that.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice

import numpy as np
from jax import Array

from stages.architecture import Key
from tools.localize.mistakes import CATALOGUE, Edit, Mistake
from tools.localize.mistakes.solving import nearest, round_numbers
from tools.localize.stage_case import NotDumped, StageReplay

PLACES = 6  # ways of making one mistake that are tried
MOST = 1000  # ways in all, within a layer
# Products that may be computed for the mistakes of whole layers: a few minutes' worth.
AFFORDED = 3e11


def edits(case: StageReplay, segment: Sequence[Key]) -> Iterator[tuple[Mistake, Edit, str]]:
    """What a stage's dump would be if a mistake was made in the missing stages before it: in all
    that it can be made in, or in one; and a sentence. Through layers only what engines get wrong in
    all of them."""
    missing = [*dict.fromkeys(name for name, _ in segment)]
    layers = {layer for _, layer in segment} - {None}
    far = len(layers) > 1
    left = count(int(AFFORDED / _products(case, len(layers))) if far else MOST, -1)
    chosen = []
    for entry in CATALOGUE:
        if entry.priority == 1 or entry.dump_only or (far and not entry.everywhere):
            continue  # of any stage, a matter of the dump, or too much to try
        here = [name for name in missing if name in entry.stages]
        alone = [[name] for name in here] if len(here) > 1 and not far else []
        chosen += [(entry, names) for names in ([here] if here else []) + alone]
    for entry, names in chosen:
        for place in range(PLACES):
            made = _made(case, names, partial(_of_place, entry, place)) if next(left) > 0 else None
            if made is None:
                break
            yield entry, made, _says(entry, made, names)
    for entry, names in chosen:
        if entry.number is not None:
            for edit in _solved(case, entry.number, names, left):
                yield entry, edit, _says(entry, edit, names)


def _says(entry: Mistake, edit: Edit, names: Sequence[str]) -> str:
    says = entry.together if entry.together and len(names) > 1 else entry.says
    return f"{says.replace('{}', edit.detail)}, at {', '.join(names)}"


def _products(case: StageReplay, layers: int) -> float:
    config = case.config
    width = config.num_attention_heads + 2 * config.num_key_value_heads
    weights = 2 * config.head_dim * width + 3 * config.intermediate_size
    return float(layers * config.hidden_size * weights * len(case.replay.trace.tokens))


def _of_place(entry: Mistake, place: int, missing: StageReplay) -> Edit | None:
    return next(islice(entry.edits(missing), place, None), None)


def _made(
    case: StageReplay, names: Sequence[str], edit: Callable[[StageReplay], Edit | None]
) -> Edit | None:
    """The dump if missing stages are what ``edit`` makes of them; None where it makes nothing, or
    what it makes can be told from a dump alone."""
    told: list[Edit] = []
    asked: set[Key] = set()

    def wrong(missing: StageReplay) -> Array:
        if missing.key in asked:  # by itself: it is told from what comes after it
            raise NotDumped(missing.stage.name)
        asked.add(missing.key)
        found = edit(missing)
        if found is None or found.value.shape != missing.exact.shape:
            return missing.exact
        told.append(found)
        return found.value

    try:
        value = case.edited(dict.fromkeys(names, wrong)).exact
    except NotDumped:
        return None
    return told[0]._replace(value=value) if told else None


def _solved(
    case: StageReplay,
    number: tuple[Callable[[StageReplay, float], Array], tuple[float, ...]],
    names: Sequence[str],
    left: Iterator[int],
) -> Iterator[Edit]:
    """The same of a constant that is solved for, through everything up to the dump."""
    made, tried = number
    keep = np.asarray(case.finite)

    def with_number(found: float) -> Edit | None:
        if next(left) <= 0:
            return None
        return _made(case, names, lambda missing: Edit(f"{found:.6g}", made(missing, found)))

    def value(found: float) -> np.ndarray | None:
        edit = with_number(found)
        return None if edit is None else np.where(keep, np.asarray(edit.value), 0.0)

    best = nearest(value, np.where(keep, np.asarray(case.dump), 0.0), tried)
    for found, free in round_numbers(best, 3) if best is not None else ():
        if (edit := with_number(found)) is not None:
            yield edit._replace(free=free)
