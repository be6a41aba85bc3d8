"""``python -m tests.maintain.reference``: write docs/reference.md from the architectures."""

from pathlib import Path

from qwen_jax import cli
from stages.architecture import Architecture
from stages.architectures import ALL_NAMES, ARCHITECTURES
from stages.verdict import CLASSES

FILE = Path(__file__).parents[2] / "docs" / "reference.md"


def render() -> str:
    """The whole page."""
    from tools.localize.mistakes import CATALOGUE

    lines = [
        "# Reference",
        "",
        "Made by `python -m tests.maintain.reference` from the architectures of the code.",
        "",
        "Axis letters: B batch, T query position, S key position, N query heads, K key/value "
        "heads, H head size, D hidden, F intermediate, V vocabulary. Files hold one sequence, "
        "without B.",
    ]
    for arch in ARCHITECTURES.values():
        lines += _tables(arch)
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
        where = "any stage" if len(entry.stages) == len(ALL_NAMES) else ", ".join(entry.stages)
        lines.append(f"| `{entry.name}` | {entry.says.replace('{}', '...')} | {where} |")
    lines += [
        "",
        "The same in several stages is one fault; two layers with each other's weights are "
        "`layers_exchanged`.",
        "",
        "Where none of them fits, the shape of the error is described: zeros (`zeros`, "
        "`dead_head`), a constant factor (`constant_factor`, `row_scaled`), an additive constant "
        "(`additive_constant`), saturation (`saturation`), rounding to a format "
        "(`rounded_to_<format>`, `computed_in_<format>`), a corrupted row of a weight "
        "(`row_corrupted`), and the slices that carry it.",
    ]
    return "\n".join(lines) + "\n"


def _tables(arch: Architecture) -> list[str]:
    """The two tables of one architecture."""
    lines = [
        "",
        f"## {arch.name}: stages, in computation order",
        "",
        "| stage | file | computed from | parameters | axes | value |",
        "|---|---|---|---|---|---|",
    ]
    for stage in arch.cached.stages:
        place = {"start": "layer-0/", "layer": "layer-<n>/", "end": ""}[stage.scope]
        inputs, axes = ", ".join(stage.inputs), " ".join(stage.axes)
        read = ", ".join(f"`{name}`" for name in stage.parameters)
        cells = [f"`{stage.name}`", f"{place}{stage.name}.bin", inputs, read, axes, stage.value]
        lines.append(f"| {' | '.join(cells)} |")
    cache = " and ".join(f"`{stage.name}`" for stage in arch.cache)
    lines += [
        "",
        f"{cache} are there only where there is a cache; without one, what they are computed from "
        "is read in their place.",
        "",
        f"## {arch.name}: parameters",
        "",
        "| parameter | axes | Hugging Face | GGUF |",
        "|---|---|---|---|",
    ]
    for each in arch.parameters:
        names = [each.tensor, each.gguf]
        if each.scope == "layer":
            names = [f"model.layers.&lt;n&gt;.{names[0]}", f"blk.&lt;n&gt;.{names[1]}"]
        tied = ", or the embedding where the two are tied" if each.tied_to else ""
        lines.append(f"| `{each.name}` | {' '.join(each.axes)} | {names[0]}{tied} | {names[1]} |")
    return lines


def main(argv: list[str]) -> int:
    cli.Parser(prog="tests.maintain.reference", description=__doc__).parse_args(argv)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    cli.run(main)
