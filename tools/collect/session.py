"""What an adapter of an engine is, and running one: a prompt, then tokens one by one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qwen_jax.weights.base import Weights
from tools.collect.options import Options
from tools.collect.recorder import Recorder


@dataclass(frozen=True)
class Calls:
    """The calls that a sequence is computed in: ``steps`` rows of the prompt each, then
    ``generate`` tokens one by one."""

    steps: tuple[int, ...]
    generate: int = 0

    @property
    def length(self) -> int:
        """How many rows there will be."""
        return sum(self.steps) + self.generate

    @property
    def several(self) -> bool:
        return len(self.steps) + self.generate > 1


class Session(ABC):
    """A model that an engine has loaded, ready to compute one sequence. A context manager.

    Attributes:
        dtype: what it computes in; None is what its stages have.
        cache: the format of its key/value cache; None without one.
        own_weights: it multiplies by other values than the model's files have.
        why: stage -> why this engine cannot give it.
    """

    dtype: str | None = None
    cache: str | None = None
    own_weights: bool = False
    why: Mapping[str, str] = {}

    @abstractmethod
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Compute these rows, telling the recorder of the call and of every stage. Returns the
        logits of the last row, [V].

        Raises:
            UserError: the engine refuses.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest says of it: "name", "version", "device", "options" and more."""

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Hugging Face name -> the values that it multiplies by, of every tensor, where it has
        ``own_weights``."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 -- most have nothing to free
        """Free what the engine holds."""

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Adapter(Protocol):
    """A module of ``tools.collect`` that runs one engine. ``Settings`` is what can be set of it."""

    __doc__: str | None
    Settings: type[Options]

    def open(self, model: Weights, settings: Any, recorder: Recorder, calls: Calls) -> Session:
        """Load the model. ``settings`` are ``Settings``.

        Raises:
            UserError: the engine cannot load it, or options that do not go together.
        """


def run(
    session: Session,
    tokens: Sequence[int],
    positions: Sequence[int],
    calls: Calls,
) -> tuple[tuple[int, ...], np.ndarray]:
    """Compute a prompt and what is generated, the likeliest token each time. Returns all tokens
    computed and the logits after the last.

    Raises:
        UserError: the engine refuses.
    """
    done, made = 0, list(tokens)
    logits = np.empty(0)
    for count in calls.steps:
        rows = slice(done, done + count)
        logits = session.step(made[rows], positions[rows])
        done += count
    for place in range(calls.generate):
        made.append(int(np.argmax(logits)))
        logits = session.step(made[-1:], [positions[-1] + 1 + place])
    return tuple(made), logits
