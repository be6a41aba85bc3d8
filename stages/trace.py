"""A trace: the stages of one sequence of tokens, in a directory or in memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.architecture import Architecture, Key
from stages.architectures import ARCHITECTURES
from stages.files import new_entry, read_file
from stages.manifest import Changed, FileEntry, Manifest


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a foreign trace does not say of itself and the user must: the model and the tokens.

    Attributes:
        config: the model's configuration as plain data (``Config.to_json``).
        dims: axis letter -> size, T among them.
        tokens, positions: one each.
    """

    config: dict[str, Any]
    dims: Mapping[str, int]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]


class Trace:
    """An opened trace. Nothing is read before ``read``.

    Attributes:
        path: its directory; of a trace in memory, its name.
        manifest: None for a foreign trace and one in memory.
        entries: (stage, layer) -> FileEntry, in computation order.
        config: the model's configuration as plain data.
        tokens, positions: of the manifest, or as the user gave them.
        steps: how many rows each call of the engine computed.
        changed: rows of the key/value cache that a later call read otherwise.
        dtype: the model's dtype; None where a foreign trace does not say.
        arch: the architecture.
    """

    def __init__(
        self,
        path: Path,
        found: Manifest | None,
        entries: Mapping[Key, FileEntry],
        config: dict[str, Any],
        tokens: tuple[int, ...],
        positions: tuple[int, ...],
    ) -> None:
        self.path = path
        self.manifest = found
        self.config = config
        self.tokens = tokens
        self.positions = positions
        self.dtype: str | None = found.dtype if found else None
        self.steps: tuple[int, ...] = found.steps if found else (len(tokens),)
        # Without cache stages in the trace, attention is replayed from what went into the cache.
        arch = ARCHITECTURES[config["architecture"]]
        self.arch: Architecture = arch.with_cache({stage for stage, _ in entries})
        names = self.arch.names
        order = sorted(
            entries, key=lambda key: (math.inf if key[1] is None else key[1], names.index(key[0]))
        )
        self.entries: dict[Key, FileEntry] = {key: entries[key] for key in order}

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def changed(self) -> tuple[Changed, ...]:
        return (self.manifest and self.manifest.changed) or ()

    def step_of(self, row: int) -> int:
        """The call of the engine, from 0, that computed a row."""
        return int(np.searchsorted(np.cumsum(self.steps), row, "right"))

    def rows_of(self, stage: str, layer: int | None) -> int:
        """How many rows, the last ones of the sequence, are held of a stage."""
        entry = self.entries[stage, layer]
        axis = self.arch.stage[stage].row_axis
        return entry.shape[entry.axes.index(axis)] if axis in entry.axes else 1

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        """One stage in the shape of its entry; float32 from APRT, else its own dtype.

        Raises:
            KeyError: the trace has no such stage.
            UserError: the file is missing, damaged, or not what the manifest says.
        """
        return read_file(self.path, self.entries[stage, layer])

    def read_rows(self, stage: str, layer: int | None) -> np.ndarray:
        """One stage in all of its axes: with a T axis, though it may be of one row."""
        value, found = self.read(stage, layer), self.arch.stage[stage]
        if value.ndim == len(found.axes):
            return value
        return np.expand_dims(value, found.positions_at)

    def to_json(self) -> dict[str, Any]:
        """Its model, tokens and stages as plain data, without values."""
        return {
            "name": str(self.path),
            "architecture": self.arch.name,
            "dtype": self.dtype,
            "tokens": list(self.tokens),
            "positions": list(self.positions),
            "stages": [
                {"stage": stage, "layer": layer, "shape": list(entry.shape), "dtype": entry.dtype}
                for (stage, layer), entry in self.entries.items()
            ],
        }

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.path}: {self.arch.name}, {self.dtype or 'foreign'}, "
            f"{len(self.tokens)} tokens, {len(self.entries)} stages>"
        )


class MemoryTrace(Trace):
    """A trace that never was on disk; everything that works on a ``Trace`` works on it.

    Arguments:
        values: {(stage, layer): array in the stage's axes}, without a batch axis.
            ``lm_head`` may lack its T axis.
        positions: None is from 0 on.
        steps: None is one call.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        tokens: tuple[int, ...],
        dtype: str,
        values: Mapping[Key, np.ndarray],
        positions: tuple[int, ...] | None = None,
        steps: tuple[int, ...] | None = None,
    ) -> None:
        arch = ARCHITECTURES[config["architecture"]].cached
        entries = {
            (stage, layer): new_entry(arch.stage[stage], layer, value.shape, len(tokens))
            for (stage, layer), value in values.items()
        }
        given = tuple(range(len(tokens))) if positions is None else positions
        super().__init__(Path(name), None, entries, config, tokens, given)
        self.dtype = dtype
        self.steps = steps or self.steps
        self.values = values

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        return self.values[stage, layer]
