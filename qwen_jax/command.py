"""The trace command, shared by ``python -m qwen_jax.trace`` and ``python -m oracle.trace``.

Both take the same arguments and write the same files; they differ in the engine that computes.
Imports neither jax nor torch, so bad input is refused before either is loaded.
"""

import argparse
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from qwen_jax import source
from qwen_jax.weights import EMBEDDING, Weights, layer_names
from stages import aprt, cli, resume
from stages.errors import UserError
from stages.manifest import DTYPES, FORMATS, FileEntry, Manifest
from stages.table import (
    NAMES,
    STAGE,
    computation_order,
    parse_layers,
    parse_stages,
    stage_axes,
    stage_shape,
)
from stages.trace import numpy_dtype
from stages.writer import TraceWriter, replaceable


@dataclass(frozen=True)
class Plan:
    """What one command was asked to do, checked.

    Attributes:
        tokenizer: None if the model has none.
        stored: (stage, layer) of every file, in computation order.
    """

    model: Weights
    tokens: tuple[int, ...]
    tokenizer: Tokenizer | None
    stages: tuple[str, ...]
    layers: tuple[int, ...]
    dtype: str
    format: str
    logits: str
    out: Path
    stored: list[tuple[str, int | None]]

    def want(self, stage: str, layer: int | None) -> bool:
        return stage in self.stages and (layer is None or layer in self.layers)

    def shape(self, stage: str) -> tuple[int, ...]:
        return stage_shape(STAGE[stage], self.model.config.dims(len(self.tokens)), self.logits)

    def bytes(self, stage: str) -> int:
        """Tensor bytes of one file of this stage."""
        item = 4 if self.format == "aprt" else numpy_dtype(self.dtype).itemsize
        return item * math.prod(self.shape(stage))

    @property
    def total(self) -> int:
        """Tensor bytes of all files."""
        return sum(self.bytes(stage) for stage, _ in self.stored)

    def header(self, producer: dict[str, Any]) -> Manifest:
        model = {"name": self.model.name, "config": self.model.config.to_json()}
        model |= {"weights": self.model.hashes}  # grows with what is read
        return Manifest(
            format=self.format,
            dtype=self.dtype,
            logits=self.logits,
            tokens=self.tokens,
            positions=tuple(range(len(self.tokens))),
            model=model,
            producer=producer,
        )


def parser(prog: str, description: str, backends: tuple[str, ...]) -> argparse.ArgumentParser:
    """The arguments of a trace command."""
    result = cli.Parser(prog=prog, description=description)
    source.add_model_arguments(result)
    add = result.add_argument
    add("--stages", default="all", metavar="LIST", help=f"all, or some of: {', '.join(NAMES)}")
    add("--layers", default="all", metavar="LIST", help="all, or numbers and ranges: 0,3-5")
    add("--dtype", default="float32", choices=DTYPES, help="what the model computes in")
    add("--backend", default=backends[0], choices=backends)
    add("--device", choices=("cpu", "gpu"), help="default: a gpu if there is one and it applies")
    add("--format", choices=tuple(FORMATS), help="default: aprt; safetensors for float64")
    add("--logits", default="last", choices=("last", "all"), help="positions kept in lm_head")
    add("--out", type=Path, metavar="DIR", help="where the trace goes")
    old = result.add_mutually_exclusive_group()
    old.add_argument("--overwrite", action="store_true", help="replace the trace that is in --out")
    old.add_argument("--resume", action="store_true", help="go on with an interrupted trace")
    add("--dry-run", action="store_true", help="print shapes, bytes and memory; run nothing")
    cli.add_json(result)
    return result


def make_plan(args: argparse.Namespace, suffix: str) -> Plan:
    """Check the arguments against the model.

    Raises:
        UserError: anything that cannot be done as asked.
    """
    stages = parse_stages(args.stages)
    model = source.open_model(args.model)
    layers = parse_layers(args.layers, model.config.num_hidden_layers)
    format = args.format or ("safetensors" if args.dtype == "float64" else "aprt")
    if format == "aprt" and args.dtype == "float64":
        raise UserError("--format aprt holds float32 values only; use --format safetensors")
    stored = [
        (stage.name, layer)
        for stage, layer in computation_order(model.config.num_hidden_layers)
        if stage.name in stages and (layer is None or layer in layers)
    ]
    if not stored:
        raise UserError(f"--stages {args.stages} --layers {args.layers} select nothing to write")
    plan = Plan(
        model=model,
        tokens=source.read_tokens(args, model),
        tokenizer=source.load_tokenizer(model),
        stages=stages,
        layers=layers,
        dtype=args.dtype,
        format=format,
        logits=args.logits,
        out=args.out or Path(f"{model.name}-{suffix}"),
        stored=stored,
    )
    if format == "aprt":
        for stage, _ in stored:
            aprt.check_count(math.prod(plan.shape(stage)))
    json_file = None if args.json in (None, "-") else Path(args.json)
    if json_file and json_file.resolve().is_relative_to(plan.out.resolve()):
        raise UserError(f"--json {json_file} would lie in the trace itself; put it elsewhere")
    return plan


def main(
    args: argparse.Namespace,
    suffix: str,
    make_engine: Callable[..., Any],
    memory: Callable[[Weights, int, str, str], int],
) -> int:
    """Plan, run the engine that ``make_engine(model, args)`` returns, write, report.

    ``memory`` is of ``estimate``: what that engine will take, for --dry-run.
    """
    began = time.perf_counter()
    plan = make_plan(args, suffix)
    if args.dry_run:
        _dry_run(args, plan, memory(plan.model, len(plan.tokens), plan.dtype, plan.logits))
        return 0
    if not args.resume:
        # Said now, not when a large model has been loaded.
        replaceable(plan.out, args.overwrite)
        _check_space(plan, [])
    engine = make_engine(plan.model, args)
    header = plan.header(engine.describe())
    kept, start = _resumed(args, plan, header)
    if args.resume:
        _check_space(plan, kept)
    last: dict[str, np.ndarray] = {}
    try:
        with (
            TraceWriter(
                plan.out, header, args.overwrite or args.resume, kept, plan.stored
            ) as writer,
            cli.progress("{task.fields[written]}") as bar,
        ):
            total, size = plan.model.config.num_hidden_layers, cli.size(plan.total)
            task = bar.add_task("layers", total=total, written="")
            shown: int | None = -1

            def emit(stage: str, layer: int | None, value: np.ndarray) -> None:
                nonlocal shown
                if plan.want(stage, layer):
                    writer.add(stage, layer, value)
                if stage == "lm_head":
                    last["logits"] = value if plan.logits == "last" else value[-1]
                writer.note()
                if layer != shown:  # once a layer: it adds up all files
                    shown = layer
                    written = f"{cli.size(writer.bytes)} of {size}"
                    bar.update(task, completed=total if layer is None else layer, written=written)

            engine.run(plan.tokens, plan.logits, plan.want, emit, start)
            weights = dict(sorted(plan.model.hashes.items()))
            writer.finish(header.model | {"weights": weights}, plan.stored)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{plan.out}/ is marked as incomplete; the same command with --resume goes on"
        ) from None
    seconds, peak = time.perf_counter() - began, _peak_memory()
    top = _top(plan.tokenizer, last["logits"])
    data = _summary(plan) | {
        "file_bytes": writer.bytes,
        "top": top,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak,
    }
    show = cli.report(args.json, data)
    show.print(_table(plan))
    _print_top(show, top)
    show.print(
        f"{plan.out}/: {len(plan.stored)} files, "
        f"{cli.size(writer.bytes)}, {plan.dtype}, {len(plan.tokens)} tokens, in {seconds:.1f} s, "
        f"peak memory {cli.size(peak)}"
    )
    return 0


def _resumed(
    args: argparse.Namespace, plan: Plan, header: Manifest
) -> tuple[list[FileEntry], tuple[int, np.ndarray] | None]:
    """The files of an interrupted trace that stay, and the layer to go on from with its input."""
    found = resume.open_interrupted(plan.out, header, plan.stored) if args.resume else None
    if found is None:
        return [], None
    layer = resume.first_layer(found, plan.stored)
    say = cli.console(to_stderr=True).print
    if layer == 0:
        say(f"{plan.out}/: no layer is whole with its {resume.CARRIES}, so it starts anew")
        return [], None
    stated = found.manifest.model["weights"]
    names = [EMBEDDING, *(n for i in range(layer) for n in layer_names(i).values())]
    with cli.progress() as bar:
        for name in bar.track(names, description="checking weights of finished layers"):
            if plan.model.hash(name) != stated.get(name):
                raise UserError(
                    f"--resume: {name} of {plan.model.name} is not what {plan.out} was begun "
                    "with; use --overwrite to start anew"
                )
    before = found.read(resume.CARRIES, layer - 1).astype(numpy_dtype(plan.dtype))
    kept = [found.entries[s, n] for s, n in plan.stored if n is not None and n < layer]
    say(f"{plan.out}/: {layer} of {plan.model.config.num_hidden_layers} layers are there")
    return kept, (layer, before)


def _check_space(plan: Plan, kept: list[FileEntry]) -> None:
    """Refuse a trace that the disk cannot hold, before anything is computed.

    Raises:
        UserError: too little space, counting what an overwritten trace frees.
    """
    there = plan.out
    while not there.exists():
        there = there.parent
    names = {plan.out / entry.path for entry in kept}
    freed = 0
    if plan.out.is_dir():
        freed = sum(f.stat().st_size for f in plan.out.rglob("*") if f.is_file() and f not in names)
    layers = {(entry.stage, entry.layer) for entry in kept}
    needed = sum(plan.bytes(stage) for stage, n in plan.stored if (stage, n) not in layers)
    free = shutil.disk_usage(there).free
    if needed > free + freed:
        raise UserError(
            f"--out {plan.out}: the trace needs {cli.size(needed)}, the disk has "
            f"{cli.size(free + freed)} free; choose fewer --stages or --layers, or another disk"
        )


def _dry_run(args: argparse.Namespace, plan: Plan, memory: int) -> None:
    show = cli.report(args.json, _summary(plan) | {"peak_memory_bytes": memory})
    show.print(_table(plan))
    show.print(
        f"dry run: nothing was computed or written; --out would be {plan.out!s}/, "
        f"peak memory about {cli.size(memory)}"
    )


def _peak_memory() -> int:
    """High-water mark of this process's resident memory, bytes.

    On Linux ``getrusage`` would also count what the parent had before it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _rows(plan: Plan) -> list[dict[str, Any]]:
    """One row a stage: in how many layers it is stored, and what that takes."""
    rows = []
    for stage in plan.stages:
        files = sum(name == stage for name, _ in plan.stored)
        if files:
            axes = stage_axes(STAGE[stage], plan.logits)
            size = files * plan.bytes(stage)
            shape = list(plan.shape(stage))
            rows.append(
                {"stage": stage, "axes": axes, "shape": shape, "files": files, "bytes": size}
            )
    return rows


def _summary(plan: Plan) -> dict[str, Any]:
    """What --json says of a dry run and of a run alike. ``bytes`` are those of the tensors."""
    rows = _rows(plan)
    return {
        "schema": 1,
        "model": plan.model.name,
        "out": str(plan.out),
        "dtype": plan.dtype,
        "format": plan.format,
        "tokens": list(plan.tokens),
        "layers": list(plan.layers),
        "stages": rows,
        "files": len(plan.stored),
        "bytes": plan.total,
    }


def _table(plan: Plan) -> Table:
    rows = _rows(plan)
    table = Table(box=None, header_style="bold", show_footer=True, pad_edge=False)
    table.add_column("stage", "total")
    table.add_column("axes")
    table.add_column("shape")
    table.add_column("files", str(len(plan.stored)), justify="right")
    table.add_column("bytes", cli.size(plan.total), justify="right")
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        cells = (" ".join(row["axes"]), shape, str(row["files"]), cli.size(row["bytes"]))
        table.add_row(row["stage"], *cells)
    return table


def _top(tokenizer: Tokenizer | None, logits: np.ndarray, count: int = 5) -> list[dict[str, Any]]:
    """The most likely next tokens after the last position."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a trace of an engine that overflowed is a trace too
        probability = np.exp(wide - wide.max())
        probability /= probability.sum()
    best = np.argsort(-wide, kind="stable")[:count]
    return [
        {
            "token": int(token),
            "text": tokenizer.decode([int(token)]) if tokenizer else None,
            "logit": float(wide[token]),
            "probability": float(probability[token]),
        }
        for token in best
    ]


def _print_top(show: Console, top: list[dict[str, Any]]) -> None:
    table = Table(title="next token", title_justify="left", box=None, header_style="bold")
    for name in ("token", "text", "logit", "probability"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for row in top:
        text = "" if row["text"] is None else repr(row["text"])
        cells = (f"{row['logit']:.4f}", f"{row['probability']:.4f}")
        table.add_row(str(row["token"]), text, *cells)
    show.print(table)
