"""Dumps of other programs: what lies in a directory of APRT files or one safetensors file without
a manifest, told by names and sizes alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import aprt, onefile
from stages.architecture import Key, Stage
from stages.architectures import ARCHITECTURES
from stages.errors import UserError
from stages.files import new_entry
from stages.manifest import DType, FileEntry


@dataclass(frozen=True, slots=True)
class Found:
    """Values of a stage: a file of their own, or from byte ``start`` of one on."""

    path: Path
    count: int
    dtype: DType = "float32"
    start: int | None = None

    def entry(
        self, root: Path, stage: Stage, layer: int | None, shape: tuple[int, ...], length: int
    ) -> FileEntry:
        """What a manifest would say of it, see ``files.new_entry``."""
        path = str(self.path.relative_to(root))
        return new_entry(stage, layer, shape, length, path, self.dtype, self.start)


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


def stage_of(found: Found, name: str, layer: int | None, config: Mapping[str, Any]) -> Stage:
    """The stage of this name.

    Raises:
        UserError: it cannot lie there.
    """
    stage = ARCHITECTURES[config["architecture"]].cached.stage[name]
    if (layer is None) != (stage.scope == "end"):
        where = "beside the layer directories" if stage.scope == "end" else "in a layer directory"
        raise UserError(f"{found.path}: {name} belongs {where}")
    if layer is not None and layer >= config["num_hidden_layers"]:
        raise UserError(
            f"{found.path}: the model has {config['num_hidden_layers']} layers; "
            "is --model the model of this trace?"
        )
    return stage


def may_be_last_rows(layer: int | None, config: Mapping[str, Any]) -> bool:
    """Whether engines may have computed a stage for the last positions only: at the end."""
    return layer is None or layer == config["num_hidden_layers"] - 1
