"""The fault matrix: every planted fault against the localizer, as a table.

    python -m tests.planted.matrix --checkpoint demo hard-qwen3 --mode f32 bf16 --layers one all
    python -m tests.planted.matrix --page docs/fault-matrix.md  # the whole of it: hours

A row a fault: where it was planted, what the localizer accused, what it called it, and the cosine
that a comparison with the right trace would have seen at that stage.
"""

import argparse
import datetime
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from qwen_jax import replay, runtime
from qwen_jax.replay import Replay
from qwen_jax.weights import DEMO, open_model
from stages.open import open_trace
from stages.trace import Layout
from tests.planted import checkpoints, faults
from tools.convert import convert
from tools.localize import Localization, localize
from tools.localize.result import faults as reported
from tools.localize.result import to_json
from tools.numpy_engine import engine

ONE_LAYER = 2


@dataclass(frozen=True)
class Row:
    """One planted fault and what became of it.

    Attributes:
        due: whether it is large enough that it must be found, see ``faults.plain``.
        placed: the right stage and layers, and nothing else, were accused.
        named: it was called by its name; None where it has none.
        cosine: of the faulty stage against the right trace, in the first faulty layer.
    """

    fault: str
    due: bool
    accused: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]
    placed: bool
    named: bool | None
    cosine: float

    @property
    def ok(self) -> bool:
        """Placed, and named if it has a name."""
        return self.placed and self.named is not False


class Bench:
    """One checkpoint, prompt and arithmetic to plant faults in.

    ``more`` is as of ``Engine.run``: where the prompt begins, whether the end of the last layer has
    one row, and in which calls it runs, through which cache.
    """

    def __init__(self, directory: Path, tokens: list[int], mode: str, **more: Any) -> None:
        self.model = open_model(directory)
        self.loaded = engine.load(directory)
        self.tokens, self.mode, self.more = tokens, mode, more
        config, first = self.model.config, more.get("first_position", 0)
        self.layout = Layout(
            config=config.to_json(),
            dims=config.dims(len(tokens)),
            tokens=tuple(tokens),
            positions=tuple(range(first, first + len(tokens))),
        )
        self.right = engine.Engine(*self.loaded, mode).run(tokens, "all", **more)

    @property
    def plantable(self) -> dict[str, faults.Fault]:
        """What can be planted. In one row no fault of a single position can, and a layer with one
        row cannot be taken for one with all."""
        known = faults.of(self.loaded[0])
        if self.more.get("last_row"):
            for name in ("ffn_silu.nan", "ffn_up.position_zero", "ffn_out.layer_off_by_one"):
                del known[name]
        return known

    def localize(self, run: engine.Run, omit: tuple[str, ...] = (), **options: Any) -> Localization:
        """The localizer's report on a run, through files as a user would hand them over; compiled
        in half the time."""
        frugal = patch.object(replay, "Replay", partial(Replay, unoptimised=True))
        with tempfile.TemporaryDirectory() as scratch, frugal:
            trace = open_trace(run.dump(Path(scratch) / "trace", omit), self.layout)
            trace.steps = run.steps
            return localize(trace, self.model, **options)

    def layers(self, which: str) -> list[int] | None:
        last = self.model.config.num_hidden_layers - 1
        return [min(ONE_LAYER, last)] if which == "one" else None

    def plant(self, fault: faults.Fault, which: str) -> engine.Run:
        layers = self.layers("one" if fault.one_layer else which)
        return faults.plant(self.loaded, self.tokens, fault, layers, self.mode, "all", **self.more)

    def differs(self, fault: faults.Fault, which: str) -> str:
        """What the localizer says of a planted fault otherwise where it makes every product again;
        empty if it is the same, but for bits of sound stages that are estimated."""
        run = self.plant(fault, which)
        found, exact = (to_json(self.localize(run, exact=exact)) for exact in (False, True))
        # those of a stage that is wrong in all layers are read off others, which are estimated
        for one, other in zip(found["faults"], exact["faults"], strict=False):
            if abs(one.get("expected_bits", 0) - other.get("expected_bits", 0)) < 0.15:
                one |= {k: v for k, v in other.items() if k == "expected_bits"}
        for name in ("verdict", "faults"):
            if found[name] != exact[name]:
                return f"{name}: {found[name]}, exactly {exact[name]}"
        for stage, entry in exact["precision"].items():
            other = found["precision"][stage]
            off = np.abs(np.subtract(other["bits"], entry["bits"])).max()
            if off > 0.4 or {**other, "bits": None} != {**entry, "bits": None}:
                return f"{stage}: {other}, exactly {entry}"
        return ""

    def try_fault(self, fault: faults.Fault, which: str, judge: Callable | None = None) -> Row:
        """Plant one fault and judge what the localizer (or ``judge``) says of it."""
        run = self.plant(fault, which)
        found = (judge or (lambda r: reported(self.localize(r))))(run)
        accused = tuple((f.stage, f.layer) for f in found)
        names = tuple(f.diagnosis[0].name if f.diagnosis else "-" for f in found)
        stages = [stage for f in found for stage in (f.stage, *f.also)]
        planted = {stage for _, stage in run.effects}
        placed = bool(found) and set(stages) <= planted and self._layers_right(fault, found, run)
        if fault.clean:
            placed = not found
        expected = {fault.diagnosis, *fault.accept} - {None}
        named = (placed and names[0] in expected) if expected else None
        due = bool(self._plain(fault, run)) or fault.clean
        return Row(fault.name, due, accused, names, placed, named, self._cosine(run))

    def _plain(self, fault: faults.Fault, run: engine.Run) -> list[engine.Key]:
        """Where the fault must be found. One channel of one row is one number, and that may be as
        far off by chance as 1 % is."""
        last = self.model.config.num_hidden_layers - 1
        lone = self.more.get("last_row") and fault.where
        return [k for k in faults.plain(run, self.mode) if not (lone and k[0] in (last, None))]

    def _layers_right(self, fault: faults.Fault, found: list, run: engine.Run) -> bool:
        """Every accused layer is one where the fault was planted, and if it is plain in all of
        its layers, none is missing."""
        planted = {layer for layer, _ in run.effects}
        plain = {layer for layer, _ in self._plain(fault, run)}
        if any(f.first.suspect.why == "nan" for f in found):
            plain = {min(plain)}  # later layers are handed NaN and do nothing wrong
        accused = {f.suspect.item.layer for fault in found for f in fault.findings}
        return accused <= planted and plain <= accused

    def _cosine(self, run: engine.Run) -> float:
        """The lowest cosine over the stages where the fault was planted."""
        return min(
            (cosine(run.stages[key], self.right.stages[key]) for key in run.effects), default=1
        )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two dumps, over finite elements; scores without what the mask removes."""
    if a.ndim == 3 and a.shape[1] == a.shape[2]:
        a, b = np.tril(a), np.tril(b)
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = a[keep], b[keep]
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else float("nan")


def _tokens(below: int, length: int, seed: int = 3) -> list[int]:
    return [0, *np.random.default_rng(seed).integers(1, below, length - 1).tolist()]


def _synthetic(path: Path) -> None:
    path.mkdir()
    convert(open_model("synthetic:0.5b"), "hf", path, wrote=lambda count: None)


NAMES = ("hard", "small", "hard-qwen3", "small-qwen3")
MAKE: dict[str, tuple[Callable[..., Any], Callable[[int], list[int]]]] = {
    "hard": (checkpoints.hard_checkpoint, checkpoints.hard_tokens),
    "small": (checkpoints.random_checkpoint, partial(_tokens, 192)),
    "0.5b": (_synthetic, partial(_tokens, 150_000)),
}


def make_bench(name: str, mode: str, directory: Path, length: int = 48, **more: Any) -> Bench:
    """A bench on the demo model, on the "hard" checkpoint or a "small" random one, on the Qwen3 of
    either, "hard-qwen3" and "small-qwen3", or on random weights in the size "0.5b" (8 GB).
    ``more`` is as of ``Bench``."""
    if name == "demo":
        return Bench(DEMO, _tokens(2048, length, seed=0), mode, **more)
    kind, _, architecture = name.partition("-")
    make, tokens = MAKE[kind]
    path = directory / name
    if not path.exists():
        make(path, **(checkpoints.QWEN3 if architecture else {}))
    return Bench(path, tokens(length), mode, **more)


def rows(bench: Bench, which: str, select: str = "") -> Iterator[Row]:
    """Every fault whose name contains ``select``."""
    for name, fault in bench.plantable.items():
        if select in name:
            yield bench.try_fault(fault, which)


def compare(bench: Bench, which: str, select: str) -> bool:
    """Whether any fault is another one where every product is made again."""
    chosen = [fault for name, fault in bench.plantable.items() if select in name]
    told = {fault.name: bench.differs(fault, which) for fault in chosen}
    differing = {name: why for name, why in told.items() if why}
    print(f"{bench.model.name}, {bench.mode}, {which}: {len(differing)} of {len(told)} differ")
    print("".join(f"  {name}: {why}\n" for name, why in differing.items()), end="", flush=True)
    return bool(differing)


def markdown(found: list[Row]) -> str:
    """The table; faults too small to be due are marked."""
    lines = ["| planted | accused | named | cosine | |", "|---|---|---|---|---|"]
    for row in found:
        accused = ", ".join(s if n is None else f"{s} ({n})" for s, n in row.accused) or "nothing"
        result = "ok" if row.ok else "placed" if row.placed else "missed"
        result = result if row.due else f"{result} (below rounding)"
        names = ", ".join(row.names)
        lines.append(f"| {row.fault} | {accused} | {names} | {row.cosine:.6f} | {result} |")
    return "\n".join(lines)


def summary(found: list[Row]) -> str:
    """How many that must be found were; named is counted of those that have a name."""
    due = [row for row in found if row.due]
    with_name = [row for row in due if row.named is not None]
    blind = sum(row.cosine > 0.999 for row in due)
    return (
        f"{len(due)} faults due: {sum(r.placed for r in due)} placed, "
        f"{sum(r.named is True for r in due)} of {len(with_name)} with a name named; "
        f"cosine above 0.999 for {blind} of them"
    )


WHOLE = itertools.product(("demo", "hard", "hard-qwen3"), ("f32", "bf16"), ("one", "all"))


def page() -> str:
    """The whole trial, as ``docs/fault-matrix.md`` has it: Markdown."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found: dict[tuple[str, str, str], list[Row]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, mode, which in WHOLE:
            found[name, mode, which] = list(rows(make_bench(name, mode, Path(scratch)), which))
            print(name, mode, which, summary(found[name, mode, which]), flush=True)
    sections = [
        f"## {name}, {mode}, {which} layer{'s' * (which == 'all')}\n\n{markdown(made)}\n"
        for (name, mode, which), made in found.items()
    ]
    counts = [
        f"| {', '.join(key)} | {summary(made).split(';')[0]} |" for key, made in found.items()
    ]
    return PAGE.format(
        faults=len(faults.FAULTS),
        date=datetime.date.today().isoformat(),
        commit=commit,
        counts="\n".join(counts),
        sections="\n".join(sections),
    )


PAGE = """\
# The fault matrix

{faults} mistakes, written by hand into a small NumPy engine that shares no code with this project
(`tests/planted/faults.py`), each planted, dumped and handed to `localize`. Made by

    python -m tests.planted.matrix --page docs/fault-matrix.md

on {date}, of commit {commit}: on the demo model and on synthetic checkpoints with the hard
statistics of Qwen2 and Qwen3 (K bias of rms 35 in the first and last layer, residual channels
hundreds of times the rest), 48 tokens; in one layer (number 2) and in all of them. *Due* are the
faults that are larger than the engine's own rounding; *placed*: the right stage and layers, and
nothing else, were accused; *named*: by the right name, counted of those that have one. The cosine
is that of the faulty stage with the right trace, the number that a comparison by cosine would have
seen.

| checkpoint, precision, layers | |
|---|---|
{counts}

{sections}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ("demo", *NAMES, "0.5b")
    parser.add_argument("--checkpoint", nargs="+", default=["demo"], choices=known)
    parser.add_argument("--mode", nargs="+", default=["f32"], choices=[*engine.ARITHMETIC])
    parser.add_argument("--layers", nargs="+", default=["one"], choices=("one", "all"))
    parser.add_argument("--select", default="", help="only faults with this in their name")
    help = "name the faults of which --exact says something else, instead of judging them"
    parser.add_argument("--compare", action="store_true", help=help)
    parser.add_argument("--brief", action="store_true", help="only rows that are not ok")
    parser.add_argument("--page", type=Path, help="instead: write the whole trial there")
    args = parser.parse_args()

    runtime.for_a_command("cpu")
    if args.page:
        args.page.write_text(page(), "utf-8")
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.checkpoint:
            for mode in args.mode:
                bench = make_bench(name, mode, Path(scratch))
                for which in args.layers:
                    if args.compare:
                        failed |= compare(bench, which, args.select)
                        continue
                    found = list(rows(bench, which, args.select))
                    print(f"\n## {name}, {mode}, {which} layer{'s' * (which == 'all')}\n")
                    print(summary(found) + "\n", flush=True)
                    missed = [row for row in found if row.due and not row.ok]
                    print(markdown(missed if args.brief else found), flush=True)
                    failed |= any(row.due and not row.placed for row in found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
