"""The forms that a report of tables has: JSON, Markdown, terminal, notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from ..optional import needed
from .tables import Table, json_text
from .view import tables_to_html

if TYPE_CHECKING:
    from rich.console import Group


class Tabular(ABC):
    """Gives an object with `to_dict` and `tables` its forms for files, terminals and notebooks."""

    notes: tuple[str, ...] = ()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready dicts, with None for what is undefined."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """The figures that a person reads."""

    def to_json(self, **options: Any) -> str:
        """`to_dict(**options)` as a JSON text."""
        return json_text(self.to_dict(**options))

    def to_markdown(self, **options: Any) -> str:
        """`tables(**options)` as Markdown, and notes."""
        notes = [f"Note: {note}\n" for note in self.notes]
        return "\n".join([*(table.to_markdown() for table in self.tables(**options)), *notes])

    def table(self, **options: Any) -> Group:
        """`tables(**options)` for the terminal: `rich.print(report.table())`."""
        needed("rich", "uie")
        from rich.console import Group
        from rich.markup import escape

        return Group(
            *(table.to_rich() for table in self.tables(**options)), *map(escape, self.notes)
        )

    def _repr_html_(self) -> str:
        return tables_to_html(self.tables(), self.notes)
