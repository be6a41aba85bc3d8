"""Reading a trace: ours, the oracle's, or a foreign directory of APRT files without manifest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from stages import aprt, manifest
from stages.errors import UserError
from stages.manifest import FileEntry, Manifest
from stages.table import ALIASES, NAMES, STAGE, stage_axes, stage_shape
from stages.writer import tensor_hash


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a foreign trace does not say of itself and the user must: the model and the tokens.

    Attributes:
        config: the model's configuration as plain data (``Config.to_json``).
        dims: axis letter -> size, T among them.
        tokens: token ids.
    """

    config: dict[str, Any]
    dims: Mapping[str, int]
    tokens: tuple[int, ...]


class Trace:
    """An opened trace. Nothing is read before ``read``.

    Attributes:
        path: its directory.
        manifest: None for a foreign trace.
        entries: (stage, layer) -> FileEntry, in computation order.
        config, tokens: of the manifest, or as the user gave them.
        dtype: the model's dtype; None where a foreign trace does not say.
    """

    def __init__(
        self,
        path: Path,
        found: Manifest | None,
        entries: Mapping[tuple[str, int | None], FileEntry],
        config: dict[str, Any],
        tokens: tuple[int, ...],
    ) -> None:
        self.path = path
        self.manifest = found
        self.config = config
        self.tokens = tokens
        self.dtype = found.dtype if found else None
        order = sorted(entries, key=lambda key: _place(*key))
        self.entries = {key: entries[key] for key in order}

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def read(self, stage: str, layer: int | None) -> np.ndarray:
        """One stage in the shape of its entry; float32 from APRT, else its own dtype.

        Raises:
            UserError: the file is missing, damaged, or not what the manifest says.
        """
        entry = self.entries[stage, layer]
        path = self.path / entry.path
        if path.suffix == ".safetensors":
            array = _read_safetensors(path, entry)
        else:
            array = aprt.read(path, layer)
        if array.size != math.prod(entry.shape):
            raise UserError(
                f"{path}: {array.size} values, but {' x '.join(entry.axes)} is "
                f"{' x '.join(map(str, entry.shape))}"
                + ("" if self.manifest else f"; are its {len(self.tokens)} --tokens right?")
            )
        if entry.xxh3 and tensor_hash(array) != entry.xxh3:
            raise UserError(f"{path}: content does not match the manifest; the file was changed")
        return array.reshape(entry.shape)


def _place(stage: str, layer: int | None) -> tuple[float, int]:
    """Sort key: computation order over a whole model."""
    return (float("inf") if layer is None else layer, NAMES.index(stage))


def _read_safetensors(path: Path, entry: FileEntry) -> np.ndarray:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            array = file.get_tensor(entry.stage)
    except (OSError, safetensors.SafetensorError, AttributeError) as error:  # the last: float8
        raise UserError(
            f"{path}: not a whole safetensors file with {entry.stage!r}: {error}"
        ) from None
    if (array.dtype.name, array.shape) != (entry.dtype, entry.shape):
        raise UserError(
            f"{path}: holds {array.dtype} {list(array.shape)}, but the manifest says "
            f"{entry.dtype} {list(entry.shape)}"
        )
    return array


def open_trace(path: Path, layout: Layout | None = None) -> Trace:
    """Open a trace directory. ``layout`` is needed, and used, only without a manifest.

    Raises:
        UserError: no such directory, an unfinished trace, or nothing that is a trace.
    """
    if not path.is_dir():
        raise UserError(f"no such trace directory: {path}")
    if (path / manifest.PARTIAL).exists():
        raise UserError(
            f"{path}: an interrupted trace ({manifest.PARTIAL} is there); the command that began "
            "it goes on with --resume"
        )
    if (path / manifest.NAME).exists():
        found = manifest.read(path)
        entries = {(entry.stage, entry.layer): entry for entry in found.files}
        if absent := [e.path for e in found.files if not (path / e.path).is_file()]:
            raise UserError(
                f"{path}: {absent[0]} is in {manifest.NAME} but not there ({len(absent)} of "
                f"{len(entries)} files); copy the whole directory or trace again"
            )
        vocabulary = found.model["config"].get("vocab_size")
        if vocabulary and not all(0 <= token < vocabulary for token in found.tokens):
            raise UserError(f"{path}: {manifest.NAME} has token ids outside the vocabulary")
        return Trace(path, found, entries, found.model["config"], found.tokens)
    files = _foreign_files(path)
    if not files:
        raise UserError(
            f"{path}: no trace: neither {manifest.NAME} nor layer-<N>/<stage>.bin files"
        )
    if layout is None:
        raise UserError(
            f"{path}: has no {manifest.NAME}, so its axes are unknown; "
            "add --model and --tokens (or --prompt)"
        )
    entries = {key: _foreign_entry(path, file, *key, layout) for key, file in files.items()}
    return Trace(path, None, entries, dict(layout.config), layout.tokens)


def _foreign_files(path: Path) -> dict[tuple[str, int | None], Path]:
    """(stage, layer) -> file. Files under other names are no stages of ours and are passed over."""
    files: dict[tuple[str, int | None], Path] = {}
    for file in sorted([*path.glob("*.bin"), *path.glob("layer-*/*.bin")]):
        stage = ALIASES.get(file.stem, file.stem)
        number = file.parent.name.removeprefix("layer-") if file.parent != path else None
        named = stage in STAGE and (number is None or number.isdecimal())
        if not named or not file.is_file():
            continue
        layer = None if number is None else int(number)
        if (stage, layer) in files:
            raise UserError(f"{path}: {stage} of layer {layer} is there twice, also as {file.name}")
        files[stage, layer] = file
    return files


def _foreign_entry(
    path: Path, file: Path, stage: str, layer: int | None, layout: Layout
) -> FileEntry:
    row = STAGE[stage]
    if (layer is None) != (row.scope == "end"):
        where = "beside the layer directories" if row.scope == "end" else "in a layer directory"
        raise UserError(f"{file}: {stage} belongs {where}")
    if layer is not None and layer >= layout.config["num_hidden_layers"]:
        raise UserError(
            f"{file}: the model has {layout.config['num_hidden_layers']} layers; "
            "is --model the model of this trace?"
        )
    values = (file.stat().st_size - aprt.HEADER.size) // 4
    # Only lm_head comes in two shapes: of the last position, or of all.
    logits = "last" if values == layout.dims["V"] else "all"
    return FileEntry(
        path=str(file.relative_to(path)),
        stage=stage,
        layer=layer,
        axes=stage_axes(row, logits),
        shape=stage_shape(row, layout.dims, logits),
        dtype="float32",
        xxh3="",
    )


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a dtype name of a manifest, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def coarsest_dtype(values: np.ndarray) -> str:
    """The name of the coarsest float dtype that holds all of these values exactly."""
    values = values[np.isfinite(values)]
    for name in ("bfloat16", "float16"):
        with np.errstate(over="ignore", invalid="ignore"):
            back = values.astype(numpy_dtype(name)).astype(values.dtype)
        if values.size and np.array_equal(back, values):
            return name
    return "float32" if values.dtype.itemsize <= 4 else "float64"
