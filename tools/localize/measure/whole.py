"""All of a dump, measured: estimated first, and in full where that leaves a doubt."""

from collections.abc import Callable
from dataclasses import dataclass, field

from qwen_jax.replay import Measured, Replay
from stages.architecture import Key
from stages.errors import NotComparable
from stages.verdict import LocalError
from tools.localize.formats import sample
from tools.localize.formats.fit import Fitted
from tools.localize.measure import settle
from tools.localize.preflight import check_weights


@dataclass
class Measurements:
    """What was measured of each stage of each layer, in computation order.

    Attributes:
        sums: the sums of squares.
        items: the same as significant bits.
        fitted: the number formats that explain some of them.
    """

    sums: dict[Key, Measured] = field(default_factory=dict)
    items: dict[Key, LocalError] = field(default_factory=dict)
    fitted: Fitted = field(default_factory=Fitted)


def measure(
    replay: Replay, dtype: str, exact: bool, advance: Callable[[LocalError], None]
) -> Measurements:
    """Measure every stage that can be replayed.

    Arguments:
        dtype: the precision of the trace.
        exact: multiply all products out, also those that are plainly sound.
        advance: is called after every stage.

    Raises:
        NotComparable: nothing can be replayed, nothing is a number, or the weights are others.
    """
    trace, weights, found = replay.trace, replay.weights, Measurements()
    guesses = sample.guess(replay) if dtype == "float32" and not exact else {}
    probed = replay.probed(sample.readings(replay, guesses))
    # a float64 trace has errors as small as those of the estimate's own arithmetic
    for m in replay if exact or dtype == "float64" else probed:
        item = settle.judged(replay, m, dtype)
        formats = guesses.get(m.stage.name, ())
        if known := sample.explained(replay, m, item, formats, dtype):
            item = found.fitted.explain(*known)
        found.sums[item.key], found.items[item.key] = m, item
        advance(item)
    if not found.items:
        raise NotComparable(f"not comparable: {trace.path} holds no stage that can be replayed")
    check_weights(trace, weights)
    settle.settle(replay, found.sums, found.items, dtype, found.fitted)
    if not any(item.compared or item.born for item in found.items.values()):
        raise NotComparable(
            f"not comparable: no stage of {trace.path} has a number, nor has what {weights.name} "
            "computes from it; all is NaN or infinite"
        )
    return found
