"""Tests over a grid of parameters: the whole of it, or every value of each parameter.

A test marked ``grid`` is one thing tried on all combinations, which costs minutes. In every run
each value of each parameter is tried, in as few combinations as that takes; ``--whole`` tries all.
"""

from collections import defaultdict

import pytest

Value = tuple[str, str]


def values(item: pytest.Function) -> frozenset[Value]:
    """(parameter, value) of one combination."""
    return frozenset((name, repr(value)) for name, value in item.callspec.params.items())


def cover(combinations: list[frozenset[Value]]) -> list[int]:
    """Indices, in order, of combinations that have among them every value of all: of those that
    add the most new values, the first, until there is none."""
    missing = frozenset().union(*combinations)
    chosen = []
    while missing:
        best = max(range(len(combinations)), key=lambda n: len(combinations[n] & missing))
        missing -= combinations[best]
        chosen.append(best)
    return sorted(chosen)


def thin(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests to leave out."""
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("grid"):
            grids[item.nodeid.partition("[")[0]].append(item)
    left_out = []
    for grid in grids.values():
        kept = cover([values(item) for item in grid])
        left_out += [item for number, item in enumerate(grid) if number not in kept]
    return left_out
