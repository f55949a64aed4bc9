"""The schema that the documents of a file get: the user's, or the labels that occur in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft_taskmoe.uie.data.reading import Reading
from peft_taskmoe.uie.schema import Schema
from peft_taskmoe.uie.wording import listed

_GROUPS = {"NER": "entities", "RE": "relations", "EE": "events"}

GivenSchema = Schema | Mapping[str, Any] | None
"""A schema as readers take it: of the one task, or of several as `Schema.to_dict()` gives them."""


def schema_of_file(
    task: str,
    given: GivenSchema,
    rows: Collection[Mapping[str, Any]],
    reading: Reading,
    others: Collection[str] = (),
) -> dict[str, Any] | None:
    """The schema dict for all rows; `None`, and an error, if there is none.

    Args:
        task: What is read.
        given: The user's schema; `None`: the labels and roles of the rows, without descriptions.
        rows: Rows of the JSONL format without their schema.
        reading: Where the error goes.
        others: Labels that the file has for something else than what the task reads.
    """
    occurring = _occurring(rows)
    own = occurring if task == "UIE" else occurring.get(_GROUPS[task], {})
    if given is None:
        if rows and not own:
            message = f"The file has no label for {task}. Pass a schema, {{label: description}}."
            reading.error("schema", message)
            return None
        return own
    schema = given.to_dict() if isinstance(given, Schema) else dict(given)
    grouped = bool(schema) and set(schema) <= set(_GROUPS.values())
    if task != "UIE" and grouped and not any(isinstance(x, str) for x in schema.values()):
        schema = schema.get(_GROUPS[task], {})
    wrong = [name for name in schema if name in others and name not in own]
    if not schema or (wrong and not any(name in own for name in schema)):
        found = f"names other things than {task} reads: {listed(wrong)}" if schema else "is empty"
        reading.error("schema", f"The schema {found}. Pass one of {_GROUPS.get(task, 'labels')}.")
        return None
    return schema


def _occurring(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The labels (and roles) of annotations, by group; groups without any are left out."""
    entities: dict[str, str] = {}
    relations: dict[str, str] = {}
    events: dict[str, Any] = {}
    for annotation in (annotation for row in rows for annotation in row["annotations"]):
        if "relation" in annotation:
            relations[annotation["relation"]] = ""
        elif "trigger" in annotation:
            event = events.setdefault(annotation["type"], {"description": "", "roles": []})
            roles = dict.fromkeys([*event["roles"], *(a["role"] for a in annotation["arguments"])])
            event["roles"] = list(roles)
        else:
            entities[annotation["label"]] = ""
    groups = zip(_GROUPS.values(), (entities, relations, events), strict=True)
    return {name: group for name, group in groups if group}
