"""``manifest.json``: what a trace directory holds and what it was made from.

It is written last and atomically, so a directory with a manifest is a whole trace. While a trace
is being written, ``manifest.json.partial`` marks the directory as unfinished.

The classes below are the format: they are what is read, checked, written and published as JSON
Schema (docs/schema/manifest.json). This version writes schema 2 and reads schema 1.
"""

import os
import string
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from stages import disk
from stages.architecture import MOST_LAYERS, SIZES, Architecture, Key, axis_size
from stages.architectures import ARCHITECTURES, architecture
from stages.errors import UserError

SCHEMA = 2
NAME = "manifest.json"
PARTIAL = NAME + ".partial"
KIND = "stage-trace"
FORMATS = {"aprt": ".bin", "safetensors": ".safetensors"}
DTYPES = ("float32", "bfloat16", "float16", "float64")
LOGITS = ("last", "all")
LAST_POSITION = 2**31 - 1

DType = Literal["float32", "bfloat16", "float16", "float64"]
Format = Literal["aprt", "safetensors"]
Logits = Literal["last", "all"]
Cache = Literal["K", "V"]
Whole = Annotated[int, Meta(ge=0, lt=2**31)]
Hash = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]


class FileEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stage's file.

    Attributes:
        path: relative to the trace directory, with forward slashes.
        stage, layer: which stage; ``layer`` is None for a whole-model stage.
        axes: axis letters of the stage; one per dimension of ``shape``.
        shape: sizes of the axes (one sequence, no batch axis).
        dtype: what the model computed it in. APRT stores it widened to float32.
        xxh3: XXH3-64 of the file's tensor bytes, hexadecimal. Guards against damage.
        rows: how many rows it holds, where those are not all: the last ones of the sequence.
        start: where in the file its tensor bytes begin, where the file has other stages too.
    """

    path: str
    stage: str
    layer: Whole | None
    axes: tuple[str, ...]
    shape: tuple[Whole, ...]
    dtype: DType
    xxh3: Hash | Literal[""]
    rows: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    start: Annotated[int, Meta(ge=0, lt=2**62)] | None = None


class WeightEntry(Struct, frozen=True, kw_only=True):
    """One weight tensor as it lies in the checkpoint: its stored dtype, shape and XXH3-64."""

    dtype: str
    shape: tuple[Whole, ...]
    xxh3: Hash


class Changed(Struct, frozen=True, kw_only=True):
    """A row of a key/value cache that a later call read otherwise; it is written once.

    Attributes:
        row: of the sequence.
        step: the first call, from 0, that read it otherwise.
        bits: significant bits that are left of what it was.
    """

    layer: Whole
    cache: Cache
    row: Whole
    step: Whole
    bits: float

    def __str__(self) -> str:
        return (
            f"{self.cache} cache of layer {self.layer}: row {self.row} changed in step {self.step}"
        )


class Batch(Struct, frozen=True, kw_only=True):
    """What a sequence was computed together with: its row in the batch, how many rows that has, and
    by how many tokens this one was padded, on the left; its trace has no row of them."""

    row: Whole
    size: Annotated[int, Meta(ge=1)]
    padding: Whole


class Model(Struct, frozen=True, kw_only=True):
    """What was run: its name, its normalised configuration, and the weight tensors used."""

    name: str
    config: dict[str, Any]
    weights: dict[str, WeightEntry]


class Manifest(Struct, frozen=True, kw_only=True):
    """Everything about a trace except its values.

    Attributes:
        architecture: of ``stages.architectures``.
        format: "aprt" or "safetensors".
        dtype: the dtype of the model.
        logits: "last" or "all" positions in ``lm_head``.
        tokens, positions: token ids and their positions, one each. Positions rise.
        steps: how many rows each call of the engine computed; ``[T]`` where one computed all.
        cache: the format of the key/value cache; None without one.
        changed: rows of the cache that changed, where there are such.
        batch: where several sequences were computed together.
        chat: whether the prompt was rendered by the tokenizer's chat template.
        producer: {"name", "backend", "device", "flags", "versions", ...}: what ran, and on what.
        files: in computation order.
        planned: in an unfinished trace, every (stage, layer) that there is to be.
    """

    architecture: str
    format: Format
    dtype: DType
    logits: Logits
    tokens: tuple[Whole, ...]
    positions: tuple[Whole, ...]
    steps: tuple[Annotated[int, Meta(ge=1)], ...]
    cache: str | None = None
    changed: tuple[Changed, ...] | UnsetType = UNSET
    batch: Batch | UnsetType = UNSET
    chat: Literal[True] | UnsetType = UNSET
    model: Model
    producer: dict[str, Any]
    files: tuple[FileEntry, ...]
    planned: tuple[tuple[str, Whole | None], ...] | UnsetType = UNSET

    @property
    def arch(self) -> Architecture:
        arch = ARCHITECTURES[self.architecture]
        return arch.cached if self.cache else arch

    def to_bytes(self) -> bytes:
        """The file's content: the same manifest always gives the same bytes."""
        head = {"schema": SCHEMA, "kind": KIND}
        whole = msgspec.json.encode(head | msgspec.to_builtins(self))
        return msgspec.json.format(whole, indent=1) + b"\n"


def write(directory: Path, manifest: Manifest, name: str = NAME) -> None:
    """Write atomically: a reader sees the old file, no file or the whole new one.

    Nothing waits for the disk (fsync): what a machine that dies leaves behind has the wrong hash.
    """
    temporary = directory / (name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed; a link is not followed
    with open(temporary, "xb") as file:
        file.write(manifest.to_bytes())
    os.replace(temporary, directory / name)


def read(directory: Path, name: str = NAME) -> Manifest:
    """Parse and check a manifest.

    Raises:
        UserError: not JSON, another schema, a field missing or of the wrong kind, a path that
            leaves the directory, or positions that no sequence has.
    """
    path = directory / name
    data = disk.read_json(path)
    if data.get("kind") not in (KIND, KIND_1):
        raise UserError(f"{path}: not the manifest of a stage trace")
    if data.get("schema") not in (1, SCHEMA):
        raise UserError(
            f"{path}: schema {data.get('schema')!r}; this version reads schemas 1 and {SCHEMA}"
        )
    try:
        if data["schema"] == 1:
            data = _upgraded(data)
        manifest = msgspec.convert(data, Manifest)
        _check(directory, manifest)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error!r}") from None
    except ValueError as error:  # msgspec's kind is one
        raise UserError(f"{path}: damaged: {error}") from None
    return manifest


KIND_1 = "qwen2-stage-trace"  # of schema 1, which had one architecture


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A manifest of schema 1 as one of schema 2."""
    name = "qwen2"
    model = dict(data["model"])
    planned = {"planned": model.pop("planned")} if "planned" in model else {}
    model["config"] = {"architecture": name} | model["config"]
    more = {"architecture": name, "steps": [len(data["tokens"])], "model": model}
    return data | more | planned


def check_positions(positions: Sequence[int], length: int) -> None:
    """One for each of ``length`` tokens, and such as one sequence can have.

    Raises:
        ValueError: they are not.
    """
    if len(positions) != length:
        raise ValueError(f"{len(positions)} positions, {length} tokens")
    if any(after <= before for before, after in pairwise(positions)):
        raise ValueError("positions must rise: a trace is one sequence")
    if positions and not 0 <= positions[0] <= positions[-1] <= LAST_POSITION:
        raise ValueError(f"positions must be 0 to {LAST_POSITION}")


def _check(directory: Path, manifest: Manifest) -> None:
    """What the types do not say.

    Raises:
        UserError: a path that leaves the directory, an unknown architecture.
        ValueError: the rest.
    """
    try:
        arch = architecture(manifest.architecture).cached
    except UserError as error:
        raise UserError(f"{directory / NAME}: {error}") from None
    length = len(manifest.tokens)
    check_positions(manifest.positions, length)
    if sum(manifest.steps) != length:
        raise ValueError(f"steps compute {sum(manifest.steps)} rows, of {length} tokens")
    if manifest.model.config.get("architecture") != manifest.architecture:
        raise ValueError(f"architecture {manifest.architecture!r}, but another in model.config")
    _check_config(manifest.model.config)
    seen: set[Key] = set()
    for entry in manifest.files:
        _check_entry(directory, entry, arch, manifest)
        key = entry.stage, entry.layer
        if key in seen:
            raise ValueError(f"{entry.stage} of layer {entry.layer} is there twice")
        seen.add(key)


def _check_config(config: dict[str, Any]) -> None:
    """What ``stages`` itself reads of a configuration, as far as it is there.

    Raises:
        ValueError: it is of another kind.
    """
    for name in ("num_hidden_layers", *SIZES.values()):
        size = config.get(name, 1)
        if type(size) is not int or not 0 < size < 2**31:
            raise ValueError(f"{name} of model.config is {size!r}, which is no size")
    count = config.get("num_hidden_layers", 0)
    if count > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {count}; at most {MOST_LAYERS} are read")
    window = config.get("sliding_window")
    if not (window is None or (type(window) is int and window > 0)):
        raise ValueError(f"sliding_window of model.config is {window!r}, which is no size")
    layers = config.get("sliding_layers", [False] * count)
    each_layer = isinstance(layers, list) and len(layers) == count
    if not each_layer or not all(isinstance(sliding, bool) for sliding in layers):
        raise ValueError("sliding_layers of model.config is not true or false for each layer")


def _check_entry(directory: Path, entry: FileEntry, arch: Architecture, manifest: Manifest) -> None:
    path = PurePosixPath(entry.path)
    inside = Path(os.path.realpath(directory / path)).is_relative_to(os.path.realpath(directory))
    if path.is_absolute() or ".." in path.parts or not inside:
        raise UserError(f"{directory / NAME}: path {entry.path!r} leaves the trace directory")
    stage = arch.stage.get(entry.stage)
    if stage is None:
        raise ValueError(f"{entry.path}: {entry.stage!r} is no stage of {arch.name}")
    if stage.layer_of(entry.layer) != entry.layer or (entry.layer is None) != (
        stage.scope == "end"
    ):
        raise ValueError(f"{path}: {stage.name} of layer {entry.layer}")
    config = manifest.model.config
    if entry.layer is not None and entry.layer >= config.get("num_hidden_layers", MOST_LAYERS):
        raise ValueError(f"{path}: layer {entry.layer}, of {config['num_hidden_layers']} layers")
    axes = stage.stored_axes(manifest.logits)
    if entry.axes != axes or len(entry.shape) != len(axes):
        raise ValueError(f"{path}: axes {entry.axes} of shape {entry.shape}; expected {axes}")
    held, length = (
        dict(zip(axes, entry.shape, strict=True)).get(stage.row_axis),
        len(manifest.tokens),
    )
    if entry.rows != (None if held == length else held) or (held or 0) > length:
        raise ValueError(f"{path}: {entry.rows} rows of shape {entry.shape}, {length} tokens")
    dims = {letter: config[name] for letter, name in SIZES.items() if name in config}
    dims |= {"T": length, "S": length} | {stage.row_axis: held or length}
    for axis, size in zip(axes, entry.shape, strict=True):
        known = set(axis) & set(string.ascii_uppercase) <= dims.keys()
        if known and size != (expected := axis_size(axis, dims)):
            raise ValueError(f"{path}: shape {entry.shape}, but {axis} is {expected}")
    if manifest.format == "aprt" and entry.dtype == "float64":
        raise ValueError(f"{path}: float64, of which APRT holds none")
    if not entry.xxh3:
        raise ValueError(f"{path}: no hash")
