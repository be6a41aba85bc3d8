"""``python -m tools.localize TRACE --model M``: where error is created, and what the mistake is.

Every dumped stage is replayed alone, in float64, on its own dumped inputs. What differs from the
dump was created at that stage; what arrived there from before cannot show.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen_jax import source
from qwen_jax.checkpoint import Checkpoint
from stages import cli, verdict
from stages.errors import NotComparable
from stages.table import LAYER_STAGES, NAMES, STAGE, computation_order
from stages.trace import Layout, Trace, numpy_dtype, open_trace
from stages.verdict import Item, Suspect

Key = tuple[str, int | None]


@dataclass
class Explanation:
    """One explanation that restores a suspect's bits."""

    name: str
    bits: float
    says: str


@dataclass
class Finding:
    """A suspect with what explains it."""

    suspect: Suspect
    dump_only: bool = False
    diagnosis: list[Explanation] = field(default_factory=list)
    shape: str = ""


@dataclass
class Report:
    """Everything localize found out about one trace."""

    trace: Trace
    model: str
    dtype: str
    items: list[Item]
    findings: list[Finding]
    skipped: list[dict[str, Any]]
    formats: dict[str, tuple[str, str]]  # stage -> precision class and format, found by trying

    @property
    def precision(self) -> dict[str, dict[str, Any]]:
        table = verdict.precision(self.items, {f.suspect.key for f in self.findings})
        for stage, (name, says) in self.formats.items():
            table[stage] |= {"class": name, "says": says}
        return table

    @property
    def verdict(self) -> str:
        if self.findings:
            return "fault"
        fine = ("exact", "f64", "f32")
        return "clean" if all(p["class"] in fine for p in self.precision.values()) else "precision"


def trace_dtype(trace: Trace) -> str:
    """The precision that a trace was computed in: its manifest's, or the coarsest format that
    holds all values of its first dumped stages exactly."""
    if trace.dtype:
        return trace.dtype
    names = [key for key in trace.entries if STAGE[key[0]].kind != "lookup"][:6]
    values = [trace.read(*key).ravel()[:65536] for key in names]
    for name in ("bfloat16", "float16"):
        with np.errstate(over="ignore", invalid="ignore"):
            same = [
                np.array_equal(v, v.astype(numpy_dtype(name)).astype(v.dtype), equal_nan=True)
                for v in values
            ]
        if all(same):
            return name
    return "float32"


def localize(trace: Trace, model: Checkpoint, advance: Callable[[Item], None]) -> Report:
    """Measure, judge and explain one trace. ``advance`` is called after every stage.

    Raises:
        NotComparable: nothing in the trace can be replayed.
    """
    from qwen_jax.replay import Replay

    dtype = trace_dtype(trace)
    replay = Replay(trace, model, numpy_dtype(dtype))
    config = model.config.to_json()
    items = []
    for m in replay:
        items.append(verdict.judge(m.stage, m.layer, m.sums, m.segment, config, dtype))
        advance(items[-1])
    if not items:
        raise NotComparable(f"not comparable: {trace.path} holds no stage that can be replayed")

    from tools import diagnose

    findings = diagnose.findings(replay, items, dtype)
    formats = diagnose.formats(replay, items, dtype, findings)
    skipped = _skipped(trace, model, items)
    return Report(trace, model.name, dtype, items, findings, skipped, formats)


def _skipped(trace: Trace, model: Checkpoint, items: list[Item]) -> list[dict[str, Any]]:
    """What was not checked alone: stages that are not in the trace, by stage."""
    rows: dict[str, list[int | None]] = {}
    for stage, layer in computation_order(model.config.num_hidden_layers):
        if (stage.name, layer) not in trace.entries:
            rows.setdefault(stage.name, []).append(layer)
    covered = {link: item.stage for item in items for link in item.segment}
    result = []
    for stage, layers in rows.items():
        whole = len(layers) == model.config.num_hidden_layers
        entry: dict[str, Any] = {"stage": stage, "why": "not in the trace"}
        if STAGE[stage].scope == "layer" and not whole:
            entry["layers"] = layers
        through = {covered.get((stage, layer)) for layer in layers}
        if None not in through:
            entry["checked_through"] = sorted(t for t in through if t)
        result.append(entry)
    return result


# --- output


@dataclass
class Fault:
    """Findings of one cause, as reported: one entry, whatever the number of layers."""

    layer: int | str | None
    stage: str
    findings: list[Finding]
    also: list[str] = field(default_factory=list)

    @property
    def first(self) -> Finding:
        return self.findings[0]

    def to_json(self) -> dict[str, Any]:
        worst = min(self.findings, key=lambda f: f.suspect.found)
        suspect = worst.suspect
        entry: dict[str, Any] = {
            "layer": self.layer,
            "stage": self.stage,
            "bits": round(suspect.found, 1),
            "expected_bits": round(suspect.expected, 1),
            "where": suspect.where,
            "diagnosis": [
                {"name": e.name, "bits": round(e.bits, 1), "says": e.says}
                for e in self.first.diagnosis
            ],
        }
        if suspect.item.segment:
            entry["segment"] = [*dict.fromkeys(s for s, _ in suspect.item.segment), self.stage]
        if suspect.why == "nan":
            entry["nonfinite"] = suspect.item.born
        if self.first.dump_only:
            entry["dump_only"] = True
        if self.also:
            entry["also"] = self.also
        if self.first.shape:
            entry["shape"] = self.first.shape
        return entry


def faults(report: Report) -> list[Fault]:
    """Findings put together by cause, first cause first."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in report.findings:
        name = finding.diagnosis[0].name if finding.diagnosis else finding.suspect.why
        groups.setdefault((finding.suspect.item.stage, name), []).append(finding)
    measured: dict[str, set] = {}
    for item in report.items:
        measured.setdefault(item.stage, set()).add(item.layer)
    result: list[Fault] = []
    for (stage, name), found in groups.items():
        layers = [f.suspect.item.layer for f in found]
        fault = Fault(_layers(layers, measured[stage]), stage, found)
        twin = next((f for f in result if _same_cause(f, fault, name)), None)
        if twin:
            twin.also.append(stage)
        else:
            result.append(fault)
    order = {(i.stage, i.layer): n for n, i in enumerate(report.items)}
    return sorted(result, key=lambda f: order[f.first.suspect.key])


TWINS = ({"q_post_rope", "k_post_rope"}, {"attn_norm", "ffn_norm", "final_norm"})


def _same_cause(first: Fault, second: Fault, name: str) -> bool:
    """Whether two stages that share code show the same named mistake in the same layers."""
    named = bool(first.first.diagnosis) and first.first.diagnosis[0].name == name
    related = any({first.stage, second.stage} <= twins for twins in TWINS)
    layers = first.layer == second.layer or (first.layer == "all" and second.layer is None)
    return named and related and layers


def _layers(found: list[int | None], measured: set) -> int | str | None:
    if len(found) == 1:
        return "all" if measured == {found[0]} and len(measured) > 1 else found[0]
    if set(found) == measured:
        return "all"
    mask = np.zeros(max(n for n in measured if n is not None) + 2, bool)
    mask[[n for n in found if n is not None]] = True
    return verdict.ranges(mask)


def to_json(report: Report) -> dict[str, Any]:
    """The object of ``--json``."""
    return {
        "schema": 1,
        "verdict": report.verdict,
        "trace": str(report.trace.path),
        "model": report.model,
        "dtype": report.dtype,
        "faults": [fault.to_json() for fault in faults(report)],
        "precision": report.precision,
        "skipped": report.skipped,
    }


def sentence(report: Report) -> str:
    """The verdict in one sentence."""
    found = faults(report)
    if found:
        first = found[0]
        what = _place(first)
        why = first.first.diagnosis[0].says if first.first.diagnosis else "of no known kind"
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        return f"fault: {what}: {why}{more}"
    lowered: dict[str, list[str]] = {}
    for stage, entry in report.precision.items():
        if entry["class"] not in ("exact", "f64", "f32"):
            lowered.setdefault(entry["class"], []).append(stage)
    if not lowered:
        return "clean: every stage that could be checked has the bits of float32 or better"
    meaning = _meaning(lowered, _through(report.items))
    parts = [
        f"{name} in {'all other stages' if len(s) > 12 else ', '.join(s)}"
        for name, s in lowered.items()
    ]
    how = sorted({says for _, says in report.formats.values()})
    return (
        "precision, no fault: "
        + (meaning or "; ".join(parts))
        + (f" ({', '.join(how)})" if how else "")
    )


def _through(items: list[Item]) -> dict[str, set[str]]:
    """Stage -> the missing stages that it was computed through."""
    through: dict[str, set[str]] = {}
    for item in items:
        through.setdefault(item.stage, set()).update(stage for stage, _ in item.segment)
    return through


def _meaning(lowered: dict[str, list[str]], through: dict[str, set[str]]) -> str | None:
    """What a pattern of precision classes means, where it has one cause."""
    products = {name for name in NAMES if STAGE[name].kind in verdict.PRODUCTS}

    def blamed(stage: str) -> set[str]:
        """After missing stages, the products among them are what lowers the precision."""
        return through[stage] & products - {stage} or {stage}

    stages = {name: set().union(*map(blamed, found)) for name, found in lowered.items()}
    linears = {name for name in NAMES if STAGE[name].kind == "matmul"}
    cache = {"attn_scores", "attention"}
    if len(stages) == 1:
        name, found = next(iter(stages.items()))
        if name == "tf32/f16" and found <= cache:
            return "f16-level attn_scores and attention, f32 elsewhere: an f16 key/value cache"
        if name == "bf16" and found <= cache:
            return "bf16-level attn_scores and attention, f32 elsewhere: a bf16 key/value cache"
        if name == "8-bit" and found <= cache:
            return "8-bit attn_scores and attention, f32 elsewhere: a quantised key/value cache"
        if name in ("8-bit", "lower") and found <= linears:
            return f"{name} linear layers, f32 elsewhere: activations are quantised before matmuls"
        if found <= linears | cache:
            return f"{name} products, f32 elsewhere: matmuls run in {name}"
        if len(found) > 12:
            return f"{name} throughout"
    eight, sixteen = stages.get("8-bit", set()), stages.get("tf32/f16", set())
    if len(stages) == 2 and eight and sixteen and eight <= linears and sixteen <= cache:
        return "8-bit linear layers and an f16 key/value cache, f32 elsewhere"
    return None


def _place(fault: Fault) -> str:
    layer = fault.layer
    stage = " and ".join([fault.stage, *fault.also])
    if fault.first.suspect.item.segment:
        chain = [*dict.fromkeys(s for s, _ in fault.first.suspect.item.segment), fault.stage]
        stage = f"the segment {' > '.join(chain)} (not dumped in between)"
    if layer is None:
        return stage
    return f"{stage} of all layers" if layer == "all" else f"layer {layer} {stage}"


COLOURS = {
    "exact": "green", "f64": "green", "f32": "green", "tf32/f16": "cyan", "bf16": "yellow",
    "8-bit": "magenta", "lower": "red",
}  # fmt: skip


def _table(report: Report) -> Table:
    """Layers down, stages across, significant bits in the cells; faults marked with ``*``."""
    held = {(item.stage, item.layer): item for item in report.items}
    faulty = {finding.suspect.key for finding in report.findings}
    shown = [s.name for s in LAYER_STAGES if any(key[0] == s.name for key in held)]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for name in shown:
        table.add_column(name.replace("_", "\n"), justify="right")
    for layer in sorted({n for _, n in held if n is not None}):
        cells = [_cell(held.get((name, layer)), (name, layer) in faulty) for name in shown]
        table.add_row(str(layer), *cells)
    return table


def _cell(item: Item | None, faulty: bool) -> Text:
    if item is None:
        return Text("-", style="dim")
    number = "exact" if item.bits >= verdict.EXACT_BITS else f"{item.bits:.1f}"
    if faulty:
        return Text(number + "*", style="bold red")
    found = verdict.class_of(item.level, item.stage) or "lower"
    return Text(number, style=COLOURS[found])


def _print(show: Console, report: Report) -> None:
    show.print(Text(sentence(report), style="bold"))
    held = {(item.stage, item.layer): item for item in report.items}
    faulty = {finding.suspect.key for finding in report.findings}
    show.print(
        f"\n{report.trace.path}: {report.dtype}, {len(report.trace.tokens)} tokens, weights of "
        f"{report.model}; significant bits of the error created at each stage\n"
    )
    show.print(_table(report))
    whole = Text()
    for key in (("embedding", 0), ("final_norm", None), ("lm_head", None)):
        if key in held:
            whole.append(f"{key[0]} ")
            whole.append(_cell(held[key], key in faulty))
            whole.append("   ")
    if whole:
        show.print(whole)
    for number, fault in enumerate(faults(report), 1):
        _print_fault(show, number, fault)
    for entry in report.skipped:
        through = entry.get("checked_through")
        note = f", checked together with {', '.join(through)}" if through else ": not checked"
        where = f" of layers {_short(entry['layers'])}" if "layers" in entry else ""
        show.print(f"not in the trace: {entry['stage']}{where}{note}")


def _short(layers: Iterable[int]) -> str:
    mask = np.zeros(max(layers) + 2, bool)
    mask[list(layers)] = True
    return verdict.ranges(mask)


def _print_fault(show: Console, number: int, fault: Fault) -> None:
    entry = fault.to_json()
    where = ", ".join(f"{axis} {place}" for axis, place in entry["where"].items())
    show.print(f"\n[bold red]fault {number}[/bold red]: {_place(fault)}")
    if "nonfinite" in entry:
        show.print(f"  {entry['nonfinite']} elements are NaN or infinite; their inputs are finite")
    else:
        show.print(f"  {entry['bits']} bits, {entry['expected_bits']} expected; {where}")
    for explanation in entry["diagnosis"]:
        name, says = explanation["name"], explanation["says"]
        show.print(f"  matches '{says}' to {explanation['bits']} bits ({name})", markup=False)
    if "shape" in entry:
        show.print(f"  {entry['shape']}", markup=False)
    if "dump_only" in entry:
        show.print("  only the dump is wrong: later stages used the right value")


# --- command


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="python -m tools.localize", description=__doc__)
    result.add_argument("trace", type=Path, metavar="TRACE", help="a trace directory")
    source.add_model_arguments(result)
    result.add_argument(
        "--against", type=Path, metavar="OTHER", help="a second trace, judged side by side"
    )
    result.add_argument(
        "--against-model", metavar="DIR|HUB_ID", help="the weights of OTHER; default: --model"
    )
    cli.add_json(result)
    return result


def _open(args: argparse.Namespace, path: Path, model: Checkpoint) -> Trace:
    given = args.tokens or args.prompt or args.prompt_file
    layout = None
    if given or not (path / "manifest.json").exists():
        tokens = source.read_tokens(args, model)
        layout = Layout(
            config=model.config.to_json(), dims=model.config.dims(len(tokens)), tokens=tokens
        )
    trace = open_trace(path, layout)
    _check_model(trace, model)
    return trace


def _check_model(trace: Trace, model: Checkpoint) -> None:
    """The weights must be those that made the trace, or every number would be about the wrong
    model."""
    if trace.config != model.config.to_json():
        raise NotComparable(
            f"not comparable: {trace.path} was made with another config than {model.name}; "
            "give its own model with --model"
        )
    if trace.manifest is None:
        return
    stated = trace.manifest.model["weights"]
    name = "model.norm.weight"
    if name in stated:
        model.read(name)
        if model.hashes[name]["xxh3"] != stated[name]["xxh3"]:
            raise NotComparable(
                f"not comparable: {trace.path} was made with other weights than {model.name} "
                f"({name} differs); give its own model with --model"
            )


def run(path: Path, model: Checkpoint, args: argparse.Namespace) -> Report:
    """Localize one trace with a progress bar."""
    trace = _open(args, path, model)
    with cli.progress() as bar:
        task = bar.add_task(f"replaying {trace.name}", total=len(trace.entries))
        return localize(trace, model, lambda _: bar.advance(task))


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    model = source.open_model(args.model)

    from qwen_jax import runtime

    runtime.configure("cpu")
    try:
        reports = [run(args.trace, model, args)]
        if args.against:
            other = source.open_model(args.against_model) if args.against_model else model
            reports.append(run(args.against, other, args))
    except NotComparable as error:
        if args.json:
            cli.report(args.json, {"schema": 1, "verdict": "not_comparable", "why": str(error)})
        raise
    data = to_json(reports[0])
    if args.against:
        from tools import against

        data["against"] = to_json(reports[1])
        data["right"] = against.judgements(*reports)
    show = cli.report(args.json, data)
    _print(show, reports[0])
    if args.against:
        show.print()
        _print(show, reports[1])
        against.show(show, *reports)
    return 1 if any(report.verdict == "fault" for report in reports) else 0


if __name__ == "__main__":
    cli.run(main)
