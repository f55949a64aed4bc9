"""Long jobs in the Python API: lines that are written at once, a run that is killed and goes on,
files that are another job's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peft_taskmoe.uie import (
    Document,
    Entity,
    Event,
    Extractor,
    PromptFormat,
    Schema,
    Span,
    completion_text,
    record_from_dict,
    score,
)
from peft_taskmoe.uie.extraction import batches
from scripted import Scripted, byte_tokenizer, text_in

torch.set_num_threads(1)

WORDS = Schema.from_dict("NER", {"Capital": "words with a capital letter"})
TEXTS = [f"text {i} of Ada and Zoe{i}" for i in range(9)]


def capitals(prompt: str) -> str:
    text = text_in(prompt)
    found = [
        Entity("Capital", Span(m.group(), *m.span())) for m in re.finditer(r"\b[A-Z]\w*", text)
    ]
    return completion_text(found, text, WORDS)


def extractor(answer=capitals, **options) -> Extractor:
    torch.manual_seed(0)
    return Extractor(
        Scripted(answer), byte_tokenizer(), **{"max_new_tokens": 120, "batch_size": 2, **options}
    )


def rows(path: Path) -> list[dict]:
    return [
        json.loads(line) | {"seconds": 0} for line in path.read_text("utf-8").splitlines() if line
    ]


@pytest.fixture
def whole(tmp_path) -> list[dict]:
    """What a run writes that nothing stops."""
    path = tmp_path / "whole.jsonl"
    assert extractor().to_jsonl(TEXTS, WORDS, path, progress=False) == len(TEXTS)
    return rows(path)


def test_a_line_for_each_text(whole):
    assert [row["id"] for row in whole] == [str(i) for i in range(1, 10)]
    assert [row["text"] for row in whole] == TEXTS
    found = [record_from_dict("UIE", record) for record in whole[3]["records"]]
    assert [record.span.text for record in found] == ["Ada", "Zoe3"] and found[0].confidence > 0
    assert whole[0]["problems"] == [] and len(whole[0]["answers"]) == 1


@pytest.mark.parametrize(
    "damage",
    ["", '{"id": "5", "source": "12', '{"id": "a\\"b\\', '{"id": "5", "s', '{"i', "{", None],
)
def test_a_stopped_run_goes_on_and_equals_one_that_was_not_stopped(
    tmp_path, whole, monkeypatch, damage
):
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(batches, "_MOST_BATCHES", 2)
    first = extractor()

    def taken():
        for number, text in enumerate(TEXTS):
            if number == 5:
                raise KeyboardInterrupt
            yield text

    with pytest.raises(KeyboardInterrupt):
        first.to_jsonl(taken(), WORDS, path, progress=False)
    assert rows(path) == whole[:2]  # each line is there as soon as it is answered
    with path.open("a") as file:
        file.write(json.dumps(whole[2]) if damage is None else damage)
    second = extractor(batch_size=3)  # has no part in what is found
    assert second.to_jsonl(TEXTS, WORDS, path, progress=False) == 7
    assert rows(path) == whole
    assert [text_in(prompt) for prompt in second.model.prompts].count(TEXTS[0]) == 0
    assert second.to_jsonl(iter(TEXTS), WORDS, path, progress=False) == 0 and rows(path) == whole


KILLED = """
import sys
sys.path[:0] = sys.argv[1:3] + [sys.argv[1] + "/uie"]
import test_jobs as here

def slow(prompt):
    import time
    time.sleep(0.01)  # for each token
    return here.capitals(prompt)

here.extractor(slow).to_jsonl(here.TEXTS, here.WORDS, sys.argv[3], progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_line_that_was_written(tmp_path, whole):
    path, tests = tmp_path / "out.jsonl", Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tests), str(tests.parent), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1]
    done = path.read_bytes().count(b"\n")
    assert 2 <= done < len(TEXTS), error
    assert extractor().to_jsonl(TEXTS, WORDS, path, progress=False) == len(TEXTS) - done
    assert rows(path) == whole


def change_weights(one: Extractor) -> Extractor:
    with torch.no_grad():
        next(one.model.parameters()).mul_(1.01)
    return one


@pytest.mark.parametrize(
    "other",
    [
        lambda path: extractor().to_jsonl(TEXTS, {"Capital": "another guideline"}, path),
        lambda path: extractor().to_jsonl(TEXTS, [WORDS, {"Place": ""}], path),
        lambda path: extractor().to_jsonl(TEXTS, WORDS, path, thresholds=0.5),
        lambda path: extractor(max_new_tokens=90).to_jsonl(TEXTS, WORDS, path),
        lambda path: extractor(format=PromptFormat(style="compact")).to_jsonl(TEXTS, WORDS, path),
        lambda path: change_weights(extractor()).to_jsonl(TEXTS, WORDS, path),
        lambda path: extractor(all_occurrences=True).to_jsonl(TEXTS, WORDS, path),
        lambda path: extractor(overlap=7).to_jsonl(TEXTS, WORDS, path),
    ],
)
def test_a_file_of_another_schema_setting_or_model_is_not_continued(tmp_path, whole, other):
    path = tmp_path / "whole.jsonl"
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"whole.jsonl:1` was not written by such a run: with this schema"
    ):
        other(path)
    assert path.read_bytes() == before


def test_other_texts_ids_or_files_are_not_continued_and_can_be_overwritten(tmp_path, whole):
    path = tmp_path / "whole.jsonl"
    before = path.read_bytes()
    texts = [*TEXTS[:2], "another", *TEXTS[3:]]
    with pytest.raises(
        ValueError, match=r"whole.jsonl:3` does not belong to text 3, which is another now"
    ):
        extractor().to_jsonl(texts, WORDS, path)
    with pytest.raises(ValueError, match="has more lines than there are texts"):
        extractor().to_jsonl(TEXTS[:4], WORDS, path)
    with pytest.raises(ValueError, match="does not belong to text 1"):
        extractor().to_jsonl(TEXTS, WORDS, path, ids=[f"name {text}" for text in TEXTS])
    assert path.read_bytes() == before
    line = {"id": "a", "source": "12", "text": "own", "annotations": []}
    for foreign in (json.dumps(line), json.dumps({"id": "a", "text": "own"})[:-4], '{"id": 5, "s'):
        path.write_text(foreign)
        with pytest.raises(ValueError, match=r"The last line of .* was not written by such a run"):
            extractor().to_jsonl(TEXTS, WORDS, path)
        assert path.read_text() == foreign
    path.write_bytes(before.replace(b'"records"', b'"rec\x00rds', 1))
    with pytest.raises(ValueError, match="`overwrite=True`"):
        extractor().to_jsonl(TEXTS, WORDS, path)
    assert extractor().to_jsonl(texts, WORDS, path, overwrite=True, progress=False) == 9
    assert rows(path)[2]["text"] == "another"


def test_what_is_overwritten_stays_until_the_first_new_line_is_there(tmp_path, whole):
    path = tmp_path / "whole.jsonl"
    before = path.read_bytes()

    def broken(prompt):
        raise RuntimeError("the model broke")

    def seen(prompt):
        assert path.read_bytes() == before  # while the first batch is answered
        return capitals(prompt)

    with pytest.raises(ValueError, match="before any text"):
        extractor(max_prompt_tokens=5).to_jsonl(TEXTS, WORDS, path, overwrite=True)
    with pytest.raises(RuntimeError, match="the model broke"):
        extractor(broken).to_jsonl(TEXTS, WORDS, path, overwrite=True)
    assert path.read_bytes() == before
    assert extractor(seen).to_jsonl(TEXTS[:1], WORDS, path, overwrite=True) == 1
    assert rows(path) == whole[:1]
    assert extractor().to_jsonl([], WORDS, path, overwrite=True) == 0 and rows(path) == []
    assert [one.name for one in tmp_path.glob("*new*")] == []


WRITER = """
import sys
from pathlib import Path
from peft_taskmoe.uie.extraction.jobs import Item, write_lines
class Waits:
    def answer(self, asked, **options):
        print("writing", flush=True)
        sys.stdin.read()
        yield from ()
write_lines(Waits(), [], Path(sys.argv[1]), "run")
"""


@pytest.mark.slow
def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path, whole):
    path = tmp_path / "whole.jsonl"
    path.write_bytes(b"")
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout.readline() == b"writing\n"
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"Another process is writing `.*whole.jsonl`"):
            extractor().to_jsonl(TEXTS, WORDS, path, overwrite=overwrite)
    first.kill()
    first.wait()
    assert extractor().to_jsonl(TEXTS, WORDS, path, progress=False) == len(TEXTS)
    assert rows(path) == whole


def test_names_make_the_lines_answers_to_documents(tmp_path):
    documents = [
        Document(
            f"d{i}",
            text,
            "NER",
            WORDS,
            (Entity("Capital", Span("Ada", text.index("Ada"), text.index("Ada") + 3)),),
        )
        for i, text in enumerate(TEXTS[:3])
    ]
    path = tmp_path / "out.jsonl"
    extractor().to_jsonl(TEXTS[:3], WORDS, path, ids=[document.id for document in documents])
    answers = {
        row["id"]: [record_from_dict("UIE", one) for one in row["records"]] for row in rows(path)
    }
    (counts,) = score({"x": documents}, {"x": answers}).scores
    assert (counts.total().tp, counts.total().fp) == (3, 3)
    with pytest.raises(ValueError, match="fewer `ids` than texts"):
        extractor().to_jsonl(TEXTS, WORDS, tmp_path / "few.jsonl", ids=["a"])
    for texts in (TEXTS[:3], iter(TEXTS[:3])):
        with pytest.raises(ValueError, match="more `ids` than texts"):
            extractor().to_jsonl(texts, WORDS, path, ids=["d0", "d1", "d2", "d3"])


def test_given_events_are_a_part_of_what_is_asked(tmp_path):
    schema = Schema.from_dict("EE", {"Attack": {"description": "", "roles": ["by"]}})
    events = [[Event("Attack", Span("hit", 4, 7))], [Event("Attack", Span("hurt", 12, 16))]]
    texts, path = ["Bob hit and hurt Ada."] * 2, tmp_path / "out.jsonl"

    def one() -> Extractor:
        return extractor(lambda prompt: " []")

    assert one().to_jsonl(texts, schema, path, given=events) == 2
    assert one().to_jsonl(texts, schema, path, given=iter(events)) == 0
    with pytest.raises(ValueError, match="does not belong to text 2"):
        one().to_jsonl(texts, schema, path, given=[events[0], events[0]])
    with pytest.raises(ValueError, match="more lists of given events than texts"):
        one().to_jsonl(texts, schema, path, given=[*events, events[0]])
