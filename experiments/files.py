"""The files of a run: written whole or not at all, and what they say about versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import peft_taskmoe

PACKAGES = ("peft", "transformers", "trl", "torch", "datasets", "accelerate")


def once(path: Path, work: Callable[[], Any]) -> Any:
    """What a file holds, or the outcome of the work, which the main process then writes there."""
    if not path.is_file():
        done = work()
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            write_json(path, done)
        PartialState().wait_for_everyone()
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there, also where several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def versions() -> dict[str, str]:
    """What the figures were made with; `sources` tells states of one version apart."""
    found = {"peft_taskmoe": peft_taskmoe.__version__}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    package = Path(peft_taskmoe.__file__).parent
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py"))))
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    )
    return {
        **found,
        "sources": sources.hexdigest()[:12],
        "python": platform.python_version(),
        "device": device,
    }
