"""One table, for a terminal, Markdown and a page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.text import Text

BREAKS = re.compile("[_ ]")
Cell = str | Text  # a Text has a style, which only a terminal shows


@dataclass(frozen=True)
class Table:
    """Rows of cells below the names of the columns.

    Attributes:
        title: what the rows are of; empty where that goes without saying.
        left: names of the columns that are no numbers; None is the first.
        styles: of each row, as rich names them; none is all plain.
        gap: blanks between columns in a terminal.
        narrow: a terminal breaks the names of columns at every "_" and blank.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: Sequence[str] | None = None
    styles: Sequence[str] = ()
    narrow: bool = False
    gap: int = 2

    @property
    def text(self) -> list[list[str]]:
        """The rows without styles."""
        return [[str(cell) for cell in row] for row in self.rows]

    @property
    def terminal(self) -> rich.table.Table:
        """The table for a console, without its title."""
        padding = (0, 1) if self.gap == 2 else (0, self.gap, 0, 0)
        made = rich.table.Table(box=None, header_style="bold", pad_edge=False, padding=padding)
        left = self.names[:1] if self.left is None else self.left
        for name in self.names:
            head = Text(BREAKS.sub("\n", name) if self.narrow else name)
            made.add_column(head, justify="left" if name in left else "right")
        for row, style in zip(self.rows, self.styles or [""] * len(self.rows), strict=True):
            cells = (Text(cell) if isinstance(cell, str) else cell for cell in row)
            made.add_row(*cells, style=style)
        return made

    @property
    def markdown(self) -> str:
        """The table alone, for a page of Markdown."""
        lines = [list(self.names), ["---"] * len(self.names), *self.text]
        cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "".join(f"| {' | '.join(line)} |\n" for line in cells)
