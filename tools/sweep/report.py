"""The rows of a sweep for people: cells, a table in the terminal, a table in Markdown."""

from typing import Any

from rich.table import Table
from rich.text import Text

from tools.sweep.grid import REQUIRE, Point

COLUMNS = (
    "dtype", "T", "B", "program", "flags", "compared with", "bytes", "first difference",
    "local bits", "rel. L2", "arg-max", "KL", "class", "verdict",
)  # fmt: skip
WIDTH = 165  # of the table where no terminal sets it
SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
COLOURS = {"identical": "green", "precision": "cyan", "fault": "bold red", "not run": "dim"}


UNOBSERVED = "* the forward that returns the logits alone, fused as XLA likes: what nobody observes"


def failure(point: Point, row: dict[str, Any]) -> str | None:
    """Why this row fails the sweep; None if it does not."""
    if row["verdict"] == "not run":
        return row["why"] if row.get("failed") else None
    if row["verdict"] == "fault":
        return _fault(row)
    if point.require == REQUIRE and not row["identical"]:
        first = row["first_difference"]
        return f"required identical; {_place(first)} is the first of {row['stages_differing']} " \
               "stages that differ"  # fmt: skip
    bits = row.get("local_bits")
    if isinstance(point.require, int | float) and bits and bits["worst"] < point.require:
        return f"required {point.require} bits; {_place(bits)} has {bits['worst']}"
    return None


def _fault(row: dict[str, Any]) -> str:
    if not row.get("faults"):
        where = row["relative_l2"]
        return f"relative L2 {_number(where['worst'])} at {_place(where)}"
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for fault in row["faults"]:
        by_stage.setdefault(fault["stage"], []).append(fault)
    parts = []
    for stage, found in by_stage.items():
        worst = min(found, key=lambda fault: fault["bits"])
        layers = [str(fault["layer"]) for fault in found if fault["layer"] is not None]
        place = f" of layer {','.join(layers)}" if layers else ""
        parts.append(f"{stage}{place}: {worst['bits']} bits, {worst['expected']} expected")
    return "; ".join(parts)


def cells(point: Point, row: dict[str, Any]) -> list[str]:
    """One row of the table, in the order of ``COLUMNS``."""
    known = [
        SHORT[point.dtype],
        str(point.length),
        str(point.batch),
        _program(point),
        point.flags + (" + excess" if point.excess else ""),
        _compared_with(point),
    ]
    if row["verdict"] == "not run":
        return [*known, *[""] * 7, f"not run: {row['why']}"]
    first, bits = row["first_difference"], row.get("local_bits")
    differing = f"{row['stages_differing']} of {row['stages']} differ"
    same = "same" if row["identical"] else differing
    return [
        *known,
        same,
        _place(first) if first else "",
        f"{bits['worst']} {_place(bits)}" if bits else "",
        "0" if row["identical"] else _number(row["relative_l2"]["worst"]),
        f"{row['argmax_equal']}/{row['positions']}",
        _number(row["kl_max"]),
        _classes(row.get("classes", {})),
        row["verdict"],
    ]


def _program(point: Point) -> str:
    parts = [point.loop]
    if point.attention == "fused":
        parts.append("fused attention")
    if point.precision != "highest":
        parts.append(f"matmul {point.precision}")
    if point.plant:
        parts.append(f"planted {point.plant}")
    return ", ".join(parts)


def _compared_with(point: Point) -> str:
    says = {
        "reference": "un-jitted",
        "captured": "nothing captured",
        "stages": "stages one by one",
        "rerun": "run again",
        "recompiled": "compiled again",
        "unobserved": "other program*",
        "process": "other process",
        "threads": "one thread",
    }
    return says[point.trial]


def _place(where: dict[str, Any]) -> str:
    return where["stage"] + ("" if where["layer"] is None else f" {where['layer']}")


def _number(value: float | None) -> str:
    """None is what JSON made of a number that was not finite."""
    return "not finite" if value is None else "0" if value == 0 else f"{value:.1e}"


def _classes(found: dict[str, str]) -> str:
    """'f32', or 'f32; tf32/f16 in matmul, scores'. What is exact, by chance or always, says
    nothing."""
    kinds: dict[str, list[str]] = {}
    for kind, name in found.items():
        if kind != "lookup":
            kinds.setdefault(name, []).append(kind)
    if not kinds:
        return ""
    usual = max(kinds, key=lambda name: len(kinds[name]))
    rest = [
        f"{name} in {', '.join(held)}"
        for name, held in kinds.items()
        if name not in (usual, "exact")
    ]
    return "; ".join([usual, *rest])


def table(pairs: list[tuple[Point, dict[str, Any]]]) -> Table:
    """For the terminal. Why a point was not run is said below it, once."""
    result = Table(
        box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), caption=UNOBSERVED
    )
    result.caption_justify = "left"
    for name in COLUMNS:
        right, whole = name in ("T", "B"), name in ("local bits", "verdict")
        result.add_column(name, justify="right" if right else "left", no_wrap=whole)
    for point, row in pairs:
        shown = [Text(cell) for cell in [*cells(point, row)[:-1], row["verdict"]]]
        shown[-1].stylize(COLOURS[row["verdict"]])
        result.add_row(*shown)
    return result


def markdown(pairs: list[tuple[Point, dict[str, Any]]]) -> str:
    """The same as a Markdown table; columns that are empty throughout are left out."""
    rows = [cells(point, row) for point, row in pairs]
    used = [n for n in range(len(COLUMNS)) if any(row[n] for row in rows)]
    lines = [[COLUMNS[n] for n in used], ["---"] * len(used)]
    lines += [[row[n].replace("|", "\\|") for n in used] for row in rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{UNOBSERVED.replace('*', chr(92) + '*')}\n"
