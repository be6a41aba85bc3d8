"""``manifest.json``: what a trace directory holds and what it was made from.

It is written last and atomically, so a directory with a manifest is a whole trace. While a trace
is being written, ``manifest.json.partial`` marks the directory as unfinished.
"""

import json
import os
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages.errors import UserError
from stages.table import STAGE, stage_axes

SCHEMA = 1
NAME = "manifest.json"
PARTIAL = NAME + ".partial"
KIND = "qwen2-stage-trace"
FORMATS = {"aprt": ".bin", "safetensors": ".safetensors"}
DTYPES = ("float32", "bfloat16", "float16", "float64")


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
    """Write atomically: a reader sees the old file, no file or the whole new one.

    Nothing waits for the disk (fsync): what a machine that dies leaves behind has the wrong hash.
    """
    temporary = directory / (name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(manifest.to_bytes())
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
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UserError(f"{path}: not the manifest of a stage trace")
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema {data.get('schema')!r}; this version reads schema {SCHEMA}"
        )
    try:
        manifest = _parse(directory / name, data)
    except KeyError as error:
        raise UserError(f"{path}: damaged: no {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return manifest


def _parse(path: Path, data: dict[str, Any]) -> Manifest:
    logits, model = _one_of(data["logits"], ("last", "all")), dict(data["model"])
    model |= {part: dict(model[part]) for part in ("config", "weights")}
    manifest = Manifest(
        format=_one_of(data["format"], FORMATS),
        dtype=_one_of(data["dtype"], DTYPES),
        logits=logits,
        tokens=tuple(_whole(token) for token in data["tokens"]),
        positions=tuple(_whole(position) for position in data["positions"]),
        model=model,
        producer=dict(data["producer"]),
        files=tuple(_entry(path, entry, logits) for entry in data["files"]),
    )
    if len(manifest.positions) != len(manifest.tokens):
        raise ValueError(f"{len(manifest.positions)} positions, {len(manifest.tokens)} tokens")
    if len({(entry.stage, entry.layer) for entry in manifest.files}) < len(manifest.files):
        raise ValueError("a stage of a layer is there twice")
    return manifest


def _entry(where: Path, data: dict[str, Any], logits: str) -> FileEntry:
    path, directory = PurePosixPath(data["path"]), where.parent
    inside = Path(os.path.realpath(directory / path)).is_relative_to(os.path.realpath(directory))
    if path.is_absolute() or ".." in path.parts or not inside:
        raise UserError(f"{where}: path {data['path']!r} leaves the trace directory")
    row = STAGE[_one_of(data["stage"], STAGE)]
    layer = None if data["layer"] is None else _whole(data["layer"])
    if row.layer_of(layer) != layer or (layer is None) != (row.scope == "end"):
        raise ValueError(f"{path}: {row.name} of layer {layer}")
    axes = stage_axes(row, logits)
    shape = tuple(_whole(size) for size in data["shape"])
    if data["axes"] != list(axes) or len(shape) != len(axes):
        raise ValueError(f"{path}: axes {data['axes']!r} of shape {shape}; expected {axes}")
    if not re.fullmatch("[0-9a-f]{16}", data["xxh3"]):
        raise ValueError(f"{path}: xxh3 {data['xxh3']!r} is no hash")
    return FileEntry(
        path=str(path),
        stage=row.name,
        layer=layer,
        axes=axes,
        shape=shape,
        dtype=_one_of(data["dtype"], DTYPES),
        xxh3=data["xxh3"],
    )


def _one_of(value: Any, valid: Collection[str]) -> str:
    if value not in valid:
        raise ValueError(f"{value!r} is none of {', '.join(valid)}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value
