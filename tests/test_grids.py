"""Of a grid every value of each parameter is tried."""

from itertools import product

import pytest

from tests.grids import cover

GRIDS = [(9, 5), (4, 4), (1, 7), (1, 1), (3, 2, 5)]


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_every_value_is_tried_in_few_combinations(sizes: tuple[int, ...]) -> None:
    grid = [
        frozenset((str(axis), str(value)) for axis, value in enumerate(each))
        for each in product(*map(range, sizes))
    ]
    chosen = cover(grid)
    assert frozenset().union(*(grid[n] for n in chosen)) == frozenset().union(*grid)
    assert len(chosen) == max(sizes)
