"""Constants as they come out of a dump, and as somebody would have written them."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def round_numbers(found: float, digits: int) -> Iterator[tuple[float, int]]:
    """``found`` rounded to 1 to ``digits`` significant digits, 0 numbers fitted; then as it is, 1.

    What is too rough does not bring the bits back, so the roundest that does is the first.
    """
    tried = dict.fromkeys(float(f"{found:.{places}e}") for places in range(digits))
    yield from ((number, 0) for number in tried)
    yield found, 1


def lowest(error: Callable[[float], float], tried: np.ndarray) -> float:
    """The positive number at which an error is least, of ``tried`` [n], which rise, and then of
    ever closer ones around it: to about a millionth of itself."""
    for _ in range(8):
        best = int(np.argmin([error(float(number)) for number in tried]))
        first, last = max(best - 1, 0), min(best + 1, len(tried) - 1)
        tried = np.geomspace(tried[first], tried[last], 17)
    return float(tried[8])


STEP = 1e-3  # of a logarithm: what a derivative is taken over
CLOSE = 1e-7


def nearest(
    value: Callable[[float], np.ndarray | None], dump: np.ndarray, tried: Sequence[float]
) -> float | None:
    """The positive number whose ``value`` comes nearest to a dump: the best of those ``tried``,
    and from there by Gauss and Newton in its logarithm. None where ``value`` is none."""
    errors = []
    for number in tried:
        found = value(number)
        if found is None:
            return None
        errors.append(float(np.nan_to_num(np.square(found - dump), nan=np.inf).sum()))
    log = math.log(tried[int(np.argmin(errors))])
    for _ in range(8):
        here, ahead = value(math.exp(log)), value(math.exp(log + STEP))
        if here is None or ahead is None:
            return None
        slope = (ahead - here) / STEP
        square = float(np.square(slope).sum())
        if not 0 < square < math.inf:
            return None
        step = float(((dump - here) * slope).sum()) / square
        log += max(min(step, 1.0), -1.0)
        if abs(step) < CLOSE:
            break
    return math.exp(log)
