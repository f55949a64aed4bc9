"""Extractions and reports as HTML pages, notebook views and terminal output."""

from .html import tables_to_html, to_html, to_page
from .terminal import show

__all__ = ["show", "tables_to_html", "to_html", "to_page"]
