"""Which stages of a trace have to be measured exactly: all others are estimated.

Nothing that is acted upon is an estimate: what could be a suspect, or computed in a number format,
is measured in full before it is judged.
"""

from qwen_jax.replay import Measured, Replay
from stages import verdict
from stages.architecture import Key
from stages.verdict import LocalError
from tools.localize.formats import fit


def judged(replay: Replay, measured: Measured, dtype: str) -> LocalError:
    """One stage's sums as significant bits."""
    m, dims = measured, replay.config.dims(1)
    before = len(replay.trace.tokens) - m.rows
    heads = m.stage.heads(dims)
    return verdict.judge(m.stage, m.layer, m.sums, m.segment, heads, before, dtype, m.estimated)


def doubtful(items: list[LocalError], dtype: str) -> set[Key]:
    """The estimated items that have to be measured exactly: those that may be suspects or have a
    format, and then all layers of a stage that is one, by which it is judged."""
    estimated = [item for item in items if item.estimated]
    found = {item.key for item in estimated if fit.may_have_formats(item, dtype)}
    found |= verdict.doubtful(items, dtype)
    if found:
        return found
    wrong = {suspect.item.name for suspect in verdict.suspects(items, dtype)}
    return {item.key for item in estimated if item.name in wrong}


def settle(
    replay: Replay,
    measured: dict[Key, Measured],
    items: dict[Key, LocalError],
    dtype: str,
    fitted: fit.Fitted,
) -> None:
    """Measure in place whatever is doubtful, until nothing is. A format that an
    estimate found stays what it is judged against."""
    while keys := doubtful([*items.values()], dtype):
        for m in replay.exactly(keys):
            key = m.stage.name, m.layer
            measured[key], items[key] = m, judged(replay, m, dtype)
            if key in fitted.by_item:
                with replay.numerics():
                    items[key] = fit.rejudged(replay, m, items[key], fitted, dtype)


def exactly(replay: Replay, item: LocalError, dtype: str) -> LocalError:
    """The item measured, if it is only estimated."""
    if not item.estimated:
        return item
    (measured,) = replay.exactly([item.key])
    return judged(replay, measured, dtype)
