"""The model card of a saved adapter: right for the method, runnable, and never over a person's."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.utils import PushToHubMixin

import scripted
from peft_taskmoe import TaskMoELoraConfig
from peft_taskmoe.model_card import write_card
from peft_taskmoe.uie import PromptFormat, save_format

TRL_CARD = """---
library_name: peft
---

# Model Card for tiny

It has been trained using [TRL](https://github.com/huggingface/trl).

## Quick start

```python
from transformers import pipeline

generator = pipeline("text-generation", model="None")
```

## Training procedure
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A tiny base model and a tiny encoder, each with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    scripted.tiny_llama().save_pretrained(root / "base")
    config = transformers.BertConfig(
        vocab_size=scripted.VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    transformers.BertModel(config).save_pretrained(root / "encoder")
    for name in ("base", "encoder"):
        tokenizer = scripted.byte_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # what Llama takes
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # is saved
        tokenizer.save_pretrained(root / name)
    return str(root / "base"), str(root / "encoder")


@pytest.fixture
def adapted(folders):
    """`adapted(task_dim=8, ...)`: a fresh adapter on the tiny base model."""

    def make(auto: type = transformers.AutoModelForCausalLM, **settings) -> PeftModel:
        settings = {"task_type": "CAUSAL_LM", "task_encoder": folders[1], **settings}
        model = auto.from_pretrained(folders[0])
        return get_peft_model(model, TaskMoELoraConfig(num_experts=2, r=2, **settings))

    return make


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def code_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return code


@pytest.mark.parametrize("given", [False, True])
def test_the_card_names_base_and_encoder_and_its_code_runs(
    adapted, folders, tmp_path, capsys, given
) -> None:
    model = adapted(**({"task_encoder": None, "task_dim": 8} if given else {}))
    model.save_pretrained(tmp_path)
    text, card = read(tmp_path), ModelCard.load(tmp_path / "README.md")
    assert "2 LoRA experts of rank 2" in text and folders[0] in text
    assert "[More Information Needed]" not in text and "import peft_taskmoe" in code_of(text)
    assert ("`task_embeds` of shape (batch, 8)" in text) == given == (folders[1] not in text)
    assert (card.data.library_name, card.data.license) == ("peft", "unknown")
    assert card.data.pipeline_tag == "text-generation"
    assert {"peft_taskmoe", "mixture-of-experts", "transformers"} <= set(card.data.tags)
    exec(code_of(text), {})
    assert "Ariane 5 lifted off." in capsys.readouterr().out


def test_the_card_of_a_classifier_runs(adapted, tmp_path, capsys) -> None:
    auto = transformers.AutoModelForSequenceClassification
    adapted(auto, task_type="SEQ_CLS", router_inputs="token").save_pretrained(tmp_path)
    assert "reads the token." in read(tmp_path)
    exec(code_of(read(tmp_path)), {})
    assert "logits" in capsys.readouterr().out


def test_the_card_of_an_extractor_runs_and_has_scores(adapted, tmp_path, capsys) -> None:
    """Written over PEFT's and over its own; the header that a person filled in stays."""
    model = adapted()
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(
        read(tmp_path).replace("license: unknown", "license: apache-2.0"), encoding="utf-8"
    )
    save_format(PromptFormat(), tmp_path)
    sections = "## Data\n\nTrained on demo."
    assert write_card(
        tmp_path, model.peft_config["default"], sections=sections, scores={"demo": 0.5}
    )
    data = ModelCard.load(tmp_path / "README.md").data
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("demo", "f1", 0.5)
    assert data.license == "apache-2.0" and "information-extraction" in data.tags
    assert sections in read(tmp_path)
    exec(code_of(read(tmp_path)), {})
    assert capsys.readouterr().out.startswith("(")

    model.save_pretrained(tmp_path)  # perhaps with other weights: the scores are not theirs
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.eval_results is None and "Extractor" in read(tmp_path)
    assert data.license == "apache-2.0" and "Trained on demo" not in read(tmp_path)


def test_saving_twice_writes_the_same(adapted, tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    first = read(tmp_path)
    adapted().save_pretrained(tmp_path)
    assert read(tmp_path) == first and "hidden" not in first


@pytest.mark.parametrize("how", ["own card", "edited ours", "edited PEFT's", "own scores"])
def test_a_card_that_a_person_wrote_is_kept(adapted, tmp_path, how) -> None:
    model = adapted()
    path = tmp_path / "README.md"
    if how == "own card":
        path.write_text("---\nlicense: mit\n---\n\n# My adapter\n", encoding="utf-8")
    elif how == "edited PEFT's":
        PeftModel.create_or_update_model_card(model, str(tmp_path))
        path.write_text(read(tmp_path) + "\nMine.\n", encoding="utf-8")
    else:
        model.save_pretrained(tmp_path)
        text = read(tmp_path).replace("## Licence", "## My licence")
        if how == "own scores":
            write_card(tmp_path, model.peft_config["default"], scores={"demo": 0.5})
            text = read(tmp_path).replace("value: 0.5", "value: 0.6")
        path.write_text(text, encoding="utf-8")
    before = ModelCard.load(path)
    model.save_pretrained(tmp_path)
    after = ModelCard.load(path)
    assert after.text.strip().startswith(before.text.strip())  # PEFT adds its version
    assert after.data.license == before.data.license
    assert after.data.eval_results == before.data.eval_results


def test_trls_card_gets_code_that_loads_the_adapter(adapted, tmp_path) -> None:
    (tmp_path / "README.md").write_text(TRL_CARD, encoding="utf-8")
    adapted().save_pretrained(tmp_path)
    text = read(tmp_path)
    assert "pipeline(" not in text and "import peft_taskmoe" in code_of(text)
    assert "# Model Card for tiny" in text and "## Training procedure" in text


def test_a_base_of_the_hub_is_named_in_the_header(adapted, tmp_path) -> None:
    model = adapted()
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None and not any("base_model:" in tag for tag in data.tags)
    config.base_model_name_or_path = "codellama/CodeLlama-7b-hf"
    write_card(tmp_path, config, adapter="user/adapter")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "codellama/CodeLlama-7b-hf"
    assert "base_model:adapter:codellama/CodeLlama-7b-hf" in data.tags
    assert 'from_pretrained("user/adapter")' in read(tmp_path)


@pytest.mark.parametrize("ours", [True, False])
def test_a_push_writes_the_card_of_the_method_only(adapted, tmp_path, monkeypatch, ours) -> None:
    sent: list[tuple] = []
    monkeypatch.setattr(
        PushToHubMixin, "_upload_modified_files", lambda self, *args, **kwargs: sent.append(args)
    )
    lora = LoraConfig(target_modules=["q_proj"])
    model = copy.deepcopy(adapted()) if ours else get_peft_model(scripted.tiny_llama(), lora)
    model._upload_modified_files(str(tmp_path), "user/adapter", files_timestamps={})
    assert sent == [(str(tmp_path), "user/adapter")]
    assert (tmp_path / "README.md").exists() == ours


def test_a_config_saved_alone_has_no_card(tmp_path) -> None:
    TaskMoELoraConfig(task_dim=8).save_pretrained(str(tmp_path))
    assert not (tmp_path / "README.md").exists()
