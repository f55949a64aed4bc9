"""The command line: lines, going on after an interruption, exit codes and messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_taskmoe import cli
from peft_taskmoe.cli import Exit
from peft_taskmoe.uie import (
    Document,
    Entity,
    Extractor,
    PromptFormat,
    Schema,
    Span,
    completion_text,
    save_format,
    write_jsonl,
)
from scripted import Scripted, byte_tokenizer, text_in, tiny_llama

SCHEMA = {"Capital": "words with a capital letter"}
WORDS = Schema.from_dict("NER", SCHEMA)


def capitals(prompt: str) -> str:
    text = text_in(prompt)
    found = [
        Entity("Capital", Span(m.group(), *m.span())) for m in re.finditer(r"\b[A-Z]\w*", text)
    ]
    return completion_text(found, text, WORDS)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder with a schema; adapters are a model that finds capital letters."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    loads = []

    def load(adapter, *, base_model, model_kwargs, **options):
        loads.append((adapter, base_model, model_kwargs))
        torch.manual_seed(0)  # the same weights each time
        return Extractor(Scripted(capitals), byte_tokenizer(), **options)

    monkeypatch.setattr(Extractor, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    work.loads = loads
    return tmp_path


def extract(*more: str) -> int:
    arguments = [
        "extract",
        "--adapter",
        "a",
        "--schema",
        "schema.json",
        "--input",
        "texts.jsonl",
        "--output",
        "out.jsonl",
    ]
    return cli.main([*arguments, *more])


def rows(name: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def test_a_line_out_for_each_line_in_and_bad_ones_are_reported_by_number(work, capsys):
    lines = [
        '{"text": "Ada met Bob.", "id": "first"}',
        "{broken",
        '"just Zoe"',
        "",
        '{"title": "no text"}',
        '{"text": "nothing"}',
        '{"text": "half \\ud83d a Pair"}',
    ]
    Path("texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert extract() == Exit.SOME_LINES_BAD
    found = rows()
    assert [row["id"] for row in found] == ["first", "2", "3", "4", "5", "6", "7"]
    assert [len(row["records"]) if "records" in row else "error" for row in found] == [
        2,
        "error",
        1,
        "error",
        "error",
        0,
        1,
    ]
    assert found[0]["records"][0]["text"] == "Ada" and found[0]["answers"] == [
        ' [Capital(span="Ada"), Capital(span="Bob")]'
    ]
    assert found[0]["problems"] == [] and found[0]["seconds"] > 0
    assert found[6]["text"] == "half \ud83d a Pair" and found[6]["records"][0]["start"] == 9
    messages = capsys.readouterr().err
    for number, words in (
        (2, "The line is no JSON"),
        (4, "The line is no JSON"),
        (5, "The line has no text"),
    ):
        assert re.search(rf"texts\.jsonl:{number}: {words}", messages)
    assert "3 lines could not be used" in messages
    # Without bad lines:
    Path("texts.jsonl").write_text('{"text": "Ada"}\n{"text": "Bob"}', encoding="utf-8")
    assert extract("--overwrite") == Exit.DONE
    assert [row["id"] for row in rows()] == ["1", "2"]


def test_an_interrupted_run_goes_on_behind_the_lines_that_are_written(work, monkeypatch, capsys):
    texts = [f"text {i} Ada" for i in range(10)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert extract() == Exit.DONE
    whole = rows()
    Path("out.jsonl").unlink()

    real = Extractor.answer

    def stopped(*args, **options):
        for number, extraction in enumerate(real(*args, **options)):
            if number == 4:
                raise KeyboardInterrupt
            yield extraction

    monkeypatch.setattr(Extractor, "answer", stopped)
    assert extract() == Exit.INTERRUPTED
    assert "The same command goes on from here" in capsys.readouterr().err
    with Path("out.jsonl").open("a") as file:
        file.write('{"id": "5", "text": "tex')  # the line that it was stopped in
    monkeypatch.setattr(Extractor, "answer", real)
    assert extract() == Exit.DONE
    assert "4 of 10 lines were done already" in capsys.readouterr().err
    assert [{**row, "seconds": 0} for row in rows()] == [{**row, "seconds": 0} for row in whole]
    assert extract() == Exit.DONE and len(rows()) == 10  # nothing is left to do


def work_loads() -> list:
    return work.loads


def test_error_lines_of_an_earlier_run_still_count(work):
    Path("texts.jsonl").write_text('{"text": "Ada"}\n{\n')
    assert extract() == extract() == Exit.SOME_LINES_BAD


def test_an_output_of_other_settings_or_texts_is_not_continued(work, capsys):
    Path("texts.jsonl").write_text('{"text": "Ada"}\n{"text": "Bob"}\n')
    assert extract() == Exit.DONE
    before = Path("out.jsonl").read_bytes()
    assert extract("--threshold", "0.5") == Exit.NOTHING_DONE
    assert "`out.jsonl:1` was not written by such a run" in capsys.readouterr().err
    Path("texts.jsonl").write_text('{"text": "Ada"}\n{"text": "Zoe"}\n')
    assert extract() == Exit.NOTHING_DONE
    assert (
        "`out.jsonl:2` does not belong to text 2, which is another now" in capsys.readouterr().err
    )
    Path("texts.jsonl").write_text('{"text": "Ada"}\n')
    assert extract() == Exit.NOTHING_DONE
    assert "`out.jsonl` has more lines than there are texts" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == before
    assert extract("--overwrite") == Exit.DONE and len(rows()) == 1


@pytest.mark.parametrize("notes", ["my notes\nand no line feed at the end", "one line"])
def test_a_foreign_output_is_left_alone(work, capsys, notes):
    Path("texts.jsonl").write_text('{"text": "Ada"}\n')
    Path("out.jsonl").write_text(notes)
    assert extract() == Exit.NOTHING_DONE
    assert "was not written by such a run" in capsys.readouterr().err
    assert Path("out.jsonl").read_text() == notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("texts.jsonl").unlink(), "There is no file `texts.jsonl`"),
        (lambda: Path("schema.json").unlink(), "schema.json"),
        (lambda: Path("schema.json").write_text("[1]"), "`schema.json` holds no schema"),
    ],
)
def test_what_cannot_begin_says_why(work, capsys, change, message):
    Path("texts.jsonl").write_text('{"text": "Ada"}\n')
    change()
    assert extract() == Exit.NOTHING_DONE
    assert message in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_arguments_that_do_not_exist_end_with_2(capsys):
    assert cli.main([]) == Exit.NOTHING_DONE and "usage: " in capsys.readouterr().out
    for arguments in (["extract"], ["extract", "--colour", "red"], ["paint"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == Exit.NOTHING_DONE
    with pytest.raises(SystemExit) as stop:
        cli.main(["extract", "--help"])
    assert stop.value.code == 0 and "Exit codes" in capsys.readouterr().out


def test_documents_with_their_own_schemas_and_scores(work, capsys):
    text = "Ada met Bob."
    documents = [
        Document(
            "a",
            text,
            "NER",
            WORDS,
            (Entity("Capital", Span("Ada", 0, 3)), Entity("Capital", Span("Bob", 8, 11))),
        ),
        Document("b", "Zoe met Al", "NER", WORDS, (Entity("Capital", Span("Zoe", 0, 3)),)),
        Document("c", "Eve", "NER", WORDS, (Entity("Capital", Span("Eve", 0, 3)),)),
    ]
    write_jsonl(documents, "gold.jsonl")
    assert (
        cli.main(["extract", "--adapter", "a", "--input", "gold.jsonl", "--output", "out.jsonl"])
        == Exit.DONE
    )
    lines = Path("out.jsonl").read_text().splitlines()
    Path("out.jsonl").write_text(
        "\n".join([*lines[:2], json.dumps({"id": "c", "error": "x"}), lines[0], "[]"]) + "\n"
    )
    capsys.readouterr()
    command = ["score", "--gold", "gold.jsonl", "--predicted", "out.jsonl", "--json", "scores.json"]
    assert cli.main(command) == Exit.SOME_LINES_BAD
    printed = capsys.readouterr()
    for number, words in (
        (3, "Nothing was extracted: x"),
        (4, "has an answer already"),
        (5, "no JSON object"),
    ):
        assert f"out.jsonl:{number}: " in printed.err and words in printed.err
    figures = json.loads(Path("scores.json").read_text())
    (of_set,) = figures["datasets"]
    assert (of_set["all"]["tp"], of_set["all"]["fp"], of_set["all"]["fn"]) == (3, 1, 1)
    assert figures["answers"]["gold"]["unanswered"] == 1
    assert "75.0" in printed.out and "gold" in printed.out
    Path("out.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.main([*command, "--intervals", "--labels", "--match", "offsets"]) == Exit.DONE
    assert "Capital" in capsys.readouterr().out
    assert cli.main([*command, "--identification"]) == Exit.DONE
    assert json.loads(Path("scores.json").read_text())["identification"]
    assert (
        cli.main(["score", "--gold", "gold.jsonl", "gold.jsonl", "--predicted", "out.jsonl"])
        == Exit.NOTHING_DONE
    )


def test_the_reliability_of_confidences(work, capsys):
    gold = [
        Document(str(i), f"Ada met Bob{i}.", "NER", WORDS, (Entity("Capital", Span("Ada", 0, 3)),))
        for i in range(4)
    ]
    write_jsonl(gold, "gold.jsonl")
    assert (
        cli.main(["extract", "--adapter", "a", "--input", "gold.jsonl", "--output", "out.jsonl"])
        == Exit.DONE
    )
    command = ["score", "--gold", "gold.jsonl", "--predicted", "out.jsonl", "--json", "scores.json"]
    capsys.readouterr()
    assert cli.main([*command, "--reliability", "count", "--intervals"]) == Exit.DONE
    printed = capsys.readouterr().out
    assert "| gold | " in printed and "| all | 8 | 0." in printed and "ECE 0." in printed
    figures = json.loads(Path("scores.json").read_text())
    assert figures["reliability"]["precision"] == 0.5 and figures["reliability"]["ece_interval"]
    values = [record["confidence"] for row in rows() for record in row["records"]]
    assert figures["reliability"]["confidence"] == pytest.approx(sum(values) / 8)
    assert "reliability" not in json.loads(Path("scores.json").read_text())["datasets"][0]
    Path("out.jsonl").write_text(Path("out.jsonl").read_text().replace('"confidence"', '"was"', 1))
    with pytest.warns(UserWarning, match="keys `was`"):
        assert cli.main([*command, "--reliability-plot", "curve.svg"]) == Exit.DONE
    captured = capsys.readouterr()
    assert "| all | 7 |" in captured.out and "1 records have no confidence" in captured.err
    assert "<svg" in Path("curve.svg").read_text()


def test_a_line_without_any_schema_or_event_is_an_error_line(work):
    event = {"type": "Hit", "trigger": {"text": "hit", "start": 4, "end": 7}, "arguments": []}
    lines = [
        {"text": "Ada"},
        {"text": "Bob hit", "task": "EAE", "schema": {"Hit": {"roles": ["by"], "description": ""}}},
    ]
    lines += [{**lines[1], "annotations": [event]}]
    Path("texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        cli.main(["extract", "--adapter", "a", "--input", "texts.jsonl", "--output", "out.jsonl"])
        == Exit.SOME_LINES_BAD
    )
    first, second, third = rows()
    assert (
        'no "schema", and no --schema' in first["error"] and "needs the events" in second["error"]
    )
    assert "error" not in third and len(third["answers"]) == 1


def test_convert(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.conll").write_text("Ada B-person\nmet O\n\nBob X-person\n")
    Path("labels.json").write_text('{"person": "people"}')
    command = [
        "convert",
        "--source-format",
        "conll",
        "--schema",
        "labels.json",
        "in.conll",
        "out.jsonl",
    ]
    assert cli.main(command) == Exit.NOTHING_DONE
    assert "in.conll:4: tags" in capsys.readouterr().err and not Path("out.jsonl").exists()
    assert cli.main([*command, "--keep-going"]) == Exit.SOME_LINES_BAD
    assert [row["text"] for row in rows()] == ["Ada met", "Bob"]
    assert rows()[0]["schema"] == {"person": "people"}
    assert "2 documents, 1 problems" in capsys.readouterr().err
    assert (
        cli.main(["convert", "--source-format", "jsonl", "out.jsonl", "again.jsonl"]) == Exit.DONE
    )
    assert rows("again.jsonl") == rows()
    assert (
        cli.main(
            ["convert", "--source-format", "jsonl", "--scheme", "IOB1", "out.jsonl", "x.jsonl"]
        )
        == Exit.NOTHING_DONE
    )
    assert "--scheme says nothing about the format `jsonl`" in capsys.readouterr().err
    assert (
        cli.main(["convert", "--source-format", "brat", "folder", "x.jsonl"]) == Exit.NOTHING_DONE
    )
    assert "Pass --task" in capsys.readouterr().err


def test_from_the_shell_with_an_adapter_from_disk(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "adapter")
    save_format(PromptFormat(style="compact"), tmp_path / "adapter")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "texts.jsonl").write_text('{"text": "Ada"}\n{"text": "Bob"}\n')
    options = ["--max-new-tokens", "3", "--batch-size", "2", "--max-prompt-tokens", "500"]
    files = [f"--adapter={tmp_path}/adapter", f"--schema={tmp_path}/schema.json"]
    files += [f"--input={tmp_path}/texts.jsonl", f"--output={tmp_path}/out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "peft_taskmoe", "extract", *files, *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = rows(str(tmp_path / "out.jsonl"))
    assert [row["text"] for row in found] == ["Ada", "Bob"] and all(row["answers"] for row in found)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"peft-taskmoe": "peft_taskmoe.cli:main"}


def test_every_option_of_the_model_reaches_the_extractor(work, monkeypatch):
    Path("texts.jsonl").write_text('{"text": "Ada"}')
    real, seen = Extractor.from_pretrained, []
    monkeypatch.setattr(
        Extractor,
        "from_pretrained",
        lambda *args, **kwargs: (
            seen.append((args, kwargs))
            or real("a", **{**kwargs, "constrained": False, "prefix_caching": False})
        ),
    )
    assert extract() == Exit.DONE
    bare = {"base_model": None, "model_kwargs": {}, "batch_size": 8, "max_new_tokens": 256}
    bare |= {"max_prompt_tokens": None, "constrained": False, "prefix_caching": False}
    options = "--base-model b --batch-size 2 --max-new-tokens 3 --max-prompt-tokens 999"
    options += " --constrained --prefix-caching --dtype bfloat16 --device cuda --overwrite"
    assert extract(*options.split()) == Exit.DONE
    asked = {"base_model": "b", "batch_size": 2, "max_new_tokens": 3, "max_prompt_tokens": 999}
    asked |= {"model_kwargs": {"dtype": "bfloat16", "device_map": "cuda"}}
    asked |= {"constrained": True, "prefix_caching": True}
    assert seen == [(("a",), bare), (("a",), asked)]
