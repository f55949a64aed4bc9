"""The report about an adapter: one file, with scores, confused labels, routing and examples."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest
from peft import get_peft_model

from html_page import Page
from peft_taskmoe import TaskMoELoraConfig, cli, save_task_centroids
from peft_taskmoe.uie import (
    Argument,
    Document,
    Entity,
    Event,
    Extractor,
    Problem,
    PromptFormat,
    Schema,
    Span,
    save_format,
    write_jsonl,
)
from peft_taskmoe.uie.extraction.report import write_report
from peft_taskmoe.uie.parse import ParsedAnswer
from peft_taskmoe.uie.scoring.confusion import NOT_FOUND, NOT_GOLD, confusion
from peft_taskmoe.uie.view.report import report_page
from scripted import byte_tokenizer, tiny_llama
from tiny import randomise

TEXT = "Ada met Bob in Rome."
NER = Schema.from_dict("NER", {"Person": "", "Place": "", "Firm": ""})


def entity(label: str, words: str, confidence: float | None = None) -> Entity:
    start = TEXT.index(words)
    return Entity(label, Span(words, start, start + len(words)), confidence=confidence)


PEOPLE = [entity("Person", "Ada"), entity("Person", "Bob"), entity("Place", "Rome")]
GOLD = Document("1", TEXT, "NER", NER, PEOPLE)
FOUND = [entity("Person", "Ada", 0.9), entity("Firm", "Rome", 0.6), entity("Firm", "met", 0.3)]
WRONG = [("Person", "Person"), ("Person", NOT_FOUND), ("Place", "Firm"), (NOT_GOLD, "Firm")]


@pytest.mark.parametrize("match", ["text", "offsets"])
def test_confusion_pairs_the_labels_of_the_same_mention(match):
    assert confusion({"a": [GOLD]}, {"a": {"1": FOUND}}, match) == Counter(WRONG)
    missed = {("Person", NOT_FOUND): 2, ("Place", NOT_FOUND): 1}
    assert confusion({"a": [GOLD]}, {}, match) == missed


def test_confusion_of_arguments_is_one_of_roles():
    schema = Schema.from_dict("EE", {"Met": {"description": "", "roles": ["who", "whom"]}})

    def met(*roles: tuple[str, str]) -> Event:
        arguments = tuple(Argument(role, entity("", words).span) for role, words in roles)
        return Event("Met", entity("", "met").span, arguments)

    document = Document("1", TEXT, "EE", schema, [met(("who", "Ada"), ("whom", "Bob"))])
    found = confusion({"a": [document]}, {"a": {"1": [met(("whom", "Ada"), ("whom", "Bob"))]}})
    assert found == {("Met", "Met"): 1, ("who", "whom"): 1, ("whom", "whom"): 1}


def test_two_labels_of_one_mention_are_matched_where_equal():
    gold = Document("1", TEXT, "NER", NER, [entity("Person", "Ada"), entity("Firm", "Ada")])
    answers = {"a": {"1": [entity("Firm", "Ada"), entity("Place", "Ada")]}}
    assert confusion({"a": [gold]}, answers) == {("Firm", "Firm"): 1, ("Person", "Place"): 1}


def test_the_page_needs_no_other_file_and_escapes_what_was_written():
    pytest.importorskip("matplotlib")
    evil = "<script>alert(1)</script>"
    answer = ParsedAnswer(tuple(FOUND), (Problem("malformed", evil, evil),), "raw")
    page = report_page(evil, {"set": [GOLD]}, {"set": {"1": answer}}, facts={"base": evil})
    read = Page(page)
    assert not read.fetched and evil in read.visible and "default-src 'none'" in page
    for words in ("Strict F1", "95% interval", "ECE", "Gold labels", "malformed", "(not found)"):
        assert words in read.visible, words
    assert page.count("data:image/png;base64,") == 1
    assert '<td class="left">NER</td>' in page and '<td class="same"' in page
    assert Counter(re.findall(r'scope="row">([^<]+)</th>', page))["Firm"] == 1


def test_a_page_without_matplotlib_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report_page("a", {"set": [GOLD]}, {"set": {"1": FOUND}})
    assert "needs `matplotlib`" in Page(page).visible and "data:image/png" not in page


def test_rare_labels_are_pooled_and_nothing_found_is_a_page_as_well():
    labels = [f"L{i}" for i in range(30)]
    schema = Schema.from_dict("NER", labels)
    documents = [Document(str(i), "Ada", "NER", schema, [Entity(label, Span("Ada", 0, 3))])
                 for i, label in enumerate(labels)]  # fmt: skip
    page = report_page("a", {"set": documents}, {"set": {}})
    assert "(others)" in page and "No record has a confidence." in page
    assert page.count("</th><td") == 14 + 2  # labels, others, not gold


@pytest.fixture
def adapter(tmp_path, tiny_encoder, word_tokenizer):
    """A folder with a tiny adapter, its base model, its encoder and its tasks' centroids."""
    tiny_encoder.model.save_pretrained(tmp_path / "encoder")
    word_tokenizer.save_pretrained(tmp_path / "encoder")
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    encoder = str(tmp_path / "encoder")
    settings = {"task_type": "CAUSAL_LM", "task_encoder": encoder}
    config = TaskMoELoraConfig(num_experts=3, r=2, **settings)
    base = tiny_llama()
    base.config._name_or_path = str(tmp_path / "base")
    model = randomise(get_peft_model(base, config))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    save_format(PromptFormat(style="compact"), tmp_path / "adapter")
    tasks = {"people <1>": ["w4 w5"], "places": ["w40 w41"]}
    save_task_centroids(model, tasks, tmp_path / "adapter", tokenizer=byte_tokenizer())
    return tmp_path / "adapter"


def test_the_command_reports_routing_and_nearest_tasks(adapter, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    names = ("one", "two", "three")
    for name in names:
        write_jsonl([GOLD], tmp_path / f"{name}.jsonl")
    gold = [str(tmp_path / f"{name}.jsonl") for name in names]
    command = ["report", "--adapter", str(adapter), "--gold", *gold, "--max-new-tokens", "4"]
    output = tmp_path / "report.html"
    assert cli.main([*command, "--output", str(output)]) == cli.Exit.DONE
    page = Page(output.read_text(encoding="utf-8"))
    assert not page.fetched and "people <1>" in page.visible
    assert "1 of one, 1 of two, 1 of three" in page.visible
    assert "The nearest training tasks" in page.visible and "TASKMOE_LORA" in page.visible
    assert output.read_text(encoding="utf-8").count("data:image/png") >= 2  # heat map, similarity
    command = ["report", "--adapter", str(adapter), "--gold", gold[0], gold[0]]
    assert cli.main([*command, "--output", str(output)]) == cli.Exit.NOTHING_DONE
    assert "Two gold files are called `one`" in capsys.readouterr().err
    next(adapter.glob("*centroids*")).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["report", "--adapter", str(adapter), "--gold", gold[0], "--max-new-tokens", "4"]
    assert cli.main([*command, "--output", str(output)]) == cli.Exit.DONE
    page = Page(output.read_text(encoding="utf-8"))
    assert "needs `matplotlib`" in page.visible
    assert "No centroids of the training tasks lie beside the adapter." in page.visible


def test_an_adapter_without_a_router_or_centroids_has_a_report(tmp_path):
    extractor = Extractor(tiny_llama(), byte_tokenizer(), max_new_tokens=4)
    path = tmp_path / "report.html"
    write_report(path, extractor, {"a": [GOLD]}, {"a": {"1": FOUND}}, name="plain")
    page = path.read_text(encoding="utf-8")
    assert "plain" in page and 'id="routing"' not in page
