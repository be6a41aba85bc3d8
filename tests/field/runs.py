"""Running one case: an engine, its trace, its verdict, and whether that is right."""

import contextlib
import io
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import NotComparable, UserError
from tests.field import broken, healthy, models
from tools.collect.__main__ import main as collect
from tools.localize import localize
from tools.localize.result import Localization, faults, sentence

ROWS = 24  # of a wrong file's prompt
SEED = 1  # of its model: names were tuned on that of seed 0
TYPES = ("F32", "Q6_K", "Q4_K")  # that each is written in


@dataclass
class Row:
    """One line of the table.

    Attributes:
        precision: group of stages -> what is said of it.
        wrong: what is wrong with what was said; empty is right.
        placed, named, alone: of a wrong file: the first fault is where it is, is called what it is,
            is the only one.
        seconds: of processors, collecting and judging.
    """

    kind: str  # healthy, broken
    name: str
    engine: str
    model: str
    options: str
    length: int
    calls: int
    verdict: str = ""
    says: str = ""
    precision: dict[str, str] = field(default_factory=dict)
    wrong: str = ""
    placed: bool = False
    named: bool = False
    alone: bool = False
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def steps(length: int, calls: int) -> tuple[list[int], int]:
    """How many rows each call has, and how many tokens are then generated one by one."""
    if calls == 1:
        return [length], 0
    if length < calls:
        return [length], calls - 1
    if calls == 3:  # the prompt in two parts, and a token
        return [length // 2, length - length // 2 - 1, 1], 0
    return [length - calls + 1, *[1] * (calls - 1)], 0


def run(case: healthy.Case, made: models.Models) -> Row:
    """A healthy engine."""
    source, *rest = case.model
    row = Row(
        "healthy", case.name, case.engine, _model_name(case.model), " ".join(case.options),
        case.length, case.calls,
    )  # fmt: skip
    out, weights = made.directory / "trace", made.directory / "weights"
    split, generate = steps(case.length, case.calls)
    words = [*case.options, "--tokens", f"random:{case.length}"]
    if case.calls > 1:
        words += ["--steps", ",".join(map(str, split)), "--generate", str(generate)]
    shutil.rmtree(weights, ignore_errors=True)
    own = "--quantize" in case.options or "--bits" in case.options
    if own:
        words += ["--weights", str(weights)]
    makers = {"gguf": made.gguf, "directory": made.checkpoint, "demo": lambda: models.DEMO}
    model = makers[source](*rest)
    found = _judged(row, case.engine, model, weights if own else model, out, words)
    if found is None:
        return row
    row.precision, formats = _precision(found)
    if found.verdict == "fault":
        row.wrong = "accused"
    else:
        false = [
            f"{name} in {group}"
            for group, names in formats.items()
            for name in sorted(names - case.true[group])
        ]
        row.wrong = f"not so: {', '.join(false)}" if false else ""
    return row


def _model_name(model: tuple[Any, ...]) -> str:
    if model[0] == "gguf":
        _, head, theta, kind = model
        demo = "padded demo, " if head == 32 else ""
        return f"{demo}{kind}, head {head}, theta {theta:g}"
    if model[0] == "demo":
        return "the demo"
    _, architecture, head, theta = model
    return f"{architecture}, head {head}, theta {theta:g}"


def _judged(
    row: Row, engine: str, model: Path, judge: Path, out: Path, words: list[str]
) -> Localization | None:
    """Collect and localize; fills in the row. None where one of them refuses."""
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            collect([engine, str(model), "--out", str(out), "--overwrite", *words])
        found = localize(out, judge)
    except (UserError, NotComparable) as error:
        row.verdict, row.says, row.wrong = "error", str(error), "refused"
        return None
    finally:
        row.seconds = round(time.process_time() - start, 1)
    row.verdict, row.says = found.verdict, sentence(found)
    return found


def _precision(found: Localization) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Of each group of stages: its classes with format names, and those names."""
    group_of = {stage: name for name, stages in healthy.GROUPS.items() for stage in stages}
    classes: dict[str, list[str]] = {}
    formats: dict[str, set[str]] = {}
    for stage, entry in found.precision.items():
        group = group_of.get(stage, "rest")
        formats.setdefault(group, set()).update(f.name for f in found.fitted.names(stage))
        formats[group] -= {"float32"}
        if entry["class"] not in ("exact", "f64"):
            classes.setdefault(group, []).append(entry["class"])
    said = {}
    for group, names in classes.items():
        made = ", ".join(sorted(formats[group]))
        said[group] = "/".join(dict.fromkeys(names)) + (f" ({made})" if made else "")
    return said, formats


def run_broken(case: broken.Wrong, kind: str, made: models.Models) -> Row:
    """A wrong file, judged by the right one."""
    raw = models.config(64, **case.model)
    row = Row("broken", f"{case.name} {kind}", "llama.cpp", case.name, kind, ROWS, 1)
    tensors = models.weights(raw, SEED)
    right = models.write_gguf(made.directory / "right.gguf", raw, tensors, kind)
    case.change(tensors)
    wrong = models.write_gguf(
        made.directory / "wrong.gguf", raw, tensors, kind, case.types, **case.metadata
    )
    words = ["--tokens", f"random:{ROWS}", "--of", str(right)]
    found = _judged(row, "llama.cpp", wrong, right, made.directory / "trace", words)
    if found is None:
        return row
    row.precision, _ = _precision(found)
    entries = faults(found)
    row.alone = len(entries) == 1
    if not entries:
        row.wrong = "missed"
        return row
    first = entries[0]
    # of a segment any stage of it
    stages = {first.stage, *(stage for stage, _ in first.first.suspect.item.segment)}
    row.placed = any((stage, first.layer) in case.places for stage in stages)
    row.named = row.placed and first.name in case.names
    row.says += f" [{len(entries)}: {'; '.join(_entry(e) for e in entries[:3])}]"
    return row


def _entry(fault: Any) -> str:
    unnamed = "" if fault.diagnosis else f" ({fault.first.shape or '?'})"
    return f"{fault.layer} {fault.stage} {fault.name}{unnamed}"
