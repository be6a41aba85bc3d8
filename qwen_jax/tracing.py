"""Tracing a model: what is asked for, checked; into memory, or to disk in bounded memory.

Imports neither jax nor torch: any engine with the interface of ``engine.JaxEngine`` may compute,
and bad input is refused before one is loaded.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from qwen_jax.weights.base import Weights
from stages import aprt, resume
from stages.architecture import Key
from stages.errors import UserError
from stages.manifest import (
    DTYPES,
    FORMATS,
    LOGITS,
    DType,
    FileEntry,
    Format,
    Logits,
    Manifest,
    Model,
    check_positions,
)
from stages.selection import parse_layers, parse_stages
from stages.trace import MemoryTrace, Trace, numpy_dtype, open_trace
from stages.writer import Planned, TraceWriter, replaceable

Emit = Callable[[str, int | None, np.ndarray], None]


class Engine(Protocol):
    """What computes a trace: ``engine.JaxEngine``, or the oracle's ``TorchEngine``."""

    def describe(self) -> dict[str, Any]: ...

    def run(
        self,
        tokens: tuple[int, ...],
        positions: tuple[int, ...],
        logits: str,
        want: Callable[[str, int | None], bool],
        emit: Emit,
        resume: tuple[int, np.ndarray] | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What is to be traced, checked by ``make_plan``.

    Attributes:
        positions: one for each token.
        format: of the files.
        stored: (stage, layer) of everything asked for, in computation order.
    """

    model: Weights
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    stages: tuple[str, ...]
    layers: tuple[int, ...]
    dtype: str
    format: str
    logits: str
    stored: tuple[Key, ...]

    def want(self, stage: str, layer: int | None) -> bool:
        return stage in self.stages and (layer is None or layer in self.layers)

    def shape(self, stage: str) -> tuple[int, ...]:
        config = self.model.config
        return config.tables.stage[stage].shape(config.dims(len(self.tokens)), self.logits)

    @property
    def planned(self) -> Planned:
        return {key: (self.shape(key[0]), self.dtype) for key in self.stored}

    def bytes(self, stage: str) -> int:
        """Tensor bytes of this stage, of one layer."""
        item = 4 if self.format == "aprt" else numpy_dtype(self.dtype).itemsize
        return item * math.prod(self.shape(stage))

    @property
    def total(self) -> int:
        """Tensor bytes of all stages."""
        return sum(self.bytes(stage) for stage, _ in self.stored)

    def header(self, producer: dict[str, Any]) -> Manifest:
        """The manifest, but for files and weights."""
        config = self.model.config
        return Manifest(
            architecture=config.architecture,
            format=cast(Format, self.format),
            dtype=cast(DType, self.dtype),
            logits=cast(Logits, self.logits),
            tokens=self.tokens,
            positions=self.positions,
            steps=(len(self.tokens),),
            model=Model(name=self.model.name, config=config.to_json(), weights={}),
            producer=producer,
            files=(),
        )


def make_plan(
    model: Weights,
    tokens: tuple[int, ...],
    positions: tuple[int, ...] | None = None,
    *,
    stages: str = "all",
    layers: str = "all",
    dtype: str = "float32",
    format: str | None = None,
    logits: str = "last",
) -> Plan:
    """Check what is asked for against the model.

    Raises:
        UserError: anything that cannot be done as asked.
    """
    for name, value, valid in (
        ("dtype", dtype, DTYPES),
        ("format", format, (None, *FORMATS)),
        ("logits", logits, LOGITS),
    ):
        if value not in valid:
            known = ", ".join(each for each in valid if each)
            raise UserError(f"no {name} {value!r}; choose one of {known}")
    config = model.config
    names = parse_stages(stages, config.tables)
    numbers = parse_layers(layers, config.num_hidden_layers)
    format = format or ("safetensors" if dtype == "float64" else "aprt")
    stored = tuple(
        (stage.name, layer)
        for stage, layer in config.tables.computation_order(config.num_hidden_layers)
        if stage.name in names and (layer is None or layer in numbers)
    )
    if not stored:
        raise UserError(f"--stages {stages} --layers {layers} select nothing to write")
    if positions is None:
        positions = tuple(range(len(tokens)))
    try:
        check_positions(positions, len(tokens))
    except ValueError as error:
        raise UserError(f"no positions of a trace: {error}") from None
    plan = Plan(
        model=model,
        tokens=tokens,
        positions=positions,
        stages=names,
        layers=numbers,
        dtype=dtype,
        format=format,
        logits=logits,
        stored=stored,
    )
    if format == "aprt":
        for stage, _ in stored:
            aprt.check(dtype, math.prod(plan.shape(stage)))
    return plan


def to_memory(engine: Engine, plan: Plan) -> MemoryTrace:
    """Run the engine and keep what was asked for."""
    values: dict[Key, np.ndarray] = {}

    def emit(stage: str, layer: int | None, value: np.ndarray) -> None:
        if plan.want(stage, layer):
            values[stage, layer] = value

    engine.run(plan.tokens, plan.positions, plan.logits, plan.want, emit)
    made = engine.describe()
    name = f"{made['name']}-{made['backend']}-{plan.model.name}"
    config = plan.model.config.to_json()
    return MemoryTrace(name, config, plan.tokens, plan.dtype, values, plan.positions)


@dataclass(frozen=True)
class Written:
    """A trace on disk.

    Attributes:
        bytes: of all files.
        logits: [V], of the last position, whatever was stored.
    """

    path: Path
    bytes: int
    logits: np.ndarray

    def open(self) -> Trace:
        return open_trace(self.path)


def to_disk(
    engine: Engine,
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    go_on: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    track: Callable[[Sequence[str]], Any] = lambda names: names,
    advance: Callable[[int | None, int], None] = lambda layer, written: None,
) -> Written:
    """Run the engine and write what was asked for, as it comes.

    Arguments:
        overwrite: replace the trace that is in ``out``.
        go_on: go on with the interrupted one that is there.
        tell: gets a line about what is found there.
        track: wraps the weights that are checked again, for a progress bar.
        advance: is called as (layer, bytes written) when a layer begins.

    Raises:
        UserError: ``out`` cannot be used, or a write failed; what is there is then marked as
            incomplete.
    """
    header = plan.header(engine.describe())
    kept, start = _resumed(plan, header, out, tell, track) if go_on else ([], None)
    if go_on:
        check_space(plan, out, kept)
    last: list[np.ndarray] = []
    shown: int | None = -1
    head = plan.model.config.tables.head.name
    with TraceWriter(
        out, header, plan.model.hashes, plan.planned, overwrite or go_on, kept
    ) as writer:

        def emit(stage: str, layer: int | None, value: np.ndarray) -> None:
            nonlocal shown
            if plan.want(stage, layer):
                writer.add(stage, layer, value)
            if stage == head:
                last.append(value if plan.logits == "last" else value[-1])
            writer.note()
            if layer != shown:  # once a layer: it adds up all files
                shown = layer
                advance(layer, writer.bytes)

        engine.run(plan.tokens, plan.positions, plan.logits, plan.want, emit, start)
        writer.finish()
    return Written(path=out, bytes=writer.bytes, logits=last[0])


def check_out(plan: Plan, out: Path, overwrite: bool) -> None:
    """Refuse a directory that a new trace cannot have, before a large model is loaded.

    Raises:
        UserError: it is in use, or the disk is too small.
    """
    replaceable(out, overwrite)
    check_space(plan, out, [])


def _resumed(
    plan: Plan,
    header: Manifest,
    out: Path,
    tell: Callable[[str], None],
    track: Callable[[Sequence[str]], Any],
) -> tuple[list[FileEntry], tuple[int, np.ndarray] | None]:
    """The files of an interrupted trace that stay, and the layer to go on from with its input."""
    found = resume.open_interrupted(out, header, plan.stored)
    if found is None or found.manifest is None:
        return [], None
    layer = resume.first_layer(found, plan.stored)
    config = plan.model.config
    carries = config.tables.layer_output.name
    if layer == 0:
        tell(f"{out}/: no layer is whole with its {carries}, so it starts anew")
        return [], None
    stated = found.manifest.model.weights
    names = [config.tables.table.tensor]
    for number in range(layer):
        names += config.tensor_names("layer", number).values()
    for name in track(names):
        if plan.model.hash(name) != stated.get(name):
            raise UserError(
                f"--resume: {name} of {plan.model.name} is not what {out} was begun with; use "
                "--overwrite to start anew"
            )
    before = found.read(carries, layer - 1).astype(numpy_dtype(plan.dtype))
    kept = [found.entries[s, n] for s, n in plan.stored if n is not None and n < layer]
    tell(f"{out}/: {layer} of {config.num_hidden_layers} layers are there")
    return kept, (layer, before)


def check_space(plan: Plan, out: Path, kept: list[FileEntry]) -> None:
    """Refuse a trace that the disk cannot hold, before anything is computed.

    Raises:
        UserError: too little space, counting what an overwritten trace frees.
    """
    there = out
    while not there.exists():
        there = there.parent
    names = {out / entry.path for entry in kept}
    freed = 0
    if out.is_dir():
        freed = sum(f.stat().st_size for f in out.rglob("*") if f.is_file() and f not in names)
    layers = {(entry.stage, entry.layer) for entry in kept}
    needed = sum(plan.bytes(stage) for stage, n in plan.stored if (stage, n) not in layers)
    free = shutil.disk_usage(there).free
    if needed > free + freed:
        raise UserError(
            f"--out {out}: the trace needs {_size(needed)}, the disk has {_size(free + freed)} "
            "free; choose fewer --stages or --layers, or another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
