"""What one point of a sweep comes to: bytes, local bits, accumulated error, the next token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_jax.replay import Replay
from qwen_jax.weights.base import Weights
from stages import verdict
from stages.architecture import Key, Stage
from stages.compare import Difference, LogitsDifference
from stages.files import numpy_dtype, tensor_hash
from stages.trace import MemoryTrace, Trace
from stages.verdict import LocalError
from tools.diff import TOLERANCE, compare_traces
from tools.parity.grid import Point
from tools.parity.memory import compared

CLASS = {"float64": "f64", "float32": "f32", "float16": "tf32/f16", "bfloat16": "bf16"}
UNOPTIMISED = 128  # tokens up to which a replay takes longer to compile than to run
FINEST_FIRST = [name for name, _, _ in verdict.CLASSES]


def hashes(traces: Sequence[Trace]) -> dict[str, str]:
    """ "stage layer" -> hash of the bytes of all sequences."""
    found = {}
    for key in traces[0].entries:
        parts = [tensor_hash(np.ascontiguousarray(compared(trace, key))) for trace in traces]
        found[name_of(*key)] = " ".join(parts)
    return found


def name_of(stage: str, layer: int | None) -> str:
    return stage if layer is None else f"{stage} {layer}"


@dataclass
class Agreement:
    """How a candidate and a reference agree, over all sequences.

    Attributes:
        first: (stage, layer) of the first stage whose bytes differ; None if all are identical.
        differing: how many of ``stages`` differ in bytes.
        worst: the largest relative L2 and where it is.
        logits: one a sequence.
    """

    stages: int
    first: tuple[str, int | None] | None
    differing: int
    worst: tuple[float, str, int | None]
    unmatched: int
    logits: list[LogitsDifference]

    def to_json(self) -> dict[str, Any]:
        l2, stage, layer = self.worst
        return {
            "identical": self.first is None,
            "stages": self.stages,
            "stages_differing": self.differing,
            "first_difference": self.first and {"stage": self.first[0], "layer": self.first[1]},
            "relative_l2": {"worst": l2, "stage": stage, "layer": layer},
            "argmax_equal": sum(found.argmax_equal for found in self.logits),
            "positions": sum(found.positions for found in self.logits),
            "kl_max": max(found.kl_max for found in self.logits),
        }

    def within(self, dtype: str) -> bool:
        """Whether the accumulated error is what two sound engines of one dtype may have."""
        return self.unmatched == 0 and self.worst[0] <= TOLERANCE[dtype]


def agreement(candidate: Sequence[MemoryTrace], reference: Sequence[MemoryTrace]) -> Agreement:
    """Compare the stages that the candidate has."""
    keys = [key for key in reference[0].entries if key in candidate[0].entries]
    differing: set[Key] = set()
    rows: list[tuple[Key, Difference]] = []
    logits: list[LogitsDifference] = []
    for ours, theirs in zip(candidate, reference, strict=True):
        differing |= {key for key in keys if _bytes(ours, key) != _bytes(theirs, key)}
        found, next_token = compare_traces(ours, theirs, keys)
        rows += found.items()
        if next_token is not None:
            logits.append(next_token)
    key, row = max(rows, key=lambda item: _distance(item[1]))
    return Agreement(
        stages=len(keys),
        first=next((key for key in keys if key in differing), None),
        differing=len(differing),
        worst=(_distance(row), *key),
        unmatched=sum(row.unmatched for _, row in rows),
        logits=logits,
    )


def _bytes(trace: Trace, key: tuple[str, int | None]) -> tuple[str, bytes]:
    value = compared(trace, key)
    return str(value.dtype), value.tobytes()


def _distance(row: Difference) -> float:
    return float("inf") if row.unmatched else row.relative_l2


@dataclass
class Local:
    """Local error of one candidate: every stage alone, against float64 on its own inputs."""

    items: list[LocalError] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def worst(self) -> LocalError:
        return min(self.items, key=lambda item: item.level)

    def to_json(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "local_bits": {
                "worst": round(worst.level, 2),
                "unadjusted": round(worst.bits, 2),
                "stage": worst.name,
                "layer": worst.layer,
            },
            "classes": self.classes(),
            "faults": self.faults,
        }

    def classes(self) -> dict[str, str]:
        """Kind of stage -> the coarsest precision class found in it."""
        found: dict[str, str] = {}
        for item in self.items:
            kind, name = item.stage.kind.name, class_of(item)
            held = found.get(kind, name)
            found[kind] = max(held, name, key=_coarseness)
        return found


def class_of(item: LocalError) -> str:
    return verdict.class_of(item.level, item.stage, item.segment) or "lower"


def _coarseness(name: str) -> int:
    return FINEST_FIRST.index(name) if name in FINEST_FIRST else len(FINEST_FIRST)


def local(traces: Iterable[MemoryTrace], model: Weights, point: Point, device: str) -> Local:
    """Replay every stage of every sequence, and name the faults."""
    result, dtype, config = Local(), point.dtype, model.config
    worst: dict[tuple[str, int | None], dict[str, Any]] = {}
    for trace in traces:
        replay = Replay(
            trace, model, numpy_dtype(dtype), unoptimised=len(trace.tokens) <= UNOPTIMISED
        )
        dims = config.dims(len(trace.tokens))
        items = [
            verdict.judge(m.stage, m.layer, m.sums, m.segment, m.stage.heads(dims), 0, dtype)
            for m in replay
        ]
        result.items += items
        odd = {suspect.key: suspect.why for suspect in verdict.suspects(items, dtype)}
        for item in items:
            key = item.name, item.layer
            expected = expected_class(point, item.stage, device)
            why = "bits" if _coarseness(class_of(item)) > _coarseness(expected) else odd.get(key)
            if why and item.level < worst.get(key, {"bits": np.inf})["bits"]:
                worst[key] = {
                    "stage": item.name,
                    "layer": item.layer,
                    "bits": round(item.level, 2),
                    "class": class_of(item),
                    "expected": expected,
                    "why": why,
                }
    order = [(s.name, n) for s, n in config.arch.computation_order(config.num_hidden_layers)]
    result.faults = [worst[key] for key in order if key in worst]
    return result


def expected_class(point: Point, stage: Stage, device: str) -> str:
    """The coarsest arithmetic that the point asked for: a fault is what lies below."""
    lower = point.products in ("tf32", "bf16x3") or (
        point.precision != "highest" and device == "gpu"
    )
    if stage.kind.sums_products and point.dtype == "float32" and lower:
        return "tf32/f16"
    return CLASS[point.dtype]
