"""Extractions and reports for the eye: HTML pages, notebooks and terminals."""

from .html import tables_to_html, to_html, to_page
from .terminal import show

__all__ = ["show", "tables_to_html", "to_html", "to_page"]
