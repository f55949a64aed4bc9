"""Packages that only some functions need: imported there, or an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        ImportError: It is not installed; the message names the extra that brings it.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"This needs `{package}`, which is not installed. "
            f"Run: pip install 'peft_taskmoe[{extra}]'"
        ) from error
    return importlib.import_module(module)
