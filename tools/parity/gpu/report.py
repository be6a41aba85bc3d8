"""The rows of ``tools.parity --aot`` for people, in the sections of ``tools.parity.report``."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from qwen_jax.table import Table
from tools.parity.grid import Point
from tools.parity.report import Pair, point_cells, section

Row = dict[str, Any]

POINT = ("dtype", "T", "B", "program")
CHECKED = "compiled and checked"
FOUND = ("programs", "kernels", "PTX", "products", "approximate", "fma", "verdict")
LEGEND = """\
--aot: columns and verdicts (nothing of it is a run on hardware):
  programs    compiled, one layer by one layer or as a whole; each with Triton
              products and, where it has products, with cuBLAS's. Tiles are the
              compiler's first choice: none is timed
  kernels     of the program's own, and PTX: their instructions
  products    the formats that products multiply in, with Triton and with
              cuBLAS
  approximate PTX instructions that do not round to nearest, all on the list of
              those allowed, and how often they stand in the code; ex2, rcp,
              div, sqrt: 2, 1, 2 and 1 ulp at most
  fma         fused multiply-adds outside of products and exponentials
  checked     compiled, and every rule holds: products as asked for, arithmetic
              rounds to nearest or is on the list, every stage is an output, no
              atomics, no call but cuBLAS's
  violation   one does not: the sweep fails and names program, stage and
              instruction"""


def failure(point: Point, row: Row) -> str | None:
    """Why this row fails the sweep; None if it does not."""
    if row["verdict"] == "not run":
        return row["why"] if row.get("failed") else None
    if not (found := row["violations"]):
        return None
    first = found[0]
    place = f"{first['program']} program, {first['stage'] or 'no stage'}"
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{first['rule']}: {place}: {first['instruction']}, {first['products']}{more}"


def sections(pairs: list[Pair]) -> Iterator[Table]:
    """What was compiled and checked, and what was not run, by reason."""
    held: dict[str, list[tuple[list[str], str]]] = {}
    for point, row in pairs:
        verdict = row["verdict"]
        if verdict == "not run":
            held.setdefault(f"not run: {row['why']}", []).append((_point(point), verdict))
            continue
        held.setdefault(CHECKED, []).append((_point(point) + _found(row), verdict))
    for title in sorted(held, key=lambda title: title != CHECKED):
        yield section(title, (*POINT, *FOUND) if title == CHECKED else POINT, held[title])


def _point(point: Point) -> list[str]:
    """The cells of ``POINT``."""
    *cells, program = point_cells(point)[:4]
    parts = ["logits alone" if point.trial == "unobserved" else program]
    return [*cells, ", ".join(parts + ["excess"] * point.excess)]


def _found(row: Row) -> list[str]:
    """The cells of ``FOUND``."""
    programs = row["programs"]
    products: dict[str, set[str]] = {}
    approximate: Counter[str] = Counter()
    for program in programs:
        products.setdefault(program["products_by"], set()).update(program["products"])
        for opcode, count in program["approximate"].items():
            approximate[opcode.split(".")[0]] += count
    return [
        str(len(programs)),
        str(sum(program["kernels"] for program in programs)),
        str(sum(program["instructions"] for program in programs)),
        ", ".join(f"{by} {'/'.join(sorted(found))}" for by, found in products.items() if found),
        ", ".join(f"{count} {name}" for name, count in sorted(approximate.items())),
        str(sum(program["contracted"] for program in programs)),
        row["verdict"],
    ]
