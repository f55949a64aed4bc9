"""Finds the newest whole checkpoint of a transformers `Trainer`, whatever a kill left behind."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import TrainerCallback

CHECKSUMS = "checksums.json"
_STATES = {  # beginning of a file's name: the keys that its content must have
    "optimizer": {"state", "param_groups"},
    "scheduler": {"last_epoch"},
    "rng_state": {"python", "numpy", "cpu"},
}
_NEEDED = {
    "weights": ("adapter_model.", "model.", "model-", "pytorch_model"),
    **{name: (name,) for name in _STATES},
}


def newest_whole_checkpoint(output_dir: str | Path) -> tuple[Path | None, dict[str, str]]:
    """Find the checkpoint to resume from: `trainer.train(resume_from_checkpoint=...)`.

    Args:
        output_dir: The Trainer's `output_dir`, which holds `checkpoint-STEP` folders.

    Returns:
        The newest whole checkpoint or None, and what is wrong with each newer one, by its name.
    """
    steps = {
        int(folder.name.removeprefix("checkpoint-")): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.is_dir() and folder.name.removeprefix("checkpoint-").isdecimal()
    }
    broken: dict[str, str] = {}
    for _, folder in sorted(steps.items(), reverse=True):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder, broken
        broken[folder.name] = fault
    return None, broken


def checkpoint_fault(folder: str | Path) -> str | None:
    """Say what is wrong with a checkpoint; None if its weights and training states are whole.

    Files are read safely: tensors and plain values, never code. What DeepSpeed or FSDP sharded
    into folders is not read.
    """
    folder = Path(folder)
    try:
        files = (*folder.iterdir(), *folder.glob("*/*.safetensors"))
        content = {file.name: _read(file) for file in files if file.suffix in _READERS}
        _check_complete(folder, content)
        for name, expected in content.get(CHECKSUMS, {}).items():
            if _checksum(folder / Path(name).name) != expected:
                raise ValueError(f"{name} is not what was saved")
    except Exception as error:  # whatever a broken file makes its reader raise
        return str(error).partition("\n")[0]
    return None


class ChecksumCallback(TrainerCallback):
    """Saves checksums in each checkpoint, so that `checkpoint_fault` also finds changed bytes."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write `checksums.json` into the checkpoint that was just saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            files = [file for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS]
            sums = {file.name: _checksum(file) for file in sorted(files)}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def _check_complete(folder: Path, content: dict[str, Any]) -> None:
    step = dict(content.get("trainer_state.json", {})).get("global_step")
    if f"checkpoint-{step}" != folder.name:
        raise ValueError(f"trainer_state.json has the step {step}")
    sharded = any(folder.glob("global_step*")) or any(folder.glob("pytorch_model_fsdp*"))
    for what, names in _NEEDED.items():
        if not sharded and not any(name.startswith(names) for name in content):
            raise ValueError(f"there is no file of the {what}")
    for name, value in content.items():
        for start, keys in _STATES.items():
            if name.startswith(start) and (lacking := sorted(keys - set(value))):
                raise ValueError(f"{name} has no {', '.join(lacking)}")


def _read(file: Path) -> Any:
    try:
        return None if file.name == "training_args.bin" else _READERS[file.suffix](file)
    except Exception as error:
        raise ValueError(f"{file.name} cannot be read ({error})") from error


def _read_archive(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        if changed := archive.testzip():
            raise ValueError(f"{changed} is not what was saved")
    core = np._core if hasattr(np, "_core") else np.core  # the second is numpy 1
    states = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype("uint32"))]
    with torch.serialization.safe_globals(states):  # what random states consist of
        return torch.load(file, map_location="meta", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
    ".safetensors": lambda file: safe_open(file, framework="pt").keys(),
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_archive),
}


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
