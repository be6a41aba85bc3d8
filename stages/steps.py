"""A dump that came call by call, ``step-0000/``, ``step-0001/``, …, read as one trace.

Each directory has the rows that one call of the engine computed, in the layout of any dump; of the
cache all rows that the call's attention read. They are put together when a stage is read, so one
stage is in memory at a time.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from stages import verdict
from stages.architecture import Key, Stage
from stages.architectures import ARCHITECTURES
from stages.dump import Found, may_be_last_rows, stage_of, stages_in
from stages.errors import UserError
from stages.files import new_entry, numpy_dtype, read_file
from stages.manifest import Cache, Changed, FileEntry
from stages.rows import put
from stages.trace import Layout, Trace

STEP = re.compile(r"step-([0-9]+)")


class Part(NamedTuple):
    """What one call gave of a stage: its rows before row ``end`` of the sequence, the number of
    rows at the end of the call; of a cache, ``end`` rows or more."""

    call: int
    end: int
    rows: int
    file: FileEntry


def directories(path: Path) -> list[Path]:
    """The directories of the calls, in order; none where a dump did not come call by call.

    Raises:
        UserError: one is missing, or there twice.
    """
    found: dict[int, Path] = {}
    for each in sorted(path.iterdir()):
        if (match := STEP.fullmatch(each.name)) and each.is_dir():
            call = int(match[1])
            if call in found:
                raise UserError(f"{path}: {found[call].name} and {each.name} are the same call")
            found[call] = each
    if absent := [call for call in range(len(found)) if call not in found]:
        raise UserError(
            f"{path}: step-{absent[0]:04} is missing: {len(found)} calls are there, the last is "
            f"{found[max(found)].name}, and they count from 0"
        )
    return [found[call] for call in sorted(found)]


class StepsTrace(Trace):
    """A dump without a manifest whose directory has one directory for each call.

    Raises:
        UserError: the calls do not make one sequence of the layout's tokens, or are not of one
            model.
    """

    def __init__(self, path: Path, calls: Sequence[Path], layout: Layout) -> None:
        self._parts: dict[Key, list[Part]] = {}
        steps: list[int] = []
        for directory in calls:
            files = stages_in(directory, layout.config["architecture"])
            rows = {key: stage_of(file, *key, layout.config) for key, file in files.items()}
            steps.append(_rows_of_call(directory, files, rows, layout))
            for key, file in files.items():
                part = _part(path, file, rows[key], key[1], steps, layout)
                self._parts.setdefault(key, []).append(part)
        length = len(layout.tokens)
        if sum(steps) != length:
            shown = ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")
            raise UserError(
                f"{path}: its {len(steps)} calls computed {sum(steps)} rows ({shown}), but there "
                f"are {length} tokens; give --tokens every one that was computed"
            )
        entries = {}
        for key, parts in self._parts.items():
            there = [part.call for part in parts]  # may begin late, and must go on then
            if there != [*range(there[0], len(calls))]:
                lacks = next(n for n in range(there[0], len(calls)) if n not in there)
                name = key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"
                raise UserError(
                    f"{calls[lacks]}: lacks {name}, which {calls[lacks - 1].name} has; are both "
                    "of one model, and written to the end?"
                )
            entries[key] = self._whole(key, parts, layout)
        config = dict(layout.config)
        super().__init__(path, None, entries, config, layout.tokens, layout.positions)
        self.steps = tuple(steps)

    def _whole(self, key: Key, parts: list[Part], layout: Layout) -> FileEntry:
        """The stage of all calls. A trace's rows are the last ones of its sequence: what a call
        computed for its last row alone begins where no row is missing any more."""
        arch = ARCHITECTURES[layout.config["architecture"]].cached
        stage, length = arch.stage[key[0]], len(layout.tokens)
        if other := next((p for p in parts if p.file.dtype != parts[0].file.dtype), None):
            first = parts[0].file
            raise UserError(
                f"{other.file.path}: is in {other.file.dtype}, but {first.path} in {first.dtype}"
            )
        rows = length
        if stage.row_axis == "T":
            gaps = [i for i, (a, b) in enumerate(pairwise(parts), 1) if a.end != b.end - b.rows]
            del parts[: max(gaps, default=0)]
            rows = sum(part.rows for part in parts)
        shape = stage.shape(layout.dims, "last" if stage.last and rows == 1 else "all", rows)
        return new_entry(stage, key[1], shape, length, dtype=parts[0].file.dtype)

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        """See ``Trace.read``. A row of the cache is as the call that computed it has read it; keys
        that came later are zeros in the scores: no part of the computation."""
        entry, found, done = self.entries[stage, layer], self.arch.stage[stage], 0
        axes, along = found.axes, found.positions_at
        whole = np.zeros(entry.shape, numpy_dtype(entry.dtype))
        out = whole if whole.ndim == len(axes) else np.expand_dims(whole, along)
        for part in self._parts[stage, layer]:
            value = read_file(self.path, part.file)
            if "T" not in axes:
                value = value[done : part.end]
            elif "S" in axes:
                value = value[..., : part.end]
            put(found, out, value, done)
            done += value.shape[along]
        return whole

    @cached_property
    def changed(self) -> tuple[Changed, ...]:
        """Reads every cache of every call, two at a time."""
        caches = [
            (s, n) for s, n in self.entries if n is not None and "T" not in self.arch.stage[s].axes
        ]
        return tuple(each for key in caches for each in self._changed(*key))

    def _changed(self, stage: str, layer: int) -> Iterator[Changed]:
        told: set[int] = set()
        for before, part in pairwise(self._parts[stage, layer]):
            was, now = (read_file(self.path, each.file) for each in (before, part))
            for row, bits in changed_rows(was[: before.end], now[: before.end]):
                if row not in told:
                    cache = cast(Cache, stage[0].upper())
                    yield Changed(layer=layer, cache=cache, row=row, step=part.call, bits=bits)
                told.add(row)


def _rows_of_call(
    directory: Path, files: Mapping[Key, Found], stages: Mapping[Key, Stage], layout: Layout
) -> int:
    """How many rows a call has computed: the most that a stage has.

    Raises:
        UserError: none says it, or they do not agree.
    """
    found: dict[Key, int] = {}
    for key, stage in stages.items():
        if "S" not in stage.axes:
            file, width = files[key], math.prod(stage.shape(layout.dims, rows=1))
            found[key], left = divmod(file.count, width)
            if left or found[key] < 1:
                raise UserError(
                    f"{file.path}: {file.count} values are no rows of {width}; is --model the "
                    "model of this call?"
                )
    if not found:
        raise UserError(
            f"{directory}: nothing in it says how many rows the call computed; dump a stage such "
            "as attn_norm too"
        )
    most = max(found, key=lambda key: found[key])
    for key, rows in found.items():
        if rows < found[most] and not may_be_last_rows(key[1], layout.config):
            raise UserError(
                f"{files[key].path}: has {rows} rows, but {most[0]} of the same call has "
                f"{found[most]}; is --model the model of this call?"
            )
    return found[most]


def _part(
    root: Path,
    found: Found,
    stage: Stage,
    layer: int | None,
    steps: Sequence[int],
    layout: Layout,
) -> Part:
    """A file of the last of the calls that have computed ``steps`` rows each.

    Raises:
        UserError: it lacks keys.
    """
    end = sum(steps)
    dims = {**layout.dims, "T": steps[-1], "S": 1}
    count, left = divmod(found.count, math.prod(stage.shape(dims, rows=1)))
    rows = count
    if "S" in stage.axes:
        rows = steps[-1]
        dims["S"], left = divmod(found.count, math.prod(stage.shape(dims)))
        if left or dims["S"] < end:
            whole = " x ".join(map(str, stage.shape({**dims, "S": end})))
            raise UserError(
                f"{found.path}: {found.count} values, but {' x '.join(stage.axes)} is {whole}: the "
                f"{end} rows that there are by then are all keys"
            )
    shape = stage.shape({**dims, "T": rows})
    entry = found.entry(root, stage, layer, shape, rows)
    return Part(len(steps) - 1, end, rows, entry)


def changed_rows(before: np.ndarray, now: np.ndarray) -> Iterator[tuple[int, float]]:
    """The rows [S, ...] that are not what they were, and the significant bits that are left."""
    same = _row_bytes(before) == _row_bytes(now)
    for row in np.flatnonzero(~same.all(1)).tolist():
        x, y = (np.asarray(each[row], np.float64) for each in (before, now))
        if not np.array_equal(x, y, equal_nan=True):  # -0 is 0
            error, scale = np.square(y - x).sum(), np.square(x).sum()
            yield row, round(float(verdict.bits(error, scale)), 1) if np.isfinite(error) else 0.0


def _row_bytes(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).view(np.uint8).reshape(len(value), -1)
