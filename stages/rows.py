"""Rows of a sequence that several calls computed, put together into one value of a stage."""

import numpy as np

from stages.architecture import Stage


def put(stage: Stage, whole: np.ndarray, value: np.ndarray, start: int) -> None:
    """Place the rows ``value`` of one call into ``whole`` from row ``start`` of it on.

    Both are in the axes of the stage, without a batch axis. Scores [N, T, S] of an early call have
    fewer keys than the whole; the columns beyond them are left alone: they are masked there.
    """
    place = [slice(size) for size in value.shape]
    place[stage.positions_at] = slice(start, start + value.shape[stage.positions_at])
    whole[tuple(place)] = value
