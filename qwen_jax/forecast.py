"""``--headroom FORMAT`` of the trace commands: where an engine in that format would overflow.

Imports neither jax nor torch.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import ml_dtypes
from rich.console import Console

from qwen_jax.table import Table
from stages.architecture import place_of
from stages.errors import UserError
from stages.files import numpy_dtype
from stages.headroom import FORMATS, SUM, Format, Headroom, measure, missing
from stages.trace import Trace

SHOWN = 20  # rows, the largest ones
SHORT = {"f16": "float16", "fp16": "float16", "bf16": "bfloat16"}
SHORT |= {"fp8": "float8_e4m3fn", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


def add_argument(parser: argparse.ArgumentParser) -> None:
    help = "also say where an engine in that format would overflow, and exit with 1 if it would: "
    parser.add_argument(
        "--headroom", type=_format, metavar="FORMAT", help=help + ", ".join(FORMATS)
    )


def _format(text: str) -> Format:
    name = SHORT.get(text.lower(), text.lower())
    if name not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(FORMATS)}")
    return FORMATS[name]


def check(format: Format, dtype: str) -> None:
    """Refuse to forecast from a run that cannot get past the end of the format itself.

    Raises:
        UserError: it cannot.
    """
    if ml_dtypes.finfo(numpy_dtype(dtype)).max <= ml_dtypes.finfo(format.dtype).max:
        raise UserError(
            f"--headroom {format.name} of a run in {dtype}, which ends there too: use --dtype "
            "float32"
        )


class Forecast:
    """Where an engine in a format would overflow, by one trace in another."""

    def __init__(self, trace: Trace, format: Format) -> None:
        self.format, self.rows = format, measure(trace, format)
        self.missing = missing(trace, format)

    @property
    def overflows(self) -> list[Headroom]:
        return [row for row in self.rows if row.overflows]

    def to_json(self) -> dict[str, Any]:
        """The object ``headroom`` of ``--json``."""
        return {
            "format": self.format.name,
            "most": self.format.most,
            "overflows": bool(self.overflows),
            "rows": [row.to_json() for row in self.rows],
            "missing": self.missing,
        }

    def show(self, show: Console) -> None:
        show.print(f"\n{self._sentence()}", soft_wrap=True)
        told = [row for row in self.rows if row.what != SUM]
        least = sorted((row.part for row in told), reverse=True)[:SHOWN][-1:]
        shown = [row for row in told if row.part >= least[0]]
        if shown:
            show.print(_table(shown).terminal)
        if len(told) > len(shown):
            show.print(f"and {len(told) - len(shown)} more, see headroom of --json")
        sums = [row for row in self.rows if row.what == SUM and row.over]
        if sums:
            most = max(sums, key=lambda row: row.part)
            show.print(
                f"norms need float32: sums of squares reach {_number(most.largest)} "
                f"({place_of(most.stage, most.layer)})"
            )
        if self.missing:
            show.print(f"not in the trace, so not known: {', '.join(self.missing)}")

    def _sentence(self) -> str:
        name, over = self.format.name, self.overflows
        ends = f"{name} ends at {_number(self.format.most)}"
        told = [row for row in self.rows if row.what != SUM]
        if over:
            places = "place" if len(over) == 2 else "places"
            more = f", and in {len(over) - 1} more {places}" if len(over) > 1 else ""
            return f"in {name} overflows first {_says(over[0])}{more}; {ends}"
        if not told:
            return f"in {name} nothing overflows, or takes more than a quarter of its range; {ends}"
        most = max(told, key=lambda row: row.part)
        return f"in {name} nothing overflows; nearest is {_says(most)}; {ends}"


def _says(row: Headroom) -> str:
    what = {"value": "", "before the scale": " before the scale"}.get(row.what, f" as {row.what}")
    where = f"channel {row.channel}" if row.head is None else f"head {row.head}, key {row.channel}"
    place = place_of(row.stage, row.layer)
    return f"{place}, {_number(row.largest)}{what} in {where}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.4g}"


def _table(rows: Sequence[Headroom]) -> Table:
    cells = []
    for row in rows:
        layer, head = ("" if x is None else str(x) for x in (row.layer, row.head))
        part = f"{row.part:.0%}" if row.part < 10 else f"{row.part:,.0f} x"
        largest, place = _number(row.largest), (str(row.position), str(row.channel))
        cells.append((layer, row.stage, row.what, largest, part, head, *place))
    names = ("layer", "stage", "of", "largest", "of range", "head", "row", "channel")
    styles = ["bold red" if row.overflows else "" for row in rows]
    return Table("", names, cells, left=("stage", "of"), styles=styles)
