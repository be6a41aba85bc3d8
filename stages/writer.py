"""Writing a trace: one file a stage, hashed and written beside the computation, manifest last."""

import os
import queue
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import cast

import ml_dtypes  # noqa: F401 -- teaches NumPy and safetensors bfloat16
import numpy as np
from msgspec.structs import replace
from safetensors.numpy import save as safetensors_bytes

from stages import aprt, manifest
from stages.architecture import Key
from stages.architectures import ALL_NAMES
from stages.errors import UserError
from stages.lock import lock
from stages.manifest import FORMATS, DType, FileEntry, Manifest, Model, WeightEntry
from stages.trace import tensor_hash

THREADS = 2
WAITING = 8  # stages that may wait to be written before the computation has to wait
NOTE_EVERY = 1.0  # seconds between two notes of what is finished, for a process that is killed


def stage_path(stage: str, layer: int | None, format: str) -> str:
    """Where a stage lies in a trace directory: ``layer-3/ffn_up.bin`` or ``lm_head.bin``."""
    file = stage + FORMATS[format]
    return file if layer is None else f"layer-{layer}/{file}"


def encode(
    array: np.ndarray, stage: str, layer: int | None, format: str
) -> tuple[list[bytes | np.ndarray], str]:
    """The chunks of one stage's file, and the XXH3-64 of its tensor bytes."""
    if format == "aprt":
        header, payload = aprt.encode(array, layer)
        return [header, payload], tensor_hash(payload)
    array = np.ascontiguousarray(array)  # safetensors writes a strided array wrongly, silently
    return [safetensors_bytes({stage: array})], tensor_hash(array)


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
    if path.is_dir() and not path.is_symlink():
        return path.name.removeprefix("layer-").isdecimal() and all(
            map(_of_a_stage, path.iterdir())
        )
    names = (manifest.NAME, manifest.PARTIAL, manifest.NAME + ".tmp", manifest.PARTIAL + ".tmp")
    return path.name in names or _of_a_stage(path)


def _of_a_stage(path: Path) -> bool:
    return path.is_file() and path.stem in ALL_NAMES and path.suffix in FORMATS.values()


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
    ``WAITING`` wait at a time. ``finish`` writes the manifest. Without it, or after an error, the
    directory stays marked as unfinished; the mark lists the files that are whole.

    Arguments:
        overwrite: replace the trace that is there.
        header: everything but the files.
        hashes: tensor name -> what is known of it; may still grow: the mark has what is in it then.
        planned: every (stage, layer) that there is to be, for the mark.
        kept: files of an interrupted trace in the same directory that stay, and count as added.

    Raises:
        UserError: the directory cannot be used, or a write failed (a full disk).
    """

    def __init__(
        self,
        directory: Path,
        header: Manifest,
        hashes: Mapping[str, WeightEntry],
        overwrite: bool = False,
        kept: Collection[FileEntry] = (),
        planned: Iterable[Key] = (),
    ) -> None:
        self.directory = directory
        self.header = header
        self.hashes = hashes
        self._sizes = {entry.path: (directory / entry.path).stat().st_size for entry in kept}
        self._entries = {(entry.stage, entry.layer): entry for entry in kept}
        self._planned = tuple(planned)
        self._noted = time.monotonic()
        self._error: Exception | None = None
        self._queue: queue.Queue[tuple[str, int | None, np.ndarray] | None] = queue.Queue(WAITING)
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
                _remove(old, {directory / name for name in (manifest.PARTIAL, *self._sizes)})
            except OSError as error:
                raise UserError(f"--out {directory}: {error.strerror}") from None
            self._held = undo.pop_all()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return sum(self._sizes.values())

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

    def add(self, stage: str, layer: int | None, array: np.ndarray) -> None:
        """Queue one stage of one sequence (no batch axis). ``array`` must not change any more."""
        if self._error:
            raise self._failure()
        self._queue.put((stage, layer, array))

    def note(self) -> None:
        """Have the mark say which files are whole by now, for a process that is killed."""
        if time.monotonic() - self._noted >= NOTE_EVERY:
            self._noted = time.monotonic()
            with suppress(OSError):  # the writing of the stage itself will say so
                self._mark()

    def _mark(self) -> None:
        files = tuple(self._entries.copy().values())  # other threads add to it
        marked = replace(self.header, model=self._model(), files=files, planned=self._planned)
        manifest.write(self.directory, marked, manifest.PARTIAL)

    def _model(self) -> Model:
        return replace(self.header.model, weights=dict(sorted(self.hashes.items())))

    def finish(self, order: Iterable[Key]) -> Manifest:
        """Wait for the files, then write the manifest that makes the directory a trace.

        ``order`` is every (stage, layer) that must have been added, in computation order.
        """
        self._stop()
        if self._error:
            raise self._failure()
        order = tuple(order)
        if missing := [each for each in order if each not in self._entries]:
            raise RuntimeError(f"stages that were never added: {missing[:3]}")
        files = tuple(self._entries[each] for each in order)
        whole = replace(self.header, model=self._model(), files=files)
        try:
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
            if self._error is None:
                try:
                    self._write(*item)
                except Exception as error:  # handed to the thread that adds
                    self._error = error

    def _write(self, stage: str, layer: int | None, array: np.ndarray) -> None:
        relative = stage_path(stage, layer, self.header.format)
        chunks, digest = encode(array, stage, layer, self.header.format)
        path = self.directory / relative
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # whatever stands there, a link too, is not written through
        with open(path, "xb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")  # type: ignore[arg-type]
                while len(view):  # an unbuffered write may be short, 2 GiB at most
                    view = view[file.write(view) :]
            self._sizes[relative] = file.tell()
        row = self.header.tables.stage[stage]
        axes = row.stored_axes(self.header.logits)
        rows = array.shape[axes.index(row.row_axis)] if row.row_axis in axes else None
        self._entries[stage, layer] = FileEntry(
            path=relative,
            stage=stage,
            layer=layer,
            axes=axes,
            shape=array.shape,
            dtype=cast(DType, str(array.dtype)),
            xxh3=digest,
            rows=None if rows == len(self.header.tokens) else rows,
        )
