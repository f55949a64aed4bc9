"""Wrote the files beside it, with the code of 0.1.0: never to be run again for this folder.

`python write.py OUT`: adapters of a tiny Llama with the logits that they gave, and answers.
`scores.json` is what `peft-taskmoe score --gold gold.jsonl --predicted answers.jsonl` wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_taskmoe import TaskMoELoraConfig, record_gates
from peft_taskmoe.nearest import TaskCentroids
from peft_taskmoe.uie import Extractor
from peft_taskmoe.uie.scoring.calibration import Calibration, Curve
from scripted import Scripted, byte_tokenizer

SIZES = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
SMALL = {"num_experts": 3, "r": 2, "task_dim": 6, "lora_dropout": 0.0, "init_weights": False}
ADAPTERS = {
    "token_and_task": {},
    "token": {"router_inputs": "token"},
    "task": {"router_inputs": "task", "task_norm": "rms"},
    "raw_task_top_k": {"top_k": 2, "task_norm": "none", "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 5}},
    "some_layers": {"layers_to_transform": [1], "bias": "taskmoe_lora_only"},
    "head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
    "tokens": {"trainable_token_indices": [3, 5], "target_modules": r".*\.(k|o)_proj"},
    "encoder": {"task_encoder": {"name_or_path": "none/there", "pooling": "cls", "stride": 2}},
}
TEXT = "Ada Lovelace met Bob in Bergen. Ada left."
ANSWER = '[Person("Ada Lovelace"), Person("Bob"), Met("Ada", "Bob"), Person("Eve"), Person(, '


def main(out: Path) -> None:
    """Write everything."""
    ids = torch.arange(1, 13).view(2, 6)
    embeds = torch.linspace(-2, 2, 12).view(2, 6)
    expected = {"input_ids": ids, "task_embeds": embeds}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(out / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        base = LlamaForCausalLM.from_pretrained(out / "base")
        torch.manual_seed(seed)
        config = TaskMoELoraConfig(task_type="CAUSAL_LM", **{**SMALL, **settings})
        model = get_peft_model(base, config).eval()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "taskmoe_lora_" not in key:
                parameter.data.add_(torch.randn_like(parameter) * 0.3)
        with torch.no_grad():
            expected[name] = model(input_ids=ids, task_embeds=embeds).logits
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(str(out / name), save_embedding_layers=False)
        (out / name / "README.md").unlink(missing_ok=True)
    save_file(expected, out / "expected.safetensors")
    schema = {"Person": "", "Met": {"head": ["Person"], "tail": []}}
    (out / "answers.jsonl").unlink(missing_ok=True)
    extractor = Extractor(Scripted(lambda prompt: ANSWER), byte_tokenizer(), max_new_tokens=200)
    extractor.to_jsonl([TEXT, "Bob met nobody."], schema, out / "answers.jsonl")
    write_beside(out)


def write_beside(out: Path) -> None:
    """What lies beside an adapter: task centroids (of two rows of the expected), calibration."""
    base = LlamaForCausalLM.from_pretrained(out / "base")
    model = PeftModel.from_pretrained(base, str(out / "task")).eval()
    expected = load_file(out / "expected.safetensors")
    with record_gates(model) as record, torch.no_grad():
        for row, name in enumerate(("first", "second")):
            with record.task(name):
                ids, embeds = (expected[key][row : row + 1] for key in ("input_ids", "task_embeds"))
                model(input_ids=ids, task_embeds=embeds)
    embeds = {name: expected["task_embeds"][row:][:1] for row, name in enumerate(record.tasks())}
    TaskCentroids.of(record, embeds).save(out / "task")
    curves = {
        "all": Curve(10, (0.2, 0.6), (0.1, 0.9)),
        "entity": Curve(5, (0.0, 1.0), (0.25, 0.75)),
    }
    Calibration(curves).save(out / "task")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
