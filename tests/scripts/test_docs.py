"""Every code block of README and documents runs, with tiny models under the names of the Hub."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import torch
import transformers
import trl
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from trl import ModelConfig, SFTConfig

import peft_taskmoe
from peft_taskmoe import cli, uie
from peft_taskmoe.uie import PROBLEM_KINDS, Document, Entity, Extractor, Span, completion_text
from peft_taskmoe.uie.schema import Schema
from running import PYPROJECT, ROOT
from scripted import VOCAB, Scripted, byte_tokenizer, text_in, tiny_llama

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE, ENCODER, ADAPTER = "codellama/CodeLlama-7b-hf", "Salesforce/codet5-base", "user/my-adapter"
# Blocks that do not run here: the page, how the block begins, and why.
NOT_RUN = {
    ("training.md", "import torch\nfrom transformers import BitsAndBytesConfig"): "needs a GPU",
}
# What the adapter of `make demo` wrote about a text.
ANSWERS = {
    "The probe Wayfarer 2, built by the Nordic Space Agency, left for Titan on a Helion rocket.": (
        ' [space_agency("Nordic Space Agency"), spacecraft("Wayfarer 2"), '
        'launcher("Helion Rocket")]'
    )
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.S | re.M)]


def reason_not_to_run(page: Path, code: str) -> str | None:
    return next(
        (
            why
            for (name, start), why in NOT_RUN.items()
            if (page.name, start) == (name, code[: len(start)])
        ),
        None,
    )


def answer(prompt: str) -> str:
    """The answer to a text of the documents: as listed, or all capitalised words as one label."""
    text, label = text_in(prompt), re.search(r"class (\w+)\((\w+)\)", prompt)
    if text in ANSWERS:
        return ANSWERS[text]
    if label[2] != "Entity":
        return " []"
    found = [Entity(label[1], Span(m.group(), *m.span())) for m in re.finditer(r"\b[A-Z]\w*", text)]
    return completion_text(found, text, Schema.of(label[1]))


def save_models() -> None:
    """Write the models that the documents name into the current folder."""
    encoder = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    transformers.BertModel(encoder).save_pretrained(ENCODER)
    tiny_llama().save_pretrained(BASE)
    for name in (ENCODER, BASE):
        byte_tokenizer().save_pretrained(name)
    config = peft_taskmoe.TaskMoELoraConfig(task_type="CAUSAL_LM", task_encoder=ENCODER)
    get_peft_model(base_model(), config).save_pretrained(ADAPTER)
    for name in ("lora-ner", "lora-re", "lora-ee", "lora-eae"):
        lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(base_model(), lora).save_pretrained(name)


def base_model() -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(BASE)


def published_adapter(name: str) -> str:
    """A folder in the layout of the paper's published adapter."""
    Path(name).mkdir(parents=True)
    tensors = {}
    for layer, module in base_model().named_modules():
        if isinstance(module, nn.Linear) and layer != "lm_head":
            shapes = {
                "lora_A_weight": (8, module.in_features, 4),
                "lora_B_weight": (8, 4, module.out_features),
                "lora_route.weight": (8, module.in_features + 8),
            }
            for part, shape in shapes.items():
                tensors[f"base_model.model.{layer}.{part}"] = torch.randn(shape)
    save_file(tensors, Path(name) / "adapter_model.safetensors")
    Path(name, "adapter_config.json").write_text('{"lora_alpha": 32}', encoding="utf-8")
    return name


def starting_names() -> dict[str, Any]:
    """What a page may use without having made it."""
    prompts, answers = ["Who launched it? ", "Where does it fly to? "], ["Ariane", "To Mars"]
    rows = {"prompt": prompts, "completion": answers}
    tokenizer, encoder = byte_tokenizer(), peft_taskmoe.TaskEncoder(ENCODER)
    config = peft_taskmoe.TaskMoELoraConfig(task_type="CAUSAL_LM", task_encoder=ENCODER)
    texts = [p + a for p, a in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    return {
        "__name__": "documents",
        "base_model": base_model(),
        "model": get_peft_model(base_model(), config),
        "config": config,
        "tokenizer": tokenizer,
        "encoder": encoder,
        "prompt": prompts[0],
        "prompts": prompts,
        "texts": texts,
        "batch": batch,
        "inputs": batch,
        "dataset": Dataset.from_dict(rows),
        "prompt_completion_dataset": Dataset.from_dict(rows),
    }


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    """The names of a page, in a folder with the models; nothing reaches the network."""
    monkeypatch.chdir(tmp_path)
    save_models()
    Path("outputs/mine").mkdir(parents=True)

    def load(name: str, **options: Any) -> Extractor:
        assert name in (ADAPTER, "outputs/demo")
        for key in ("constrained", "device", "dtype"):  # have their own tests
            options.pop(key, None)
        return Extractor(Scripted(answer), byte_tokenizer(), **options)

    monkeypatch.setattr(Extractor, "from_pretrained", load)
    monkeypatch.setattr(PeftModel, "push_to_hub", PeftModel.save_pretrained)
    monkeypatch.setattr(transformers.Trainer, "push_to_hub", transformers.Trainer.save_model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", published_adapter)
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(SFTConfig, use_cpu=True))
    return starting_names()


def with_python(page: Path) -> bool:
    return any(block.language == "python" for block in blocks_of(page))


@pytest.mark.parametrize("page", filter(with_python, PAGES), ids=lambda page: page.name)
@pytest.mark.slow
def test_python_runs_and_prints_what_is_shown(page, names, capsys) -> None:
    blocks = blocks_of(page)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        compiled = compile(block.code, str(page), "exec", dont_inherit=True)
        if reason_not_to_run(page, block.code):
            continue
        capsys.readouterr()
        exec(compiled, names)
        printed = capsys.readouterr().out
        if following is not None and following.language == "text":
            assert printed.strip("\n") == following.code.strip("\n")


def test_every_block_that_does_not_run_is_there() -> None:
    found = [(p.name, b.code) for p in PAGES for b in blocks_of(p)]
    for name, start in NOT_RUN:
        assert any(page == name and code.startswith(start) for page, code in found), start


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line)
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "sh"
        for line in block.code.replace("\\\n", " ").splitlines()
        if shlex.split(line, comments=True)
    ]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page, line) -> None:
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        del words[0]
    if "peft_taskmoe" in words:  # python -m, torchrun -m, accelerate launch -m
        assert words[words.index("peft_taskmoe") - 1] == "-m"
        words[: words.index("peft_taskmoe") + 1] = ["peft-taskmoe"]
    if words[0] == "peft-taskmoe":
        if words[1:] != ["--version"]:
            assert callable(cli.parser().parse_args(words[1:]).run)
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.M)
    elif words[0] == "nox":
        sessions = (ROOT / "noxfile.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {words[words.index('-s') + 1]}\(", sessions, re.M)
    elif words[0] == "pip":
        extras = [name for found in re.findall(r"\[(.*)\]", words[-1]) for name in found.split(",")]
        assert set(extras) <= set(PYPROJECT["project"]["optional-dependencies"])
    elif script := next((word for word in words if word.endswith(".py")), None):
        _check_script(ROOT / script, words[words.index(script) + 1 :])
    else:
        known = ("git", "cd", "head", "nohup", "pre-commit", "shuf")
        assert words[0] in known, f"what is `{words[0]}`?"


def _check_script(script: Path, arguments: list[str]) -> None:
    """The script is there, and each option is its own or a field of what TRL parses."""
    assert script.is_file()
    sources = "".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
    trl = SFTConfig.__dataclass_fields__.keys() | ModelConfig.__dataclass_fields__.keys()
    for word in arguments:
        if word.startswith("--") and word != "--config":
            name = word[2:].split("=")[0]
            assert name in trl or re.search(rf"\b{name.replace('-', '[-_]')}\b", sources), word
    for before, word in itertools.pairwise(arguments):
        if before == "--config":
            assert (ROOT / word).is_file(), word


def test_json_and_yaml_parse_and_documents_are_documents() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "yaml":
                assert yaml.safe_load(block.code)
            if block.language == "json":
                for row in map(json.loads, block.code.splitlines()):
                    if "annotations" in row and "task" in row:
                        assert Document.from_dict(row).to_dict() == row


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "experiments" / "README.md"], ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(page) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_of(file), target
        if page.parent.name == "docs":  # the site holds this folder alone
            assert file.resolve().is_relative_to(page.parent), target


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: \S*\.(\w+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)
    assert sorted(named) == sorted([*peft_taskmoe.__all__, *uie.__all__])


def test_the_guide_names_every_kind_of_problem_and_every_exit_code() -> None:
    guide = (ROOT / "docs" / "extraction.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", guide, re.M)
    assert set(PROBLEM_KINDS) <= {kind for row in rows for kind in re.findall(r"\w+", row)}
    assert list(map(int, re.findall(r"^\| (\d+) \|", guide, re.M))) == list(cli.Exit)
