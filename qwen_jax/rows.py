"""Rows of the sequence that come call by call: few are put together first, as to fetch and to place
one alone takes longer than to compute it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

from qwen_jax.cache import KeyValueCache
from qwen_jax.padded import EmitRows, Want
from stages.architecture import Architecture, Stage

TOGETHER = 32

Layer = int | None
Values = Mapping[str, Any]  # stage -> its value on the device


class Rows:
    """What calls of one length have computed, on the device until there are ``TOGETHER`` rows of
    it; of a longer call, one layer at a time.

    Arguments:
        arch: the architecture, with the cache's stages.
        held: the cache, which knows where a call's scores belong.
        host: fetches a stage's value.
        want, emit: see ``engine.JaxEngine.run_calls``.
    """

    def __init__(
        self,
        arch: Architecture,
        held: KeyValueCache,
        host: Callable[[str, Any], np.ndarray],
        want: Want,
        emit: EmitRows,
    ) -> None:
        self._arch, self._held, self._host = arch, held, host
        self._want, self._emit = want, emit
        self._wanted: dict[Layer, list[Stage]] = {}
        self._first = self._end = self._count = 0
        self._calls: list[list[tuple[Layer, list[Stage], list[Any]]]] = []
        self._logits: list[np.ndarray] = []

    def begin(self, count: int) -> None:
        """A call of ``count`` rows begins."""
        if count != self._count:
            self.flush()
        self._count = count
        self._end += count
        self._calls.append([])

    def take(self, layer: Layer, values: Values) -> None:
        """Keep what the call has computed in a layer."""
        if layer not in self._wanted:
            every = self._arch.stages
            self._wanted[layer] = [s for s in every if self._want(s.name, layer)]
        stages = [s for s in self._wanted[layer] if s.name in values]
        self._calls[-1].append((layer, stages, [values[s.name] for s in stages]))
        if self._count >= TOGETHER:
            self._put()

    def finish(self, logits: np.ndarray | None) -> None:
        """End the call. logits: [B, T, V] of its rows or of the last; None if none are wanted."""
        if logits is not None:
            self._logits.append(logits)
        if self._end - self._first >= TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Emit what is there."""
        self._put()
        if self._logits:
            logits = np.concatenate(self._logits, 1)
            self._emit(self._arch.head.name, None, logits, self._end - logits.shape[1])
        self._first, self._calls, self._logits = self._end, [], []

    def _put(self) -> None:
        for parts in zip(*self._calls, strict=True):
            layer, stages, _ = parts[0]
            along = tuple(1 + stage.positions_at for stage in stages)
            each = [values for *_, values in parts]
            if len(each) > 1 and self._end - self._first >= TOGETHER:
                each = [_joined(along, each)]  # of fewer there are too many lengths for programs
            for stage, axis, values in zip(stages, along, zip(*each, strict=True), strict=True):
                found = np.concatenate([self._host(stage.name, value) for value in values], axis)
                found = self._held.of_calls(stage, layer, found, self._first, self._count)
                self._emit(stage.name, layer, found, self._end - found.shape[axis])
        for call in self._calls:
            call.clear()


@partial(jax.jit, static_argnums=0)
def _joined(along: tuple[int, ...], parts: list[list[jax.Array]]) -> list[jax.Array]:
    """Values of several calls as one each, one after the other along their own axes."""
    each = zip(*parts, strict=True)
    return [lax.concatenate(values, axis) for values, axis in zip(each, along, strict=True)]
