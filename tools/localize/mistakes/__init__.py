"""The mistakes that engines make, as a grammar of edits: a room for each word of an operation.

``CATALOGUE`` has all of them, the more specific first.
"""

from tools.localize.mistakes import (
    arithmetic,
    constant,
    entries,
    function,
    logits,
    masks,
    rotation,
    terms,
    value,
    weight,
)
from tools.localize.mistakes.registry import CATALOGUE, Edit, Mistake, named

# In the order in which the rooms are read where two explanations are equally good.
ROOMS = (
    value, entries, logits, weight, constant, rotation, terms, masks, function, arithmetic
)  # fmt: skip

__all__ = ["CATALOGUE", "ROOMS", "Edit", "Mistake", "named"]
