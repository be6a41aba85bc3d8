"""The architectures that this project knows, by the name that checkpoints give them."""

from itertools import pairwise

from stages.architecture import Architecture, Stage
from stages.errors import UserError
from stages.qwen2 import QWEN2
from stages.qwen3 import QWEN3

ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in (QWEN2, QWEN3)}


def _merged() -> tuple[str, ...]:
    """Every stage of any architecture, with a cache or without, in an order of computation that all
    of them share."""
    order = list(QWEN2.cached.names)
    for each in ARCHITECTURES.values():
        for before, name in pairwise(each.cached.names):
            if name not in order:
                order.insert(order.index(before) + 1, name)
    return tuple(order)


ALL_NAMES = _merged()


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        UserError: none of ours.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"architecture {name!r}; this tool knows {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def any_stage(name: str) -> Stage:
    """The row of a stage of whichever architecture has it first."""
    plain = [*ARCHITECTURES.values()]
    every = [*plain, *(each.cached for each in plain)]
    return next(each.stage[name] for each in every if name in each.stage)
