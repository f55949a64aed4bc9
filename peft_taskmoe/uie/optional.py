"""Packages that only some functions need: imported there, or an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        ImportError: It is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"This needs `{error.name}`, which is not installed. "
            f"Run: pip install 'peft_taskmoe[{extra}]'"
        ) from error
