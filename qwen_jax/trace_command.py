"""The trace command, shared by ``python -m qwen_jax.trace`` and ``python -m oracle.trace``.

Both take the same arguments and write the same files; they differ in the engine that computes.
Imports neither jax nor torch, so bad input is refused before either is loaded.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from qwen_jax import arguments, cli, tracing
from qwen_jax.prompt import load_tokenizer
from qwen_jax.tracing import Engine, Plan, Written
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.architectures import ALL_NAMES
from stages.errors import UserError
from stages.manifest import FORMATS, LOGITS

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float64": "float64"}
DTYPES |= {"f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}


def dtype(text: str) -> str:
    """A dtype by its name or a short one."""
    if text.lower() not in DTYPES:
        names = ", ".join(dict.fromkeys(DTYPES.values()))
        raise argparse.ArgumentTypeError(f"{text!r} is none of {names}")
    return DTYPES[text.lower()]


def parser(prog: str, description: str, backends: tuple[str, ...]) -> argparse.ArgumentParser:
    """The arguments of a trace command."""
    result = cli.Parser(prog=prog, description=description)
    arguments.add_model_arguments(result)
    add = result.add_argument
    add("--stages", default="all", metavar="LIST", help=f"all, or some of: {', '.join(ALL_NAMES)}")
    add("--layers", default="all", metavar="LIST", help="all, or numbers and ranges: 0,3-5")
    add(
        "--dtype",
        type=dtype,
        default="float32",
        metavar="{float32,bfloat16,float16,float64}",
        help="what the model computes in; default: float32",
    )
    add("--backend", default=backends[0], choices=backends)
    add("--device", choices=("cpu", "gpu"), help="default: a gpu if there is one and it applies")
    add("--format", choices=tuple(FORMATS), help="default: aprt; safetensors for float64")
    add("--logits", default="last", choices=LOGITS, help="positions kept in lm_head")
    add("--out", type=Path, metavar="DIR", help="where the trace goes")
    old = result.add_mutually_exclusive_group()
    old.add_argument("--overwrite", action="store_true", help="replace the trace that is in --out")
    old.add_argument("--resume", action="store_true", help="go on with an interrupted trace")
    add("--dry-run", action="store_true", help="print shapes, bytes and memory; run nothing")
    cli.add_json(result)
    return result


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks for, checked.

    Raises:
        UserError: anything that cannot be done as asked.
    """
    model, prompt = open_model(args.model), arguments.prompt_of(args)
    tokens = prompt.read(model)
    load_tokenizer(
        model
    )  # it names the next token: a damaged one is refused now, not after the run
    return tracing.make_plan(
        model,
        tokens,
        prompt.positions(tokens),
        stages=args.stages,
        layers=args.layers,
        dtype=args.dtype,
        format=args.format,
        logits=args.logits,
    )


def out_of(args: argparse.Namespace, plan: Plan, suffix: str) -> Path:
    """Where the trace goes.

    Raises:
        UserError: --json would lie in it.
    """
    out: Path = args.out or Path(f"{plan.model.name}-{suffix}")
    json_file = None if args.json in (None, "-") else Path(args.json)
    if json_file and json_file.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--json {json_file} would lie in the trace itself; put it elsewhere")
    return out


def main(
    args: argparse.Namespace,
    suffix: str,
    make_engine: Callable[[Plan], Engine],
    memory: Callable[[Weights, int, str, str], int],
) -> int:
    """Plan, run the engine that ``make_engine(plan)`` returns, write, report.

    ``memory`` is of ``estimate``: what that engine will take, for --dry-run.
    """
    began = time.perf_counter()
    plan = plan_of(args)
    out = out_of(args, plan, suffix)
    if args.dry_run:
        needed = memory(plan.model, len(plan.tokens), plan.dtype, plan.logits)
        show = cli.report(args.json, _summary(plan, out) | {"peak_memory_bytes": needed})
        show.print(_table(plan))
        show.print(
            f"dry run: nothing was computed or written; --out would be {out!s}/, peak memory about "
            f"{cli.size(needed)}"
        )
        return 0
    if not args.resume:
        tracing.check_out(plan, out, args.overwrite)
    written = _run(make_engine(plan), plan, out, args.overwrite, args.resume)
    seconds, peak = time.perf_counter() - began, _peak_memory()
    top = _top(load_tokenizer(plan.model), written.logits)
    data = _summary(plan, out) | {
        "file_bytes": written.bytes,
        "top": top,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak,
    }
    show = cli.report(args.json, data)
    show.print(_table(plan))
    _print_top(show, top)
    show.print(
        f"{out}/: {len(plan.stored)} files, {cli.size(written.bytes)}, {plan.dtype}, "
        f"{len(plan.tokens)} tokens, in {seconds:.1f} s, peak memory {cli.size(peak)}"
    )
    return 0


def _run(engine: Engine, plan: Plan, out: Path, overwrite: bool, resume: bool) -> Written:
    """``tracing.to_disk`` with a progress bar."""
    layers, size = plan.model.config.num_hidden_layers, cli.size(plan.total)
    with cli.progress("{task.fields[written]}") as bar:
        task = bar.add_task("layers", total=layers, written="")

        def advance(layer: int | None, written: int) -> None:
            done = layers if layer is None else layer
            bar.update(task, completed=done, written=f"{cli.size(written)} of {size}")

        def track(names: Sequence[str]) -> Any:
            return bar.track(names, description="checking weights of finished layers")

        try:
            return tracing.to_disk(
                engine,
                plan,
                out,
                overwrite=overwrite,
                go_on=resume,
                tell=cli.console(to_stderr=True).print,
                track=track,
                advance=advance,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{out}/ is marked as incomplete; the same command with --resume goes on"
            ) from None


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
            axes = plan.model.config.tables.stage[stage].stored_axes(plan.logits)
            size = files * plan.bytes(stage)
            shape = list(plan.shape(stage))
            rows.append(
                {"stage": stage, "axes": axes, "shape": shape, "files": files, "bytes": size}
            )
    return rows


def _summary(plan: Plan, out: Path) -> dict[str, Any]:
    """What --json says of a dry run and of a run alike. ``bytes`` are those of the tensors."""
    rows = _rows(plan)
    return {
        "schema": 2,
        "architecture": plan.model.config.architecture,
        "model": plan.model.name,
        "out": str(out),
        "dtype": plan.dtype,
        "format": plan.format,
        "tokens": list(plan.tokens),
        "positions": list(plan.positions),
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
