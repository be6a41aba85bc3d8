"""``python -m tools.localize TRACE --model M``: where error is created, and what the mistake is.

Every dumped stage is replayed alone, in float64, on its own dumped inputs. What differs from the
dump was created at that stage; what arrived there from before cannot show.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen_jax import source
from qwen_jax.weights import Weights
from stages import cli, verdict
from stages.errors import NotComparable, UserError
from stages.table import LAYER_STAGES, STAGE, computation_order
from stages.trace import Trace, coarsest_dtype, numpy_dtype
from stages.verdict import Item
from tools.localizer.report import COLOURS, Fault, Report, faults, place, sentence, to_json

Key = tuple[str, int | None]


def trace_dtype(trace: Trace) -> str:
    """The precision that a trace was computed in: its manifest's, or the coarsest format that
    holds all values of its first dumped stages exactly."""
    if trace.dtype:
        return trace.dtype
    # not the embedding, which has the weights' format, nor scores, where a mask's fill may stand
    telling = [key for key in trace.entries if STAGE[key[0]].kind not in ("lookup", "scores")]
    names = telling[:6]
    values = [trace.read(*key).ravel()[:65536] for key in names]
    return coarsest_dtype(np.concatenate(values)) if values else "float32"


def localize(trace: Trace, model: Weights, advance: Callable[[Item], None]) -> Report:
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

    _check_weights(trace, model)

    from tools.localizer import diagnose

    findings = diagnose.findings(replay, items, dtype)
    formats = diagnose.formats(replay, items, dtype, findings)
    skipped = _skipped(trace, model, items)
    return Report(trace, model.name, dtype, items, findings, skipped, formats)


def _skipped(trace: Trace, model: Weights, items: list[Item]) -> list[dict[str, Any]]:
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
    show.print(f"\nfault {number}: {place(fault)}", style="bold red")
    if "nonfinite" in entry:
        show.print(f"  {entry['nonfinite']} elements are NaN or infinite; their inputs are finite")
    else:
        show.print(f"  {entry['bits']} bits, {entry['expected_bits']} expected; {where}")
    for explanation in entry["diagnosis"]:
        name, says = explanation["name"], explanation["says"]
        show.print(f"  matches '{says}' to {explanation['bits']} bits ({name})")
    if "shape" in entry:
        show.print(f"  {entry['shape']}")
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


def _open(args: argparse.Namespace, path: Path, model: Weights) -> Trace:
    trace = source.open_given(args, path, model)
    source.check_tokens(args, trace, model)
    _check_model(trace, model)
    return trace


def _check_model(trace: Trace, model: Weights) -> None:
    """The weights must be those that made the trace, or every number would be about the wrong
    model."""
    if trace.config != model.config.to_json():
        raise NotComparable(
            f"not comparable: {trace.path} was made with another config than {model.name}; "
            "give its own model with --model"
        )


def _check_weights(trace: Trace, model: Weights) -> None:
    """Called when the replay has read, and so hashed, every weight.

    Raises:
        NotComparable: the trace was made with other weights, so nothing it shows is a fault.
    """
    if trace.manifest is None:
        return
    stated = trace.manifest.model["weights"]
    other = [n for n, w in model.hashes.items() if n in stated and stated[n] != w]
    if other:
        raise NotComparable(
            f"not comparable: {trace.path} was made with other weights than {model.name} "
            f"({len(other)} of {len(model.hashes)} tensors differ, first {other[0]}); "
            "give its own model with --model"
        )


def run(path: Path, model: Weights, args: argparse.Namespace) -> Report:
    """Localize one trace with a progress bar."""
    trace = _open(args, path, model)
    with cli.progress() as bar:
        task = bar.add_task(f"replaying {trace.name}", total=len(trace.entries))
        return localize(trace, model, lambda _: bar.advance(task))


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.against_model and not args.against:
        raise UserError("--against-model is the model of --against; give that too")
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
            nothing = {"faults": [], "precision": {}, "skipped": []}
            why = {"schema": 1, "verdict": "not_comparable", "why": str(error)}
            cli.report(args.json, why | nothing)
        raise
    data = to_json(reports[0])
    if args.against:
        from tools.localizer import against

        data["against"] = to_json(reports[1])
        data["right"] = against.judgements(*reports)
        data["same_weights"] = against.same_weights(*reports)
    show = cli.report(args.json, data)
    _print(show, reports[0])
    if args.against:
        show.print()
        _print(show, reports[1])
        against.show(show, *reports)
    return 1 if any(report.verdict == "fault" for report in reports) else 0


if __name__ == "__main__":
    cli.run(main)
