"""Of which token ``localize`` says what error costs it."""

import math
from dataclasses import dataclass

from qwen_jax.config import Config

HOW = ("checked", "shares", "none")
# ``work`` up to which a command does as much by itself, a minute of two cores each.
CHECKED, SHARES = 2e11, 1e12


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a trace.

    Attributes:
        row: of the sequence, the one after which the token comes; None is the last one, and
            negative ones count from the end.
        token: None is the one that the trace puts first.
        against: its rival; None is the one that exact arithmetic puts first, if that is known and
            another, else the best of the others.
        checked: compute what exact arithmetic has, and try the largest shares.
        of_clean: ask also where every stage has the bits of float32: the answer takes longer than
            finding that out, and is some hundred-thousandths of a nat.
    """

    row: int | None = None
    token: int | None = None
    against: int | None = None
    checked: bool = True
    of_clean: bool = True


def work(config: Config, length: int) -> int:
    """The multiplications of weights with rows in all layers."""
    shapes = [config.shapes[name] for name in config.tensor_names("layer", 0).values()]
    return length * config.num_hidden_layers * sum(math.prod(shape) for shape in shapes)


def affordable(config: Config, length: int) -> str:
    """Which of ``HOW`` takes no longer than about a minute."""
    asked = work(config, length)
    return "checked" if asked <= CHECKED else "shares" if asked <= SHARES else "none"


def usual(config: Config, length: int) -> Question | None:
    """What a command asks by itself."""
    how = affordable(config, length)
    return None if how == "none" else Question(checked=how == "checked", of_clean=False)
