"""``python -m tools.diff A B``: how far trace A has come from trace B, stage by stage.

This is *accumulated* error: what arrived at a stage together with what was created there.
``tools.localize`` tells the two apart.
"""

import argparse
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwen_jax import source
from stages import cli, preflight
from stages.compare import BLOCK, Difference, LogitsDifference, coarser, compare, compare_logits
from stages.errors import NotComparable
from stages.mask import layer_mask
from stages.slices import head_count
from stages.table import parse_layers, parse_stages
from stages.trace import Trace

Key = tuple[str, int | None]

# Relative L2 that correct engines of one precision stay below, end to end. Measured on the demo
# model (5 layers, 207 tokens), worst stage, ours against the oracle: 1.1e-6 (float32), 2.2e-3
# (float16), 1.4e-2 (bfloat16; 1.8e-2 against float32). The rest is for depth, which the demo does
# not have. --tolerance sets another.
TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="python -m tools.diff", description=__doc__)
    result.add_argument("a", type=Path, metavar="A", help="a trace directory")
    result.add_argument("b", type=Path, metavar="B", help="the trace it is compared with")
    source.add_model_arguments(result)
    result.add_argument("--stages", default="all", metavar="LIST", help="compare only these")
    result.add_argument("--layers", default="all", metavar="LIST", help="compare only these")
    result.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="X",
        help="relative L2 that still agrees; default: by dtype, "
        + ", ".join(f"{k} {v:g}" for k, v in TOLERANCE.items()),
    )
    result.add_argument("--every-layer", action="store_true", help="a row for every layer")
    cli.add_json(result)
    return result


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):  # NaN would let everything pass or nothing
        raise argparse.ArgumentTypeError(f"{text!r}: expected a relative L2 such as 1e-5")
    return value


def compare_traces(
    a: Trace, b: Trace, keys: list[Key]
) -> tuple[dict[Key, Difference], LogitsDifference | None]:
    """Every stage of ``keys`` compared; ``b`` is the reference. Bounded memory: a stage a core.

    Raises:
        NotComparable: a stage has another shape on each side.
    """
    dtype = coarser(a.dtype, b.dtype)
    config = b.config
    logits: list[LogitsDifference] = []

    def one(key: Key) -> Difference:
        stage, layer = key
        x, y, axes = a.read(*key), b.read(*key), b.entries[key].axes
        if stage == "lm_head":
            if x.ndim != y.ndim:  # last position on one side, all on the other
                x, y, axes = x.reshape(-1, x.shape[-1])[-1], y.reshape(-1, y.shape[-1])[-1], ("V",)
            if x.shape == y.shape:
                logits.append(compare_logits(x, y))
        if x.shape != y.shape:
            raise NotComparable(
                f"not comparable: {stage} of layer {layer} is {list(x.shape)} / {list(y.shape)}"
            )
        mask = layer_mask(config, layer, len(b.tokens)) if stage == "attn_scores" else None
        return compare(x, y, axes, dtype, mask, head_count(axes, config))

    # Two threads hand Python's lock to each other at every call into NumPy, which takes longer than
    # a small stage does.
    large = [key for key in keys if math.prod(b.entries[key].shape) > BLOCK]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(large, pool.map(one, large), strict=True))
    return {key: found.get(key) or one(key) for key in keys}, logits[0] if logits else None


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    told = args.model is not None or source.tokens_given(args)
    model = source.open_model(args.model) if told else None
    a, b = (source.open_given(args, path, model) for path in (args.a, args.b))
    if model and a.manifest and b.manifest:
        source.check_tokens(args, a, model)
    try:
        ready = preflight.check(a, b)
        keys = _select(args, ready.common, b)
        with cli.progress() as bar:
            bar.add_task(f"comparing {len(keys)} stages", total=None)
            rows, logits = compare_traces(a, b, keys)
    except NotComparable as error:
        if args.json:
            cli.report(args.json, {"schema": 1, "verdict": "not_comparable", "why": str(error)})
        raise
    default = TOLERANCE[coarser(a.dtype, b.dtype)]
    tolerance = default if args.tolerance is None else args.tolerance
    parting = next((key for key in keys if not rows[key].within(tolerance)), None)
    verdict = "agree" if parting is None else "differ"
    data = {
        "schema": 1,
        "verdict": verdict,
        "a": str(args.a),
        "b": str(args.b),
        "notes": ready.notes,
        "tolerance": tolerance,
        "smallest_tolerance": _smallest(rows),
        "parting": parting and {"stage": parting[0], "layer": parting[1]},
        "only_a": [{"stage": s, "layer": n} for s, n in ready.only_a],
        "only_b": [{"stage": s, "layer": n} for s, n in ready.only_b],
        "rows": [{"stage": s, "layer": n} | asdict(row) for (s, n), row in rows.items()],
        "logits": logits and asdict(logits),
    }
    show = cli.report(args.json, data)
    _print_preflight(show, a, b, ready)
    show_comparison(show, b, rows, logits, tolerance, args.every_layer)
    return 0 if parting is None else 1


def show_comparison(
    show: Console,
    b: Trace,
    rows: dict[Key, Difference],
    logits: LogitsDifference | None,
    tolerance: float,
    every_layer: bool = False,
) -> None:
    """Print the table of ``compare_traces``, what it means for the next token, and the verdict."""
    parting = next((key for key in rows if not rows[key].within(tolerance)), None)
    show.print(_table(rows, parting, every_layer, b))
    _print_logits(show, logits)
    _print_verdict(show, rows, parting, tolerance)


def _select(args: argparse.Namespace, common: list[Key], b: Trace) -> list[Key]:
    stages = parse_stages(args.stages)
    layers = parse_layers(args.layers, b.config["num_hidden_layers"])
    keys = [(s, n) for s, n in common if s in stages and (n is None or n in layers)]
    if not keys:
        raise NotComparable("not comparable: none of the selected stages is in both traces")
    return keys


def _smallest(rows: dict[Key, Difference]) -> float | None:
    """The smallest tolerance with which everything would agree; None where none would do."""
    if any(row.unmatched for row in rows.values()):
        return None
    return max(row.relative_l2 for row in rows.values())


def _print_preflight(show: Console, a: Trace, b: Trace, ready: preflight.Preflight) -> None:
    show.print(f"A {_about(a)}\nB {_about(b)}")
    for note in ready.notes:
        show.print(f"note: {note}")
    for trace, only in ((a, ready.only_a), (b, ready.only_b)):
        if only:
            names = ", ".join(where(*key) for key in only[:4])
            more = ", ..." if len(only) > 4 else ""
            show.print(f"only in {trace.name}, not compared: {len(only)} stages ({names}{more})")
    show.print()


def _about(trace: Trace) -> str:
    if trace.manifest is None:
        return f"{trace.path}: foreign, {len(trace.entries)} stages, {len(trace.tokens)} tokens"
    made = trace.manifest.producer
    return (
        f"{trace.path}: {made.get('name')} {made.get('backend')} {trace.dtype} on "
        f"{made.get('device')}, {len(trace.entries)} stages, {len(trace.tokens)} tokens"
    )


def where(stage: str, layer: int | None) -> str:
    """How a stage of a layer is written for people."""
    return stage if layer is None else f"layer {layer} {stage}"


def _table(rows: dict[Key, Difference], parting: Key | None, every_layer: bool, b: Trace) -> Table:
    """A row a stage with the layer where its relative L2 is largest, or a row a layer."""
    if every_layer:
        shown = list(rows)
    else:
        worst: dict[str, Key] = {}
        for key, row in rows.items():
            held = worst.get(key[0])
            if held is None or _badness(row) > _badness(rows[held]):
                worst[key[0]] = key
        shown = list(worst.values())
        if parting and parting not in shown:
            shown.insert([key[0] for key in shown].index(parting[0]), parting)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("stage")
    table.add_column("layer" if every_layer else "worst layer", justify="right")
    for name in ("rel L2", "max |a-b|", "at", "1-cosine", "ULP=0", "ULP<=1", "NaN/Inf"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in shown:
        row = rows[key]
        style = "bold red" if key == parting else None
        table.add_row(key[0], "" if key[1] is None else str(key[1]), *_cells(row), style=style)
    return table


def _badness(row: Difference) -> tuple[int, float]:
    return row.unmatched, row.relative_l2


def _cells(row: Difference) -> tuple[str, ...]:
    bad = f"{row.nonfinite_a}/{row.nonfinite_b}" if row.nonfinite_a or row.nonfinite_b else ""
    if row.identical:
        return ("0", "0", "", "0", "100%", "100%", bad)
    at = ",".join(map(str, row.at))
    return (
        f"{row.relative_l2:.1e}",
        f"{row.max_abs:.1e}",
        at,
        f"{1 - row.cosine:.1e}",
        f"{100 * row.ulp_0:.1f}%",
        f"{100 * row.ulp_1:.1f}%",
        bad,
    )


def _print_logits(show: Console, logits: LogitsDifference | None) -> None:
    if logits is None:
        show.print("\nlogits: not in both traces, so nothing is known of the next token")
        return
    show.print(
        f"\nlogits: arg-max equal at {logits.argmax_equal} of {logits.positions} positions, "
        f"top-5 overlap {100 * logits.top5_overlap:.0f}%, KL mean {logits.kl_mean:.1e} "
        f"max {logits.kl_max:.1e} nats, smallest margin {logits.margin:.3g}"
    )


def _print_verdict(
    show: Console, rows: dict[Key, Difference], parting: Key | None, tolerance: float
) -> None:
    smallest = _smallest(rows)
    needed = (
        "no tolerance would pass" if smallest is None else f"smallest that passes {smallest:.1e}"
    )
    first = next((key for key, row in rows.items() if not row.identical), None)
    if first is None:
        show.print(f"identical: all {len(rows)} stages, bit for bit")
    elif parting is None:
        show.print(
            f"agree: every stage within relative L2 {tolerance:g} ({needed}); first "
            f"bits that differ: {where(*first)}"
        )
    else:
        row = rows[parting]
        places = ", ".join(f"{axis} {i} ({r:.1e})" for axis, (i, r) in row.worst.items())
        show.print(
            f"differ: the traces part at {where(*parting)}: relative L2 "
            f"{row.relative_l2:.1e}, tolerance {tolerance:g} ({needed})"
        )
        if places:
            show.print(f"worst there: {places}")
        show.print(
            "error arrives at a stage from before as well as being created there: "
            "python -m tools.localize tells which"
        )


if __name__ == "__main__":
    cli.run(main)
