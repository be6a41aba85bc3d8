"""``manifest.json``: what a trace directory holds and what it was made from.

It is written last and atomically, so a directory with a manifest is a whole trace. While a trace
is being written, ``manifest.json.partial`` marks the directory as unfinished.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages.errors import UserError
from stages.table import STAGE

SCHEMA = 1
NAME = "manifest.json"
PARTIAL = NAME + ".partial"
KIND = "qwen2-stage-trace"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One stage's file.

    Attributes:
        path: relative to the trace directory, with forward slashes.
        stage, layer: which stage; ``layer`` is None for a whole-model stage.
        axes: letters of the stage table; one per dimension of ``shape``.
        shape: sizes of the axes (one sequence, no batch axis).
        dtype: what the model computed it in. APRT stores it widened to float32.
        xxh3: XXH3-64 of the file's tensor bytes, hexadecimal. Guards against damage.
    """

    path: str
    stage: str
    layer: int | None
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a trace except its values.

    Attributes:
        format: "aprt" or "safetensors".
        dtype: the dtype of the model: float32, bfloat16, float16 or float64.
        logits: "last" or "all" positions in ``lm_head``.
        tokens, positions: token ids and their positions, one each.
        model: {"name", "config", "weights"}; weights maps a tensor's name to its dtype, shape and
            XXH3-64 as it lies in the checkpoint.
        producer: {"name", "backend", "device", "flags", "versions", ...}: what ran, and on what.
        files: in computation order.
    """

    format: str
    dtype: str
    logits: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    model: dict[str, Any]
    producer: dict[str, Any]
    files: tuple[FileEntry, ...] = ()

    def to_bytes(self) -> bytes:
        """The file's content: the same manifest always gives the same bytes."""
        head = {"schema": SCHEMA, "kind": KIND}
        return (json.dumps(head | asdict(self), indent=1) + "\n").encode()


def write(directory: Path, manifest: Manifest, name: str = NAME) -> None:
    """Write atomically: a reader sees the old file, no file or the whole new one."""
    temporary = directory / (name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / name)


def read(directory: Path, name: str = NAME) -> Manifest:
    """Parse and check a manifest.

    Raises:
        UserError: not JSON, another schema, a field missing or of the wrong kind, or a path that
            leaves the directory.
    """
    path = directory / name
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UserError(f"{path}: not the manifest of a stage trace")
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema {data.get('schema')!r}; this version reads schema {SCHEMA}"
        )
    try:
        files = tuple(_entry(directory, entry) for entry in data["files"])
        manifest = Manifest(
            format=str(data["format"]),
            dtype=str(data["dtype"]),
            logits=str(data["logits"]),
            tokens=tuple(int(t) for t in data["tokens"]),
            positions=tuple(int(p) for p in data["positions"]),
            model=dict(data["model"]),
            producer=dict(data["producer"]),
            files=files,
        )
        manifest.model["config"], manifest.model["weights"]  # must be there
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: {type(error).__name__} {error}") from None
    return manifest


def _entry(directory: Path, data: dict[str, Any]) -> FileEntry:
    path = PurePosixPath(data["path"])
    inside = (directory / path).resolve().is_relative_to(directory.resolve())
    if path.is_absolute() or ".." in path.parts or not inside:
        raise UserError(f"{directory / NAME}: path {data['path']!r} leaves the trace directory")
    if data["stage"] not in STAGE:
        raise UserError(f"{directory / NAME}: unknown stage {data['stage']!r}")
    shape = tuple(int(size) for size in data["shape"])
    axes = tuple(str(axis) for axis in data["axes"])
    if len(shape) != len(axes):
        raise ValueError(f"{data['path']}: {len(shape)} sizes for {len(axes)} axes")
    return FileEntry(
        path=str(path),
        stage=data["stage"],
        layer=None if data["layer"] is None else int(data["layer"]),
        axes=axes,
        shape=shape,
        dtype=str(data["dtype"]),
        xxh3=str(data["xxh3"]),
    )
