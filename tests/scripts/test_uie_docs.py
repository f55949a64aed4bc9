"""`docs/extraction.md` says what is so: its Python runs, its commands parse, its tables name what exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from peft_taskmoe import cli
from peft_taskmoe.uie import PROBLEM_KINDS, Document, Entity, Extractor, Span, completion_text
from peft_taskmoe.uie.schema import Schema
from scripted import Scripted, byte_tokenizer, text_in

GUIDE = Path(__file__).parents[2] / "docs" / "extraction.md"
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


def blocks(language: str) -> list[str]:
    return [block for name, block in BLOCKS if name == language]


def capitals(prompt: str) -> str:
    """Everything with a capital letter, as the first class of the prompt (of a given event, none)."""
    text, name = text_in(prompt), re.search(r"class (\w+)\((\w+)\)", prompt)
    if name[2] != "Entity":
        return " []"
    schema = Schema.of(name[1])
    found = [Entity(name[1], Span(m.group(), *m.span())) for m in re.finditer(r"\b[A-Z]\w*", text)]
    return completion_text(found, text, schema)


def test_the_python_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def load(name, **options):
        assert name == "user/my-adapter"
        options.pop("constrained", None)  # has its own tests
        return Extractor(Scripted(capitals), byte_tokenizer(), **options)

    monkeypatch.setattr(Extractor, "from_pretrained", load)
    scope: dict = {"__name__": "guide"}
    for block in blocks("python"):
        exec(compile(block, str(GUIDE), "exec", dont_inherit=True), scope)
    printed = capsys.readouterr().out
    assert "Launcher Ariane 0 6" in printed  # the first example of the page
    assert blocks("text")[0].rstrip("\n") in printed  # the prompt as it is shown
    assert scope["rows"][0]["completion"] == ' [launcher(span="Ariane 5"), place(span="Kourou")]'
    assert (tmp_path / "found.html").stat().st_size > 1000
    assert scope["report"].intervals


@pytest.mark.parametrize("command", [line for block in blocks("sh") for line in block.splitlines()])
def test_the_commands_of_the_guide_exist(command):
    program, *arguments = shlex.split(command)
    assert program == "peft-taskmoe"
    assert callable(cli.parser().parse_args(arguments).run)


def test_the_document_of_the_guide_is_one():
    (row,) = map(json.loads, blocks("json"))
    assert Document.from_dict(row).to_dict() == row


def test_the_guide_names_every_kind_of_problem_and_every_exit_code():
    guide = GUIDE.read_text(encoding="utf-8")
    table = guide[guide.index("| kind |") : guide.index("An answer that `max_new_tokens`")]
    assert set(re.findall(r"`(\w+)`", table)) == set(PROBLEM_KINDS)
    codes = re.findall(r"^\| (\d+) \|", guide, re.MULTILINE)
    assert list(map(int, codes)) == list(cli.Exit)


def test_links_within_the_guide_lead_somewhere():
    guide = GUIDE.read_text(encoding="utf-8")
    titles = {
        re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-")
        for line in guide.splitlines()
        if line.startswith("## ")
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", guide)) <= titles
