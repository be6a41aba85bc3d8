"""Writing a trace: stages are hashed and written beside the computation, the manifest last.

APRT has one file a stage; safetensors one file for all, where each stage has its place from the
beginning and its header is written when all are there. So a stage may come whole or row by row.
"""

import math
import os
import queue
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
from msgspec.structs import replace

from stages import aprt, disk, manifest, onefile
from stages.architecture import Key
from stages.architectures import ALL_NAMES
from stages.errors import UserError
from stages.files import numpy_dtype, tensor_hash
from stages.lock import lock
from stages.manifest import FORMATS, DType, FileEntry, Manifest, Model, WeightEntry
from stages.rows import put

Planned = Mapping[Key, tuple[tuple[int, ...], str]]  # what there is to be: its shape and dtype

THREADS = 2
WAITING = 8  # stages that may wait to be written before the computation has to wait,
SMALL = 1 << 25  # or more, of so many bytes in all: those of a decode come all at once
GATHERED = 32  # rows of a decode that are written at once: a row alone takes longer than to compute
NOTE_EVERY = 1.0  # seconds between two notes of what is finished, for a process that is killed


def _lay_out(planned: Planned, header: Manifest) -> dict[Key, FileEntry]:
    """What the manifest will say of each name, but for the hash.

    Raises:
        UserError: APRT cannot hold it.
    """
    entries: dict[Key, FileEntry] = {}
    for (name, layer), (shape, dtype) in planned.items():
        stage = header.arch.stage[name]
        axes = stage.stored_axes(header.logits)
        rows = shape[axes.index(stage.row_axis)] if stage.row_axis in axes else None
        file = name + FORMATS[header.format]
        entries[name, layer] = FileEntry(
            path=file if layer is None else f"layer-{layer}/{file}",
            stage=name,
            layer=layer,
            axes=axes,
            shape=shape,
            dtype=cast(DType, dtype),
            xxh3="",
            rows=None if rows == len(header.tokens) else rows,
        )
        if header.format == "aprt":
            aprt.check(dtype, math.prod(shape))
    return entries


def replaceable(directory: Path, overwrite: bool) -> list[Path]:
    """What a new trace in ``directory`` would replace. Changes nothing.

    Raises:
        UserError: it holds a trace and ``overwrite`` is false, it holds anything else, or it is
            no directory.
    """
    try:
        contents = sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--out {directory}: {error.strerror}") from None
    strangers = [path.name for path in contents if not _of_a_trace(path)]
    if strangers:
        raise UserError(
            f"--out {directory}: holds {strangers[0]!r}, which is no part of a trace; "
            "choose an empty or new directory"
        )
    if contents and not overwrite:
        raise UserError(f"--out {directory}: already holds a trace; add --overwrite to replace it")
    return contents


def _of_a_trace(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name.removeprefix("layer-").isdecimal() and all(
            map(_of_a_stage, path.iterdir())
        )
    names = (manifest.NAME, manifest.PARTIAL, manifest.NAME + ".tmp", manifest.PARTIAL + ".tmp")
    return _of_a_stage(path) or (path.name in (*names, onefile.NAME) and path.is_file())


def _of_a_stage(path: Path) -> bool:
    named = path.stem in ALL_NAMES and path.suffix in FORMATS.values()
    return named and path.is_file() and not path.is_symlink()


def _remove(paths: Iterable[Path], keep: Collection[Path]) -> None:
    for path in paths:
        if path.is_dir():
            _remove(path.iterdir(), keep)
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in keep:
            path.unlink(missing_ok=True)


class TraceWriter:
    """A context manager that turns stages into a trace directory.

    ``add`` may be called with stages in any order, and returns before they are on disk; at most
    ``WAITING``, or ``SMALL`` bytes of them, wait at a time. ``finish`` writes the manifest. Without
    it, or after an error, the directory stays marked as unfinished; the mark lists the stages that
    are whole.

    Arguments:
        overwrite: replace the trace that is there.
        header: everything but the files.
        hashes: tensor name -> what is known of it; may still grow: the mark has what is in it then.
        planned: every (stage, layer) that there is to be, in computation order, with its shape
            (without a batch axis) and dtype.
        kept: stages of an interrupted trace in the same directory that stay, and count as added.

    Raises:
        UserError: the directory cannot be used, or a write failed (a full disk).
    """

    def __init__(
        self,
        directory: Path,
        header: Manifest,
        hashes: Mapping[str, WeightEntry],
        planned: Planned,
        overwrite: bool = False,
        kept: Collection[FileEntry] = (),
    ) -> None:
        self.directory = directory
        self.header = header
        self.hashes = hashes
        self.bytes = 0  # written so far
        self._places = _lay_out(planned, header)
        self._head = b""
        if header.format == "safetensors":
            self._head, starts = onefile.lay_out(self._places.values())
            self._places = {
                key: replace(place, path=onefile.NAME, start=starts[key])
                for key, place in self._places.items()
            }
        self._entries = {(entry.stage, entry.layer): entry for entry in kept}
        for key, entry in self._entries.items():
            if self._places.get(key) != replace(entry, xxh3=""):
                raise UserError(f"--out {directory}: {entry.path} is not laid out as it will be")
            self.bytes += self._size(entry)
        self._made: set[str] = set()  # files
        self._few: dict[Key, list[tuple[np.ndarray, slice]]] = {}  # rows that wait for the next
        self._rows: dict[Key, np.ndarray] = {}  # of a stage that comes in parts: which are there
        self._lock = threading.Lock()
        self._noted = time.monotonic()
        self._error: Exception | None = None
        self._queue: queue.Queue[tuple[Key, np.ndarray, slice | None] | None] = queue.Queue()
        self._room = threading.Condition()
        self._waiting: list[int] = []  # bytes of each stage in the queue
        with ExitStack() as undo:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                busy = f"--out {directory}: another process is writing a trace there"
                undo.callback(os.close, lock(directory, busy))
                old = replaceable(directory, overwrite or bool(kept))
                if kept and not (directory / manifest.PARTIAL).exists():
                    raise UserError(f"--out {directory}: another process has just finished it")
                # The mark comes first: from here on nothing in the directory reads as whole.
                self._mark()
                stays = {manifest.PARTIAL, *(entry.path for entry in kept)}
                _remove(old, {directory / name for name in stays})
                self._file: int | None = None  # that has all stages
                if self._head:
                    self._file = disk.create(directory / onefile.NAME, exists=bool(kept))
                    undo.callback(os.close, self._file)
                    disk.write(self._file, bytes(len(self._head)), 0)
            except OSError as error:
                raise UserError(f"--out {directory}: {error.strerror}") from None
            self._held = undo.pop_all()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        with self._held:
            if (self.directory / manifest.PARTIAL).exists():
                with suppress(OSError):  # a full disk: the mark is an older one
                    self._mark()

    def add(
        self, stage: str, layer: int | None, value: np.ndarray, rows: slice | None = None
    ) -> None:
        """Queue one stage of one sequence (no batch axis). ``value`` must not change any more.

        With ``rows`` the value has these rows of the stage along T (of a cache, along S): a stage
        is whole when all have come. An S axis may be shorter: the keys after it are zeros. Few rows
        wait for those after them, ``GATHERED`` at most.
        """
        if self._error:
            raise self._failure()
        key = stage, layer
        if rows is None or rows.stop - rows.start >= GATHERED or not self._fits(key, value, rows):
            self._hand_over(key, value, rows)  # what does not fit is refused there
            return
        if key in self._few and self._few[key][-1][1].stop != rows.start:
            self._gather(key)
        waiting = self._few.setdefault(key, [])
        waiting.append((value, rows))
        if rows.stop - waiting[0][1].start >= GATHERED:
            self._gather(key)

    def _fits(self, key: Key, value: np.ndarray, rows: slice) -> bool:
        """Whether the value is these rows of the stage as planned."""
        place = self._places[key]
        along = place.axes.index(self.header.arch.stage[place.stage].row_axis)
        planned = [*place.shape]
        planned[along] = rows.stop - rows.start
        if "S" in place.axes[along + 1 :] and value.ndim == len(planned):
            planned[-1] = min(planned[-1], value.shape[-1])
        return (value.shape, str(value.dtype)) == (tuple(planned), place.dtype)

    def _gather(self, key: Key) -> None:
        """Queue the rows of a stage that wait, as one value."""
        waiting = self._few.pop(key)
        stage, (last, end) = self.header.arch.stage[key[0]], waiting[-1]
        first, shape = waiting[0][1].start, [*last.shape]
        shape[stage.positions_at] = end.stop - first
        value = np.zeros(shape, last.dtype)
        for part, rows in waiting:
            put(stage, value, part, rows.start - first)
        self._hand_over(key, value, slice(first, end.stop))

    def _hand_over(self, key: Key, value: np.ndarray, rows: slice | None) -> None:
        def room() -> bool:
            few = len(self._waiting) < WAITING
            return few or sum(self._waiting) + value.nbytes <= SMALL

        with self._room:
            self._room.wait_for(room)
            self._waiting.append(value.nbytes)
        self._queue.put((key, value, rows))

    def note(self) -> None:
        """Have the mark say which files are whole by now, for a process that is killed."""
        if time.monotonic() - self._noted >= NOTE_EVERY:
            self._noted = time.monotonic()
            with suppress(OSError):  # the writing of the stage itself will say so
                self._mark()

    def _mark(self) -> None:
        files = tuple(self._entries.copy().values())  # other threads add to it
        planned = tuple(self._places)
        marked = replace(self.header, model=self._model(), files=files, planned=planned)
        manifest.write(self.directory, marked, manifest.PARTIAL)

    def _model(self) -> Model:
        return replace(self.header.model, weights=dict(sorted(self.hashes.items())))

    def finish(self) -> Manifest:
        """Wait for the stages, then write the manifest that makes the directory a trace.

        Raises:
            RuntimeError: one that was planned was never added, or not all of its rows.
            UserError: a write failed.
        """
        for key in [*self._few]:
            self._gather(key)
        self._stop()
        if self._error:
            raise self._failure()
        if missing := [each for each in self._places if each not in self._entries]:
            raise RuntimeError(f"stages that were never added: {missing[:3]}")
        files = tuple(self._entries[each] for each in self._places)
        whole = replace(self.header, model=self._model(), files=files)
        try:
            if self._file is not None:
                disk.write(self._file, self._head, 0)
                self.bytes += len(self._head)
            manifest.write(self.directory, whole)
            (self.directory / manifest.PARTIAL).unlink()
        except OSError as error:
            self._error = error
            raise self._failure() from None
        return whole

    def _stop(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _failure(self) -> Exception:
        if isinstance(self._error, OSError):
            return UserError(
                f"{self.directory}: writing stopped: {self._error.strerror}; what is there is "
                "marked as incomplete"
            )
        assert self._error is not None
        return self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            with self._room:
                self._waiting.remove(item[1].nbytes)
                self._room.notify()
            if self._error is None:
                try:
                    self._write(*item)
                except Exception as error:  # handed to the thread that adds
                    self._error = error

    def _write(self, key: Key, value: np.ndarray, rows: slice | None) -> None:
        """Write a stage, or some rows of it, to its place."""
        place = self._places[key]
        axes, shape = place.axes, place.shape
        along, expected = 0, shape
        if rows is not None:
            along = axes.index(self.header.arch.stage[place.stage].row_axis)
            expected = (*shape[:along], rows.stop - rows.start, *shape[along + 1 :])
            if "S" in axes[along + 1 :]:
                at = axes.index("S")
                later = np.zeros((*expected[:at], shape[at] - value.shape[at]), value.dtype)
                value = np.concatenate([value, later], at)
        within = rows is None or 0 <= rows.start < rows.stop <= shape[along]
        if not within or (value.shape, str(value.dtype)) != (expected, place.dtype):
            raise RuntimeError(
                f"{key}: {value.dtype} {value.shape}, planned {place.dtype} {expected}"
            )
        alone = self._file is None
        value = aprt.payload(value) if alone else np.ascontiguousarray(value)
        file, start = self._open(place)
        end = start + value.itemsize * math.prod(shape)
        try:
            if rows is None:
                disk.write(file, value, start)
            else:
                first = start + value.itemsize * rows.start * math.prod(shape[along + 1 :])
                step = value.itemsize * math.prod(shape[along:])
                for part in value.reshape(math.prod(shape[:along]), -1):
                    disk.write(file, part, first)
                    first += step
        finally:
            if alone:
                os.close(file)
        with self._lock:
            self.bytes += value.nbytes
            if rows is not None:
                there = self._rows.setdefault(key, np.zeros(shape[along], bool))
                there[rows] = True
                if not there.all():
                    return
        if rows is not None:
            value = disk.mapped(self.directory / place.path)[start:end]
        self._entries[key] = replace(place, xxh3=tensor_hash(value))

    def _size(self, place: FileEntry) -> int:
        """Bytes of a stage on disk."""
        count = math.prod(place.shape)
        if self.header.format == "aprt":
            return aprt.HEADER.size + 4 * count
        return numpy_dtype(place.dtype).itemsize * count

    def _open(self, place: FileEntry) -> tuple[int, int]:
        """The file of a stage, and where in it its values begin."""
        if self._file is not None and place.start is not None:
            return self._file, place.start
        path = self.directory / place.path
        with self._lock:
            if place.path in self._made:
                return os.open(path, os.O_WRONLY | os.O_NOFOLLOW), aprt.HEADER.size
            path.parent.mkdir(exist_ok=True)
            file = disk.create(path)
            self._made.add(place.path)
            disk.write(file, aprt.header(place.layer, math.prod(place.shape)), 0)
            self.bytes += aprt.HEADER.size
        return file, aprt.HEADER.size
