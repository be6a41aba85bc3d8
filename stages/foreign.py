"""Dumps of other programs: directories without a manifest, of APRT files or one safetensors file.

What they hold is told by names and sizes alone; the rest is the user's word, a ``Layout``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import aprt, manifest, onefile
from stages.architecture import Key, Stage
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.manifest import DType, FileEntry
from stages.trace import Layout, Trace, new_entry


@dataclass(frozen=True, slots=True)
class Found:
    """Values of a stage: a file of their own, or from byte ``start`` of one on."""

    path: Path
    count: int
    dtype: DType = "float32"
    start: int | None = None

    def entry(
        self, root: Path, row: Stage, layer: int | None, shape: tuple[int, ...], length: int
    ) -> FileEntry:
        """As ``trace.new_entry``."""
        path = str(self.path.relative_to(root))
        return new_entry(row, layer, shape, length, path, self.dtype, self.start)


def open_foreign(path: Path, layout: Layout | None) -> Trace:
    """Open a directory without a manifest.

    Raises:
        UserError: nothing in it is a stage, or it does not fit the layout.
    """
    from stages import steps  # which is made of what is in here

    calls = steps.directories(path)
    known = ARCHITECTURES if layout is None else [layout.config["architecture"]]
    if not any(stages_in(each, name) for each in [path, *calls] for name in known):
        if (first := path / "sequence-0").is_dir():
            raise UserError(f"{path}: a batch of traces; give one of them, such as {first}")
        raise UserError(
            f"{path}: no trace: neither {manifest.NAME} nor layer-<N>/<stage>.bin files"
        )
    if layout is None:
        raise UserError(
            f"{path}: has no {manifest.NAME}, so its axes are unknown; "
            "add --model and --tokens (or --prompt)"
        )
    files = stages_in(path, layout.config["architecture"])
    if not calls:
        entries = {key: _entry(path, found, *key, layout) for key, found in files.items()}
        return Trace(path, None, entries, dict(layout.config), layout.tokens, layout.positions)
    if files:
        beside = next(iter(files.values())).path.relative_to(path)
        raise UserError(
            f"{path}: {beside} beside {calls[0].name}/ may be of all calls or of one; take one of "
            "the two away"
        )
    return steps.StepsTrace(path, calls, layout)


def stages_in(path: Path, architecture: str) -> dict[Key, Found]:
    """What a directory holds. Files under other names are no stages of ours and are passed over."""
    arch = ARCHITECTURES[architecture].cached
    files: dict[Key, Found] = {}

    def add(name: str, found: Found) -> None:
        head, _, stage = name.rpartition("/")
        stage = arch.aliases.get(stage, stage)
        number = head.removeprefix("layer-") if head else None
        if stage not in arch.stage or not (number is None or number.isdecimal()):
            return
        layer = None if number is None else int(number)
        if (stage, layer) in files:
            raise UserError(
                f"{path}: {stage} of layer {layer} is there twice, also as {found.path.name}"
            )
        files[stage, layer] = found

    for file in sorted([*path.glob("*.bin"), *path.glob("layer-*/*.bin")]):
        if file.is_file():
            count = max(0, file.stat().st_size - aprt.HEADER.size) // 4
            add(file.relative_to(path).with_suffix("").as_posix(), Found(file, count))
    if (whole := path / onefile.NAME).is_file():
        for name, (dtype, count, start) in onefile.read_layout(whole).items():
            add(name, Found(whole, count, dtype, start))
    return files


def row_of(found: Found, stage: str, layer: int | None, config: Mapping[str, Any]) -> Stage:
    """The row of a stage.

    Raises:
        UserError: it cannot lie there.
    """
    row = ARCHITECTURES[config["architecture"]].cached.stage[stage]
    if (layer is None) != (row.scope == "end"):
        where = "beside the layer directories" if row.scope == "end" else "in a layer directory"
        raise UserError(f"{found.path}: {stage} belongs {where}")
    if layer is not None and layer >= config["num_hidden_layers"]:
        raise UserError(
            f"{found.path}: the model has {config['num_hidden_layers']} layers; "
            "is --model the model of this trace?"
        )
    return row


def may_be_last_rows(layer: int | None, config: Mapping[str, Any]) -> bool:
    """Whether engines may have computed a stage for the last positions only: at the end."""
    return layer is None or layer == config["num_hidden_layers"] - 1


def _entry(root: Path, found: Found, stage: str, layer: int | None, layout: Layout) -> FileEntry:
    row, length = row_of(found, stage, layer, layout.config), layout.dims["T"]
    rows, left = divmod(found.count, math.prod(row.shape(layout.dims, rows=1)))
    few = 1 <= rows < length and may_be_last_rows(layer, layout.config)
    if left or not (rows == length or few):
        whole = " x ".join(map(str, row.shape(layout.dims)))
        raise UserError(
            f"{found.path}: {found.count} values, but {' x '.join(row.axes)} is {whole}; are its "
            f"{length} --tokens right?"
        )
    shape = row.shape(layout.dims, "last" if row.last and rows == 1 else "all", rows)
    return found.entry(root, row, layer, shape, length)
