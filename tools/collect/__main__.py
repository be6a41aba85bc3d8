"""``python -m tools.collect ENGINE MODEL --out D``: run another engine and trace what it computes.

The trace has a manifest that says which engine it was, its version and its options, so every
command reads it as one of ours. What an engine cannot show is said there and on the screen.
``python -m tools.collect files DIR --map NAME`` turns dumps that lie on disk into a trace.
"""

import argparse
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from qwen_jax import arguments, cli
from qwen_jax.weights import open_model
from qwen_jax.weights.base import Weights
from stages.errors import UserError
from stages.manifest import WeightEntry
from stages.version import NAME, version
from stages.writer import replaceable
from tools.collect import effective, engines
from tools.collect.recorder import Collected, Recorder
from tools.collect.session import Adapter, Session, run

SCHEMA = 1
PROG = "tools.collect"


def counts(text: str) -> tuple[int, ...]:
    """The numbers of rows of a list such as 16,16,1,1."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected rows of each call, such as 16,16,1,1")
    return found


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens")
    return int(text)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every engine takes beside its own options."""
    arguments.add_prompt_arguments(parser)
    add = parser.add_argument
    add("--stages", default="all", metavar="LIST", help="all, or names of stages")
    add("--layers", default="all", metavar="LIST", help="all, or numbers and ranges: 0,3-5")
    add("--out", type=Path, required=True, metavar="DIR", help="where the trace goes")
    add("--overwrite", action="store_true", help="replace the trace that is in --out")
    cli.add_json(parser)


def overview() -> argparse.ArgumentParser:
    """What there is to read before an engine is chosen."""
    result = cli.Parser(prog=PROG, description=__doc__)
    names = ", ".join([*engines.ENGINES, "files"])
    result.add_argument("engine", metavar="ENGINE", help=f"{names}; ENGINE --help says more")
    return result


def parser(name: str, adapter: Adapter) -> tuple[argparse.ArgumentParser, list[str]]:
    """The arguments of one engine, and the names of those that are its own."""
    own = argparse.ArgumentParser(add_help=False)
    adapter.add_arguments(own)
    result = cli.Parser(prog=PROG, description=adapter.__doc__, parents=[own])
    result.prog += f" {name}"
    result.add_argument("model", metavar="MODEL", help="as --model of the other commands")
    add_common(result)
    result.add_argument(
        "--steps", type=counts, metavar="16,16,1,1", help="rows of each call; default: all in one"
    )
    result.add_argument(
        "--generate",
        type=_count,
        default=0,
        metavar="N",
        help="then N tokens more, the likeliest each time, computed one by one",
    )
    result.add_argument(
        "--of",
        metavar="MODEL",
        help="what MODEL should be, where it may have been made wrongly: the trace is then one of "
        "that, for tools.localize --model",
    )
    result.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="also write the weights that the engine multiplies by, for tools.localize --model",
    )
    return result, list(vars(own.parse_args([])))


def main(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name.startswith("-"):
        overview().parse_args(argv or ["--help"])
    if name == "files":
        from tools.collect import files

        return files.main(rest)
    adapter = engines.adapter(name)
    made, own = parser(name, adapter)
    args = made.parse_args(rest)
    replaceable(args.out, args.overwrite)
    model, prompt = open_model(args.model), arguments.prompt_of(args)
    right = open_model(args.of) if args.of else model
    tokens = prompt.read(right)
    positions = prompt.positions(tokens)
    steps = args.steps or (len(tokens),)
    if sum(steps) != len(tokens):
        raise UserError(f"--steps add up to {sum(steps)}, but the prompt has {len(tokens)} tokens")
    recorder = Recorder(right, args.stages, args.layers)
    length = len(tokens) + args.generate
    if args.weights:
        effective.refuse(args.weights)
    with adapter.open(model, args, recorder, length) as session:
        if args.weights and not session.own_weights:
            raise UserError(
                f"--weights: {name} multiplies by the values in the files of {model.name}; "
                "tools.localize takes those"
            )
        computed, logits = run(session, tokens, positions, steps, args.generate)
        weights, judged_by = _weights(session, model, args.weights)
        if args.of:  # what it multiplies by is what is in question
            weights, judged_by = {}, right.name
        options = {each: getattr(args, each) for each in own}
        found = recorder.finish(
            args.out,
            computed,
            describe(session, options),
            cache=session.cache,
            dtype=session.dtype,
            weights=weights,
            why=session.why,
            overwrite=args.overwrite,
        )
    data = to_json(name, found) | {"weights": judged_by, "next_token": int(logits.argmax())}
    show(cli.report(args.json, data), data, found)
    return 0


def _weights(
    session: Session, model: Weights, out: Path | None
) -> tuple[Mapping[str, WeightEntry] | None, str | None]:
    """Hashes for the manifest, and what ``--model`` of tools.localize should be."""
    if out:
        written = effective.write(out, model, session.weights())
        return {name: written.hash(name) for name in written.shapes}, str(out)
    return ({}, None) if session.own_weights else (None, model.name)


def describe(session: Session, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of an engine."""
    told = {"backend": "", "device": f"cpu: {platform.machine()}", "flags": ""} | session.describe()
    versions = {NAME: version(), "python": platform.python_version()}
    return told | {
        "options": {name: value for name, value in options.items() if value is not None},
        "cpu_count": os.cpu_count(),
        "versions": versions | told.get("versions", {}),
        "own_weights": session.own_weights,
    }


def describe_files(engine: str, map: str) -> dict[str, Any]:
    """What a manifest says of files that somebody else has made."""
    told = {"name": engine, "version": "of unknown version", "backend": "", "device": "unknown"}
    return told | {"flags": "", "map": Path(map).stem, "versions": {NAME: version()}}


def to_json(engine: str, found: Collected) -> dict[str, Any]:
    """What there is of a trace, as plain data."""
    made = found.manifest
    stages: dict[str, dict[str, Any]] = {}
    for entry in made.files:
        row = stages.setdefault(entry.stage, {"stage": entry.stage, "axes": list(entry.axes)})
        row.setdefault("layers", []).append(entry.layer)
        row["shape"] = list(entry.shape)
    return {
        "schema": SCHEMA,
        "engine": engine,
        "producer": made.producer,
        "architecture": made.architecture,
        "model": made.model.name,
        "out": str(found.path),
        "dtype": made.dtype,
        "cache": made.cache,
        "tokens": list(made.tokens),
        "positions": list(made.positions),
        "steps": list(made.steps),
        "stages": list(stages.values()),
        "absent": found.absent,
        "cache_changed": [msgspec.to_builtins(each) for each in found.changed],
        "files": len(made.files),
        "bytes": found.bytes,
    }


def show(console: Console, data: Mapping[str, Any], found: Collected) -> None:
    """The same for people."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("stage", "axes", "shape", "files"):
        table.add_column(name, justify="right" if name == "files" else "left")
    for row in data["stages"]:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["stage"], " ".join(row["axes"]), shape, str(len(row["layers"])))
    console.print(table)
    for stage, why in found.absent.items():
        console.print(f"not there: {stage} ({why})")
    for change in found.changed[:5]:
        console.print(f"{change}: a row of a cache is written once")
    made = data["producer"]
    console.print(
        f"{found.path}/: {data['files']} files, {cli.size(found.bytes)}, of {made['name']} "
        f"{made['version']}, {data['dtype']}"
    )


if __name__ == "__main__":
    cli.run(main)
