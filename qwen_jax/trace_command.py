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

from qwen_jax import arguments, cli, forecast, tracing
from qwen_jax.prompt import load_tokenizer, read_prompts
from qwen_jax.tracing import Engine, Plan, Written
from qwen_jax.weights import open_model
from stages import manifest
from stages.architectures import ALL_NAMES
from stages.errors import UserError
from stages.manifest import FORMATS, LOGITS
from stages.numbers import OFFERED_CACHES

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
    arguments.add_model_arguments(result, batch=True)
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
    add("--generate", type=int, metavar="N", help="go on with N tokens, each the most likely one")
    add("--prefill-chunk", type=int, metavar="C", help="compute the prompt in calls of C rows")
    add(
        "--cache",
        metavar="FORMAT",
        help=f"a key/value cache of one of {', '.join(OFFERED_CACHES)}; default: none; with "
        "--generate or --prefill-chunk the model's dtype",
    )
    forecast.add_argument(result)
    add("--out", type=Path, metavar="DIR", help="where the trace goes")
    old = result.add_mutually_exclusive_group()
    old.add_argument("--overwrite", action="store_true", help="replace the trace that is in --out")
    old.add_argument("--resume", action="store_true", help="go on with an interrupted trace")
    add("--dry-run", action="store_true", help="print shapes, bytes and memory; run nothing")
    cli.add_json(result)
    return result


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """What the command line asks for, checked: one sequence, or those of a batch.

    Raises:
        UserError: anything that cannot be done as asked.
    """
    model = open_model(args.model)
    batch = args.prompts is not None
    if batch and args.resume:
        raise UserError("--resume goes on with one sequence; use --overwrite with --prompts")
    prompts = (
        read_prompts(args.prompts, args.first_position, args.chat)
        if batch
        else [arguments.prompt_of(args)]
    )
    if args.chat and args.tokens is not None:
        raise UserError("--chat renders text, and --tokens are ids already; use one of them")
    load_tokenizer(model)  # it names tokens: a damaged one is refused now, not after the run
    plans = []
    for prompt in prompts:
        tokens = prompt.read(model)
        plans.append(
            tracing.make_plan(
                model,
                tokens,
                prompt.positions(tokens),
                stages=args.stages,
                layers=args.layers,
                dtype=args.dtype,
                format=args.format,
                logits=args.logits,
                generate=args.generate,
                prefill_chunk=None if batch else args.prefill_chunk,
                cache=args.cache or ("model" if args.prefill_chunk is not None else None),
                chat=args.chat,
            )
        )
    return tracing.make_batch(plans, args.prefill_chunk) if batch else plans


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
    memory: Callable[..., int],
) -> int:
    """Plan, run the engine that ``make_engine(plan)`` returns, write, report.

    ``memory`` is of ``estimate``: what that engine will take, for --dry-run.
    """
    began = time.perf_counter()
    plans = plans_of(args)
    plan = max(plans, key=lambda plan: len(plan.tokens))
    out = out_of(args, plan, suffix)
    if args.headroom:
        forecast.check(args.headroom, plan.dtype)
    _note_positions(plans)
    if args.dry_run:
        length = len(plans) * len(plan.positions)
        needed = memory(plan.model, length, plan.dtype, plan.logits, plan.cache is not None)
        refused = _refused(plan, out, args)
        told = _said(plans, out, [{} for _ in plans], needed, {"refused": refused})
        show = cli.report(args.json, told)
        show.print(_table(plan, len(plans)))
        show.print(
            f"dry run: nothing was computed or written; --out would be {out!s}/, peak memory about "
            f"{cli.size(needed)}"
        )
        if refused:
            show.print(f"a run would refuse: {refused}")
        return 0
    if plan.batch:
        tracing.check_batch_out(out, args.overwrite)
    elif not args.resume:
        tracing.check_out(plan, out, args.overwrite)
    written = _run(make_engine(plan), plans, out, args.overwrite, args.resume)
    seconds, peak = time.perf_counter() - began, _peak_memory()
    tokenizer = load_tokenizer(plan.model)
    found = [_found(tokenizer, *each) for each in zip(plans, written, strict=True)]
    forecasts = [
        args.headroom and forecast.Forecast(each.open(), args.headroom) for each in written
    ]
    for facts, ahead in zip(found, forecasts, strict=True):
        if ahead:
            facts["headroom"] = ahead.to_json()
    show = cli.report(args.json, _said(plans, out, found, peak, {"seconds": round(seconds, 3)}))
    show.print(_table(plan, len(plans)))
    for each, facts, ahead in zip(written, found, forecasts, strict=True):
        if plan.batch:
            show.print(f"\n{each.path}/: {len(facts['tokens'])} tokens")
        _print_generated(show, tokenizer, facts.get("generated"))
        _print_top(show, facts["top"])
        if ahead:
            ahead.show(show)
    rows = " + ".join(str(len(each.positions)) for each in plans)
    files = sum(len(p.stored) if p.format == "aprt" else 1 for p in plans)
    show.print(
        f"{out}/: {files} file{'s' if files > 1 else ''}, "
        f"{cli.size(sum(each.bytes for each in written))}, {plan.dtype}, "
        f"{rows} tokens, in {seconds:.1f} s, peak memory {cli.size(peak)}"
    )
    return int(any(ahead and ahead.overflows for ahead in forecasts))


def _note_positions(plans: Sequence[Plan]) -> None:
    """Print a note where a prompt is longer than the model was made for. It is not refused, because
    engines go on there too, and what they do is to be compared."""
    last, known = max(p.positions[-1] for p in plans), plans[0].model.config.max_position_embeddings
    if last >= known:
        cli.console(to_stderr=True).print(
            f"note: position {last} is beyond those of {plans[0].model.name}, 0 to {known - 1} "
            "(max_position_embeddings)"
        )


def _said(
    plans: Sequence[Plan],
    out: Path,
    found: Sequence[dict[str, Any]],
    peak: int,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The object of --json: of one sequence, or of the sequences of a batch."""
    run = {"peak_memory_bytes": peak} | (more or {})
    if plans[0].batch is None:
        return _summary(plans[0], out) | found[0] | run
    sequences = [
        _summary(plan, out / f"sequence-{i}") | facts | run
        for i, (plan, facts) in enumerate(zip(plans, found, strict=True))
    ]
    return {"schema": 2, "out": str(out), "sequences": sequences}


def _found(tokenizer: Tokenizer | None, plan: Plan, written: Written) -> dict[str, Any]:
    """The part of a sequence's summary that is known only after the run."""
    found: dict[str, Any] = {
        "tokens": list(written.tokens[: len(plan.positions)]),
        "file_bytes": written.bytes,
        "top": _top(tokenizer, written.logits),
    }
    if plan.generate:
        picked = written.tokens[len(plan.tokens) :]
        found["generated"] = [
            {"token": token, "text": tokenizer.decode([token]) if tokenizer else None}
            for token in picked
        ]
    return found


def _print_generated(
    show: Console, tokenizer: Tokenizer | None, generated: list[dict[str, Any]] | None
) -> None:
    if generated is None:
        return
    tokens = [each["token"] for each in generated]
    text = f": {tokenizer.decode(tokens)!r}" if tokenizer else ""
    show.print(f"generated {len(tokens)} tokens{text}")
    show.print(f"as ids: {','.join(map(str, tokens))}")


def _refused(plan: Plan, out: Path, args: argparse.Namespace) -> str | None:
    """Why a run could not write to ``out``; None where it could."""
    try:
        if plan.batch:
            tracing.check_batch_out(out, args.overwrite)
        elif not args.resume:
            tracing.check_out(plan, out, args.overwrite)
        elif (out / manifest.NAME).exists() and not (out / manifest.PARTIAL).exists():
            return f"--resume: {out} is a whole trace"
    except UserError as error:
        return str(error)
    return None


def _run(
    engine: Engine, plans: Sequence[Plan], out: Path, overwrite: bool, resume: bool
) -> list[Written]:
    """``tracing.to_disk`` with a progress bar."""
    plan = plans[0]
    layers, size = plan.model.config.num_hidden_layers, cli.size(sum(p.total for p in plans))
    with cli.progress("{task.fields[written]}") as bar:
        task = bar.add_task("layers", total=layers, written="")

        def advance(layer: int | None, written: int) -> None:
            done = layers if layer is None else layer
            bar.update(task, completed=done, written=f"{cli.size(written)} of {size}")

        def track(names: Sequence[str]) -> Any:
            return bar.track(names, description="checking weights of finished layers")

        try:
            if plan.batch:
                return tracing.batch_to_disk(
                    engine, plans, out, overwrite=overwrite, advance=advance
                )
            written = tracing.to_disk(
                engine,
                plan,
                out,
                overwrite=overwrite,
                go_on=resume,
                tell=cli.console(to_stderr=True).print,
                track=track,
                advance=advance,
            )
            return [written]
        except KeyboardInterrupt:
            again = "--overwrite starts anew" if plan.cache or plan.batch else "--resume goes on"
            raise KeyboardInterrupt(
                f"{out}/ is marked as incomplete; the same command with {again}"
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
            axes = plan.arch.stage[stage].stored_axes(plan.stored_logits)
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
        "steps": list(plan.steps),
        "cache": plan.cache,
        "layers": list(plan.layers),
        "stages": rows,
        "files": len(plan.stored),
        "bytes": plan.total,
    }


def _table(plan: Plan, sequences: int) -> Table:
    """The stages that are written, with their sizes; of a batch, those of its longest sequence."""
    rows = _rows(plan)
    table = Table(box=None, header_style="bold", show_footer=True, pad_edge=False)
    table.add_column("stage", f"longest of {sequences} sequences" if sequences > 1 else "total")
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
