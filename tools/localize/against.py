"""Two engines side by side: at every stage where they differ, which one is right."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages import verdict
from stages.architectures import ALL_NAMES, any_stage
from tools.localize.report import COLOURS, Localization

CLEAR = 2.0  # bits by which one side must be better to be called the right one


def judgements(a: Localization, b: Localization) -> list[dict[str, Any]]:
    """One row a stage that both traces hold: each side's bits, and who is right.

    ``right`` is "A", "B", "both" (no more than ``CLEAR`` bits apart and no fault) or "neither".
    The bits are those of the worst layer; each side is judged by its own weights.
    """
    rows = []
    for name in ALL_NAMES:
        levels = [[item.level for item in r.items if item.stage == name] for r in (a, b)]
        if not all(levels):
            continue
        worst = [min(each) for each in levels]
        layers = [_faulty_layers(report, name) for report in (a, b)]
        faulty = [bool(found) for found in layers]
        if all(faulty):
            right = "neither"
        elif any(faulty):
            right = "B" if faulty[0] else "A"
        elif abs(worst[0] - worst[1]) <= CLEAR:
            right = "both"
        else:
            right = "A" if worst[0] > worst[1] else "B"
        rows.append(
            {
                "stage": name,
                "a": {"bits": _bits(a, name), "fault_layers": layers[0]},
                "b": {"bits": _bits(b, name), "fault_layers": layers[1]},
                "right": right,
            }
        )
    return rows


def _faulty_layers(report: Localization, stage: str) -> list[int | None]:
    return [f.suspect.item.layer for f in report.findings if f.suspect.item.stage == stage]


def _bits(report: Localization, stage: str) -> list[float]:
    """[lowest, highest] over the layers."""
    found = [round(item.bits, 1) for item in report.items if item.stage == stage]
    return [min(found), max(found)]


def same_weights(a: Localization, b: Localization) -> bool | None:
    """Whether both sides ran the same weights; None where a manifest is missing to say so."""
    weights = [r.trace.manifest.model.weights if r.trace.manifest else None for r in (a, b)]
    return None if None in weights else weights[0] == weights[1]


def show(console: Console, a: Localization, b: Localization) -> None:
    """Print the table, and first whether the two sides ran the same weights."""
    if same_weights(a, b) is False:
        console.print("the two sides have different weights; each is judged by its own")
    elif a.model != b.model:
        console.print(f"A is judged by the weights of {a.model}, B by those of {b.model}")
    table = Table(box=None, header_style="bold", pad_edge=False, title="A against B")
    table.title_justify = "left"
    for name in ("stage", "A bits", "B bits", "right"):
        table.add_column(name, justify="right" if "bits" in name else "left")
    for row in judgements(a, b):
        cells = [_range(row[side], row["stage"]) for side in ("a", "b")]
        right = {"both": "both", "neither": "neither: a fault on both sides"}.get(row["right"])
        reason = "more precise" if not (row["a"]["fault_layers"] or row["b"]["fault_layers"]) else (
            "the other has a fault"
        )  # fmt: skip
        table.add_row(row["stage"], *cells, right or f"{row['right']} ({reason})")
    console.print(table)


def _range(side: dict[str, Any], stage: str) -> Text:
    low, high = side["bits"]
    text = f"{low:.1f}" if low == high else f"{low:.1f} - {high:.1f}"
    if side["fault_layers"]:
        return Text(text + "*", style="bold red")
    return Text(text, style=COLOURS[verdict.class_of(low, any_stage(stage)) or "lower"])
