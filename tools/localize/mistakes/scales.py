"""Codes of a quantiser that are read without their scales: of which grid, and over which slices."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from stages import numbers


def _floats(dtype: Any) -> np.ndarray:
    """Every finite number of an 8-bit float, rising."""
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


# What a number of a key/value cache may be stored as.
GRIDS: dict[str, np.ndarray] = {
    "int4": np.arange(-8.0, 8.0),
    "int8": np.arange(-128.0, 128.0),
    **{f.name: _floats(f.dtype) for f in numbers.used(numbers.CACHE) if f.keeps == "cache"},
}
# What has one scale, of rows [T, K, blocks, channels]: the axes that share it; fewest scales first.
SLICES: dict[str, tuple[int, ...]] = {
    "": (0, 1, 2, 3),
    "of each head": (0, 2, 3),
    "of each token": (1, 2, 3),
    "of each channel": (0,),
    "of each token and head": (2, 3),
    "of each token in blocks of 32": (3,),
}
BLOCK = 32
SAME = 0.99  # of the codes: the rest lie on an edge, where float32 may round either way


def _blocks(x: np.ndarray) -> np.ndarray:
    """Rows [T, K, H] as [T, K, blocks, channels]."""
    size = BLOCK if x.shape[-1] % BLOCK == 0 else x.shape[-1]
    return x.reshape(*x.shape[:2], -1, size)


def _on(grid: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, x)])


def lost(right: np.ndarray, found: np.ndarray) -> Iterator[tuple[str, np.ndarray, int]]:
    """Rows [T, K, H] of codes without their scales, if that is what was found of the right rows:
    the scales and the grid, the codes, and how many scales were fitted.

    Every code bounds the scale that made it, as it must have been nearest.
    """
    x, codes = _blocks(right), _blocks(found)
    for name, grid in GRIDS.items():
        at = np.searchsorted(grid, codes).clip(1, len(grid) - 2)
        inside = (grid[at] == codes) & (codes != 0) & (x != 0)
        if inside.sum() < codes.size / 2:
            continue
        middle, safe = (grid[1:] + grid[:-1]) / 2, np.where(x == 0, 1, x)
        ends = np.sort(np.stack([middle[at - 1] / safe, middle[at] / safe]), 0)
        low, high = np.where(inside, ends[0], -np.inf), np.where(inside, ends[1], np.inf)
        for slices, axes in SLICES.items():
            bounds = low.max(axes, keepdims=True), high.min(axes, keepdims=True)
            factor = np.where(np.isfinite(bounds).all(0), np.mean(bounds, 0), 1.0)
            value = _on(grid, x * factor)
            if (value == codes).mean() < SAME:
                continue
            if np.abs(factor - 1).max() > 1e-3:
                free, most = factor.size, np.abs(x).max(axes, keepdims=True)
                top = np.rint(np.median(most * factor))
                by_size = np.where(most == 0, 1, top / np.maximum(most, 1e-300))
                again = _on(grid, x * by_size)
                if free > 1 and (again == codes).mean() >= SAME:  # no number of it is fitted
                    value, factor, free = again, by_size, 0
                yield _says(name, slices, 1 / factor), value.reshape(right.shape), free
            return


def _says(grid: str, slices: str, scale: np.ndarray) -> str:
    if scale.size == 1:
        return f"{scale.item():.4g} ({grid})"
    return f"{slices}, {scale.min():.3g} to {scale.max():.3g} ({grid})"


def codes(right: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Rows [T, K, H] as the codes that the largest of each slice gives, without their scales."""
    x = _blocks(right)
    for name, grid in GRIDS.items():
        for slices, axes in SLICES.items():
            most = np.maximum(np.abs(x).max(axes, keepdims=True), 1e-30)
            value = _on(grid, x * (grid[-1] / most))
            yield f"{slices or 'of all'} ({name})", value.reshape(right.shape)
