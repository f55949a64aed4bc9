"""Documents from files and data sets, back to files, and as training examples."""

from peft_taskmoe.uie.data.brat import read_brat
from peft_taskmoe.uie.data.conll import read_conll
from peft_taskmoe.uie.data.conversion import READERS, convert, read_datasets
from peft_taskmoe.uie.data.doccano import read_doccano
from peft_taskmoe.uie.data.hub import RowMapping, TokenTags, read_hub
from peft_taskmoe.uie.data.iepile import read_iepile
from peft_taskmoe.uie.data.jsonl import read_jsonl, write_jsonl
from peft_taskmoe.uie.data.label_studio import read_label_studio
from peft_taskmoe.uie.data.reading import (
    READ_PROBLEM_KINDS,
    OnError,
    ReadError,
    ReadProblem,
    ReadReport,
)
from peft_taskmoe.uie.data.spacy_docs import read_spacy
from peft_taskmoe.uie.data.tags import TagScheme
from peft_taskmoe.uie.data.text_lines import read_text
from peft_taskmoe.uie.data.training import mix, sample, to_dataset, to_prompt_completion

__all__ = [
    "READERS",
    "READ_PROBLEM_KINDS",
    "OnError",
    "ReadError",
    "ReadProblem",
    "ReadReport",
    "RowMapping",
    "TagScheme",
    "TokenTags",
    "convert",
    "mix",
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
    "sample",
    "to_dataset",
    "to_prompt_completion",
    "write_jsonl",
]
