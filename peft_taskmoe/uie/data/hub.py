"""Data sets of the Hub, and of whatever else `datasets` loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft_taskmoe.optional import needed
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.data.tags import TagScheme, annotated
from peft_taskmoe.uie.data.tokens import Detokenize
from peft_taskmoe.uie.strict_json import without_nulls

RowMapping = Callable[[Mapping[str, Any]], "Mapping[str, Any] | None"]
"""From a row of some data set to one of the JSONL format, with or without `id`; None: left out."""


def read_hub(
    name: str,
    mapping: RowMapping | None = None,
    *,
    split: str,
    limit: int | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    on_error: OnError = "raise",
    **load_options: Any,
) -> ReadReport:
    """Read a data set through `datasets.load_dataset`: of the Hub, or anything else that it takes.

    The mapping runs in `num_proc` processes, its result is cached by `datasets`, which also shows
    the progress. With `streaming`, rows are mapped as they arrive, and only those that `limit` asks
    for are fetched.

    Args:
        name: The data set, as in `load_dataset`.
        mapping: From a row to a row of the JSONL format, e.g. a `TokenTags`; without `id`, the
            row's number is taken. `None`: the rows are in that format.
        split: The split, e.g. "test".
        limit: Read at most so many rows, the first ones.
        streaming: Do not download the data set first.
        num_proc: Number of processes for the mapping; not with `streaming`.
        on_error: "raise" at the first error, or "collect" them all.
        load_options: Of `load_dataset`: `name` of the configuration as `subset`, `revision`, ...

    Raises:
        ReadError: At the first error, where asked to.
        ValueError: `num_proc` is given together with `streaming`.
        ImportError: `datasets` is not installed.
    """
    if streaming and num_proc is not None:
        raise ValueError(
            "A stream is read in one process. Leave num_proc out, or pass streaming=False."
        )
    reading = Reading(f"{name}[{split}]", on_error)
    if "subset" in load_options:
        load_options["name"] = load_options.pop("subset")
    load = needed("datasets", "uie").load_dataset
    rows = load(name, split=split, streaming=streaming, **load_options)
    read = _streamed if streaming else partial(_loaded, num_proc=num_proc)
    number = 0
    for number, outcome in enumerate(read(rows, name, mapping, limit), 1):
        if outcome["error"]:
            reading.error("mapping", outcome["error"], number)
        elif outcome["row"] == "null":
            reading.note("The mapping leaves the row out.", number)
        else:
            row = json.loads(outcome["row"])
            reading.add({"id": str(number)} | row if isinstance(row, dict) else row, number)
    if not number:
        reading.empty()
    return reading.report


def _streamed(
    rows: Any, name: str, mapping: RowMapping | None, limit: int | None
) -> Iterable[Mapping[str, Any]]:
    from tqdm.auto import tqdm

    rows = rows if limit is None else rows.take(limit)
    return (_mapped(row, mapping) for row in tqdm(rows, f"Reading {name}", limit))


def _loaded(
    rows: Any, name: str, mapping: RowMapping | None, limit: int | None, num_proc: int | None
) -> Iterable[Mapping[str, Any]]:
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return rows.map(
        _mapped,
        fn_kwargs={"mapping": mapping},
        remove_columns=rows.column_names,
        num_proc=num_proc,
        desc=f"Mapping {name}",
    )


def _mapped(row: Mapping[str, Any], mapping: RowMapping | None) -> dict[str, str]:
    """A row as JSON, which Arrow holds whatever keys its schema has; or what went wrong."""
    try:
        outcome = without_nulls(row) if mapping is None else mapping(row)
        return {"row": json.dumps(outcome), "error": ""}
    except Exception as error:  # whatever a user's function raises
        return {"row": "", "error": f"The mapping raised {type(error).__name__}: {error}."}


@dataclass(frozen=True)
class TokenTags:
    """Maps rows of tokens and tags, as most NER data sets of the Hub have them, to JSONL.

    Attributes:
        schema: `{label: description}`.
        names: The tag of each number, where tags are numbers:
            `dataset.features["ner_tags"].feature.names`.
        tokens: Column of the tokens.
        tags: Column of the tags.
        id_: Column of the id; `None`: rows are numbered.
        scheme: As in `read_conll`; a tag that it does not allow is an error.
        detokenize: As in `read_conll`.
    """

    schema: Mapping[str, str]
    names: Sequence[str] | None = None
    tokens: str = "tokens"
    tags: str = "ner_tags"
    id_: str | None = None
    scheme: TagScheme = "IOB2"
    detokenize: Detokenize = False

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row of the JSONL format.

        Raises:
            ValueError: Tags are numbers without names, are not as many as the tokens, or break
                the scheme.
        """
        tokens, tags = row[self.tokens], row[self.tags]
        if len(tokens) != len(tags):
            raise ValueError(f"there are {len(tokens)} tokens, but {len(tags)} tags")
        if self.names is None and any(not isinstance(tag, str) for tag in tags):
            raise ValueError(
                'tags are numbers: pass names=dataset.features["ner_tags"].feature.names'
            )
        if self.names is not None:
            for tag in tags:
                if not 0 <= tag < len(self.names):
                    raise ValueError(
                        f"the tag {tag} is none of the {len(self.names)} names; -1 and -100 stand "
                        "for missing tags. Read a split that is tagged, or leave the row out"
                    )
            tags = [self.names[tag] for tag in tags]
        text, annotations, faults = annotated(tokens, tags, self.scheme, self.detokenize)
        if faults:
            raise ValueError(f"tag {faults[0][0]}: {faults[0][1]}")
        out = {"text": text, "task": "NER", "schema": dict(self.schema), "annotations": annotations}
        return out if self.id_ is None else {"id": str(row[self.id_])} | out
