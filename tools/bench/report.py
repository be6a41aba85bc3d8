"""The tables of ``tools.bench``, for people and as Markdown."""

from collections.abc import Iterator
from typing import Any

from qwen_jax.table import Table
from tools.bench.measure import Figure

TITLES = {
    "cold": "Cold: whole processes",
    "warm": "Warm: everything loaded and compiled",
    "decode": "Decoding: a prompt, then 256 tokens, a call each, through a key/value cache",
    "tools": "diff and localize",
    "memory": "Memory: a fresh process, all stages of all layers, weights on disk in bfloat16",
}
HEADINGS = ("model", "measured", "median", "range", "floor", "wanted", "reached")


def _cells(figure: Figure) -> tuple[str, ...]:
    unit = figure.unit
    digits = 3 if unit == "s" and figure.value < 1 else 2
    spread = "" if figure.low is None else f"{figure.low:.{digits}f} - {figure.high:.{digits}f}"
    wanted = "" if figure.bar is None else f"{'<=' if figure.most else '>='} {figure.bar:g} {unit}"
    reached = {None: "", True: "yes", False: "no"}[figure.reached]
    value = f"{figure.value:.{digits}f} {unit}"
    least = "" if figure.floor is None else f"{figure.floor:.3f} s"
    return figure.of, figure.what, value, spread, least, wanted, reached


def tables(figures: list[Figure]) -> Iterator[Table]:
    """The table of every part that was measured."""
    for part, title in TITLES.items():
        if rows := [_cells(figure) for figure in figures if figure.part == part]:
            yield Table(title, HEADINGS, rows, left=HEADINGS[:2])


def markdown(figures: list[Figure], machine: dict[str, Any], repeat: int) -> str:
    """The same as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']} when it began; "
        f"{versions}. Medians of {repeat} runs, contenders in turn."
    ]
    if rates := machine.get("rates"):
        lines += [
            "",
            f"Floors are at this machine's rates: {rates['products'] / 1e9:.0f} GFLOP/s of float32 "
            f"products, {rates['memory'] / 1e9:.1f} GB/s of memory, {rates['disk'] / 1e9:.1f} GB/s "
            "into a file of the page cache.",
        ]
    for table in tables(figures):
        lines += ["", f"## {table.title}", "", table.markdown.rstrip()]
    return "\n".join(lines) + "\n"
