"""Fetch the public part of the paper's data from the Hub and write it as JSONL files of documents.

    python experiments/prepare_data.py --output data/iepile

The data come from the folder `IE-en` of the Hub data set `zjunlp/iepile` (CC BY-NC-SA 4.0, and each
corpus' own terms where they are stricter). Left out, because a licence has to be bought or asked
for: ACE 2005 and TACRED, which `zjunlp/iepile` lacks, and OntoNotes 5. Not in it: WNUT 17, DIANN,
Broad Twitter, E3C. Labels come without guidelines; write them into the files' `schema` by hand.

Mentions come without offsets: one given n times takes its first n occurrences in the text, and what
is not in the text is left out and counted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from peft_taskmoe.uie import Document, read_iepile, write_jsonl

REPOSITORY = "zjunlp/iepile"
SUPERVISED = ("NER/CoNLL2003", "NER/bc5cdr", "NER/ncbi")
ZERO_SHOT = (
    *(f"NER/CrossNER_{domain}" for domain in ("AI", "literature", "music", "politics", "science")),
    *("NER/HarveyNER", "NER/FabNER", "NER/mit-movie", "NER/mit-restaurant", "NER/MultiNERD"),
    *("RE/SciERC", "RE/semval-RE", "RE/conll04", "RE/NYT11", "RE/kbp37", "RE/GIDS"),
    *("EE/WikiEvents", "EE/CASIE", "EE/PHEE"),
)
MORE_TRAINING = ("RE/ADE_corpus", "RE/New-York-Times-RE", "EE/CrudeOilNews")
"""Public sets in the place of ACE 2005's relations and events: without them all would be NER."""


@dataclass
class PrepareArguments:
    """Where the data go."""

    output: str = field(
        default="data/iepile",
        metadata={"help": "Folder for `<set>/train.jsonl`, `<set>/test.jsonl`."},
    )
    revision: str | None = field(
        default=None, metadata={"help": "Commit of the Hub data set, to get the same again."}
    )
    max_documents: int | None = field(
        default=30_000, metadata={"help": "At most this many of each file; the paper's 30,000."}
    )


def instruction_rows(
    task: str, lines: Iterable[str], schema: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Lines of `IE-en` as rows of IEPile's instruction data, which `read_iepile` reads.

    Args:
        task: "NER", "RE" or "EE".
        lines: `{"text", "entity"}`, `{"text", "relation"}` or `{"text", "event"}`, one a line.
        schema: The three lines of `schema.json`: entity types, relations, and roles by event type.
    """
    for line in lines:
        row = json.loads(line)
        output: dict[str, list[Any]] = {}
        asked: list[Any]
        if task == "NER":
            asked = list(schema[0])
            for one in row["entity"]:
                output.setdefault(one["entity_type"], []).append(one["entity"])
        elif task == "RE":
            asked = list(schema[1])
            for one in row["relation"]:
                pair = {"subject": one["head"], "object": one["tail"]}
                output.setdefault(one["relation"], []).append(pair)
        else:
            asked = [
                {"event_type": name, "trigger": True, "arguments": list(roles)}
                for name, roles in schema[2].items()
            ]
            for one in row["event"]:
                arguments: dict[str, list[str]] = {}
                for argument in one["arguments"]:
                    arguments.setdefault(argument["role"], []).append(argument["argument"])
                event = {"trigger": one["event_trigger"], "arguments": arguments}
                output.setdefault(one["event_type"], []).append(event)
        yield {
            "task": task,
            "instruction": {"schema": asked, "input": row["text"]},
            "output": output,
        }


def documents(task: str, rows: Iterable[Mapping[str, Any]]) -> tuple[list[Document], int]:
    """The documents of instruction rows, and how many records or rows were left out as errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{task}.json"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
        report = read_iepile(path, on_error="collect")
    return report.documents, len(report.errors)


def fetch(dataset: str, split: str, revision: str | None) -> list[str]:
    """The lines of one file of `IE-en`."""
    name = f"IE-en/{dataset}/{split}.json"
    path = hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=revision)
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def main(args: PrepareArguments) -> None:
    """Write all data sets."""
    table = Table(title=f"Documents from {REPOSITORY}")
    for column in ("data set", "split", "documents", "left out"):
        table.add_column(column)
    for dataset in (*SUPERVISED, *MORE_TRAINING, *ZERO_SHOT):
        task, name = dataset.split("/")
        schema = [json.loads(line) for line in fetch(dataset, "schema", args.revision)]
        for split in ("train", "test") if dataset not in ZERO_SHOT else ("test",):
            lines = fetch(dataset, split, args.revision)[: args.max_documents]
            found, errors = documents(task, instruction_rows(task, lines, schema))
            folder = Path(args.output) / name.lower()
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(found, folder / f"{split}.jsonl")
            table.add_row(dataset, split, str(len(found)), str(errors))
    Console().print(table)


if __name__ == "__main__":
    (prepare_args,) = HfArgumentParser(PrepareArguments).parse_args_into_dataclasses()
    main(prepare_args)
