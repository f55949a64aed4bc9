"""Every document of the public data sets: gold records -> prompt and completion -> parsed records,
all offsets equal.
"""

import json
from pathlib import Path

import pytest

from peft_taskmoe.uie.parse import parse_answer
from peft_taskmoe.uie.prompt import PromptFormat, build_example
from peft_taskmoe.uie.records import Document, record_key
from peft_taskmoe.uie.regularisers import Regularisers, collect_mentions

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "uie"
SETS = sorted(path.name for path in DATA.iterdir() if path.is_dir()) if DATA.is_dir() else []

pytestmark = pytest.mark.skipif(not SETS, reason=f"the data sets are not there ({DATA})")

REGULARISED = Regularisers(shuffle=True, dropout=0.15, mask=0.5, examples=3)


def read(name):
    for path in sorted((DATA / name).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Document.from_dict(json.loads(line))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("style", ["dataclass", "compact"])
@pytest.mark.slow
def test_every_record_of_every_document_comes_back(name, style):
    documents = list(read(name))
    mentions = collect_mentions(documents)
    records = 0
    for regularisers, part in ((None, documents), (REGULARISED, documents[::5])):
        for document in part:
            example = build_example(document, PromptFormat(style), regularisers, 1, mentions)
            parsed = parse_answer(
                example.completion,
                example.schema,
                document.text,
                names=example.names,
                given=document.given,
            )
            gold = {record_key(record) for record in example.document.records}
            assert {record_key(record) for record in parsed.records} == gold, document.id
            assert len(parsed.records) == len(gold) and parsed.problems == ()
            if regularisers is None:
                assert gold == {record_key(record) for record in document.records}
                records += len(gold)
    assert documents and records
