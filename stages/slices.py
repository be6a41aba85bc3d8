"""Sums over rows and columns of a stage, folded into positions, heads and channels.

A stage is handled as a matrix everywhere: rows are heads x positions for ``N T S``, positions for
everything else; columns are what remains.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.table import QKV


def head_count(axes: tuple[str, ...], config: Mapping[str, Any]) -> int | None:
    """How many heads lie on the stage's axes; None where there are none."""
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    held = {"N": n, "K": k, "N*H": n, QKV: n + 2 * k}
    return next((held[axis] for axis in axes if axis in held), None)


def fold(
    axes: tuple[str, ...], heads: int | None, rows: np.ndarray, columns: np.ndarray
) -> dict[str, np.ndarray]:
    """{"position", "head", "channel"} -> sums of that slice, as far as the stage has the axis.

    ``rows`` and ``columns`` have one entry per row and column in their last dimension. For
    ``N T S`` "channel" is the key position.
    """
    lead = rows.shape[:-1]
    if axes == ("N", "T", "S"):
        grid = rows.reshape(*lead, heads, -1)
        return {"position": grid.sum(-2), "head": grid.sum(-1), "channel": columns}
    found = {"position": rows} if axes[0] == "T" else {}
    if heads:
        found["head"] = columns.reshape(*lead, heads, -1).sum(-1)
    return found | {"channel": columns}
