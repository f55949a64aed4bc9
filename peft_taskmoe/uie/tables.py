"""Results as tables and JSON: for a terminal (rich), a file (Markdown, JSON) or a page (HTML)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..optional import needed

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of words below a header.

    Args:
        title: What a terminal and a page show above it.
        header: The names of the columns.
        rows: The cells, as words.
        left: The number of columns that are aligned to the left; those behind them hold figures.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 2

    def to_markdown(self) -> str:
        """The table as Markdown, without its title."""
        return markdown_table(self.header, self.rows)

    def to_rich(self) -> RichTable:
        """The table for `rich.print`; cells that do not fit the terminal are folded, not cut."""
        needed("rich", "uie")
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title))
        for i, name in enumerate(self.header):
            side: Literal["left", "right"] = "left" if i < self.left else "right"
            table.add_column(escape(name), justify=side, overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as Markdown; cells may be anything that `str` turns into words."""

    def line(cells: Iterable[object]) -> str:
        words = (" ".join(str(cell).replace("|", "\\|").splitlines()) for cell in cells)
        return f"| {' | '.join(words)} |\n"

    return line(header) + line(["---"] * len(header)) + "".join(map(line, rows))


def json_text(figures: Any) -> str:
    """JSON that every file takes: no NaN, and halves of surrogate pairs as escapes."""
    text = json.dumps(figures, ensure_ascii=False, indent=1, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def percent(value: float) -> str:
    """A share times 100 with one decimal, or nothing where it is not defined."""
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def none_if_nan(value: float) -> float | None:
    """The value as JSON can hold it."""
    return None if math.isnan(value) else value
