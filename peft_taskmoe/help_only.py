"""Whether this process is the command line and will do nothing but print help or the version."""

from __future__ import annotations

import sys
from pathlib import Path


def is_help_only() -> bool:
    """Tell from the process's arguments, before anything slow is imported."""
    started = Path(sys.argv[0]).stem == "peft-taskmoe"
    if sys.argv[0] == "-m":  # while `python -m` imports the package
        started = sys.orig_argv[-len(sys.argv) :][:1] in (["peft_taskmoe"], ["peft_taskmoe.cli"])
    asked = sys.argv[1:]
    return started and (not asked or not {"-h", "--help", "--version"}.isdisjoint(asked))
