"""``python -m tools.reference``: write docs/reference.md from the tables that the code runs on."""

from pathlib import Path

from stages import cli
from stages.table import STAGES
from stages.verdict import CLASSES

FILE = Path(__file__).parents[1] / "docs" / "reference.md"


def render() -> str:
    """The whole page."""
    from tools.localizer.catalogue import CATALOGUE

    lines = [
        "# Reference",
        "",
        "Made by `python -m tools.reference` from the tables that the code itself runs on.",
        "",
        "## Stages, in computation order",
        "",
        "Axis letters: B batch, T query position, S key position, N query heads, K key/value "
        "heads, H head size, D hidden, F intermediate, V vocabulary. Files hold one sequence, "
        "without B.",
        "",
        "| stage | file | computed from | axes | value |",
        "|---|---|---|---|---|",
    ]
    for row in STAGES:
        place = {"start": "layer-0/", "layer": "layer-<n>/", "end": ""}[row.scope]
        inputs, axes = ", ".join(row.inputs), " ".join(row.axes)
        lines.append(f"| `{row.name}` | {place}{row.name}.bin | {inputs} | {axes} | {row.value} |")
    lines += [
        "",
        "## Precision classes",
        "",
        "The lowest significant bits that still count as each arithmetic: of sums of products "
        "(linear layers, scores, weighted sum), and of everything else.",
        "",
        "| class | sums of products | everything else |",
        "|---|---|---|",
    ]
    for name, products, others in CLASSES:
        lines.append(f"| {name} | {products:g} | {'' if name == '8-bit' else f'{others:g}'} |")
    named = {entry.name for entry in CATALOGUE}
    lines += [
        "",
        "## Known mistakes",
        "",
        f"{len(named)} mistakes that `localize` tries on a faulty stage and names.",
        "",
        "| name | says | stages |",
        "|---|---|---|",
    ]
    for entry in CATALOGUE:
        where = "any stage" if len(entry.stages) == len(STAGES) else ", ".join(entry.stages)
        lines.append(f"| `{entry.name}` | {entry.says.replace('{}', '...')} | {where} |")
    lines += [
        "",
        "Where none of them fits, the shape of the error is described: zeros (`zeros`, "
        "`dead_head`), a constant factor (`constant_factor`, `row_scaled`), an additive constant "
        "(`additive_constant`), saturation (`saturation`), rounding to a format "
        "(`rounded_to_<format>`, `computed_in_<format>`), a corrupted row of a weight "
        "(`row_corrupted`), and the slices that carry it.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    cli.Parser(prog="python -m tools.reference", description=__doc__).parse_args(argv)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    cli.run(main)
