"""The prompt format of an adapter, in a file beside it."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..prompt import PromptFormat

FORMAT_FILE = "uie_config.json"
"""Written beside an adapter: the prompt format it was trained with."""


def save_format(format: PromptFormat, folder: str | Path) -> None:
    """Write the prompt format beside an adapter, where `Extractor.from_pretrained` finds it."""
    text = json.dumps({"prompt_format": asdict(format)}, indent=2)
    (Path(folder) / FORMAT_FILE).write_text(text + "\n", encoding="utf-8")


def load_format(
    adapter: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> PromptFormat:
    """The prompt format that an adapter was trained with; the default, with a warning, if unknown.

    Raises:
        ValueError: If the file is not what `save_format` writes, or has unknown settings.
    """
    path = file_beside(adapter, FORMAT_FILE, revision=revision, subfolder=subfolder, token=token)
    if path is None:
        warnings.warn(
            f"No `{FORMAT_FILE}` is found beside the adapter {str(adapter)!r}, so prompts are "
            "written in the default format. If it was trained with another, pass "
            "`format=PromptFormat(...)`.",
            stacklevel=2,
        )
        return PromptFormat()
    what = f"`{FORMAT_FILE}` of {str(adapter)!r}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({error}). Write it with `save_format`.") from error
    settings = content.get("prompt_format") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(
            f'{what} has no `{{"prompt_format": {{...}}}}`. Write it with `save_format`.'
        )
    known = set(PromptFormat.__dataclass_fields__)
    if unknown := sorted({*settings} - known | {*content} - {"prompt_format"}):
        raise ValueError(
            f"{what} has settings this version does not know: {', '.join(unknown)}. Update "
            "`peft_taskmoe`, or pass `format=PromptFormat(...)`."
        )
    return PromptFormat(**settings)


def file_beside(adapter: str | Path, name: str, **where: Any) -> str | None:
    """A file beside an adapter, in its folder or on the Hub; None where there is none."""
    found: str | None = cached_file(
        str(adapter),
        name,
        **{key: value for key, value in where.items() if value is not None},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # offline, and not in the cache
    )
    return found
