"""The rows of a sweep for people: sections by what is required, in the terminal and in Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from qwen_jax.table import Cell, Table
from tools.parity.grid import REQUIRE, Point

Row = dict[str, Any]
Pair = tuple[Point, Row]

POINT = ("dtype", "T", "B", "program", "flags", "second run")
FOUND = ("differ", "first", "rel. L2", "local bits", "class", "arg-max", "KL", "verdict")
NUMBERS = ("T", "B", "differ", "arg-max")
SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
COLOURS = {
    "identical": "green",
    "checked": "green",
    "precision": "cyan",
    "fault": "bold red",
    "violation": "bold red",
    "not run": "dim",
}
SECOND = {
    "reference": "",
    "captured": "nothing captured",
    "stages": "stages one by one",
    "rerun": "run again",
    "recompiled": "compiled again",
    "unobserved": "logits alone",
    "process": "other process",
    "threads": "one thread",
}
LEGEND = """\
columns:
  T, B        T tokens in each of B sequences; every second sequence is half as
              long, and padded
  program     layer: one layer compiled, and run for each. program, scan: the
              whole model as one program. fused: attention by
              jax.nn.dot_product_attention; online: by the online softmax of
              flash attention. products: float32 products as a GPU may have
              them
  flags       of XLA on the CPU: reference (no fused multiply-add, no YNNPACK)
              or its default; excess: XLA may keep more precision than the
              dtype has
  second run  what differs from the first; logits alone: a program that returns
              nothing else
  differ      stages with other bytes; first: the first of them, and its layer
  rel. L2     the largest difference of any stage, with all that arrived there
              from before
  local bits  significant bits of the least exact stage, each replayed by
              itself in float64
  class       the precision that these bits show; where kinds of stages differ,
              by kind
  arg-max     positions with the same next token
  KL          largest divergence of the next token's probabilities, in nats

verdicts:
  identical   every byte of every stage is the same
  precision   bytes differ, and every stage is as exact as its dtype allows:
              rounding, no mistake
  fault       a stage is less exact than its dtype, or has a NaN of its own:
              the sweep fails
  not run     impossible here, for the reason given; neither passes nor fails

exit codes: 0 pass, 1 a fault or a requirement not met, 2 wrong use, 3 nothing
could be run"""


def failure(point: Point, row: Row) -> str | None:
    """Why this row fails the sweep; None if it does not."""
    if row["verdict"] == "not run":
        return row["why"] if row.get("failed") else None
    if row["verdict"] == "fault":
        return fault_says(row)
    if point.require == REQUIRE and not row["identical"]:
        first = row["first_difference"]
        return f"required identical; {_place(first)} is the first of {row['stages_differing']} " \
               "stages that differ"  # fmt: skip
    bits = row.get("local_bits")
    if isinstance(point.require, int | float) and bits and bits["worst"] < point.require:
        return f"required {point.require} bits; {_place(bits)} has {bits['worst']}"
    return None


def fault_says(row: Row) -> str:
    if not row.get("faults"):
        where = row["relative_l2"]
        return f"relative L2 {_number(where['worst'])} at {_place(where)}"
    by_stage: dict[str, list[Row]] = {}
    for fault in row["faults"]:
        by_stage.setdefault(fault["stage"], []).append(fault)
    parts = []
    for stage, found in by_stage.items():
        worst = min(found, key=lambda fault: fault["bits"])
        layers = [str(fault["layer"]) for fault in found if fault["layer"] is not None]
        place = f" of layer {','.join(layers)}" if layers else ""
        parts.append(f"{stage}{place}: {worst['bits']} bits, {worst['expected']} expected")
    return "; ".join(parts)


# --- sections


def sections(pairs: list[Pair]) -> Iterator[Table]:
    """The whole sweep: compiled against un-jitted, compiled against compiled, and what was not run;
    the strictest requirement first."""
    held: dict[tuple[int, float, str], list[Pair]] = {}
    key: tuple[int, float, str]
    for point, row in pairs:
        if row["verdict"] == "not run":
            key = (2, 0, f"not run: {row['why']}")
        elif point.trial == "reference":
            key = (0, _strictness(point), f"compiled against un-jitted; {_required(point)}")
        else:
            key = (1, _strictness(point), f"compiled against compiled; {_required(point)}")
        held.setdefault(key, []).append((point, row))
    for key in sorted(held, key=lambda key: key[:2]):
        names = POINT if key[0] == 2 else POINT + FOUND
        yield section(
            key[2],
            names,
            [
                (point_cells(point) + found_cells(point, row), row["verdict"])
                for point, row in held[key]
            ],
        )


def section(title: str, names: Sequence[str], rows: Sequence[tuple[list[str], str]]) -> Table:
    """The points of one requirement, or not run for one reason: (cells, verdict) of each. Columns
    that would be empty throughout are left out."""
    used = [n for n in range(len(rows[0][0])) if any(cells[n] for cells, _ in rows)]
    shown: list[list[Cell]] = []
    for cells, verdict in rows:
        *first, last = (cells[n] for n in used)
        style = "bold red" if last.endswith("fails") else COLOURS[verdict]
        shown.append([*first, Text(last, style)])
    kept = [names[n] for n in used]
    return Table(title, kept, shown, left=[name for name in kept if name not in NUMBERS], gap=1)


def _strictness(point: Point) -> float:
    """For sorting: "identical", then more bits before fewer, then nothing."""
    return float("-inf") if isinstance(point.require, str) else -(point.require or 0.0)


def _required(point: Point) -> str:
    if point.require == REQUIRE:
        return "required: every byte the same"
    if point.require is not None:
        return f"required: {point.require} bits in every stage"
    return "required: no fault"


def point_cells(point: Point) -> list[str]:
    """The cells of ``POINT``."""
    program: list[str] = [point.loop]
    if point.attention != "stages":
        program.append(point.attention)
    if point.products:
        program.append(f"products {point.products}")
    if point.precision != "highest":
        program.append(f"matmul {point.precision}")
    if point.plant:
        program.append(f"planted {point.plant}")
    if len(program) > 1 and point.loop == "layer":
        del program[0]
    return [
        SHORT[point.dtype],
        str(point.length),
        str(point.batch),
        ", ".join(program),
        point.flags + (" + excess" if point.excess else ""),
        SECOND[point.trial],
    ]


def found_cells(point: Point, row: Row) -> list[str]:
    """The cells of ``FOUND``."""
    if row["verdict"] == "not run":
        return []
    first, bits = row["first_difference"], row.get("local_bits")
    fails = row["verdict"] != "fault" and failure(point, row)
    return [
        f"{row['stages_differing']}/{row['stages']}",
        _place(first) if first else "",
        "0" if row["identical"] else _number(row["relative_l2"]["worst"]),
        f"{bits['worst']:.1f} {_place(bits)}" if bits else "",
        _classes(row.get("classes", {})),
        f"{row['argmax_equal']}/{row['positions']}",
        _number(row["kl_max"]),
        row["verdict"] + (": fails" if fails else ""),
    ]


def _place(where: Row) -> str:
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


def show(console: Console, sections: list[Table]) -> None:
    """The sections, in a terminal. One that is narrower wraps lines; rich would cut words."""
    console.width = 200
    for section in sections:
        console.print(Text(section.title, "bold"))
        console.print(section.terminal)
        console.print()


def markdown(sections: list[Table]) -> str:
    """The sections as Markdown, a table each."""
    return "\n".join(f"### {s.title[0].upper()}{s.title[1:]}\n\n{s.markdown}" for s in sections)
