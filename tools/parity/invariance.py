"""Is a sequence the same whatever is computed beside it? Alone and in one call, against in batches
of several sizes and places, padded, through a cache, in chunks, and decoded.

The rule is *the first operation with bit-equal inputs and unequal outputs*: ``stages.invariance``.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from rich.console import Console

from qwen_jax.table import Table
from qwen_jax.tracing import Engine, Plan, batch_to_memory, make_batch, make_plan, to_memory
from qwen_jax.weights.base import Weights
from stages.entry import Entry
from stages.errors import NotComparable
from stages.invariance import Parting, partings
from stages.trace import Trace

LENGTHS = (63, 64, 255, 256)  # across the sizes of blocks and tiles
BATCHES = (2, 3, 4, 8)
CHUNKS = (16, 64)
DECODED = 4
PADDING = 9

Tokens = tuple[int, ...]


class Outcome(Entry, frozen=True):
    """One way to compute a sequence of ``length`` tokens, and where it parts from alone, in one
    call and without a cache."""

    length: int
    way: str
    partings: list[Parting]

    @property
    def says(self) -> str:
        if not self.partings:
            return "identical"
        first = self.partings[0]
        place = "" if first.layer is None else f"layer {first.layer} "
        stages = dict.fromkeys(each.stage for each in self.partings)
        others = [name for name in stages if name != first.stage]
        more = f"; also at {', '.join(others)}" if others else ""
        return f"parts at {place}{first.stage}, in {len(first.rows)} of {self.length} rows{more}"


class InvarianceResult(Entry, frozen=True):
    """``tools.parity --invariance --json``."""

    schema: Literal[1]
    verdict: Literal["identical", "differ"]
    model: str
    device: Literal["cpu", "gpu"]
    outcomes: list[Outcome]


def ways(
    model: Weights, tokens: Tokens, others: Callable[[int], Tokens], dtype: str
) -> Iterator[tuple[str, list[Plan], int]]:
    """(what is done, the sequences that are computed together, which of them is ``tokens``).

    ``others`` gives that many tokens of another sequence.
    """

    def plan(of: Tokens, **asked: Any) -> Plan:
        return make_plan(model, of, dtype=dtype, **asked)

    one, length = plan(tokens), len(tokens)
    for size in BATCHES:
        beside = [plan(others(length)) for _ in range(size - 1)]
        yield f"first of a batch of {size}", make_batch([one, *beside]), 0
        yield f"last of a batch of {size}", make_batch([*beside, one]), size - 1
    yield f"padded by {PADDING}", make_batch([plan(others(length + PADDING)), one]), 1
    yield "through a cache", [plan(tokens, cache="model")], 0
    for chunk in CHUNKS:
        if chunk < length:
            yield f"in chunks of {chunk}", [plan(tokens, prefill_chunk=chunk)], 0
    yield f"its last {DECODED} decoded", [plan(tokens[:-DECODED], generate=DECODED + 1)], 0


def sweep(
    engine: Engine, model: Weights, stream: Callable[[int], Tokens], dtype: str
) -> Iterator[Outcome]:
    """Every way for every length that the model has positions for. ``stream`` draws tokens.

    Raises:
        NotComparable: there is no such length.
    """
    longest = model.config.max_position_embeddings - PADDING
    lengths = [length for length in LENGTHS if length <= longest]
    if not lengths:
        raise NotComparable(f"{model.name} has {longest + PADDING} positions; nothing to compare")
    for length in lengths:
        tokens = stream(length)
        alone: dict[Tokens, Trace] = {}
        for way, plans, place in ways(model, tokens, stream, dtype):
            found = batch_to_memory(engine, plans)[place]
            if found.tokens not in alone:  # a decode picks its own
                alone = {
                    found.tokens: to_memory(engine, make_plan(model, found.tokens, dtype=dtype))
                }
            yield Outcome(length, way, partings(alone[found.tokens], found))


def show(console: Console, outcomes: list[Outcome]) -> None:
    names = ("tokens", "computed", "against alone, in one call")
    rows = [(str(each.length), each.way, each.says) for each in outcomes]
    styles = ["" if each.partings else "green" for each in outcomes]
    console.print(Table("", names, rows, left=names[1:], styles=styles).terminal)
    same = sum(not each.partings for each in outcomes)
    console.print(f"{same} of {len(outcomes)} are identical, bit for bit, in every stage")
