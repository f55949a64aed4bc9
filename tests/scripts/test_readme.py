"""The Python of README.md runs as it stands, with tiny models in folders of the names that it gives."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import PeftModel

import peft_taskmoe
from peft_taskmoe.uie import EntityType, Extractor
from scripted import Scripted, byte_tokenizer, tiny_llama

README = Path(__file__).parents[2] / "README.md"
PROMPTS = ["Who launched it? ", "Where does it fly to? "]
ANSWERS = ["Ariane", "To Mars"]
GAPS = {
    "SFTConfig(...)": 'SFTConfig("out", report_to="none", use_cpu=True, max_steps=1)',
    "Trainer(...,": 'Trainer(model, TrainingArguments("out2", report_to="none"), train_dataset=dataset,',
    # What loads an adapter has a base without one.
    "from_pretrained(base_model,": 'from_pretrained(fresh("codellama/CodeLlama-7b-hf"),',
}


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer, base = byte_tokenizer(), tiny_llama()
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    models = {
        "Salesforce/codet5-base": transformers.BertModel(config),
        "codellama/CodeLlama-7b-hf": base,
    }
    for name, model in models.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    monkeypatch.setattr(PeftModel, "push_to_hub", PeftModel.save_pretrained)
    written = ' [Launcher(span="Ariane 5")]'
    monkeypatch.setattr(
        Extractor,
        "from_pretrained",
        lambda name: Extractor(Scripted(lambda prompt: written), byte_tokenizer()),
    )
    text = README.read_text(encoding="utf-8")
    for gap, filled in GAPS.items():
        assert text.count(gap) == 1, gap
        text = text.replace(gap, filled)
    batch = tokenizer(
        [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    rows = {"prompt": PROMPTS, "completion": ANSWERS}
    scope = {
        "Trainer": transformers.Trainer,
        "TrainingArguments": transformers.TrainingArguments,
        "fresh": transformers.AutoModelForCausalLM.from_pretrained,
        "base_model": base,
        "tokenizer": tokenizer,
        "encoder": peft_taskmoe.TaskEncoder("Salesforce/codet5-base"),
        "prompts": PROMPTS,
        "batch": batch,
        "inputs": batch,
        "collator": transformers.default_data_collator,
        "prompt_completion_dataset": Dataset.from_dict(rows),
        "dataset": Dataset.from_dict(rows),
    }
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, str(README), "exec", dont_inherit=True), scope)
    assert len(blocks) == 6
    assert scope["trainer"].state.global_step == 1
    assert torch.tensor(scope["dataset"]["task_embeds"][:]).shape == (2, 768)
    assert (
        scope["model"].peft_config["default"].task_encoder.name_or_path == "Salesforce/codet5-base"
    )
    (record,) = scope["found"][0].records
    shown = f"({repr(record).split(' confidence=')[0]} confidence="
    assert shown in text and shown in capsys.readouterr().out
    assert (
        issubclass(scope["Launcher"], EntityType) and scope["schema"].labels[0].name == "Launcher"
    )
