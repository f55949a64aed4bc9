"""Universal information extraction: schema and text in, typed records with offsets out.

Everything but the `Extractor` works without torch, and so is imported without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .data.brat import read_brat
from .data.conll import read_conll
from .data.conversion import convert, read_datasets
from .data.doccano import read_doccano
from .data.hub import TokenTags, read_hub
from .data.iepile import read_iepile
from .data.jsonl import read_jsonl, write_jsonl
from .data.label_studio import read_label_studio
from .data.reading import ReadError, ReadReport
from .data.spacy_docs import read_spacy
from .data.text_lines import read_text
from .data.training import mix, sample, to_dataset, to_prompt_completion
from .extraction.results import Answer, Extraction, Extractions
from .parse import ParsedAnswer, parse_answer
from .prompt import (
    Example,
    PromptFormat,
    build_example,
    completion_text,
    prompt_schema_text,
    prompt_text,
)
from .records import (
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
from .regularisers import Regularisers, collect_mentions
from .schema import EntityType, EventType, Label, Names, RelationType, Schema, SchemaError, Slot
from .scoring.calibration import Calibration, fit_calibration
from .scoring.comparison import Comparison, compare, compare_values
from .scoring.reliability import Reliability, reliability
from .scoring.report import ScoreReport
from .scoring.scorer import score
from .scoring.seen_labels import SeenLabels

if TYPE_CHECKING:
    from .extraction.extractor import Extractor
    from .extraction.format_file import load_format, save_format

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
    "TokenTags",
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
