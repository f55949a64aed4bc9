"""Stock PEFT and transformers know the method by its import: saving, loading in a fresh process, and forgetting the import."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from safetensors.torch import load_file

import peft_taskmoe
from peft_taskmoe import TaskMoELoraConfig, TaskMoELoraModel
from peft_taskmoe.peft_type import PREFIX, TASKMOE_LORA
from peft_taskmoe.registration import register
from tiny import MODELS, TASK_DIM, randomise

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


@pytest.mark.parametrize("name", sorted(MODELS))
def test_saved_and_loaded_the_logits_are_the_same_bit_for_bit(
    name, adapted, tiny_model, tmp_path
) -> None:
    model = adapted(name)
    batch = {
        "input_ids": IDS,
        "task_embeds": TASK,
        "labels": torch.tensor([0, 1]) if name == "bert" else IDS,
    }
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    adapter = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(saved) == len(adapter) and all(
        "taskmoe_lora_" in key or "classifier" in key for key in saved
    )
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(
        p.requires_grad
        for p in PeftModel.from_pretrained(
            tiny_model(name), tmp_path, is_trainable=True
        ).parameters()
    )


def test_a_second_adapter_is_loaded_beside_the_first(adapted, tiny_model, tmp_path) -> None:
    model = adapted()
    batch = {"input_ids": IDS, "task_embeds": TASK}
    model.add_adapter(
        "second", TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=2, r=1, lora_dropout=0.0)
    )
    randomise(model, seed=2).eval()
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.eval()
    for name, logits in expected.items():
        loaded.set_adapter(name)
        assert torch.equal(loaded(**batch).logits, logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_an_adapter_of_other_sizes_is_refused(
    low_cpu_mem_usage, adapted, tiny_model, tmp_path
) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "num_experts": 4}))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*taskmoe_lora_A"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_transformers_own_adapter_methods(adapted, tiny_model, tmp_path) -> None:
    """`model.load_adapter`, without a `PeftModel`; the prefix is derived from the type there."""
    model = adapted()
    expected = model(input_ids=IDS, task_embeds=TASK).logits
    model.save_pretrained(tmp_path)
    bare = tiny_model().eval()
    bare.load_adapter(str(tmp_path))
    assert torch.equal(bare(input_ids=IDS, task_embeds=TASK).logits, expected)
    bare.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    first = load_file(tmp_path / "adapter_model.safetensors")
    assert set(again) == set(first) and all(torch.equal(again[key], first[key]) for key in first)


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

import peft_taskmoe

print("loaded as well:", [n for n in sys.modules if n.split(".")[0] in ("trl", "datasets", "pandas", "matplotlib")
                          or n.startswith("peft_taskmoe.uie")])
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
torch.save(model(**batch).logits, folder + "/logits.pt")
"""


def test_a_fresh_process_gives_the_same_logits_and_needs_the_import(
    adapted, tiny_model, tmp_path
) -> None:
    """Who forgot `import peft_taskmoe` sees a bare KeyError of PEFT's; with it, the logits are equal bit for bit.

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


def test_the_saved_adapter_can_be_trained_on(adapted, tiny_model, tmp_path) -> None:
    adapted(lora_dropout=0.1).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).train()
    model(input_ids=IDS, labels=IDS, task_embeds=TASK).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "taskmoe_lora_" in n)


def test_get_peft_model_gives_the_method(tiny_model) -> None:
    model = get_peft_model(
        tiny_model(), TaskMoELoraConfig(task_type="CAUSAL_LM", task_dim=TASK_DIM)
    )
    assert isinstance(model.base_model, TaskMoELoraModel)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert torch.isfinite(model(input_ids=IDS, task_embeds=TASK).logits).all()
