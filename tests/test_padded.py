"""Sequences of several lengths in one array."""

import numpy as np

from qwen_jax.padded import Padded


def test_padding_is_on_the_left() -> None:
    batch = Padded.of([(7, 8, 9), (5,)])
    assert batch.tokens.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.valid.tolist() == [[True] * 3, [False, False, True]]
    assert batch.lengths == [3, 1]
    assert batch.tokens.dtype == batch.positions.dtype == np.int32


def test_rows_that_are_still_to_be_picked_have_positions_alone() -> None:
    batch = Padded.of([(7, 8), (5,)], [(4, 5, 6), (9, 10)])
    assert batch.tokens.tolist() == [[7, 8], [0, 5]]
    assert batch.positions.tolist() == [[4, 5, 6], [0, 9, 10]]
    assert batch.lengths == [3, 2]
