"""The command line, `peft-taskmoe extract | score | convert`: files, arguments, exit codes."""

from .main import main, parser
from .messages import Exit

__all__ = ["Exit", "main", "parser"]
