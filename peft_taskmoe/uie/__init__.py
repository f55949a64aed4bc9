"""Universal information extraction: schema and text in, typed records with offsets out."""

from peft_taskmoe.uie.parse import ParsedAnswer, parse_answer
from peft_taskmoe.uie.prompt import (
    Example,
    PromptFormat,
    build_example,
    completion_text,
    prompt_schema_text,
    prompt_text,
)
from peft_taskmoe.uie.records import (
    PROBLEM_KINDS,
    Argument,
    Document,
    Entity,
    Event,
    Problem,
    Record,
    Relation,
    Span,
    record_from_dict,
)
from peft_taskmoe.uie.regularisers import Regularisers, collect_mentions
from peft_taskmoe.uie.schema import (
    EntityType,
    EventType,
    Label,
    Names,
    RelationType,
    Schema,
    SchemaError,
    Slot,
)

__all__ = [
    "PROBLEM_KINDS",
    "Argument",
    "Document",
    "Entity",
    "EntityType",
    "Event",
    "EventType",
    "Example",
    "Label",
    "Names",
    "ParsedAnswer",
    "Problem",
    "PromptFormat",
    "Record",
    "Regularisers",
    "Relation",
    "RelationType",
    "Schema",
    "SchemaError",
    "Slot",
    "Span",
    "build_example",
    "collect_mentions",
    "completion_text",
    "parse_answer",
    "prompt_schema_text",
    "prompt_text",
    "record_from_dict",
]
