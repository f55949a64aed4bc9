"""Stock PEFT knows the method by its import, in a fresh process too; without it, it says so."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_taskmoe
from peft_taskmoe import TaskMoELoraConfig, TaskMoELoraModel
from peft_taskmoe.peft_type import PREFIX, TASKMOE_LORA
from peft_taskmoe.registration import register
from tiny import TASK_DIM

IDS = torch.arange(4, 14).view(2, 5)
TASK = torch.randn(2, TASK_DIM, generator=torch.Generator().manual_seed(5))
MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


def test_the_tables_have_their_entries() -> None:
    assert [mapping[TASKMOE_LORA] for mapping in MAPPINGS] == [
        TaskMoELoraConfig,
        TaskMoELoraModel,
        PREFIX,
    ]
    assert [mapping["TASKMOE_LORA"] for mapping in MAPPINGS] == [
        TaskMoELoraConfig,
        TaskMoELoraModel,
        PREFIX,
    ]
    assert (
        PREFIX == TASKMOE_LORA.value.lower() + "_" == TaskMoELoraModel.prefix
    )  # how transformers derives it


def test_registering_again_changes_nothing() -> None:
    before = [dict(mapping) for mapping in MAPPINGS]
    register()
    importlib.import_module("peft_taskmoe")
    assert [dict(mapping) for mapping in MAPPINGS] == before


def test_other_methods_are_left_alone() -> None:
    for mapping in MAPPINGS:
        assert [key for key in mapping if str(getattr(key, "value", key)) == "TASKMOE_LORA"] == [
            TASKMOE_LORA
        ]
        assert len(mapping) > 10


FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
folder = sys.argv[1]
base = LlamaForCausalLM.from_pretrained(folder + "/base")
batch = torch.load(folder + "/batch.pt", weights_only=True)
try:
    PeftModel.from_pretrained(base, folder + "/adapter")
except KeyError as error:
    print("without the import:", type(error).__name__, error)

before = set(sys.modules)  # transformers 5.8 brings pandas
import peft_taskmoe

others = ("trl", "datasets", "pandas", "matplotlib")
print("loaded as well:", [n for n in sys.modules.keys() - before if n.split(".")[0] in others
                          or n.startswith("peft_taskmoe.uie")])
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
torch.save(model(**batch).logits, folder + "/logits.pt")
"""


def test_a_fresh_process_gives_the_same_logits_and_needs_the_import(
    adapted, tiny_model, tmp_path
) -> None:
    """Without it there is a bare KeyError of PEFT's; with it, the logits are equal bit for bit.

    The import brings neither extraction nor a training library along.
    """
    tiny_model().save_pretrained(tmp_path / "base")
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": IDS, "task_embeds": TASK}
    torch.save(batch, tmp_path / "batch.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(peft_taskmoe.__file__).parent.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "without the import: KeyError 'TASKMOE_LORA'",
        "loaded as well: []",
    ]
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(logits, model.requires_grad_(False)(**batch).logits)


def test_another_version_of_peft_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.mapping", ModuleType("peft.mapping"))
    message = r"needs PEFT's tuner interface of 0\.21 or newer; found peft \d.*pip install 'peft>="
    with pytest.raises(ImportError, match=message):
        register()
