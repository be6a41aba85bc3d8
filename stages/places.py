"""Which stage a module's input or output is, derived from the architecture.

For engines whose modules have Hugging Face's names: a stage with a parameter is the output of the
module that holds it, the activation that of the module of its name, the layer's output that of the
layer. A stage without a parameter is what such a module reads, if nothing else is.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from stages.architecture import ACTIVATION, Architecture, Stage

ACTIVATION_MODULE = "mlp.act_fn"
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)(?:\.(.+))?")


class Place(NamedTuple):
    """What a module's input or output is: a stage or, of several side by side, one ``part``."""

    stage: str
    layer: int | None
    part: str = ""


def place(arch: Architecture, path: str, side: str) -> Place | None:
    """What the input ("in") or output ("out") of the module at a Hugging Face path is; None where
    it is no stage. What stands in front of ``layers.``, or of the last name, does not count."""
    if match := LAYER.fullmatch(path):
        layer, end = int(match[1]), match[2] or ""
        found = _layer_places(arch).get((end, side))
        return found and found._replace(layer=layer)
    return _outer_places(arch).get((path.rpartition(".")[2], side))


@cache
def _layer_places(arch: Architecture) -> dict[tuple[str, str], Place]:
    return {key: found for stage in arch.layer_stages for key, found in _places(arch, stage)}


@cache
def _outer_places(arch: Architecture) -> dict[tuple[str, str], Place]:
    """The places of modules outside the layers, by the last name of their path."""
    return {
        (end.rpartition(".")[2], side): found._replace(layer=stage.layer_of(0))
        for stage in (*arch.start_stages, *arch.end_stages)
        for (end, side), found in _places(arch, stage)
    }


def _places(arch: Architecture, stage: Stage) -> Iterator[tuple[tuple[str, str], Place]]:
    """(module, side) -> what it is, without the layer."""
    modules = [arch.parameter[name].module for name in stage.parameters]
    if stage is arch.layer_output:
        yield ("", "out"), Place(stage.name, None)
    elif stage.kind is ACTIVATION:
        yield (ACTIVATION_MODULE, "out"), Place(stage.name, None)
    elif len(modules) == 1:
        yield (modules[0], "out"), Place(stage.name, None)
    elif modules:  # the last row wins: biased projections give what is after the bias
        for module in modules:
            yield (module, "out"), Place(stage.name, None, module.rpartition(".")[2])
    else:
        for reader in arch.stages:
            if reader.inputs == (stage.name,) and len(reader.parameters) == 1:
                module = arch.parameter[reader.parameters[0]].module
                yield (module, "in"), Place(stage.name, None)


def modules(arch: Architecture, stage: Stage, layer: int | None) -> list[tuple[str, str]]:
    """The Hugging Face path and side of the modules that a stage is found at, in order; empty
    where it is the value of none."""
    found = []
    for (end, side), _ in _places(arch, stage):
        path = f"model.layers.{layer}.{end}".rstrip(".") if stage.scope == "layer" else end
        found.append((path, side))
    return found


def parts(arch: Architecture, stage: str) -> dict[str, str]:
    """The last names of the modules whose values stand side by side in a stage, in order, with the
    axis of each; empty where it is the value of one module, or of none."""
    if stage not in arch.stage:
        return {}
    parameters = [arch.parameter[name] for name in arch.stage[stage].parameters]
    found = {p.module.rpartition(".")[2]: p.axes[0] for p in parameters}
    return found if len(parameters) > 1 else {}
