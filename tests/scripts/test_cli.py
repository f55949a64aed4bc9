"""The command line: lines, going on after an interruption, exit codes and messages."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_taskmoe import cli
from peft_taskmoe.cli import Exit, inputs
from peft_taskmoe.cli import extract as extract_command
from peft_taskmoe.cli import score as score_command
from peft_taskmoe.cli.parquet import read_parquet
from peft_taskmoe.cli.shares import Processes, Shares
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
from running import PYPROJECT
from scripted import Scripted, byte_tokenizer, text_in, tiny_llama

ROOT = Path(__file__).parents[2]
SCHEMA = {"Capital": "words with a capital letter"}
WORDS = Schema.from_dict("NER", SCHEMA)
EXTRACT = ("extract", "--adapter", "a", "--input", "texts.jsonl", "--output", "out.jsonl")


def capitals(prompt: str) -> str:
    text = text_in(prompt)
    found = re.finditer(r"\b[A-Z]\w*", text)
    return completion_text(
        [Entity("Capital", Span(m.group(), *m.span())) for m in found], text, WORDS
    )


@pytest.fixture
def loads(tmp_path, monkeypatch) -> list[dict]:
    """In a folder with a schema; adapters are a model that finds capital letters.

    What it is loaded with is kept; the name of the adapter decides its weights.
    """
    loads = []

    def load(adapter, *, base_model, encoder, device, dtype, **options):
        loads.append({"adapter": adapter, "base_model": base_model, "encoder": encoder} | options)
        loads[-1] |= {"device": device, "dtype": dtype}
        torch.manual_seed(len(adapter + (base_model or "")))
        options |= {"constrained": False, "prefix_caching": False}
        return Extractor(Scripted(capitals), byte_tokenizer(), **options)

    monkeypatch.setattr(Extractor, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text(json.dumps(SCHEMA))
    return loads


def extract(*more: str) -> int:
    return cli.main([*EXTRACT, "--schema", "schema.json", *more])


def texts(*lines: str | dict, file: str = "texts.jsonl") -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(file).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def rows(name: str | Path = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def timeless(found: list[dict]) -> list[dict]:
    return [{**row, "seconds": 0} for row in found]


def stops(monkeypatch, after: int, error: BaseException) -> None:
    """Extraction fails after some texts, until `monkeypatch.undo()`."""
    real = Extractor.answer

    def answer(*args, **options):
        for number, extraction in enumerate(real(*args, **options)):
            if number == after:
                raise error
            yield extraction

    monkeypatch.setattr(Extractor, "answer", answer)


def test_a_line_out_for_each_line_in_and_bad_ones_are_reported_by_number(loads, capsys):
    texts(
        {"text": "Ada met Bob.", "id": "first", "lang": "en", "source": "news", "text2": None,
         "task": "RE", "schema": {"a": ""}, "annotations": [1], "entities": ["x"]},
        "{broken",
        '"just Zoe"',
        "",
        {"title": "no text"},
        {"text": "nothing", "id": None},
        '{"text": "half \\ud83d a Pair"}',
        '{"text": "a", "n": NaN}',
        "",
        " ",
    )  # fmt: skip
    assert extract() == Exit.SOME_LINES_BAD
    found = rows()
    assert [row["id"] for row in found] == ["first", "2", "3", "4", "5", "6", "7", "8"]
    counts = [len(row["records"]) if "records" in row else "error" for row in found]
    assert counts == [2, "error", 1, "error", "error", 0, 1, "error"]
    first = found[0]
    assert first["answers"] == [' [Capital(span="Ada"), Capital(span="Bob")]']
    assert first["records"][0]["text"] == "Ada"
    assert first["problems"] == [] and first["seconds"] > 0
    assert first["lang"] == "en" and first["text2"] is None and first["input"] == {"source": "news"}
    unread = {key: first[key] for key in ("task", "schema", "annotations", "entities")}
    assert unread == {"task": "RE", "schema": {"a": ""}, "annotations": [1], "entities": ["x"]}
    assert found[6]["text"] == "half \ud83d a Pair" and found[6]["records"][0]["start"] == 9
    messages = capsys.readouterr().err
    for number, words in ((2, "The line is no JSON"), (4, "The line is no JSON"),
                          (5, "The line has no text"), (8, "The line is no JSON")):  # fmt: skip
        assert re.search(rf"texts\.jsonl:{number}: {words}", messages)
    assert "4 lines could not be used" in messages
    Path("texts.jsonl").write_text('{"text": "Ada"}\n{"text": "Bob"}', encoding="utf-8")
    assert extract("--overwrite") == Exit.DONE
    assert [row["id"] for row in rows()] == ["1", "2"]


def test_a_text_file_is_a_text_a_line(loads):
    Path("texts.txt").write_bytes('\ufeffAda\r\n\r\n"Zoe" {\r\n\r\n'.encode() + b"\xff\n")
    assert extract("--input", "texts.txt") == Exit.SOME_LINES_BAD
    found = rows()
    assert [row.get("text") for row in found] == ["Ada", "", '"Zoe" {', "", None]
    assert [len(row.get("records", "error")) for row in found] == [1, 0, 1, 0, 5]
    assert found[-1]["error"] == "Byte 0 (0xff) of the line is no UTF-8. Save the file as UTF-8."


STRANGE = [
    {"annotations": None},
    {"annotations": 5},
    {"annotations": [None]},
    {"annotations": [{"label": ["x"], "text": "Ada"}]},
    {"entities": None},
    {"schema": None},
    {"schema": [[]]},
    {"schema": 5},
    {"schema": {"a": [["b"]]}},
    {"schema": {"entities": None}},
    {"schema": {"entities": {"a": {"examples": 5}}}},
    {"schema": {"a": {"roles": {"b": {"types": [[]]}}}}},
    {"task": None},
    {"task": []},
    {"task": "EAE"},
    {"id": {"a": []}, "text": ["Ada"]},
    "[" * 100_000,
    '{"text": "Ada", "schema": ' + '{"a":' * 100_000,
    '{"text": "Ada", "n": ' + "9" * 10_000 + "}",
    "\\ud800",
    "\0",
]


def test_any_line_gives_records_or_an_error_line(loads):
    good = {"text": "Ada", "schema": SCHEMA, "task": "NER"}
    lines = [{**good, **line} if isinstance(line, dict) else line for line in STRANGE]
    texts(*(line for strange in lines for line in (strange, good)))
    assert cli.main(EXTRACT) == Exit.SOME_LINES_BAD
    found = rows()
    assert len(found) == 2 * len(STRANGE)
    assert all("records" in row for row in found[1::2])
    assert all(("records" in row) != ("error" in row) for row in found)


def test_an_error_that_nobody_thought_of_costs_its_line(loads, monkeypatch):
    question = inputs._question

    def failing(row, *more):
        if row["text"] == "bad":
            raise RuntimeError("oh")
        return question(row, *more)

    monkeypatch.setattr(inputs, "_question", failing)
    texts({"text": "Ada"}, {"text": "bad"}, {"text": "Bob"})
    assert extract() == Exit.SOME_LINES_BAD
    assert rows()[1]["error"] == "The line cannot be used (RuntimeError: oh)."
    assert [len(rows()[i]["records"]) for i in (0, 2)] == [1, 1]


def test_an_interrupted_run_goes_on_behind_the_lines_that_are_written(loads, monkeypatch, capsys):
    texts(*({"text": f"text {i} Ada"} for i in range(10)))
    assert extract() == Exit.DONE
    whole = rows()
    Path("out.jsonl").unlink()
    for error, code, words in (
        (KeyboardInterrupt(), Exit.INTERRUPTED, "stays; the same command goes on from there"),
        (RuntimeError("out of memory"), Exit.STOPPED, "RuntimeError: out of memory"),
        (OSError("disk full"), Exit.STOPPED, "the same command goes on from there"),
    ):
        with monkeypatch.context() as patch:
            stops(patch, 2, error)
            assert extract() == code
        assert words in capsys.readouterr().err
        with Path("out.jsonl").open("a") as file:
            file.write('{"id": "5", "source": "1')  # the line that it was stopped in
    with monkeypatch.context() as patch:
        stops(patch, 0, RuntimeError("out of memory"))
        assert extract() == Exit.NOTHING_DONE
    capsys.readouterr()
    assert extract() == Exit.DONE
    assert "6 of 10 lines were done already" in capsys.readouterr().err
    assert timeless(rows()) == timeless(whole)
    before = Path("out.jsonl").read_bytes()
    assert extract() == Exit.DONE and Path("out.jsonl").read_bytes() == before


def test_error_lines_of_an_earlier_run_still_count(loads):
    texts({"text": "Ada"}, "{")
    assert extract() == extract() == Exit.SOME_LINES_BAD


def test_an_output_of_another_job_is_neither_continued_nor_changed(loads, capsys):
    texts({"text": "Ada"}, {"text": "Bob"})
    assert extract() == Exit.DONE
    before = Path("out.jsonl").read_bytes()
    other = "`out.jsonl:1` was not written by such a run"
    for option in (("--threshold", "0.5"), ("--adapter", "other"), ("--base-model", "b")):
        assert extract(*option) == Exit.NOTHING_DONE
        assert other in capsys.readouterr().err
    texts({"text": "Ada"}, {"text": "Zoe"})
    assert extract() == Exit.NOTHING_DONE
    message = "`out.jsonl:2` does not belong to text 2, which is another now"
    assert message in capsys.readouterr().err
    texts({"text": "Ada"})
    assert extract() == Exit.NOTHING_DONE
    assert "`out.jsonl` has more lines than there are texts" in capsys.readouterr().err
    for notes in ("my notes\nand no line feed at the end", "one line"):
        Path("notes.jsonl").write_text(notes)
        assert extract("--output", "notes.jsonl") == Exit.NOTHING_DONE
        assert "was not written by such a run" in capsys.readouterr().err
        assert Path("notes.jsonl").read_text() == notes
    assert Path("out.jsonl").read_bytes() == before
    assert extract("--overwrite") == Exit.DONE and len(rows()) == 1


def test_overwriting_keeps_the_old_output_until_there_is_a_new_line(loads, monkeypatch, capsys):
    texts({"text": "Ada"}, {"text": "Bob"})
    assert extract() == Exit.DONE
    before = Path("out.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        stops(patch, 0, RuntimeError("out of memory"))
        assert extract("--overwrite") == Exit.NOTHING_DONE
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "from_pretrained", lambda *a, **k: 1 / 0)
        assert extract("--overwrite") == Exit.NOTHING_DONE
    assert extract("--overwrite", "--max-prompt-tokens", "5") == Exit.NOTHING_DONE
    assert Path("out.jsonl").read_bytes() == before
    with monkeypatch.context() as patch:
        stops(patch, 1, RuntimeError("out of memory"))
        assert extract("--overwrite") == Exit.STOPPED
    assert len(rows()) == 1
    for error, code in ((KeyboardInterrupt, Exit.INTERRUPTED), (OSError, Exit.STOPPED)):
        with monkeypatch.context() as patch:
            stops(patch, 1, error())
            assert extract("--overwrite") == code
        assert "without --overwrite the same command goes on" in capsys.readouterr().err
    assert extract() == Exit.DONE and len(rows()) == 2
    assert "1 of 2 lines were done already" in capsys.readouterr().err
    assert extract("--output", "out.parquet") == Exit.DONE
    with monkeypatch.context() as patch:
        stops(patch, 1, KeyboardInterrupt())
        assert extract("--output", "out.parquet", "--overwrite") == Exit.INTERRUPTED
        assert "The old output stays; the same command starts" in capsys.readouterr().err

        def interrupted(*files):
            raise KeyboardInterrupt

        patch.setattr(score_command, "_read", interrupted)
        command = ["score", "--gold", "out.jsonl", "--predicted", "out.jsonl"]
        assert cli.main(command) == Exit.INTERRUPTED
        assert "Interrupted. The same command starts anew." in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["texts.jsonl", "./x/../texts.jsonl", "link", "hard", "schema.json"]
)
def test_an_output_that_is_read_is_refused(loads, capsys, name):
    texts({"text": "Ada"})
    Path("x").mkdir()
    Path("link").symlink_to("texts.jsonl")
    os.link("texts.jsonl", "hard")
    before = Path("texts.jsonl").read_bytes(), Path("schema.json").read_bytes()
    for more in ([], ["--overwrite"]):
        assert extract("--output", name, *more) == Exit.NOTHING_DONE
        assert "which is read. Write to another file" in capsys.readouterr().err
    assert (Path("texts.jsonl").read_bytes(), Path("schema.json").read_bytes()) == before
    assert not loads
    command = ["score", "--gold", "texts.jsonl", "--predicted", "schema.json", "--json", name]
    assert cli.main(command) == Exit.NOTHING_DONE and "which is read" in capsys.readouterr().err
    if name != "schema.json":
        assert convert("jsonl", "texts.jsonl", name) == Exit.NOTHING_DONE
        assert "which is read" in capsys.readouterr().err


def schema_file(content: str) -> None:
    Path("schema.json").write_text(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("texts.jsonl").unlink(), "There is no file `texts.jsonl`"),
        (lambda: Path("schema.json").unlink(), "schema.json"),
        *((lambda content=content: schema_file(content), "`schema.json` holds no schema")
          for content in ("[1]", "{", "[]", "5", '{"entities": null}', "[" * 100_000)),
    ],
)  # fmt: skip
def test_what_cannot_begin_says_why(loads, capsys, change, message):
    texts({"text": "Ada"})
    change()
    assert extract() == Exit.NOTHING_DONE
    assert message in capsys.readouterr().err
    assert not Path("out.jsonl").exists() and not loads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--threshold nan", "'nan' is no number from 0 to 1"),
        ("--threshold 2", "'2' is no number from 0 to 1"),
        ("--threshold x", "'x' is no number from 0 to 1"),
        ("--batch-size 0", "'0' is no whole number of at least 1"),
        ("--max-new-tokens 1.5", "'1.5' is no whole number of at least 1"),
        ("--max-prompt-tokens -1", "'-1' is no whole number of at least 1"),
        ("--dtype float99", "invalid choice: 'float99' (choose from"),
        ("--device tpu", "--device is 'tpu', but this machine has cpu"),
        ("--output nowhere/out.jsonl", "There is no folder `"),
        ("--output out.csv", "`out.csv` would be no .csv. Write .jsonl or .parquet."),
        ("--output .", "is a folder. Name a file in it"),
    ],
)
def test_values_that_cannot_be_are_refused_before_a_model_is_loaded(
    loads, capsys, options, message
):
    texts({"text": "Ada"})
    try:
        code = extract(*options.split())
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == Exit.NOTHING_DONE and not loads and not Path("out.jsonl").exists()
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(loads, capsys):
    texts({"text": "Ada"})
    assert extract("--device", "cuda") == Exit.NOTHING_DONE
    assert "--device is 'cuda', but this machine has" in capsys.readouterr().err


def test_each_process_of_a_machine_takes_an_accelerator_of_its_own(loads, monkeypatch):
    texts({"text": "Ada"})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert extract() == Exit.DONE and loads[0]["device"] == "cuda:1"


def test_a_stream_that_is_no_file_is_printed_to(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main([]) == Exit.NOTHING_DONE and "usage: " in sys.stdout.getvalue()


def test_arguments_that_do_not_exist_end_with_2(capsys):
    assert cli.main([]) == Exit.NOTHING_DONE and "usage: " in capsys.readouterr().out
    for arguments in (["extract"], ["extract", "--colour", "red"], ["paint"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == Exit.NOTHING_DONE
    with pytest.raises(SystemExit) as stop:
        cli.main(["extract", "--help"])
    assert stop.value.code == 0 and "Exit codes" in capsys.readouterr().out


def test_a_parquet_output_holds_the_same(loads, capsys, monkeypatch):
    texts(
        {"text": "Ada", "n": 1},
        {"text": "half \ud83d a \\ud83d Pair", "n": "x"},
        "{",
        {"text": "b"},
    )
    assert extract() == Exit.SOME_LINES_BAD
    with monkeypatch.context() as patch:
        stops(patch, 2, RuntimeError("out of memory"))
        assert extract("--output", "out.parquet") == Exit.STOPPED
    assert not Path("out.parquet").exists()
    assert extract("--output", "out.parquet") == Exit.SOME_LINES_BAD
    assert "2 of 4 lines were done already" in capsys.readouterr().err
    assert not Path("out.parquet.jsonl").exists()
    found = list(read_parquet(Path("out.parquet")))
    expected = rows()
    assert [row.pop("n", None) for row in found] == ["1", '"x"', "null", "null"]  # of mixed types
    expected[1]["text"] = expected[1]["text"].replace("\ud83d", "\ufffd", 1)
    assert timeless(found) == timeless(
        [{k: v for k, v in row.items() if k != "n"} for row in expected]
    )
    before = Path("out.parquet").read_bytes()
    assert extract("--output", "out.parquet") == Exit.SOME_LINES_BAD
    assert "out.parquet" in capsys.readouterr().err
    assert extract("--output", "out.parquet", "--threshold", "0.1") == Exit.NOTHING_DONE
    assert "`out.parquet` was not written by such a run" in capsys.readouterr().err
    assert Path("out.parquet").read_bytes() == before
    texts({"text": "Zoe"})
    assert extract("--output", "out.parquet", "--overwrite") == Exit.DONE
    assert [row["text"] for row in read_parquet(Path("out.parquet"))] == ["Zoe"]
    capsys.readouterr()
    texts({"text": "Zoe", "meta": {}, "deep": [{"a": {}}]}, {"text": "Ada", "meta": {}})
    with monkeypatch.context() as patch:
        patch.setattr(extract_command, "write_parquet", lambda *files: 1 / 0)
        assert extract("--output", "out.parquet", "--overwrite") == Exit.STOPPED
    assert "Wrote" not in capsys.readouterr().err
    for _ in range(2):
        assert extract("--output", "out.parquet", "--overwrite") == Exit.DONE
        found = list(read_parquet(Path("out.parquet")))
        assert [row["meta"] for row in found] == ["{}", "{}"]
        assert [row["deep"] for row in found] == ['[{"a": {}}]', "null"]


@pytest.fixture
def process(monkeypatch):
    """`process(rank, count, *options)`: extract as one of several processes."""
    wait = Processes.wait_for_all
    monkeypatch.setattr(Processes, "wait_for_all", lambda self: self.count > 1 or wait(self))

    def run(rank: int, count: int, *options: str) -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        return extract(*options)

    return run


@pytest.mark.slow
def test_several_processes_write_what_one_does(loads, monkeypatch, capsys, process):
    texts(*({"text": f"text {i} Ada"} for i in range(30)), "{")
    assert extract() == Exit.SOME_LINES_BAD
    whole = rows()
    Path("out.jsonl").unlink()
    capsys.readouterr()
    assert process(1, 2) == Exit.DONE and not Path("out.jsonl").exists()
    assert "Extracting" not in capsys.readouterr().err  # the first process shows the progress
    assert process(0, 2) == Exit.SOME_LINES_BAD
    assert "Extracting" in capsys.readouterr().err
    assert timeless(rows()) == timeless(whole)
    assert not list(Path().glob(".out*parts"))
    assert process(0, 2) == Exit.SOME_LINES_BAD and process(1, 2) == Exit.DONE  # nothing to do
    assert timeless(rows()) == timeless(whole)

    # Stopped within a block, and continued by one, or by others than before.
    for later in ([(0, 1)], [(0, 3), (1, 3), (2, 3)]):
        assert process(1, 2, "--overwrite", "--threshold", "0.1") == Exit.DONE
        with monkeypatch.context() as patch:
            stops(patch, 3, RuntimeError("out of memory"))
            assert process(0, 2, "--overwrite", "--threshold", "0.1") == Exit.STOPPED
        assert timeless(rows()) == timeless(whole)  # the old output is still there
        asked = len(loads)
        codes = [process(*who, "--overwrite", "--threshold", "0.1") for who in later]
        assert codes == [Exit.DONE] * (len(later) - 1) + [Exit.SOME_LINES_BAD]
        assert len(loads) == asked + len(later)
        new = rows()
        assert new[0]["run"] != whole[0]["run"]
        assert [row["id"] for row in new] == [row["id"] for row in whole]
        assert process(0, 1, "--overwrite") == Exit.SOME_LINES_BAD
    assert not list(Path().glob(".out*parts"))


def test_a_merge_that_is_stopped_or_waited_for_costs_no_work_and_leaves_nothing(
    loads, monkeypatch, capsys, process
):
    texts(*({"text": f"text {i} Ada"} for i in range(30)))
    with monkeypatch.context() as patch:
        patch.setattr(Shares, "_put_together", lambda self: False)  # stopped before it
        assert process(0, 2) == process(1, 2) == Exit.DONE and not Path("out.jsonl").exists()
    asked: list[str] = []
    windows = Extractor.windows

    def counted(self, question, problems):
        asked.append(question.text)
        return windows(self, question, problems)

    def overtaken(self):
        if self.rank == 1:
            assert process(0, 2) == Exit.DONE and len(rows()) == 30

    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "windows", counted)
        patch.setattr(Processes, "wait_for_all", overtaken)
        assert process(1, 2) == Exit.DONE
    assert not any(asked) and not list(Path().glob(".out*parts"))

    whole = Path("out.jsonl").read_bytes()
    assert process(1, 2, "--overwrite") == Exit.DONE
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **options: 1 / 0)  # stopped within it
        assert process(0, 2, "--overwrite") == Exit.STOPPED
    assert "stays; the same command goes on" in capsys.readouterr().err
    (parts,) = Path().glob(".out*parts")
    shutil.copytree(parts, other := Path(".out.jsonl.other.parts"))
    file = other / "000000008.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"source": "', b'"source": "0', 1))
    before = Path("out.jsonl").read_bytes()
    assert len(rows()) == 30 and before != whole
    assert process(1, 2) == Exit.DONE and parts.exists()
    assert process(0, 2) == Exit.NOTHING_DONE and parts.exists()
    assert "other.parts` holds parts of another job" in capsys.readouterr().err
    shutil.rmtree(other)
    assert process(0, 2) == Exit.DONE and Path("out.jsonl").read_bytes() == before
    assert not parts.exists()


def test_several_processes_go_on_behind_one_and_refuse_other_parts(
    loads, monkeypatch, capsys, process
):
    texts(*({"text": f"text {i} Ada"} for i in range(30)))
    assert extract() == Exit.DONE
    whole = rows()
    with monkeypatch.context() as patch:
        stops(patch, 5, KeyboardInterrupt())
        assert extract("--overwrite") == Exit.INTERRUPTED
    assert process(0, 2) == Exit.DONE and len(rows()) == 5
    assert process(0, 2, "--threshold", "0.1") == Exit.NOTHING_DONE
    texts(*({"text": f"text {i} Zoe"} for i in range(30)), file="other.jsonl")
    Path("out.jsonl").rename("kept.jsonl")
    assert process(0, 1, "--input", "other.jsonl") == Exit.NOTHING_DONE
    assert "holds parts of another job for" in capsys.readouterr().err
    Path("kept.jsonl").rename("out.jsonl")
    assert process(1, 2) == Exit.DONE
    assert timeless(rows()) == timeless(whole)
    assert process(1, 2, "--overwrite", "--threshold", "0.1") == Exit.DONE
    assert list(Path().glob(".out*parts"))  # of a job that nobody ends
    assert process(0, 1, "--overwrite") == Exit.DONE
    assert timeless(rows()) == timeless(whole) and not list(Path().glob(".out*parts"))


def test_documents_with_their_own_schemas_and_scores(loads, capsys):
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
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("Capital", "95% interval", "unanswered")), printed
    assert cli.main([*command, "--identification"]) == Exit.DONE
    assert json.loads(Path("scores.json").read_text())["identification"]
    assert (
        cli.main(["score", "--gold", "gold.jsonl", "gold.jsonl", "--predicted", "out.jsonl"])
        == Exit.NOTHING_DONE
    )
    command = ["score", "--gold", *["gold.jsonl"] * 2, "--predicted", *["out.jsonl"] * 2]
    assert cli.main(command) == Exit.NOTHING_DONE
    assert "Two gold files are called `gold`. Give them names" in capsys.readouterr().err


def test_a_terminal_gets_tables_in_the_place_of_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entity = Entity("Capital", Span("Ada", 0, 3), confidence=0.9)
    write_jsonl([Document("a", "Ada", "NER", WORDS, (entity,))], "gold.jsonl")
    texts({"id": "a", "records": [entity.to_dict()]}, file="out.jsonl")
    command = ["score", "--gold", "gold.jsonl", "--predicted", "out.jsonl", "--reliability"]
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert cli.main(command) == Exit.DONE
        printed = capsys.readouterr().out
        assert "gold" in printed and "100.0" in printed and "ECE" in printed
        assert ("| ---" in printed or "|---" in printed) != terminal


def test_the_reliability_of_confidences(loads, capsys):
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
    with pytest.warns(UserWarning, match="not kept: `was`"):
        assert cli.main([*command, "--reliability-plot", "curve.svg"]) == Exit.DONE
    captured = capsys.readouterr()
    assert "| all | 7 |" in captured.out and "1 of the records have no confidence" in captured.err
    assert "<svg" in Path("curve.svg").read_text()


def test_a_line_without_any_schema_or_event_is_an_error_line(loads):
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


def test_scores_of_broken_predictions(loads, capsys):
    texts({"text": "Ada met Bob.", "id": "a"})
    write_jsonl(
        [Document("a", "Ada met Bob.", "NER", WORDS, (Entity("Capital", Span("Ada", 0, 3)),))],
        "gold.jsonl",
    )
    good = {"label": "Capital", "text": "Ada", "start": 0, "end": 3}
    answers = [{"records": value} for value in (None, 5, [5], ["x"], [None], [{}], {"a": 1})]
    broken = ({"label": 5}, {"label": []}, {"text": 5}, {"text": None}, {"start": "x"})
    broken += ({"start": 0.5}, {"end": None}, {"confidence": "high"}, {"confidence": float("nan")})
    answers += [{"records": [{**good, **change}]} for change in broken]
    answers += [{"records": [], "problems": value} for value in (5, [5], [{"kind": "x"}])]
    texts(*({"id": "a", **answer} for answer in answers), file="out.jsonl")
    command = ["score", "--gold", "gold.jsonl", "--predicted", "out.jsonl", "--reliability"]
    for match in ("text", "offsets"):
        assert cli.main([*command, "--match", match]) == Exit.SOME_LINES_BAD
        messages = capsys.readouterr().err
        assert messages.count("The line holds no records: ") == len(answers)


def convert(*arguments: str) -> int:
    return cli.main(["convert", "--source-format", *arguments])


def test_convert(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.conll").write_text("Ada B-person\nmet O\n\nBob X-person\n")
    Path("labels.json").write_text('{"person": "people"}')
    command = ["conll", "--schema", "labels.json", "in.conll", "out.jsonl"]
    assert convert(*command) == Exit.NOTHING_DONE
    said = capsys.readouterr().err
    assert "in.conll:4: tags" in said and not Path("out.jsonl").exists()
    assert "Pass --keep-going" in said and "on_error" not in said
    assert convert(*command, "--keep-going") == Exit.SOME_LINES_BAD
    assert [row["text"] for row in rows()] == ["Ada met", "Bob"]
    assert rows()[0]["schema"] == {"person": "people"}
    assert "2 documents, 1 problems" in capsys.readouterr().err
    assert convert("jsonl", "out.jsonl", "again.jsonl") == Exit.DONE
    assert rows("again.jsonl") == rows()
    for command, message in (
        (["jsonl", "--scheme", "IOB1"], "--scheme says nothing about the format `jsonl`"),
        (["brat", "--detokenize"], "--detokenize says nothing about the format `brat`"),
        (["paper"], "--source-format is 'paper'. Choose one of jsonl, conll, brat, iepile"),
        (["conll", "--schema", "list.json"], "`list.json` holds no schema. Write {label"),
        (["conll", "--schema", "in.conll"], "`in.conll` holds no schema: "),
        (["text"], "A text file has no labels. Pass --schema FILE."),
    ):
        Path("list.json").write_text("[1]")
        assert convert(*command, "out.jsonl", "x.jsonl") == Exit.NOTHING_DONE
        assert message in capsys.readouterr().err and not Path("x.jsonl").exists()


def test_gold_documents_that_cannot_be_read_are_named_with_the_way_out(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("gold.jsonl").write_text("{\n")
    others = {"score": ["--predicted", "gold.jsonl"], "report": ["--adapter", "a", "--output", "o"]}
    for command, more in others.items():
        assert cli.main([command, "--gold", "gold.jsonl", *more]) == Exit.NOTHING_DONE
        said = capsys.readouterr().err
        assert "Error: gold.jsonl:1: json" in said and "on_error" not in said
        assert "convert --source-format jsonl --keep-going gold.jsonl NEW_FILE" in said


def test_convert_reads_the_columns_that_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "# id 1 domain=en\n1\tB-PER\tAda\t_\n2\tO\t's\t_\n3\tB-N\t10\u00a0000\t_\n"
    Path("in.conll").write_text(text, encoding="utf-8")
    columns = ["--token-column", "2", "--tag-column", "1", "--separator", r"\t"]
    command = ["conll", *columns, "--comment", "# id", "in.conll", "out.jsonl"]
    assert convert(*command) == Exit.DONE
    assert [a["text"] for a in rows()[0]["annotations"]] == ["Ada", "10\u00a0000"]
    assert rows()[0]["text"] == "Ada 's 10\u00a0000"
    assert convert(*command, "--detokenize", "--unit", "document") == Exit.DONE
    assert rows()[0]["text"] == "Ada's 10\u00a0000"


def test_convert_reads_all_tasks_of_brat_and_refuses_a_schema_of_another(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/a.txt").write_text("Ada works at ACM")
    Path("folder/a.ann").write_text(
        "T1\tPer 0 3\tAda\nT2\tOrg 13 16\tACM\nR1\tat Arg1:T1 Arg2:T2\n"
    )
    Path("labels.json").write_text('{"Per": "", "Org": ""}')
    assert convert("brat", "folder", "out.jsonl") == Exit.DONE
    assert [len(a) for a in rows()[0]["annotations"]] and rows()[0]["task"] == "UIE"
    assert len(rows()[0]["annotations"]) == 3
    command = ["brat", "--task", "RE", "--schema", "labels.json", "folder", "out.jsonl"]
    assert convert(*command) == Exit.NOTHING_DONE
    assert "The schema" in capsys.readouterr().err
    assert convert("brat", "folder", "folder/a.txt") == Exit.NOTHING_DONE
    assert "which is read" in capsys.readouterr().err


@pytest.fixture
def job(tmp_path):
    """Arguments of an extraction with a tiny adapter from the disk, without --output."""
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    save_format(PromptFormat(style="compact"), tmp_path / "adapter")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    lines = (json.dumps({"text": f"Ada met Bob {i}."}) + "\n" for i in range(64))
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    files = [f"--adapter={tmp_path}/adapter", f"--schema={tmp_path}/schema.json"]
    return ["extract", *files, f"--input={tmp_path}/texts.jsonl", "--max-new-tokens=12"]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(*arguments: object, **environment: object) -> subprocess.Popen:
    """A process of Python with these arguments."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=ENVIRONMENT | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen, code: int = Exit.DONE) -> tuple[bytes, bytes]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err.decode()
    return out, err


@pytest.mark.slow
def test_from_the_shell_with_an_adapter_from_disk(job, tmp_path):
    output = tmp_path / "out.jsonl"
    ended(start("-m", "peft_taskmoe", *job, f"--output={output}", "--max-prompt-tokens=500"))
    found = rows(output)
    assert [row["text"] for row in found] == [f"Ada met Bob {i}." for i in range(64)]
    assert all(row["answers"] for row in found)
    assert PYPROJECT["project"]["scripts"] == {"peft-taskmoe": "peft_taskmoe.cli:main"}


def test_help_and_version_import_nothing_slow():
    commands = ("peft_taskmoe --help", "peft_taskmoe.cli --version", "peft_taskmoe extract --help")
    for command in commands:
        _, err = ended(start("-X", "importtime", "-m", *command.split()))
        assert not re.search(rb"\b(torch|transformers|peft|datasets)$", err, re.MULTILINE)


@pytest.mark.slow
def test_results_reach_pipes_and_files_of_any_code_page(tmp_path):
    gold = {"id": "a", "text": "Ada", "task": "NER", "schema": {"人名": ""}}
    gold["annotations"] = [{"label": "人名", "text": "Ada", "start": 0, "end": 3}]
    file = tmp_path / "gold.jsonl"
    file.write_text(json.dumps(gold), encoding="utf-8")
    command = ["-m", "peft_taskmoe", "score", "--gold", file, "--predicted", file, "--labels"]
    command += ["--json", tmp_path / "s.json"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out, _ = ended(start(*command, PYTHONIOENCODING="cp1252", **ascii_only))
    assert "人名" in out.decode("utf-8")
    assert "人名" in (tmp_path / "s.json").read_text("utf-8")


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(tmp_path):
    gold = {"id": "a", "text": "Ada", "task": "NER", "schema": {"p": ""}, "annotations": []}
    file = tmp_path / "gold.jsonl"
    file.write_text(json.dumps(gold), encoding="utf-8")
    command = ["-m", "peft_taskmoe", "score", "--gold", file, "--predicted", file]
    process = start(*command, "--json", tmp_path / "s.json")
    process.stdout.close()
    assert process.wait(timeout=300) == Exit.DONE and b"Traceback" not in process.stderr.read()
    assert json.loads((tmp_path / "s.json").read_text("utf-8"))


@pytest.mark.slow
def test_launchers_and_a_killed_process(job, tmp_path):
    whole, several, killed = (tmp_path / f"{name}.jsonl" for name in ("whole", "two", "killed"))
    assert cli.main([*job, f"--output={whole}"]) == Exit.DONE
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    _, err = ended(start(*torchrun, "-m", "peft_taskmoe", *job, f"--output={several}"))
    assert timeless(rows(several)) == timeless(rows(whole))
    assert bars(err) == {b"32"}

    environment = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = ["-m", "peft_taskmoe", *job, f"--output={killed}"]
    first, second = (start(*command, RANK=rank, **environment) for rank in (0, 1))
    while not any(f.stat().st_size for f in tmp_path.glob(".killed.jsonl.*.parts/000000008.jsonl")):
        assert second.poll() is None
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    ended(first)
    second.wait()
    assert not killed.exists()
    # With --cpu in the place of --multi_gpu, accelerate starts one process.
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=3"]
    _, err = ended(start(*accelerate, "--main_process_port", free_port(), *command))
    assert timeless(rows(killed)) == timeless(rows(whole))
    assert bars(err) == {b"24"}


def bars(err: bytes) -> set[bytes]:
    """The totals of the progress bars that were shown, of which there is one."""
    assert err.count(b"[00:00<?, ? text/s]") == 1
    return set(re.findall(rb"/(\d+) \[\S+, +\S+ text/s\]", err))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_every_option_of_the_model_reaches_the_extractor(loads):
    texts({"text": "Ada"})
    assert extract() == Exit.DONE
    bare = {"adapter": "a", "base_model": None, "encoder": None, "device": "cpu", "dtype": None}
    bare |= {"batch_size": 8, "max_new_tokens": 256, "max_prompt_tokens": None}
    assert loads == [bare | {"constrained": False, "prefix_caching": False}]
    options = "--base-model b --batch-size 2 --max-new-tokens 3 --max-prompt-tokens 999"
    options += " --constrained --prefix-caching --dtype bfloat16 --device cpu --overwrite"
    assert extract(*options.split()) == Exit.DONE
    asked = {"base_model": "b", "batch_size": 2, "max_new_tokens": 3, "max_prompt_tokens": 999}
    asked |= {"dtype": "bfloat16", "constrained": True, "prefix_caching": True}
    assert loads[1] == bare | asked


def test_the_task_encoder_can_be_another_folder(loads, adapted, tiny_encoder, tmp_path, capsys):
    texts({"text": "Ada"})
    tiny_encoder.model.save_pretrained("encoder")
    tiny_encoder.tokenizer.save_pretrained("encoder")
    settings = {"name_or_path": "/nowhere", "pooling": "cls", "text": "schema"}
    adapted(task_type="CAUSAL_LM", task_encoder=settings).save_pretrained("adapter")
    assert extract("--adapter", "adapter", "--task-encoder", "encoder") == Exit.DONE
    config = loads[0]["encoder"].config
    assert (config.name_or_path, config.pooling, config.text) == ("encoder", "cls", "schema")
    LoraConfig().save_pretrained("lora")
    assert extract("--adapter", "lora", "--task-encoder", "encoder") == Exit.NOTHING_DONE
    assert "--task-encoder says nothing about a LORA adapter" in capsys.readouterr().err
