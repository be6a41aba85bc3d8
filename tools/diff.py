"""``python -m tools.diff A B``: how far trace A has come from trace B, stage by stage.

This is *accumulated* error: what arrived at a stage together with what was created there.
``tools.localize`` tells the two apart.
"""

import argparse
import math
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from qwen_jax import arguments, cli
from qwen_jax.config import Config
from qwen_jax.prompt import Prompt
from qwen_jax.table import Table
from qwen_jax.weights import open_model
from stages import generations, preflight
from stages.architecture import Key, Stage, place_of
from stages.compare import BLOCK, Difference, LogitsDifference, coarser, compare, compare_logits
from stages.errors import NotComparable, UserError, called
from stages.generations import Choice, Parted, Prefix, shared_rows
from stages.manifest import NAME
from stages.mask import layer_mask
from stages.open import open_trace
from stages.selection import parse_layers, parse_stages
from stages.trace import Layout, Trace
from tools import shown
from tools.difference import SCHEMA, TraceDifference
from tools.report import notebook as notebook  # how a difference is drawn there
from tools.report import write

# Relative L2 that correct engines of one precision stay below, end to end. Measured on the demo
# model (5 layers, 207 tokens), worst stage, ours against the oracle: 1.1e-6 (float32), 2.2e-3
# (float16), 1.4e-2 (bfloat16; 1.8e-2 against float32). The rest is for depth, which the demo does
# not have. --tolerance sets another.
TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def diff(
    a: Trace | str | Path,
    b: Trace | str | Path,
    *,
    stages: str = "all",
    layers: str = "all",
    tolerance: float | None = None,
) -> TraceDifference:
    """Compare two traces, or their directories; ``b`` is the reference.

    Arguments:
        a, b: a dump without a manifest is taken to be of the other side's model and tokens.
        stages, layers: compare only these, as ``--stages`` and ``--layers``.
        tolerance: relative L2 that still agrees; None is that of the coarser dtype.

    Raises:
        NotComparable: other tokens, positions, config or weights, or nothing in common.
        UserError: no such trace, stage, layer or tolerance, or a file is damaged.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:  # NaN passes all or nothing
        raise UserError(f"tolerance {tolerance}: expected a relative L2 such as 1e-5")
    a, b = _open(a, b), _open(b, a)
    parted, more = None, list[str]()
    if (rows := shared_rows(a, b)) is not None:
        parted = generations.parted(a, b, rows)
        more = [f"{t.name} has {n}" for t in (a, b) if (n := len(t.tokens) - rows)]
        a, b = Prefix(a, rows), Prefix(b, rows)
    ready = preflight.check(a, b)
    if rows is not None:
        ready.notes.insert(0, f"compared are the {rows} rows in common; {', '.join(more)} more")
    names = parse_stages(stages, b.arch)
    numbers = parse_layers(layers, b.config["num_hidden_layers"])
    keys = [(s, n) for s, n in ready.common if s in names and (n is None or n in numbers)]
    if not keys:
        raise NotComparable("not comparable: none of the selected stages is in both traces")
    found, logits = compare_traces(a, b, keys)
    if all(_without_numbers(row) for row in found.values()):
        raise NotComparable(
            "not comparable: no stage has a number on both sides; all is NaN or infinite"
        )
    if tolerance is None:
        tolerance = TOLERANCE[coarser(a.dtype, b.dtype)]
    return TraceDifference(a, b, ready, found, logits, tolerance, parted)


def _open(this: Trace | str | Path, other: Trace | str | Path) -> Trace:
    if isinstance(this, Trace):
        return this
    path, layout = Path(this), None
    if path.is_dir() and not (path / NAME).exists():
        known = other if isinstance(other, Trace) else open_trace(Path(other))
        dims = Config.from_json(known.config).dims(len(known.tokens))
        layout = Layout(
            config=known.config, dims=dims, tokens=known.tokens, positions=known.positions
        )
    return open_trace(path, layout)


def _common_rows(stage: Stage, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last rows that both sides have of a stage, in the stage's axes."""
    axis = stage.positions_at
    count = min(x.shape[axis], y.shape[axis])
    place = (slice(None),) * axis + (slice(-count, None),)
    return x[place], y[place]


def _in_the_sequence(found: Difference, stage: Stage, before: int) -> Difference:
    """``found`` in the last rows of a stage, with positions counted from the sequence's start."""
    axis, worst = stage.positions_at, dict(found.worst)
    if "position" in worst:
        worst["position"] = worst["position"][0] + before, worst["position"][1]
    at = (*found.at[:axis], found.at[axis] + before, *found.at[axis + 1 :])
    return replace(found, at=at, worst=worst)


def compare_traces(
    a: Trace, b: Trace, keys: list[Key]
) -> tuple[dict[Key, Difference], LogitsDifference | None]:
    """Every name of ``keys`` compared; ``b`` is the reference. Bounded memory: a name a core.

    Raises:
        NotComparable: a name has another shape on each side.
    """
    dtype = coarser(a.dtype, b.dtype)
    dims = {"N": b.config["num_attention_heads"], "K": b.config["num_key_value_heads"]}
    logits: list[LogitsDifference] = []

    def one(key: Key) -> Difference:
        name, layer = key
        stage = b.arch.stage[name]
        x, y = _common_rows(stage, a.read_rows(*key), b.read_rows(*key))
        if x.shape == y.shape and stage is b.arch.head:
            logits.append(compare_logits(x, y))
        if x.shape != y.shape:
            raise NotComparable(
                f"not comparable: {name} of layer {layer} is {list(x.shape)} / {list(y.shape)}"
            )
        mask = None
        if stage.kind.masked and layer is not None:
            mask = layer_mask(b.config, layer, b.positions)[-x.shape[1] :]
        found = compare(x, y, stage, dtype, mask, stage.heads(dims))
        found = _in_the_sequence(found, stage, len(b.tokens) - x.shape[stage.positions_at])
        # of the one stage that is usually kept, its place goes without saying
        return replace(found, at=found.at[1:]) if stage.last and len(x) == 1 else found

    # Two threads hand Python's lock to each other at every call into NumPy, which takes longer than
    # a small name does.
    large = [key for key in keys if math.prod(b.entries[key].shape) > BLOCK]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(large, pool.map(one, large), strict=True))
    return {key: found.get(key) or one(key) for key in keys}, logits[0] if logits else None


@shown.for_terminal.register
def _printed(found: TraceDifference) -> cli.Printed:
    return cli.Printed(lambda show: show_difference(show, found))


def show_difference(show: Console, found: TraceDifference) -> None:
    """Print what was compared, the table, what it means for the next token, and the verdict."""
    _print_preflight(show, found.a, found.b, found.ready)
    cli.fold(show, _table(found).terminal, keys=2)
    _print_logits(show, found.logits)
    _print_verdict(show, found)


def _print_preflight(show: Console, a: Trace, b: Trace, ready: preflight.Preflight) -> None:
    show.print(f"A {_about(a)}\nB {_about(b)}")
    for note in ready.notes:
        show.print(f"note: {note}")
    for trace, only in ((a, ready.only_a), (b, ready.only_b)):
        if only:
            names = ", ".join(place_of(*key) for key in only[:4])
            more = ", ..." if len(only) > 4 else ""
            show.print(f"only in {trace.name}, not compared: {len(only)} stages ({names}{more})")
    show.print()


def _about(trace: Trace) -> str:
    calls = f" in {len(trace.steps)} calls" if len(trace.steps) > 1 else ""
    size = f"{len(trace.entries)} stages, {len(trace.tokens)} tokens{calls}"
    if trace.manifest is None:
        return f"{trace.path}: foreign, {size}"
    made = trace.manifest.producer
    return (
        f"{trace.path}: {made.get('name')} {made.get('backend')} {trace.dtype} on "
        f"{made.get('device')}, {size}"
    )


COLUMNS = ("rel L2", "max |a-b|", "at", "1-cosine", "ULP=0", "ULP<=1", "NaN/Inf")


def _table(found: TraceDifference) -> Table:
    """A row a stage with the layer where its relative L2 is largest, or a row a layer."""
    rows, parting, every_layer = found.rows, found.parting, found.every_layer
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
    return Table(
        title="",
        names=("stage", "layer" if every_layer else "worst layer", *COLUMNS),
        rows=[(s, "" if n is None else str(n), *_cells(rows[s, n])) for s, n in shown],
        styles=["bold red" if key == parting else "" for key in shown],
    )


def _without_numbers(row: Difference) -> bool:
    """Whether there is nothing but NaN and infinity on both sides."""
    return row.nonfinite_a == row.nonfinite_b == row.count


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


def _print_verdict(show: Console, found: TraceDifference) -> None:
    rows, parting, tolerance = found.rows, found.parting, found.tolerance
    smallest = found.smallest_tolerance
    needed = (
        "no tolerance would pass" if smallest is None else f"smallest that passes {smallest:.1e}"
    )
    first = next((key for key, row in rows.items() if not row.identical), None)
    if nothing := [key for key, row in rows.items() if _without_numbers(row)]:
        show.print(
            f"NaN or infinite throughout on both sides, so nothing is known of "
            f"{len(nothing)} stages, first {place_of(*nothing[0])}"
        )
    until = "until then " if found.parted else ""
    if found.parted:
        show.print(_says_parted(found.parted))
    if first is None:
        show.print(f"{until}identical: all {len(rows)} stages, bit for bit")
        return
    _print_steps(show, found)
    if parting is None:
        show.print(
            f"{until}agree: every stage within relative L2 {tolerance:g} ({needed}); first "
            f"bits that differ: {place_of(*first)}"
        )
    else:
        row = rows[parting]
        places = ", ".join(f"{axis} {i} ({r:.1e})" for axis, (i, r) in row.worst.items())
        show.print(
            f"{until}differ: the traces part at {place_of(*parting)}: relative L2 "
            f"{row.relative_l2:.1e}, tolerance {tolerance:g} ({needed})"
        )
        if places:
            show.print(f"worst there: {places}")
        show.print(
            "error arrives at a stage from before as well as being created there; which it is "
            f"here:\n{called('tools.localize')} {shlex.join([str(found.a.path), *found.given])}"
        )


def _given(a: Trace, b: Trace, model: str | None) -> tuple[str, ...]:
    """The arguments with which ``tools.localize`` judges the first trace; ``model`` is the
    ``--model`` of this command."""
    manifest = a.manifest or b.manifest
    name = model or (manifest.model.name if manifest else "demo")
    demo = name == "demo"
    known = model or demo or name.startswith("synthetic:")
    words = () if demo else ("--model", name if known else f"DIR_OF_{name}")
    if a.manifest or (demo and a.tokens == Prompt().read(open_model())):
        return words
    first = ("--first-position", str(a.positions[0])) if a.positions[0] else ()
    return (*words, "--tokens", ",".join(map(str, a.tokens)), *first)


def _print_steps(show: Console, found: TraceDifference) -> None:
    """Row by row, where rows were computed in several calls: the first that is beyond the
    tolerance, and the worst."""
    if not found.by_step:
        return
    largest, keys = found.by_row.max(0), list(found.rows)

    def place(row: int, stage: int) -> str:
        error = found.by_row[stage, row]
        return (
            f"row {row} (step {found.stepped.step_of(row)}), {place_of(*keys[stage])} {error:.1e}"
        )

    worst = int(largest.argmax())
    most = place(worst, int(found.by_row[:, worst].argmax()))
    beyond = np.flatnonzero(~(largest <= found.tolerance))
    if not len(beyond):
        show.print(f"row by row: all within the tolerance, most {most}")
        return
    row = int(beyond[0])
    stage = int(np.flatnonzero(~(found.by_row[:, row] <= found.tolerance))[0])
    show.print(
        f"row by row: {len(beyond)} of {len(largest)} beyond the tolerance; first "
        f"{place(row, stage)}; most {most}"
    )


def _says_parted(parted: Parted) -> str:
    def goes_on(choice: Choice, other: Choice) -> str:
        if choice.margin is None:
            return f"{choice.token} (its logits are not there)"
        ahead = f"{choice.margin:.3g} ahead of {other.token}"
        if choice.likeliest != choice.token:
            ahead += f", though {choice.likeliest} is its likeliest"
        return f"{choice.token} ({ahead})"

    a, b = parted.a, parted.b
    step = f"step {a.step}" if a.step == b.step else f"step {a.step} of A, {b.step} of B"
    return (
        f"differ: the generations part at row {parted.row} ({step}): A goes on with token "
        f"{goes_on(a, b)}, B with {goes_on(b, a)}"
    )


# --- command


def parser() -> argparse.ArgumentParser:
    result = cli.Parser(prog="tools.diff", description=__doc__)
    result.add_argument("a", type=Path, metavar="A", help="a trace directory")
    result.add_argument("b", type=Path, metavar="B", help="the trace it is compared with")
    arguments.add_model_arguments(result)
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
    cli.add_report(result)
    cli.add_json(result)
    return result


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < math.inf:  # as ``diff`` does, before the work
        raise argparse.ArgumentTypeError(f"{text!r}: expected a relative L2 such as 1e-5")
    return value


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    prompt = arguments.prompt_of(args)
    model = open_model(args.model) if args.model is not None or prompt.given else None
    a, b = (arguments.open_given(path, prompt, model) for path in (args.a, args.b))
    if model and a.manifest and b.manifest:
        arguments.check_tokens(prompt, a, model)
    try:
        with cli.progress() as bar:
            bar.add_task("comparing", total=None)
            found = diff(a, b, stages=args.stages, layers=args.layers, tolerance=args.tolerance)
    except NotComparable as error:
        if args.json:
            why = {"schema": SCHEMA, "verdict": "not_comparable", "why": str(error)}
            cli.report(args.json, why)
        raise
    show = cli.report(args.json, found.to_json())
    if args.report:  # before a word is printed: whoever reads may stop after ten lines
        write.comparison(args.report, found, _table(found))
    given = _given(found.a, found.b, args.model)
    show_difference(show, replace(found, every_layer=args.every_layer, given=given))
    return 0 if found.agree else 1


if __name__ == "__main__":
    cli.run(main)
