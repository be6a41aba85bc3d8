"""Mistakes with a cache against the localizer, as a table.

    python -m tests.planted.cached --mode f32 bf16

A row a fault: planted in one layer of the checkpoint with hard statistics, which runs in calls: a
prompt of 40 tokens in three, then eight tokens one by one.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax import runtime
from tests.planted import checkpoints
from tests.planted.cache_faults import CACHE_FAULTS, decoding
from tests.planted.faults import Fault
from tests.planted.matrix import Bench, make_bench
from tools.localize.result import faults as reported
from tools.numpy_engine.engine import CACHED

LENGTH = 48
CHUNKS = {
    "decoded": (40, *[1] * 8), "in chunks": (16, 16, 16), "both": (13, 13, 14, *[1] * 8),
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_scaling": YARN},
    "window": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0},
}
# Planted and judged when the catalogue stood: nothing was tuned on these.
ASIDE = [
    f"cache.{what}"
    for what in (
        "k_position_late", "v_row_stale", "k_heads_exchanged", "v_row_overwritten",
        "k_blocks_exchanged", "past_not_seen", "v_of_another_sequence",
    )
]  # fmt: skip
# The same of mistakes of any other kind, made in the decode alone.
DECODING = [
    "attn_norm.norm_layernorm", "qkv_bias.bias_k_missing", "attn_scores.scale_missing",
    "ffn_silu.act_gelu", "ffn_out.weight_transposed", "lm_head.weight_transposed",
]  # fmt: skip

# Where a fault shows of a cache that was not dumped, and what it is called then.
READ_BY = {"k_cache": "attn_scores", "v_cache": "attention"}
UNSEEN = {
    "cache.k_before_rope": "scores_k_unrotated",
    "cache.k_heads_exchanged": "cache_heads_permuted",
}


def known() -> dict[str, Fault]:
    """Everything that is planted here."""
    more = {fault.name: fault for fault in map(decoding, DECODING)}
    return CACHE_FAULTS | more


def bench_for(fault: Fault, mode: str, directory: Path, cache: str | None = None) -> Bench:
    """A bench on a model that can have the fault."""
    kind = "yarn" if fault.yarn else "window" if fault.window else ""
    more: dict[str, Any] = {"steps": CHUNKS["both"], "cache": cache}
    if not kind:
        return make_bench("hard", mode, directory, length=LENGTH, **more)
    path = directory / kind
    if not path.exists():
        checkpoints.hard_checkpoint(path)
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | KINDS[kind]), "utf-8")
    return Bench(path, checkpoints.hard_tokens(LENGTH), mode, **more)


@dataclass(frozen=True)
class Judged:
    """What became of one fault.

    Attributes:
        says: how it was put, or what was found instead.
        placed: at its stage, which says K or V, and its layer, and nothing else was accused.
        called: the first call in which it is was named.
    """

    fault: str
    says: str
    placed: bool
    called: bool
    named: bool


def judge(bench: Bench, fault: Fault, omit: tuple[str, ...] = ()) -> Judged:
    """Plant a fault in one layer and ask the localizer."""
    run = bench.plant(fault, "one")
    found = reported(bench.localize(run, omit))
    places = {(stage, f.layer) for f in found for stage in (f.stage, *f.also)}
    planted = {(stage, layer) for layer, stage in run.effects}
    if omit:
        planted = {(READ_BY.get(stage, stage), layer) for stage, layer in planted}
    ends = np.cumsum(run.steps)
    first = min(int(np.searchsorted(ends, row, "right")) for row in run.first.values())
    one = found[0] if len(found) == 1 else None
    return Judged(
        fault.name,
        one.diagnosis[0].says if one and one.diagnosis else f"{[(f.stage, f.name) for f in found]}",
        one is not None and places <= planted,
        one is not None and (one.when.step if one.when else 0) == first,
        one is not None and one.name in {fault.diagnosis, *fault.accept, UNSEEN.get(fault.name)},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", default=["f32"], help="f32, bf16, ...")
    parser.add_argument("--cache", help="its format; default: exact")
    parser.add_argument("--select", default="", help="only faults with this in their name")
    parser.add_argument("--aside", action="store_true", help="only those that were kept aside")
    parser.add_argument("--no-cache-dump", action="store_true", help="leave k_cache, v_cache out")
    args = parser.parse_args()
    runtime.for_a_command("cpu")
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for mode in args.mode:
            for name, fault in known().items():
                aside = name in ASIDE or name not in CACHE_FAULTS
                if args.select not in name or (args.aside and not aside):
                    continue
                bench = bench_for(fault, mode, Path(scratch), args.cache)
                row = judge(bench, fault, CACHED if args.no_cache_dump else ())
                marks = [
                    word if is_so else f"not {word}"
                    for word, is_so in (
                        ("placed", row.placed), ("called", row.called), ("named", row.named)
                    )
                ]  # fmt: skip
                missed += not (row.placed and row.called and row.named)
                print(f"{mode} {name}: {', '.join(marks)}: {row.says}", flush=True)
    print(f"{missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
