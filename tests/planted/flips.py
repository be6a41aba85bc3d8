"""``python -m tests.planted.flips``: tokens that coarse arithmetic flips, and what tips them.

Random prompts run in float32 and in coarser arithmetic. At the first row where another token comes
first than in exact arithmetic, the shares of the margin between the two are asked which stage tips
it: the largest towards the token that came. The three largest shares are tried: that stage alone is
made exact, and everything after it computed anew, with the error that each later stage has. The
stage is confirmed if none of the three takes more of the margin with it, the share if it is that
within a quarter; where it is not, "not linear" has to be said.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np

from tests.planted.matrix import Bench, make_bench
from tests.planted.shares import measured
from tools.localize.cost import attribution
from tools.localize.cost.result import LINEAR, Share
from tools.numpy_engine.engine import BLOCK, Engine, Run

CHECKPOINTS = ("demo", "small", "small-qwen3", "hard", "hard-qwen3")
MODES = ("bf16", "f16", "act8", "q4_0")  # the last: a cache of that, in float32 otherwise
LENGTH = 24


@dataclass(frozen=True)
class Flip:
    """One: its arithmetic, how far the margin is off, what the shares sum to, and what tips it;
    whether none of those that were tried has more of it."""

    mode: str
    change: float
    sum: float
    share: Share
    confirmed: bool

    @property
    def exact(self) -> bool:
        """Whether patching gives what the share says, within a quarter."""
        assert self.share.patched is not None
        off = abs(self.share.margin - self.share.patched)
        return off <= LINEAR * max(abs(self.share.margin), abs(self.share.patched))


class Trial:
    """One checkpoint. Its prompts are drawn by ``seed``."""

    def __init__(self, name: str, directory: Path, seed: int) -> None:
        self.bench: Bench = make_bench(name, "f32", directory, LENGTH)
        loaded, random = self.bench.loaded, np.random.default_rng(seed)
        self.random, self.vocabulary = random, loaded[0].vocabulary
        self.modes = [m for m in MODES if m != "q4_0" or loaded[0].head % BLOCK == 0]
        self.engines = {m: Engine(*loaded, "f32" if m == "q4_0" else m) for m in self.modes}

    def flips(self) -> Iterator[Flip]:
        """Those of endless prompts: of each, one in every arithmetic in which there is one."""
        right = Engine(*self.bench.loaded)
        while True:
            self.bench.tokens = [0, *self.random.integers(1, self.vocabulary, LENGTH - 1).tolist()]
            first = _first(right.run(self.bench.tokens, "all"))
            for mode in self.modes:
                cache = mode if mode == "q4_0" else None
                run = self.engines[mode].run(self.bench.tokens, "all", cache=cache)
                rows = np.flatnonzero(_first(run) != first)
                flip = self._asked(mode, run, int(rows[0])) if len(rows) else None
                if flip:
                    yield flip

    def _asked(self, mode: str, run: Run, row: int) -> Flip | None:
        """None where exact arithmetic has the same token as the run after all."""
        tokens = tuple(self.bench.tokens)
        self.bench.layout = replace(self.bench.layout, tokens=tokens)
        with patch.object(attribution, "SEEN", 0.0):  # however small: the commands leave these out
            found = measured(self.bench, run, row=row)
        if not found.flips:
            return None
        tried = [share for _, share in found.largest if share.patched is not None]
        share = max(tried, key=lambda each: each.margin)
        best = max(tried, key=lambda each: each.patched or 0.0)
        return Flip(mode, found.margin - found.exact_margin, found.sum, share, share is best)


def _first(run: Run) -> np.ndarray:
    """[T]: the token that comes first after each row."""
    return run.stages[None, "lm_head"].argmax(-1)


def row(name: str, found: Sequence[Flip]) -> str:
    """A row of the table."""
    wrong = [flip for flip in found if not flip.exact]
    off = [abs(flip.sum - flip.change) / abs(flip.change) for flip in found]
    least, most = (limit(flip.change for flip in found) for limit in (min, max))
    cells = [
        name,
        len(found),
        sum(flip.confirmed for flip in found),
        len(found) - len(wrong),
        sum(not flip.share.linear for flip in wrong),
        f"{np.median(off):.2%}, {max(off):.0%}",
        f"{least:.2g} to {most:.2g}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    '| checkpoint, arithmetic | flips | stage confirmed | share too | else "not linear" | sum of '
    "shares off: median, most | margin moved by, nats |\n|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", nargs="+", choices=CHECKPOINTS, default=CHECKPOINTS)
    parser.add_argument("--flips", type=int, default=40, help="of each checkpoint")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    found: list[Flip] = []
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.checkpoint:
            trial = Trial(name, Path(scratch), args.seed)
            some = list(islice(trial.flips(), args.flips))
            for mode in trial.modes:
                if those := [flip for flip in some if flip.mode == mode]:
                    print(row(f"{name}, {mode}", those), flush=True)
            found += some
    print(row("all", found))


if __name__ == "__main__":
    main()
