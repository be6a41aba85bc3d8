"""Tracing a model: what is asked for, checked; into memory, or to disk in bounded memory.

Imports neither jax nor torch: any engine with the interface of ``engine.JaxEngine`` may compute,
and bad input is refused before one is loaded.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import numpy as np
from msgspec import UNSET

from qwen_jax.config import Config
from qwen_jax.padded import Emit, EmitRows, Padded, Resume, Want
from qwen_jax.weights.base import Weights
from stages import aprt, resume
from stages.architecture import Architecture, Key
from stages.errors import UserError
from stages.files import numpy_dtype
from stages.manifest import (
    DTYPES,
    FORMATS,
    LOGITS,
    Batch,
    DType,
    FileEntry,
    Format,
    Logits,
    Manifest,
    Model,
    check_positions,
)
from stages.numbers import OFFERED_CACHES
from stages.open import open_trace
from stages.rows import put
from stages.selection import parse_layers, parse_stages
from stages.trace import MemoryTrace, Trace
from stages.writer import Planned, TraceWriter, replaceable


class Engine(Protocol):
    """What computes a trace: ``engine.JaxEngine``, or the oracle's ``TorchEngine``."""

    def describe(self) -> dict[str, Any]: ...

    def run(
        self,
        tokens: tuple[int, ...],
        positions: tuple[int, ...],
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None: ...

    def run_batch(
        self,
        batch: Padded,
        logits: str,
        want: Want,
        emit: Emit,
        resume: Resume = None,
    ) -> None: ...

    def run_calls(
        self,
        batch: Padded,
        steps: tuple[int, ...],
        cache: str,
        logits: str,
        want: Want,
        emit: EmitRows,
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class Plan:
    """What is to be traced, checked by ``make_plan``.

    Attributes:
        tokens: the prompt.
        positions: one for each row: of the prompt, and of all generated tokens but the last.
        steps: how many rows each call computes.
        generate: how many tokens are picked, the one after the last row among them; None where
            that was not asked for.
        cache: the format of the key/value cache; None is without one, in one call.
        format: of the files.
        stored: (stage, layer) of everything asked for, in computation order.
        batch: its place in a batch, of ``make_batch``.
        chat: whether the tokenizer's chat template made the prompt.
    """

    model: Weights
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    steps: tuple[int, ...]
    generate: int | None
    cache: str | None
    stages: tuple[str, ...]
    layers: tuple[int, ...]
    dtype: str
    format: str
    logits: str
    stored: tuple[Key, ...]
    batch: Batch | None = None
    chat: bool = False

    def want(self, stage: str, layer: int | None) -> bool:
        return stage in self.stages and (layer is None or layer in self.layers)

    @property
    def arch(self) -> Architecture:
        """With the cache's stages where there is one."""
        arch = self.model.config.arch
        return arch.cached if self.cache else arch

    @property
    def stored_logits(self) -> str:
        """Which logits are stored: "last" of one position, "all" of several."""
        return self.logits if (self.generate or 1) == 1 else "all"

    def shape(self, stage: str) -> tuple[int, ...]:
        found, dims = self.arch.stage[stage], self.model.config.dims(len(self.positions))
        picks = found.last and self.logits == "last" and (self.generate or 1) > 1
        return found.shape(dims, self.stored_logits, self.generate if picks else None)

    @property
    def planned(self) -> Planned:
        shapes = {name: self.shape(name) for name in dict.fromkeys(name for name, _ in self.stored)}
        return {key: (shapes[key[0]], self.dtype) for key in self.stored}

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
        missing = len(self.positions) - len(self.tokens)
        return Manifest(
            architecture=config.architecture,
            format=cast(Format, self.format),
            dtype=cast(DType, self.dtype),
            logits=cast(Logits, self.stored_logits),
            tokens=(*self.tokens, *[0] * missing),  # until they are picked
            positions=self.positions,
            steps=self.steps,
            cache=self.cache,
            batch=self.batch or UNSET,
            chat=True if self.chat else UNSET,
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
    generate: int | None = None,
    prefill_chunk: int | None = None,
    cache: str | None = None,
    chat: bool = False,
) -> Plan:
    """Check what is asked for against the model.

    Arguments:
        positions: one for each token, from 0 on by default; generated ones go on after the last.
        generate: how many tokens to pick, greedily, one after the other; the last is in no row.
        prefill_chunk: how many rows of the prompt each call computes; by default all.
        cache: the format of the key/value cache, "model" for the dtype of the model; with
            ``generate`` or ``prefill_chunk`` there is one in any case.

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
    if cache is None and (generate is not None or prefill_chunk is not None):
        cache = "model"
    if cache is not None:
        cache = cache_format(dtype if cache == "model" else cache, config)
    arch = config.arch.cached if cache else config.arch
    names = parse_stages(stages, arch)
    numbers = parse_layers(layers, config.num_hidden_layers)
    format = format or ("safetensors" if dtype == "float64" else "aprt")
    stored = tuple(
        (stage.name, layer)
        for stage, layer in arch.computation_order(config.num_hidden_layers)
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
    steps = _steps(len(tokens), generate, prefill_chunk)
    if generate is not None:
        last = positions[-1] + generate - 1
        if last >= config.max_position_embeddings:
            raise UserError(
                f"--generate {generate} after {len(tokens)} tokens needs position {last}, and "
                f"{model.name} has positions 0 to {config.max_position_embeddings - 1}; generate "
                "fewer, or shorten the prompt"
            )
        positions = (*positions, *range(positions[-1] + 1, last + 1))
    plan = Plan(
        model=model,
        tokens=tokens,
        positions=positions,
        steps=steps,
        generate=generate,
        cache=cache,
        stages=names,
        layers=numbers,
        dtype=dtype,
        format=format,
        logits=logits,
        stored=stored,
        chat=chat,
    )
    if format == "aprt":
        for stage, _ in stored:
            aprt.check(dtype, math.prod(plan.shape(stage)))
    return plan


def make_batch(plans: Sequence[Plan], prefill_chunk: int | None = None) -> list[Plan]:
    """Plans of single sequences as one batch, padded on the left to the longest prompt.

    A call computes the same rows of the padded batch for all, so those of a sequence alone may be
    fewer.
    """
    longest = max(len(plan.tokens) for plan in plans)
    calls = _steps(longest, plans[0].generate, prefill_chunk)
    found = []
    for row, plan in enumerate(plans):
        padding = longest - len(plan.tokens)
        ends = np.maximum(np.cumsum(calls) - padding, 0)
        steps = tuple(int(n) for n in np.diff(ends, prepend=0) if n)
        batch = Batch(row=row, size=len(plans), padding=padding)
        found.append(replace(plan, steps=steps, batch=batch))
    return found


def _steps(length: int, generate: int | None, chunk: int | None) -> tuple[int, ...]:
    """How many rows each call computes.

    Raises:
        UserError: none, or more than there are.
    """
    if generate is not None and generate < 1:
        raise UserError(f"--generate {generate}: expected 1 or more tokens")
    if chunk is not None and not 1 <= chunk <= length:
        raise UserError(
            f"--prefill-chunk {chunk}: the prompt has {length} tokens; give 1 to {length}"
        )
    whole, rest = divmod(length, chunk or length)
    prompt = [chunk or length] * whole + ([rest] if rest else [])
    return (*prompt, *[1] * ((generate or 1) - 1))


def cache_format(name: str, config: Config) -> str:
    """The name of a format that the model's cache can have.

    Raises:
        UserError: there is none of that name, or it does not divide the heads.
    """
    if name not in OFFERED_CACHES:
        raise UserError(f"no cache format {name!r}; choose one of {', '.join(OFFERED_CACHES)}")
    block = OFFERED_CACHES[name]
    if config.head_dim % block:
        raise UserError(
            f"--cache {name} has blocks of {block}, which do not divide this model's head size "
            f"{config.head_dim}; choose another format"
        )
    return name


def to_memory(engine: Engine, plan: Plan) -> MemoryTrace:
    """Run the engine and keep what was asked for."""
    return batch_to_memory(engine, [plan])[0]


def batch_to_memory(engine: Engine, plans: Sequence[Plan]) -> list[MemoryTrace]:
    """Trace the sequences of a batch (``make_batch``) in one run; one trace for each plan."""
    values: list[dict[Key, np.ndarray]] = [{} for _ in plans]
    dtype = numpy_dtype(plans[0].dtype)

    def emit(i: int, stage: str, layer: int | None, value: np.ndarray, rows: slice | None) -> None:
        key = stage, layer
        if not plans[i].want(*key):
            return
        if rows is None:
            values[i][key] = value
            return
        if key not in values[i]:
            values[i][key] = np.zeros(plans[i].shape(stage), dtype)
        put(plans[i].arch.stage[stage], values[i][key], value, rows.start)

    made = engine.describe()
    name = f"{made['name']}-{made['backend']}-{plans[0].model.name}"
    config = plans[0].model.config.to_json()
    return [
        MemoryTrace(
            name,
            config,
            (*plan.tokens, *picked[:-1]),
            plan.dtype,
            found,
            plan.positions,
            plan.steps,
        )
        for plan, picked, found in zip(plans, compute(engine, plans, emit), values, strict=True)
    ]


# sequence, stage, layer, value, its rows where those are not all
EmitOf = Callable[[int, str, int | None, np.ndarray, slice | None], None]


def compute(
    engine: Engine,
    plans: Sequence[Plan],
    emit: EmitOf,
    resume: Resume = None,
) -> list[tuple[int, ...]]:
    """Run one sequence, or several of a batch that differ in their prompts alone.

    Values come without a batch axis and without padding. Returns the tokens that were picked, the
    last of which is in no row; without a cache none.
    """
    first = plans[0]
    if first.cache is None and len(plans) == 1:
        each = partial(emit, 0)
        engine.run(
            first.tokens,
            first.positions,
            first.logits,
            first.want,
            lambda stage, layer, value: each(stage, layer, value, None),
            resume,
        )
        return [()]
    batch = Padded.of([plan.tokens for plan in plans], [plan.positions for plan in plans])
    longest = batch.valid.shape[1]

    def split(stage: str, layer: int | None, value: np.ndarray, begin: int = 0) -> None:
        axis, axes = first.arch.stage[stage].positions_at, first.arch.stage[stage].axes
        flat = value.ndim == len(axes)  # lm_head of one position: no T axis
        for i, plan in enumerate(plans):
            pad, found = longest - len(plan.positions), value[i]
            if flat:
                emit(i, stage, layer, found, None)
                continue
            hidden = max(0, pad - begin)  # rows of padding
            if hidden >= found.shape[axis]:
                continue
            found = found[(slice(None),) * axis + (slice(hidden, None),)]
            if "S" in axes[axis + 1 :]:
                found = found[..., pad:]
            shape = plan.shape(stage)
            if len(shape) < len(axes):  # one row after which a token is picked
                emit(i, stage, layer, found[0], None)
                continue
            # of a stage that has the last rows alone, counted from the first of those
            start = begin + hidden - pad - (len(plan.positions) - shape[axis])
            rows = slice(start, start + found.shape[axis])
            whole = found.shape == shape
            emit(i, stage, layer, found, None if whole else rows)

    if first.cache is None:
        engine.run_batch(batch, first.logits, first.want, split, resume)
        return [() for _ in plans]
    picked = engine.run_calls(
        batch,
        max(plans, key=lambda plan: len(plan.positions)).steps,
        first.cache,
        first.logits,
        first.want,
        split,
    )
    return [tuple(map(int, row)) for row in picked]


@dataclass(frozen=True)
class Written:
    """A trace on disk.

    Attributes:
        bytes: of all files.
        tokens: those of its rows, then the last one picked where there was a cache.
        logits: [V], of the last position, whatever was stored.
    """

    path: Path
    bytes: int
    tokens: tuple[int, ...]
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
    if not go_on:
        return _write(engine, [plan], [out], overwrite, advance)[0]
    if plan.cache:
        raise UserError(
            "--resume goes on with a layer, and a sequence that is computed in calls has all of "
            "its layers in each; use --overwrite"
        )
    header = plan.header(engine.describe())
    kept, start = _resumed(plan, header, out, tell, track)
    check_space(plan, out, kept)
    return _write(engine, [plan], [out], True, advance, kept, start)[0]


def batch_to_disk(
    engine: Engine,
    plans: Sequence[Plan],
    out: Path,
    *,
    overwrite: bool = False,
    advance: Callable[[int | None, int], None] = lambda layer, written: None,
) -> list[Written]:
    """Write the traces of a batch (``make_batch``), one directory ``out/sequence-<i>`` each; see
    ``to_disk``."""
    paths = [out / f"sequence-{i}" for i in range(len(plans))]
    for old in check_batch_out(out, overwrite):
        if old not in paths:
            shutil.rmtree(old)
    return _write(engine, plans, paths, overwrite, advance)


def check_batch_out(out: Path, overwrite: bool) -> list[Path]:
    """The sequences that are in a batch's directory.

    Raises:
        UserError: it holds anything else, or ``overwrite`` is false.
    """
    if not out.exists():
        return []
    try:
        found = sorted(out.iterdir())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    for path in found:
        number = path.name.removeprefix("sequence-")
        if path.is_symlink() or not path.is_dir() or not number.isdecimal():
            raise UserError(
                f"--out {out}: holds {path.name!r}, which is no sequence of a batch; choose an "
                "empty or new directory"
            )
        replaceable(path, overwrite)
    return found


def _write(
    engine: Engine,
    plans: Sequence[Plan],
    paths: Sequence[Path],
    overwrite: bool,
    advance: Callable[[int | None, int], None],
    kept: Sequence[FileEntry] = (),
    start: tuple[int, np.ndarray] | None = None,
) -> list[Written]:
    """Run the engine once, and write each of its sequences where it goes."""
    last: dict[int, np.ndarray] = {}
    shown: int | None = -1
    head, producer = plans[0].arch.head, engine.describe()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                TraceWriter(
                    path,
                    plan.header(producer),
                    plan.model.hashes,
                    plan.planned,
                    overwrite or bool(kept),
                    kept,
                )
            )
            for plan, path in zip(plans, paths, strict=True)
        ]

        def emit(
            i: int, stage: str, layer: int | None, value: np.ndarray, rows: slice | None
        ) -> None:
            nonlocal shown
            if plans[i].want(stage, layer):
                writers[i].add(stage, layer, value, rows)
            if stage == head.name:
                last[i] = value if value.ndim < len(head.axes) else value[-1]
            writers[i].note()
            if layer != shown:  # once a layer: it adds up all files
                shown = layer
                advance(layer, sum(writer.bytes for writer in writers))

        picked = compute(engine, plans, emit, start)
        written = []
        for i, (plan, writer) in enumerate(zip(plans, writers, strict=True)):
            tokens = (*plan.tokens, *picked[i])
            rows = tokens[: len(plan.positions)]
            writer.header = msgspec.structs.replace(writer.header, tokens=rows)
            writer.finish()
            written.append(Written(paths[i], writer.bytes, tokens, last[i]))
    return written


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
        tell(f"{out}/: no interrupted trace is there to go on with, so it starts anew")
        return [], None
    layer = resume.first_layer(found, plan.stored)
    config = plan.model.config
    carries = config.arch.layer_output.name
    if layer == 0:
        tell(f"{out}/: no layer is whole with its {carries}, so it starts anew")
        return [], None
    stated = found.manifest.model.weights
    names = [config.arch.embedding.tensor]
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
