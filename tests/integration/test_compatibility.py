"""What 0.1.0 saved (tests/data/v0_1_0) loads, with the logits, records and scores that it gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peft_taskmoe import record_gates
from peft_taskmoe.cli import main
from peft_taskmoe.nearest import TaskCentroids
from peft_taskmoe.uie import Entity, Record, Relation, Schema, Span, parse_answer
from peft_taskmoe.uie.records import record_from_dict, spans_of
from peft_taskmoe.uie.scoring.calibration import Calibration

SAVED = Path(__file__).parents[1] / "data" / "v0_1_0"
ADAPTERS = sorted(path.parent.name for path in SAVED.glob("*/adapter_config.json"))


def test_the_files_are_there_and_small() -> None:
    assert len(ADAPTERS) == 9
    assert sum(path.stat().st_size for path in SAVED.rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_give_the_logits_of_then(adapter: str) -> None:
    expected = load_file(SAVED / "expected.safetensors")
    base = LlamaForCausalLM.from_pretrained(SAVED / "base")
    model = PeftModel.from_pretrained(base, str(SAVED / adapter))
    with torch.no_grad():
        given = {name: expected[name] for name in ("input_ids", "task_embeds")}
        found = model(**given).logits
    torch.testing.assert_close(found, expected[adapter], rtol=0, atol=5e-6)


def test_answers_are_read_into_the_records_of_then() -> None:
    schema = Schema.of({"Person": "", "Met": {"head": ["Person"], "tail": []}})
    for line in (SAVED / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        then = [record_from_dict("UIE", record) for record in row["records"]]
        now = parse_answer(row["answers"][0], schema, row["text"]).records
        assert sorted(map(_said, now)) == sorted(map(_said, then))


def _said(record: Record) -> tuple:
    return record.label, [(span.text, span.start, span.end) for span in spans_of(record)]


def test_scores_are_those_of_then(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = ("--gold", SAVED / "gold.jsonl", "--predicted", SAVED / "answers.jsonl")
    main(["score", *map(str, files), "--json", str(tmp_path / "scores.json")])
    then, now = (json.loads((f / "scores.json").read_text("utf-8")) for f in (SAVED, tmp_path))
    assert now == {**now, **then}


def test_task_centroids_are_those_of_then() -> None:
    """The gates of each of the two tasks are nearest to their own centroid, as at that time."""
    known = TaskCentroids.load(SAVED / "task")
    assert (known.tasks, len(known.layers)) == (("first", "second"), 14)
    expected = load_file(SAVED / "expected.safetensors")
    base = LlamaForCausalLM.from_pretrained(SAVED / "base")
    model = PeftModel.from_pretrained(base, str(SAVED / "task")).eval()
    torch.testing.assert_close(known.embeds, expected["task_embeds"])
    with record_gates(model) as record, torch.no_grad(), record.task("now"):
        given = {name: expected[name][1:] for name in ("input_ids", "task_embeds")}
        model(**given)
    torch.testing.assert_close(record.mean_gates("now").float(), known.gates[1], rtol=0, atol=1e-6)


def test_a_calibration_gives_the_confidences_of_then() -> None:
    known = Calibration.load(SAVED / "task")
    records = [Entity("Person", Span("Ada", 0, 3), value) for value in (0.0, 0.5, 1.0)]
    assert [one.confidence for one in known.apply(records)] == [0.25, 0.5, 0.75]
    relation = Relation("Met", Span("Ada", 0, 3), Span("Bob", 8, 11), confidence=0.4)
    assert [one.confidence for one in known.apply([relation])] == [pytest.approx(0.5)]
