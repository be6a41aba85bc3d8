"""What a known mistake is, and all of them: each room of the grammar enters its own.

A mistake is a function from a StageReplay to what the stage's dump would be if it was made. The
dump is compared with each; what restores its significant bits names the mistake. ``{}`` in what a
mistake says is replaced by the detail of the candidate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jax import Array

from stages.architecture import ADD, LINEAR, NORM, ROTATION, Kind
from stages.architectures import ALL_NAMES, any_stage
from tools.localize.stage_case import StageReplay


class Edit(NamedTuple):
    """What a stage's dump would be, [1, ...] float64, the detail of the mistake, and how many
    numbers in it were fitted to the dump."""

    detail: str
    value: Array
    free: int = 0


Candidates = Iterator[tuple[str, Array] | Edit]
Entry = Callable[[StageReplay], Candidates]

# Findings that are one fault, besides those of one stage:
#   kind   of stages of one kind that mistakes are made in together: all norms, q and k, K and V
#   layer  of any stages of the same layers
#   number of any stages of one kind with the same number, in whichever layers it shows
#   detail of any stages of the same layers with the same detail
#   file   of any stages of any layers: the mistake is one of the file of weights
#   moved  the same as kind; of any stages whose layers have other layers' weights alike
Joined = Literal["kind", "layer", "number", "detail", "file", "moved"]


@dataclass(frozen=True)
class Mistake:
    """One known mistake.

    Attributes:
        name: identifier in ``--json``.
        says: for people.
        stages: where it can be made.
        candidates: what the dump would be.
        room: which word of the grammar it changes: value, entries, weight, constant, ...
        priority: of equally good explanations the lower one wins: 0 has a name of its own, 1 is of
            any stage, 2 is found by matching or search, so that the others are also one of it.
        near: the wrong value can lie so close to the right one that a coarser precision would
            explain the difference.
        dump_only: True if it is a mistake of the dump alone: later stages used the right value.
            False if they used the wrong one. None if it can be either.
        rotated: the candidates are rotated, though the stage is no rotation.
        lenient: it need not bring back everything: a quantiser's ties fall either way, and what
            goes through a cache is off by a format that is not known while attention is wrong.
        fitted: it has a number for every row: it follows the rounding too, and would win by that.
        everywhere: engines make it in all layers: it is looked for where whole layers are missing.
        number: the stage's value with any number in the place of the one that is mistaken, and
            the numbers, rising, from which it is looked for where the stage was not dumped.
        joined: which findings of it are one fault.
        rest: mistakes that are said of another stage of the same layer where it shows the rest.
        together: what is said of it where several stages show it; else what the first one says.
    """

    name: str
    says: str
    stages: tuple[str, ...]
    candidates: Entry
    room: str
    priority: int = 0
    near: bool = False
    dump_only: bool | None = False
    rotated: bool = False
    lenient: bool = False
    fitted: bool = False
    everywhere: bool = False
    number: tuple[Callable[[StageReplay, float], Array], tuple[float, ...]] | None = None
    joined: Joined = "kind"
    rest: tuple[str, ...] = ()
    together: str = ""

    def edits(self, case: StageReplay) -> Iterator[Edit]:
        """What the dump would be, each way that the mistake can be made."""
        return (Edit(*found) for found in self.candidates(case))


CATALOGUE: list[Mistake] = []


def named(name: str) -> Mistake | None:
    """The first mistake of a name; None where it is no mistake's."""
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def _room(function: Callable[..., Any]) -> str:
    return function.__module__.rpartition(".")[2]


def mistake(says: str, stages: str, name: str = "", **more: Any) -> Callable[[Entry], Entry]:
    """Enter the decorated function into the catalogue, under its own name if no other is given.

    ``stages`` are separated by spaces; ``more`` are further fields of the Mistake.
    """

    def enter(candidates: Entry) -> Entry:
        called = name or candidates.__name__
        fields = more if "room" in more else {"room": _room(candidates), **more}
        CATALOGUE.append(Mistake(called, says, tuple(stages.split()), candidates, **fields))
        CATALOGUE.sort(key=lambda entry: entry.priority)  # stable: else as they are entered
        return candidates

    return enter


def simple(
    name: str, says: str, stages: str, candidate: Callable[[StageReplay], Array | None], **more: Any
) -> None:
    """Enter a mistake with one candidate; None where it cannot be made."""

    def candidates(case: StageReplay) -> Candidates:
        value = candidate(case)
        if value is not None:
            yield "", value

    mistake(says, stages, name, **{"room": _room(candidate), **more})(candidates)


# --- where mistakes are made: names of stages of any architecture, separated by spaces


def of_kind(kind: Kind) -> str:
    """The stages of one kind."""
    return " ".join(name for name in ALL_NAMES if any_stage(name).kind is kind)


NORMS = of_kind(NORM)
LINEARS = of_kind(LINEAR)
LAYER_LINEARS = " ".join(n for n in LINEARS.split() if any_stage(n).scope == "layer")
ROPES = of_kind(ROTATION)
BIASES = " ".join(n for n in of_kind(ADD).split() if any_stage(n).parameters)
ALL = " ".join(ALL_NAMES)
WITH_HEADS = " ".join(n for n in ALL_NAMES if any_stage(n).heads({"N": 1, "K": 1, "H": 1}))
HEADS_INSIDE = " ".join(n for n in WITH_HEADS.split() if not any_stage(n).heads_lead)
RESIDUALS = "post_attn_residual post_ffn_residual"
