"""What the error of a dump costs: of its scores in every layer, and of one token."""

from collections.abc import Sequence
from dataclasses import replace

from qwen_jax.replay import Replay
from qwen_jax.weights.base import Weights
from stages.architecture import SCORES
from stages.files import numpy_dtype
from stages.verdict import LocalError
from tools.localize.cost import attribution, softmax_error
from tools.localize.cost.query import Question
from tools.localize.cost.softmax_error import Nats
from tools.localize.preflight import check_model
from tools.localize.result import Localization


def of_scores(replay: Replay, items: Sequence[LocalError]) -> list[Nats]:
    """The error of each layer's scores, in nats; a sample of those that are plainly sound."""
    sound = {item.layer for item in items if item.stage.kind is SCORES and item.estimated}
    return softmax_error.measure(replay, sound)


def of_a_token(
    found: Localization, replay: Replay, harm: Question | None, right: Weights | None
) -> Localization:
    """The same with what the error costs a token; by the weights that are ``right``, too."""
    if harm is None:
        return found
    clean = found.verdict == "clean"
    if harm.of_clean or not clean or right is not None:
        found = replace(found, harm=attribution.measure(replay, harm, clean))
    if right is not None:
        check_model(found.trace, right)
        other = Replay(found.trace, right, numpy_dtype(found.dtype))
        found = replace(found, rounding=(right.name, attribution.measure(other, harm, clean)))
    return found
