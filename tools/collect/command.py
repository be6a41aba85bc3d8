"""What ``tools.collect ENGINE`` and ``tools.collect files`` have in common."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from qwen_jax import arguments, cli
from qwen_jax.table import Table
from tools.collect.recorder import Collected

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


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every engine takes beside its own options."""
    arguments.add_prompt_arguments(parser)
    add = parser.add_argument
    add("--stages", default="all", metavar="LIST", help="all, or names of stages")
    add("--layers", default="all", metavar="LIST", help="all, or numbers and ranges: 0,3-5")
    add("--out", type=Path, required=True, metavar="DIR", help="where the trace goes")
    add("--overwrite", action="store_true", help="replace the trace that is in --out")
    cli.add_json(parser)


def show(console: Console, data: Mapping[str, Any], found: Collected) -> None:
    """Print what was collected."""
    rows = [
        (row["stage"], " ".join(row["axes"]), " x ".join(map(str, row["shape"])),
         str(len(row["layers"])))
        for row in data["stages"]
    ]  # fmt: skip
    table = Table("", ("stage", "axes", "shape", "files"), rows, left=("stage", "axes", "shape"))
    console.print(table.terminal)
    for stage, why in found.absent.items():
        console.print(f"not there: {stage} ({why})")
    for change in found.changed[:5]:
        console.print(f"{change}: a row of a cache is written once")
    made = data["producer"]
    console.print(
        f"{found.path}/: {data['files']} files, {cli.size(found.bytes)}, of {made['name']} "
        f"{made['version']}, {data['dtype']}"
    )
