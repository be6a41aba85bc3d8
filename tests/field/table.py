"""The rows of ``python -m tests.field`` as Markdown."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.field import broken, healthy, runs
from tests.field.runs import Row

PACKAGES = (
    "xllamacpp", "gguf", "torch", "transformers", "onnxruntime", "openvino", "mlx", "mlx-lm",
    "google-tunix", "jax", "numpy",
)  # fmt: skip
GROUPS = (*healthy.GROUPS, "rest")


def line(row: Row) -> str:
    """One row for the screen."""
    what = row.wrong or "right"
    if row.kind == "broken":
        what = " ".join(
            word if yes else f"not {word}"
            for word, yes in (("placed", row.placed), ("named", row.named), ("alone", row.alone))
        )
        what = row.wrong or what
    return f"{row.seconds:5.1f} s  {row.kind} {row.name}: {row.verdict}: {what}: {row.says}"


def totals(rows: Sequence[Row]) -> list[str]:
    """The lines that sum up."""
    fine = [row for row in rows if row.kind == "healthy"]
    found = []
    if fine:
        accused = sum(row.wrong in ("accused", "refused") for row in fine)
        named = sum(row.wrong.startswith("not so") for row in fine)
        found.append(f"healthy: {len(fine)} runs, {accused} accused, {named} with a wrong format")
    wrong = [row for row in rows if row.kind == "broken"]
    for kind in runs.TYPES:
        found += _counts(f"wrong files, {kind}", [row for row in wrong if row.options == kind])
    held_out = {each.name for each in broken.WRONG if each.held_out}
    mine = [row for row in wrong if row.model in held_out]
    found += _counts(f"of these, of {len(held_out)} mistakes that no name was tuned on", mine)
    return found


def _counts(what: str, rows: Sequence[Row]) -> list[str]:
    counts = ", ".join(
        f"{sum(getattr(row, word) for row in rows)} {says}"
        for word, says in (("placed", "placed"), ("named", "named"), ("alone", "one entry"))
    )
    return [f"{what}: {len(rows)} runs, {counts}"] if rows else []


def page(rows: Sequence[Row]) -> str:
    """docs/field.md."""
    return "\n".join([*_head(rows), *_healthy(rows), *_broken(rows), *_figures(rows), ""])


def _head(rows: Sequence[Row]) -> Iterator[str]:
    yield "# Real engines, healthy and broken"
    yield ""
    yield "Made by `make field`, which runs what is installed: real engines on small models with"
    yield "random weights and on the trained demo, traced by `tools.collect`, judged by"
    yield "`tools.localize`."
    yield ""
    yield from (f"- **{total}**" for total in totals(rows))
    yield ""
    if missing := _missing(rows):
        yield f"Not run here: {missing}."
        yield ""
    yield f"Run on {_processor()}, {os.cpu_count()} cores, Python {platform.python_version()};"
    yield ", ".join(versions()) + ". Seconds are those of processors, of collecting and judging,"
    yield "in processes that keep compiled programs."
    yield ""


def _missing(rows: Sequence[Row]) -> str:
    """Cases without a row, counted by engine."""
    done = {row.name for row in rows}
    left = [
        f"{case.engine} with {case.length} tokens"
        for case in healthy.cases()
        if case.name not in done
    ]
    words = [f"{left.count(each)} healthy of {each}" for each in dict.fromkeys(left)]
    for kind in runs.TYPES:
        count = sum(f"{each.name} {kind}" not in done for each in broken.WRONG)
        words += [f"{count} wrong files in {kind}"] if count else []
    return ", ".join(words)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor()
    names = [part.split(":", 1)[1].strip() for part in text.splitlines() if "model name" in part]
    return names[0] if names else platform.machine()


def versions() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _healthy(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Healthy engines"
    yield ""
    count = len(healthy.covering(healthy.OPTIONS))
    yield f"llama.cpp's {count} cases are a covering design, not the full product: each pair of"
    yield "values of two of weight type, length, cache, theta, calls,"
    yield "size of a head and flash attention occurs at least once. A quantised V cache needs flash"
    yield "attention; without it K's alone is quantised. Wrong is an accusation, or the name of a"
    yield "format that the engine does not compute in."
    yield ""
    head = ("engine", "model", "options", "tokens", "calls", "verdict", *GROUPS, "", "s")
    yield from _markdown(head, (_line(row) for row in rows if row.kind == "healthy"))


def _line(row: Row) -> list[str]:
    groups = [row.precision.get(group, "") for group in GROUPS]
    options = row.options.replace("--", "")
    right = f"**{row.wrong}**: {row.says}" if row.wrong else "right"
    return [
        row.engine, row.model, options, str(row.length), str(row.calls), row.verdict, *groups,
        right, f"{row.seconds:.0f}",
    ]  # fmt: skip


def _broken(rows: Sequence[Row]) -> Iterator[str]:
    some = [row for row in rows if row.kind == "broken"]
    if not some:
        return
    yield "## Wrong GGUFs"
    yield ""
    yield "Files as wrong converters make them, run by llama.cpp with its own defaults, judged by"
    yield "the right file of the same type. p: placed, n: named, 1: one entry; a dash is a no."
    yield "Mistakes with a star were added when the names were done, and none was changed for them;"
    yield "of the others names were tuned on other weights."
    yield ""
    lines = []
    for each in broken.WRONG:
        name = each.name
        mine = {row.options: row for row in some if row.model == name}
        if mine:
            cells = [_marks(mine[kind]) if kind in mine else "" for kind in runs.TYPES]
            first = mine[next(kind for kind in runs.TYPES if kind in mine)]
            star = " \\*" if each.held_out else ""
            lines.append([name.replace("_", " ") + star, *cells, _short(first.says)])
    yield from _markdown(("mistake", *runs.TYPES, f"said of {runs.TYPES[0]}"), lines)


def _marks(row: Row) -> str:
    if row.wrong:
        return row.wrong
    marks = (("p", row.placed), ("n", row.named), ("1", row.alone))
    return " ".join(mark if yes else "-" for mark, yes in marks)


def _short(says: str) -> str:
    return says.partition(" [")[0].replace("|", "\\|")


def _figures(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.kind == "timing":
            yield "## From an engine's model file to its verdict"
            yield ""
            yield f"{row.name}, {row.model}, {row.length} tokens, two commands: {row.seconds:.0f} s"
            yield f"({row.says})."
