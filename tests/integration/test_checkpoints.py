"""The newest whole checkpoint of a Trainer is found, and what is wrong with newer ones is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from peft_taskmoe import ChecksumCallback, checkpoint_fault, newest_whole_checkpoint
from tiny import VOCAB


@pytest.fixture
def run(tmp_path, adapted) -> Path:
    """The output folder of a Trainer with the whole checkpoints 1 and 2."""
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=1, use_cpu=True, report_to="none"
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, VOCAB, (4, 6))]
    model = adapted("llama", router_inputs="token")
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=[ChecksumCallback()]
    )
    trainer.train()
    assert newest_whole_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", {})
    return tmp_path / "run"


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    file.write_bytes(data)


def other_step(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": 1}))


FAULTS = {
    "adapter_model.safetensors": (half, Path.unlink, flip),
    "optimizer.pt": (half, Path.unlink, flip, lambda file: torch.save({}, file)),
    "scheduler.pt": (half, Path.unlink, flip, lambda file: torch.save({}, file)),
    "rng_state.pth": (half, Path.unlink, flip, lambda file: torch.save({"python": 1}, file)),
    "trainer_state.json": (half, Path.unlink, other_step, lambda file: file.write_text("[]")),
    "checksums.json": (half,),
}


@pytest.mark.parametrize("summed", [True, False], ids=["with checksums", "without checksums"])
def test_broken_checkpoints_are_named_and_the_one_before_is_taken(run, summed) -> None:
    whole, newest = run / "checkpoint-1", run / "checkpoint-2"
    if not summed:
        (newest / "checksums.json").unlink()
        assert newest_whole_checkpoint(run) == (newest, {})
    shutil.copytree(newest, run / "copy")
    for name, faults in FAULTS.items():
        for damage in faults:
            if not summed and (
                name == "checksums.json"
                or (damage is flip and name in ("adapter_model.safetensors", "scheduler.pt"))
            ):
                continue  # a flip in weights, or in a small archive's padding, is not noticed
            damage(newest / name)
            found, broken = newest_whole_checkpoint(run)
            assert found == whole and list(broken) == ["checkpoint-2"], (name, damage)
            what = "weights" if damage is Path.unlink and "adapter" in name else name.split(".")[0]
            assert what in broken["checkpoint-2"] and "\n" not in broken["checkpoint-2"]
            shutil.rmtree(newest)
            shutil.copytree(run / "copy", newest)


def test_empty_and_foreign_folders_are_no_checkpoints(run, tmp_path) -> None:
    (run / "checkpoint-30").mkdir()
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-4").write_text("a file")
    found, broken = newest_whole_checkpoint(run)
    assert found == run / "checkpoint-2" and list(broken) == ["checkpoint-30"]
    assert newest_whole_checkpoint(tmp_path / "nowhere") == (None, {})


def test_nothing_in_a_checkpoint_is_run(run, tmp_path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "run by the reader",))

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copytree(run / "checkpoint-2", run / "checkpoint-3", dirs_exist_ok=True)
        (run / "checkpoint-3" / "checksums.json").unlink()
        other = (run / "checkpoint-3" / "trainer_state.json").read_text()
        state = other.replace('"global_step": 2', '"global_step": 3')
        (run / "checkpoint-3" / "trainer_state.json").write_text(state)
        assert checkpoint_fault(run / "checkpoint-3") is None
        torch.save(Attack(), run / "checkpoint-3" / name)
        assert name in str(checkpoint_fault(run / "checkpoint-3"))
    assert not (tmp_path / "run by the reader").exists()
