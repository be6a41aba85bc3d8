"""Results that show themselves as their commands show them. A result is data and knows of nothing
that prints: the modules that do are registered here, and what makes results imports those."""

from functools import singledispatch
from typing import Any


@singledispatch
def for_terminal(result: Any) -> Any:
    """What rich prints of a result; its ``str`` is the same without colours."""
    raise TypeError(f"nothing that prints a {type(result).__name__} was imported")


@singledispatch
def for_notebook(result: Any) -> str:
    """A result as HTML, for a cell of a notebook."""
    raise TypeError(f"nothing that draws a {type(result).__name__} was imported")


class Shown:
    """A result that ``print``, rich and notebooks show."""

    def __str__(self) -> str:
        return str(for_terminal(self))

    def __rich__(self) -> Any:
        return for_terminal(self)

    def _repr_html_(self) -> str:
        return for_notebook(self)
