"""Universal information extraction: schema and text in, typed records with offsets out.

Everything but the `Extractor` works without torch, and so is imported without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft_taskmoe.uie.data import (
    ReadError,
    ReadReport,
    convert,
    mix,
    read_brat,
    read_conll,
    read_datasets,
    read_doccano,
    read_hub,
    read_iepile,
    read_jsonl,
    read_label_studio,
    read_spacy,
    read_text,
    sample,
    to_dataset,
    to_prompt_completion,
    write_jsonl,
)
from peft_taskmoe.uie.extraction.results import Answer, Extraction, Extractions
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
from peft_taskmoe.uie.scoring import (
    Calibration,
    Comparison,
    Reliability,
    ScoreReport,
    SeenLabels,
    compare,
    compare_values,
    fit_calibration,
    reliability,
    score,
)

if TYPE_CHECKING:
    from peft_taskmoe.uie.extraction.extractor import Extractor
    from peft_taskmoe.uie.extraction.format_file import load_format, save_format

__all__ = [
    "PROBLEM_KINDS",
    "Answer",
    "Argument",
    "Calibration",
    "Comparison",
    "Document",
    "Entity",
    "EntityType",
    "Event",
    "EventType",
    "Example",
    "Extraction",
    "Extractions",
    "Extractor",
    "Label",
    "Names",
    "ParsedAnswer",
    "Problem",
    "PromptFormat",
    "ReadError",
    "ReadReport",
    "Record",
    "Regularisers",
    "Relation",
    "RelationType",
    "Reliability",
    "Schema",
    "SchemaError",
    "ScoreReport",
    "SeenLabels",
    "Slot",
    "Span",
    "build_example",
    "collect_mentions",
    "compare",
    "compare_values",
    "completion_text",
    "convert",
    "fit_calibration",
    "load_format",
    "mix",
    "parse_answer",
    "prompt_schema_text",
    "prompt_text",
    "read_brat",
    "read_conll",
    "read_datasets",
    "read_doccano",
    "read_hub",
    "read_iepile",
    "read_jsonl",
    "read_label_studio",
    "read_spacy",
    "read_text",
    "record_from_dict",
    "reliability",
    "sample",
    "save_format",
    "score",
    "to_dataset",
    "to_prompt_completion",
    "write_jsonl",
]

_NEEDS_TORCH = {
    "Extractor": "extractor",
    "load_format": "format_file",
    "save_format": "format_file",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    module = import_module(f"peft_taskmoe.uie.extraction.{_NEEDS_TORCH[name]}")
    return getattr(module, name)
