"""Documents from files and data sets, back to files, and as training examples.

Knows the formats: JSONL (the project's own, written and read), CoNLL columns, BRAT standoff, IEPile-style JSON and
data sets of the Hub. Every other format is turned into rows of the JSONL format, so that one check covers all. Does
not know what a prompt looks like (`prompt`) or how an answer is scored (`score`); needs `datasets` only where a
`datasets.Dataset` comes in or goes out.

No line is skipped silently. A reader returns a `ReadReport`: the documents, and a `ReadProblem` with file and line for
whatever was not taken as it stands. An "error" costs a document or an annotation, or had to be repaired;
`on_error="raise"` (the default) stops at the first, `on_error="collect"` goes on. A "note" (an attribute of BRAT, an
unknown key) says what the format of a document cannot hold, and never stops.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_taskmoe.uie.alignment import TextIndex
from peft_taskmoe.uie.prompt import PromptFormat, build_example
from peft_taskmoe.uie.records import Document
from peft_taskmoe.uie.regularisers import MentionPool, Regularisers
from peft_taskmoe.uie.schema import TASKS, Label, Schema

if TYPE_CHECKING:
    from datasets import Dataset

OnError = Literal["raise", "collect"]
TagScheme = Literal["IOB1", "IOB2", "BIOES"]
READ_PROBLEM_KINDS: dict[str, str] = {
    "encoding": "bytes that are no UTF-8, or a character that UTF-8 cannot hold; the document is left out",
    "json": "a line that is no JSON; it is left out",
    "row": "a row with a missing key or a value of the wrong type; the document is left out",
    "task": "a task that does not exist; the document is left out",
    "schema": "a schema that is not valid for its task; the document is left out",
    "offsets": "a mention that does not stand where its offsets say; the document is left out",
    "label": "a label or role that the schema does not have; the document is left out",
    "duplicate_id": "an id that an earlier document has; the document is left out",
    "empty": "a file without a document",
    "columns": "a CoNLL line without the columns asked for; its sentence is left out",
    "tags": "a CoNLL tag that the scheme does not allow here; repaired as the message says",
    "brat": "a BRAT line that cannot be read, or refers to a line that is not there; the annotation is left out",
    "discontinuous": "a BRAT mention of several pieces; it and what refers to it are left out",
    "no_trigger": "an event without a trigger, or with more than one to choose from; the event is left out",
    "not_in_text": "a mention without offsets that the text does not contain; the annotation is left out",
    "mapping": "a row that the mapping function of a data set could not map; the row is left out",
    "unsupported": "note: something that a document cannot hold, such as a BRAT attribute",
}
"""Every kind of `ReadProblem`, and what becomes of what it is about."""

_ADVICE = (
    'A row is {"id", "text", "task": "NER|RE|EE|EAE", "schema", "annotations"[, "entities"]}, and every mention '
    "has text[start:end] == its text."
)


@dataclass(frozen=True, slots=True)
class ReadProblem:
    """Something in a file that was not taken as it stands.

    Args:
        kind: one of `READ_PROBLEM_KINDS`.
        message: what was found, why it cannot be used, what to do.
        file: the file, or the name of the data set.
        line: line number from 1 (row number for data sets); None where it is about the whole file.
        severity: "error", or "note" where nothing that a document can hold was lost.
    """

    kind: str
    message: str
    file: str
    line: int | None = None
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.kind}: {self.message}"


class ReadError(ValueError):
    """The first error of a file read with `on_error="raise"`; `problem` has its parts."""

    def __init__(self, problem: ReadProblem) -> None:
        super().__init__(
            f'{problem}\nPass on_error="collect" to read the rest and get a list of all problems.'
        )
        self.problem = problem


@dataclass
class ReadReport:
    """What a reader found: the documents, in the order of the file, and the problems."""

    documents: list[Document] = field(default_factory=list)
    problems: list[ReadProblem] = field(default_factory=list)

    @property
    def errors(self) -> list[ReadProblem]:
        """The problems that cost something."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def counts(self) -> dict[str, int]:
        """How often each kind of problem occurs."""
        return dict(Counter(problem.kind for problem in self.problems))

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.counts().items())
        return f"{len(self.documents)} documents, {len(self.problems)} problems" + (
            f": {kinds}" if kinds else ""
        )


class _Reading:
    """Collects the documents and problems of one reader; raises at the first error where asked to."""

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("raise", "collect"):
            raise ValueError(f'There is no on_error="{on_error}". Choose "raise" or "collect".')
        self.on_error = on_error
        self.report = ReadReport()
        self.places: dict[str, str] = {}

    def error(self, kind: str, message: str, file: str | Path, line: int | None = None) -> None:
        problem = ReadProblem(kind, message, str(file), line)
        if self.on_error == "raise":
            raise ReadError(problem)
        self.report.problems.append(problem)

    def note(self, message: str, file: str | Path, line: int | None = None) -> None:
        self.report.problems.append(ReadProblem("unsupported", message, str(file), line, "note"))

    def add(self, row: Any, file: str | Path, line: int | None) -> None:
        """Check a row of the JSONL format and take its document, or report all its faults."""
        faults = list(_faults(row))
        document = None
        if not faults:
            try:
                document = Document.from_dict(row)
            except ValueError as error:
                faults = [("schema", str(error))]
        if document is not None and document.id in self.places:
            message = f"The id `{document.id}` is that of {self.places[document.id]}. Give every document its own."
            faults = [("duplicate_id", message)]
        for kind, message in faults:
            self.error(kind, message, file, line)
        if document is not None and not faults:
            self.places[document.id] = f"line {line}" if line is not None else str(file)
            self.report.documents.append(document)
            if strange := _unknown_keys(row):
                self.note(
                    f"The annotations have keys that are not kept: {', '.join(strange)}.",
                    file,
                    line,
                )

    def finish(self, file: str | Path, found: int) -> None:
        """Report a file without anything in it."""
        if not found:
            self.error("empty", "The file has no document. Check that it is the right one.", file)


# The check of a row ---------------------------------------------------------------------------------------------------

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_REQUIRED: dict[str, tuple[type, str]] = {
    "id": (str, "a string"),
    "text": (str, "a string"),
    "task": (str, "a string"),
    "schema": (Mapping, "an object"),
    "annotations": (list, "a list"),
}


def _faults(row: Any) -> Iterator[tuple[str, str]]:
    """Every fault of a row of the JSONL format, as (kind, message)."""
    if not isinstance(row, Mapping):
        yield "row", f"Found {_shown(row)}, which is no JSON object. {_ADVICE}"
        return
    found = list(_shape_faults(row))
    if half := _HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False)):
        message = f"There is half a character (a lone surrogate) in {_shown(half[0])}, which UTF-8 cannot hold."
        found.append(("encoding", message))
    yield from found
    if found:
        return
    text, task = row["text"], row["task"]
    try:
        schema = Schema.from_dict(task, row["schema"])
    except ValueError as error:
        yield "schema" if task in TASKS else "task", str(error)
        return
    if task == "EAE" and not row["annotations"]:
        yield (
            "row",
            "An EAE document needs the event whose arguments are asked for, with its type and trigger.",
        )
    for i, annotation in enumerate(row["annotations"]):
        yield from _annotation_faults(annotation, f"annotations[{i}]", task, text, schema)
    for i, entity in enumerate(row.get("entities", [])):
        yield from _annotation_faults(entity, f"entities[{i}]", "NER", text, None)


def _shape_faults(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, (type_, name) in _REQUIRED.items():
        if key not in row:
            yield (
                "row",
                f"The key `{key}` is missing (keys: {', '.join(map(str, row)) or 'none'}). {_ADVICE}",
            )
        elif not isinstance(row[key], type_) or (key == "id" and not row[key]):
            yield (
                "row",
                f"The value of `{key}` is {_shown(row[key])}; it has to be {name}. {_ADVICE}",
            )
    if not isinstance(row.get("entities", []), list):
        yield (
            "row",
            f"The value of `entities` is {_shown(row['entities'])}; it has to be a list. {_ADVICE}",
        )


def _annotation_faults(
    annotation: Any, where: str, task: str, text: str, schema: Schema | None
) -> Iterator[tuple[str, str]]:
    """Faults of one annotation; without a schema any label will do."""
    if not isinstance(annotation, Mapping):
        yield "row", f"`{where}` is {_shown(annotation)}, not an object. {_ADVICE}"
        return
    if task == "UIE":
        task = "RE" if "relation" in annotation else "EE" if "trigger" in annotation else "NER"
    kind, key = {"NER": ("entity", "label"), "RE": ("relation", "relation")}.get(
        task, ("event", "type")
    )
    name = annotation.get(key)
    label = None
    if not isinstance(name, str) or not name:
        yield (
            "row",
            f"`{where}` has no `{key}` (keys: {', '.join(map(str, annotation)) or 'none'}). {_ADVICE}",
        )
    elif schema is not None and (label := schema.get(kind, name)) is None:
        known = ", ".join(f"`{label.name}`" for label in schema.labels if label.kind == kind)
        yield (
            "label",
            f"`{where}` has the {key} `{name}`, which the schema does not have. Its own: {known}.",
        )
    if kind == "entity":
        yield from _span_faults(annotation, where, text)
    elif kind == "relation":
        for side in ("head", "tail"):
            yield from _span_faults(annotation.get(side), f"{where}.{side}", text)
    else:
        yield from _span_faults(annotation.get("trigger"), f"{where}.trigger", text)
        arguments = annotation.get("arguments", [])
        if not isinstance(arguments, list):
            yield "row", f"`{where}.arguments` is {_shown(arguments)}, not a list. {_ADVICE}"
            return
        for i, argument in enumerate(arguments):
            yield from _argument_faults(argument, f"{where}.arguments[{i}]", text, label)


def _argument_faults(
    argument: Any, where: str, text: str, label: Label | None
) -> Iterator[tuple[str, str]]:
    yield from _span_faults(argument, where, text)
    if isinstance(argument, Mapping):
        role = argument.get("role")
        roles = [] if label is None else [slot.name for slot in label.roles]
        if not isinstance(role, str) or not role:
            yield (
                "row",
                f"`{where}` has no `role` (keys: {', '.join(map(str, argument)) or 'none'}). {_ADVICE}",
            )
        elif label is not None and role not in roles:
            known = ", ".join(f"`{name}`" for name in roles) or "none"
            yield (
                "label",
                f"`{where}` has the role `{role}`, which `{label.name}` does not have. Its own: {known}.",
            )


def _span_faults(span: Any, where: str, text: str) -> Iterator[tuple[str, str]]:
    if not isinstance(span, Mapping):
        yield "row", f"`{where}` is {_shown(span)}, not an object with text, start and end."
        return
    mention, start, end = (span.get(key) for key in ("text", "start", "end"))
    if not isinstance(mention, str) or type(start) is not int or type(end) is not int:
        yield (
            "row",
            f"`{where}` needs a text and two integers, start and end; found {_shown(dict(span))}.",
        )
    elif not 0 <= start < end <= len(text):
        yield (
            "offsets",
            f"`{where}` is at [{start}:{end}], outside of the text of {len(text)} characters or empty.",
        )
    elif text[start:end] != mention:
        stands = text.find(mention) if mention else -1
        hint = (
            f"The mention stands at {stands}: offsets count characters, not bytes."
            if stands >= 0
            else "Correct one."
        )
        yield (
            "offsets",
            f"`{where}` says {_shown(mention)}, but text[{start}:{end}] is {_shown(text[start:end])}. {hint}",
        )
    if not isinstance(span.get("type", ""), str) or span.get("alignment", "exact") not in (
        "exact",
        "normalised",
    ):
        yield (
            "row",
            f"`{where}` needs a string as type, and as alignment, if any, exact or normalised.",
        )


def _unknown_keys(row: Mapping[str, Any]) -> list[str]:
    """Keys of the annotations that a record does not hold."""
    span = {"text", "start", "end", "alignment"}
    strange: dict[str, None] = {}

    def check(data: Mapping[str, Any], known: set[str]) -> None:
        strange.update(dict.fromkeys(f"`{key}`" for key in data if key not in known))

    for annotation in row["annotations"]:
        if "relation" in annotation and row["task"] in ("RE", "UIE"):
            check(annotation, {"relation", "head", "tail", "confidence"})
            for side in ("head", "tail"):
                check(annotation[side], span | {"type"})
        elif "trigger" in annotation and row["task"] != "NER":
            check(annotation, {"type", "trigger", "arguments", "confidence"})
            check(annotation["trigger"], span)
            for argument in annotation.get("arguments", []):
                check(argument, span | {"role"})
        else:
            check(annotation, span | {"label", "confidence"})
    return list(strange)


def _shown(value: Any, length: int = 60) -> str:
    shown = repr(value)
    return f"`{shown if len(shown) <= length else shown[: length - 3] + '...'}`"


def _lines(path: Path, reading: _Reading) -> Iterator[tuple[int, str | None]]:
    r"""Numbered lines of a UTF-8 file without their ends (`\n` or `\r\n`); None for one that cannot be decoded."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                yield number, raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                reading.error("encoding", _no_utf8(error), path, number)
                yield number, None


def _no_utf8(error: UnicodeDecodeError) -> str:
    return f"Byte {error.start} (0x{error.object[error.start]:02x}) is no UTF-8. Save the file as UTF-8."


def _json(text: str) -> Any:
    """Parse JSON; raises ValueError with a reason, also for a key given twice and for too deep nesting."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key `{repeated}` is given twice in one object")
        return keys

    def refuse(constant: str) -> Any:
        raise ValueError(f"`{constant}` is no value of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# JSONL ----------------------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path, *, on_error: OnError = "raise") -> ReadReport:
    """Read documents from the project's format, one JSON object a line.

    Each line is `{"id", "text", "task", "schema", "annotations"[, "entities"]}`; other keys are kept in
    `Document.extra`. Offsets count characters and have to fit: `text[start:end]` is the mention.

    Args:
        path: the file, UTF-8 with or without a byte order mark.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: at the first error, where asked to.
    """
    path, reading = Path(path), _Reading(on_error)
    found = 0
    blank: list[int] = []
    for number, line in _lines(path, reading):
        if line is not None and not line.strip():
            blank.append(number)
            continue
        found += 1
        for earlier in blank:  # blank lines at the end of a file are no surprise
            reading.note("The line is blank.", path, earlier)
        blank.clear()
        if line is None:
            continue
        try:
            row = _json(line)
        except ValueError as error:
            reading.error(
                "json",
                f"The line is no JSON: {error}. Write one object a line. {_ADVICE}",
                path,
                number,
            )
        else:
            reading.add(row, path, number)
    reading.finish(path, found)
    return reading.report


def write_jsonl(documents: Iterable[Document], path: str | Path) -> int:
    """Write documents in the format that `read_jsonl` reads; a file that is there is replaced when all is written.

    Args:
        documents: the documents.
        path: the file to write.

    Returns:
        How many were written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    written = 0
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                file.write(json.dumps(document.to_dict(), ensure_ascii=False) + "\n")
                written += 1
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


# CoNLL columns --------------------------------------------------------------------------------------------------------


def read_conll(
    path: str | Path,
    *,
    schema: Mapping[str, str] | None = None,
    scheme: TagScheme = "IOB2",
    token_column: int = 0,
    tag_column: int = -1,
    separator: str | None = None,
    unit: Literal["sentence", "document"] = "sentence",
    comment: str | None = None,
    on_error: OnError = "raise",
) -> ReadReport:
    """Read named entities from columns, one token a line, a blank line behind each sentence.

    The text is the tokens joined by spaces, sentences of a document by line breaks. A tag that the scheme does not
    allow (I- behind O in IOB2, an entity without its end in BIOES) is an error; collected, it is read as an entity
    that starts, or ends, there. An entity does not cross a sentence.

    Args:
        path: the file, UTF-8.
        schema: `{label: description}`; None: the labels of the file, without descriptions.
        scheme: "IOB1" (B- only between neighbours of one label), "IOB2" (B- at every start) or "BIOES" (also BILOU).
        token_column: column of the token, from 0; negative from the end.
        tag_column: column of the tag.
        separator: what stands between columns; None: any white space.
        unit: a document is a "sentence", or what stands between -DOCSTART- lines ("document").
        comment: lines that start with it are skipped, e.g. "# id"; None: there are none.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: at the first error, where asked to.
        ValueError: if there is no such scheme or unit.
    """
    if scheme not in _TAG_PREFIXES or unit not in ("sentence", "document"):
        raise ValueError(
            f"Found scheme={scheme!r}, unit={unit!r}. Choose IOB1, IOB2 or BIOES; sentence or document."
        )
    path, reading = Path(path), _Reading(on_error)
    units: list[tuple[int, list[_Sentence]]] = []
    sentence, broken, new_unit, first = _Sentence(), False, True, 1

    def end_sentence() -> None:
        nonlocal sentence, broken, new_unit
        if sentence.tokens and not broken:
            if new_unit or unit == "sentence":
                units.append((first, []))
            units[-1][1].append(sentence)
            new_unit = False
        sentence, broken = _Sentence(), False

    for number, line in _lines(path, reading):
        if line is None:
            broken = True
            continue
        if comment is not None and line.startswith(comment):
            continue
        fields = line.split(separator)
        if not line.strip() or fields[0] == "-DOCSTART-":
            end_sentence()
            new_unit = new_unit or bool(line.strip())
            continue
        if not sentence.tokens:
            first = number
        columns = range(-len(fields), len(fields))
        if (
            token_column not in columns
            or tag_column not in columns
            or not fields[token_column].strip()
        ):
            broken = True
            wanted = f"token_column={token_column} and tag_column={tag_column}"
            reading.error(
                "columns",
                f"Found {_shown(line)}: {len(fields)} columns, asked for {wanted}.",
                path,
                number,
            )
            continue
        sentence.tokens.append(fields[token_column])
        sentence.tags.append(fields[tag_column])
        sentence.lines.append(number)
    end_sentence()

    rows = []
    for first, sentences in units:
        text, annotations = "", []
        for sentence in sentences:
            text += "\n" if text else ""
            mentions, faults = _tagged_mentions(sentence.tokens, sentence.tags, scheme, len(text))
            annotations += mentions
            for i, message in faults:
                reading.error("tags", message, path, sentence.lines[i])
            text += " ".join(sentence.tokens)
        rows.append((first, text, annotations))
    labels = dict.fromkeys(
        annotation["label"] for _, _, annotations in rows for annotation in annotations
    )
    described = dict(schema) if schema is not None else dict.fromkeys(labels, "")
    if rows and not described:
        reading.error(
            "schema", "The file has no tagged token. Pass schema={label: description}.", path
        )
        rows = []
    for n, (line_number, text, annotations) in enumerate(rows):
        row = {
            "id": f"{path.stem}-{n}",
            "text": text,
            "task": "NER",
            "schema": described,
            "annotations": annotations,
        }
        reading.add(row, path, line_number)
    if not reading.report.problems:
        reading.finish(path, len(rows))
    return reading.report


@dataclass(slots=True)
class _Sentence:
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


_TAG_PREFIXES: dict[TagScheme, str] = {"IOB1": "BI", "IOB2": "BI", "BIOES": "BIESLU"}


def _tagged_mentions(
    tokens: Sequence[str], tags: Sequence[str], scheme: TagScheme, offset: int
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """The NER annotations of one tagged sentence.

    Args:
        tokens: its tokens, to be joined by spaces.
        tags: the tag of each.
        scheme: what the tags mean.
        offset: where the sentence starts in its text.

    Returns:
        The annotations, and (index of a token, message) for each tag that the scheme does not allow.
    """
    faults: list[tuple[int, str]] = []
    starts = [offset]
    for token in tokens:
        starts.append(starts[-1] + len(token) + 1)
    mentions: list[dict[str, Any]] = []
    open_label: str | None = None
    first = 0

    def close(behind: int, ended: bool = True) -> None:
        nonlocal open_label
        if open_label is None:
            return
        if scheme == "BIOES" and not ended:
            message = (
                f"The entity `{open_label}` does not end with E- or S-. It is read as ending here."
            )
            faults.append((behind - 1, message))
        start, end = starts[first], starts[behind] - 1
        words = " ".join(tokens[first:behind])
        mentions.append({"label": open_label, "text": words, "start": start, "end": end})
        open_label = None

    for i, tag in enumerate(tags):
        prefix, dash, label = tag.partition("-")
        if tag == "O":
            close(i, ended=False)
        elif not dash or not label or prefix not in _TAG_PREFIXES[scheme]:
            close(i, ended=False)
            message = f"The tag `{tag}` is none of {scheme}. It is read as O; pass another scheme if the file has one."
            faults.append((i, message))
        else:
            continues = prefix in "IEL" and label == open_label
            if not continues:
                close(i, ended=False)
                if prefix in "IEL" and scheme != "IOB1":
                    message = f"The tag `{tag}` continues no entity in {scheme}. It is read as the start of one;"
                    faults.append(
                        (i, f'{message} pass scheme="IOB1" if that is what the file has.')
                    )
                open_label, first = label, i
            if prefix in "ESLU":
                close(i + 1)
    close(len(tokens), ended=False)
    return mentions, faults


# BRAT standoff --------------------------------------------------------------------------------------------------------

_BRAT_MENTION = re.compile(r"(T\S+)\t(\S+) (\d+ \d+(?:;\d+ \d+)*)(?:\t(.*))?")
_BRAT_RELATION = re.compile(r"(R\S+)\t(\S+) \S+?:(\S+) \S+?:(\S+)\s*")
_BRAT_EVENT = re.compile(r"(E\S+)\t(\S+?):(\S+)((?: \S+?:\S+)*)\s*")
_BRAT_OTHER = {
    "A": "attribute",
    "M": "attribute",
    "N": "normalisation",
    "#": "note",
    "*": "equivalence",
}


def read_brat(
    path: str | Path,
    task: Literal["NER", "RE", "EE"],
    *,
    schema: Mapping[str, Any] | None = None,
    on_error: OnError = "raise",
) -> ReadReport:
    """Read BRAT standoff: pairs of `name.txt` and `name.ann`, one document each.

    Read are T lines (mentions), R lines (relations, first argument to second) and E lines (events). NER takes the
    mentions that are no event's trigger, RE the relations with those mentions as `entities`, EE the events. A number
    behind a role (`Theme2`) is left out where the event also has the role without it; an event as argument
    stands for its trigger. What the task does not ask for, and attributes, normalisations, notes and equivalences,
    become notes.

    Args:
        path: a folder, searched with its subfolders, or one of the two files.
        task: what to read.
        schema: as in the JSONL format; None: the labels and roles of all files, without descriptions.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: at the first error, where asked to.
        ValueError: if BRAT has no such task.
    """
    if task not in ("NER", "RE", "EE"):
        raise ValueError(f'Found task="{task}". BRAT files hold NER, RE and EE.')
    path, reading = Path(path), _Reading(on_error)
    stems = [path.with_suffix("")]
    if path.is_dir():
        stems = sorted(
            {file.with_suffix("") for suffix in ("*.ann", "*.txt") for file in path.rglob(suffix)}
        )
    rows: list[tuple[Path, dict[str, Any]]] = []
    for stem in stems:
        text_file, annotation_file = (
            stem.with_name(stem.name + ".txt"),
            stem.with_name(stem.name + ".ann"),
        )
        if lacking := [file for file in (text_file, annotation_file) if not file.is_file()]:
            reading.error(
                "brat",
                "The file is missing. BRAT needs a .txt and an .ann for every document.",
                lacking[0],
            )
            continue
        try:
            text = text_file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            reading.error("encoding", _no_utf8(error), text_file)
            continue
        name = stem.relative_to(path).as_posix() if path.is_dir() else stem.name
        rows.append(
            (
                annotation_file,
                {"id": name, "text": text, "task": task}
                | _brat(annotation_file, text, task, reading),
            )
        )
    described = dict(schema) if schema is not None else _schema_of([row for _, row in rows], task)
    if rows and not described:
        reading.error(
            "schema",
            f"The files have no label for {task}. Pass schema={{label: description}}.",
            path,
        )
        rows = []
    for file, row in rows:
        reading.add(row | {"schema": described}, file, None)
    if not reading.report.problems:
        reading.finish(path, len(rows))
    return reading.report


def _brat(path: Path, text: str, task: str, reading: _Reading) -> dict[str, Any]:
    """The annotations (and, for RE, entities) of one .ann file."""
    mentions: dict[str, dict[str, Any]] = {}
    relations: list[tuple[int, re.Match[str]]] = []
    events: dict[str, tuple[int, re.Match[str]]] = {}
    for number, line in _lines(path, reading):
        if line is None or not line.strip():
            continue
        if line[0] in _BRAT_OTHER:
            reading.note(
                f"The {_BRAT_OTHER[line[0]]} {_shown(line)} has no place in a document.",
                path,
                number,
            )
        elif line[0] == "T" and (match := _BRAT_MENTION.fullmatch(line)):
            if (mention := _brat_mention(match, text, path, number, reading)) is not None:
                mentions[match[1]] = mention
        elif line[0] == "R" and (match := _BRAT_RELATION.fullmatch(line)):
            relations.append((number, match))
        elif line[0] == "E" and (match := _BRAT_EVENT.fullmatch(line)):
            events[match[1]] = number, match
        else:
            reading.error(
                "brat",
                f"Cannot read {_shown(line)}. Expected a T, R or E line of BRAT.",
                path,
                number,
            )

    triggers = {match[3] for _, match in events.values()}
    entities = [mention for name, mention in mentions.items() if name not in triggers]

    def span_of(name: str, number: int) -> dict[str, Any] | None:
        if name in events:
            reading.note(
                f"The argument `{name}` is an event; its trigger stands for it.", path, number
            )
            name = events[name][1][3]
        if name not in mentions:
            reading.error(
                "brat",
                f"There is no usable mention `{name}`. The annotation is left out.",
                path,
                number,
            )
            return None
        return {key: mentions[name][key] for key in ("text", "start", "end")}

    if task != "RE":
        for number, _ in relations:
            reading.note(f"The relation is not read for {task}.", path, number)
    if task != "EE":
        for number, _ in events.values():
            reading.note(f"The event is not read for {task}.", path, number)
    if task == "NER":
        return {"annotations": entities}
    annotations: list[dict[str, Any]] = []
    if task == "RE":
        for number, match in relations:
            head, tail = span_of(match[3], number), span_of(match[4], number)
            if head is not None and tail is not None:
                types = [
                    {"type": mentions[name]["label"]} if name in mentions else {}
                    for name in (match[3], match[4])
                ]
                annotations.append(
                    {"relation": match[2], "head": types[0] | head, "tail": types[1] | tail}
                )
        return {"annotations": annotations, "entities": entities}
    for number, match in events.values():
        pairs = [pair.split(":", 1) for pair in match[4].split()]
        bare = {role for role, _ in pairs}
        arguments = []
        for role, name in pairs:
            role = unnumbered if (unnumbered := role.rstrip("0123456789")) in bare else role
            if (span := span_of(name, number)) is not None:
                arguments.append({"role": role} | span)
        if (trigger := span_of(match[3], number)) is not None:
            annotations.append({"type": match[2], "trigger": trigger, "arguments": arguments})
    return {"annotations": annotations}


def _brat_mention(
    match: re.Match[str], text: str, path: Path, number: int, reading: _Reading
) -> dict[str, Any] | None:
    if ";" in match[3]:
        message = f"The mention `{match[1]}` has several pieces ({match[3]}), but a span has one. It is left out."
        reading.error("discontinuous", message, path, number)
        return None
    start, end = map(int, match[3].split())
    words = text[start:end]
    # BRAT writes line breaks inside a mention as spaces.
    if not words or (
        match[4] is not None and re.sub(r"\s", " ", words) != re.sub(r"\s", " ", match[4])
    ):
        message = f"The mention `{match[1]}` says {_shown(match[4])}, but text[{start}:{end}] is {_shown(words)}."
        reading.error(
            "offsets",
            f"{message} Offsets count characters of the .txt. The mention is left out.",
            path,
            number,
        )
        return None
    return {"label": match[2], "text": words, "start": start, "end": end}


def _schema_of(rows: Iterable[Mapping[str, Any]], task: str) -> dict[str, Any]:
    """The labels (and roles) that occur in rows, in the JSONL format, without descriptions."""
    annotations = [annotation for row in rows for annotation in row["annotations"]]
    if task in ("NER", "RE"):
        return dict.fromkeys(
            (annotation["label" if task == "NER" else "relation"] for annotation in annotations), ""
        )
    roles: dict[str, dict[str, None]] = {}
    for event in annotations:
        roles.setdefault(event["type"], {}).update(
            dict.fromkeys(a["role"] for a in event["arguments"])
        )
    return {type_: {"description": "", "roles": list(of_type)} for type_, of_type in roles.items()}


# IEPile-style JSON ----------------------------------------------------------------------------------------------------

_IEPILE_TASKS = {"NER": "NER", "RE": "RE", "EE": "EE", "EET": "EE", "EEA": "EAE"}
_IEPILE_NOTHING = ("", "NAN", None)


def read_iepile(path: str | Path, *, on_error: OnError = "raise") -> ReadReport:
    """Read instruction data in the format of IEPile, one JSON object a line.

    A line is `{"task", "source", "instruction", "output"}`. `instruction` holds `{"instruction", "schema", "input"}`, and
    it and `output` are JSON written into a string (objects are read as well). `source` and other keys (such as `split`)
    go to `extra`.

    =====  =======================================  ==============================================================
    task   schema                                   output
    =====  =======================================  ==============================================================
    NER    labels                                   `{label: [mention]}`
    RE     relations                                `{relation: [{"subject": mention, "object": mention}]}`
    EE     `{"event_type", "trigger", "arguments"}`  `{type: [{"trigger": mention, "arguments": {role: mention or list}}]}`
    EET    types                                    `{type: [trigger]}`
    EEA    as EE, `"trigger"` a list of mentions    `{type: [{role: mention or list}]}`
    =====  =======================================  ==============================================================

    The format has no offsets: a mention given n times takes its first n occurrences in the text (whole words first), the
    last one again if there are fewer; as an argument it takes the first. White space around a mention is no part of it.
    Arguments "NAN" and "" are none. An event without a trigger cannot be held, and of an EEA line only those types that
    have one trigger can: the format does not say which arguments belong to which. One text stands in several lines where
    its schema was split; each line is a document.

    Source: the description of the data in the README of the repository zjunlp/IEPile.

    Args:
        path: the file, UTF-8.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: at the first error, where asked to.
    """
    path, reading = Path(path), _Reading(on_error)
    found = 0
    for number, line in _lines(path, reading):
        found += line is None or bool(line.strip())
        if line is None or not line.strip():
            continue
        try:
            source = _json(line)
        except ValueError as error:
            reading.error("json", f"The line is no JSON: {error}.", path, number)
            continue
        try:
            row, lost, taken = _iepile_row(source, f"{path.stem}-{number}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"The line is not in the format that `read_iepile` describes: {type(error).__name__}: {error}."
            reading.error("row", message, path, number)
            continue
        for kind, message in lost:
            reading.error(kind, message, path, number)
        if row["task"] == "EAE" and not row["annotations"] and lost:
            continue  # its errors have said why there is nothing to ask
        reading.add(row, path, number)
        if taken:
            reading.note(
                f"Keys that mean something else in a document are not kept: {taken}.", path, number
            )
    reading.finish(path, found)
    return reading.report


def _iepile_row(
    source: Mapping[str, Any], default_id: str
) -> tuple[dict[str, Any], list[tuple[str, str]], str]:
    """The JSONL row of an IEPile object, what was left out (kind and message), and keys that were not kept."""
    if missing := [key for key in ("task", "instruction", "output") if key not in source]:
        raise ValueError(f"it has no `{missing[0]}` (keys: {', '.join(source)})")
    instruction, output = (
        _json(source[key]) if isinstance(source[key], str) else source[key]
        for key in ("instruction", "output")
    )
    if source["task"] not in _IEPILE_TASKS:
        raise ValueError(
            f"there is no reading of task `{source['task']}`, only of {', '.join(_IEPILE_TASKS)}"
        )
    task, text = _IEPILE_TASKS[source["task"]], instruction["input"]
    index = TextIndex(text)
    taken: Counter[str] = Counter()
    lost: list[tuple[str, str]] = []

    def span(mention: str, *, take: bool) -> dict[str, Any] | None:
        mention = mention.strip()
        places = index.occurrences(mention).places
        if not places:
            message = f"The text has no {_shown(mention)}. What it belongs to is left out."
            lost.append(("not_in_text", message))
            return None
        start, end = places[min(taken[mention], len(places) - 1) if take else 0]
        taken[mention] += take
        return {"text": text[start:end], "start": start, "end": end}

    def arguments(roles: Mapping[str, Any]) -> list[dict[str, Any]]:
        given = [
            (role, mention)
            for role, mentions in roles.items()
            for mention in (mentions if isinstance(mentions, list) else [mentions])
            if mention not in _IEPILE_NOTHING
        ]
        placed = [(role, span(mention, take=False)) for role, mention in given]
        return [{"role": role} | place for role, place in placed if place is not None]

    annotations: list[dict[str, Any]] = []

    def event(type_: str, trigger: Any, roles: Mapping[str, Any]) -> None:
        if trigger in _IEPILE_NOTHING:
            lost.append(("no_trigger", f"An event `{type_}` has no trigger. It is left out."))
        elif (place := span(trigger, take=True)) is not None:
            annotations.append({"type": type_, "trigger": place, "arguments": arguments(roles)})

    names = instruction["schema"]
    if not isinstance(names, list):
        raise ValueError(f"its schema is {_shown(names)}, which is no list")
    schema: dict[str, Any] = dict.fromkeys(names, "") if task in ("NER", "RE") else {}
    triggers: dict[str, list[str]] = {}
    for entry in names if task in ("EE", "EAE") else ():
        entry = entry if isinstance(entry, Mapping) else {"event_type": entry}
        schema[entry["event_type"]] = {"description": "", "roles": list(entry.get("arguments", ()))}
        if isinstance(entry.get("trigger"), list):
            triggers[entry["event_type"]] = entry["trigger"]
    for label, values in output.items():
        taken.clear()
        if task == "EAE":
            of_type = triggers.get(label, [])
            if len(of_type) == 1 and len(values) <= 1:
                event(label, of_type[0], values[0] if values else {})
            elif of_type or values:
                message = (
                    f"There are {len(of_type)} triggers and {len(values)} sets of arguments of `{label}`, and the format "
                    "does not say which belong together. They are left out."
                )
                lost.append(("no_trigger", message))
            continue
        for value in values:
            if task == "NER":
                if (entity := span(value, take=True)) is not None:
                    annotations.append({"label": label} | entity)
            elif task == "RE":
                head, tail = span(value["subject"], take=False), span(value["object"], take=False)
                if head is not None and tail is not None:
                    annotations.append({"relation": label, "head": head, "tail": tail})
            elif isinstance(value, Mapping):
                event(label, value.get("trigger"), value.get("arguments", {}))
            else:
                event(label, value, {})
    row = {"id": str(source.get("id", default_id)), "text": text, "task": task, "schema": schema}
    row["annotations"] = annotations
    others = {k: v for k, v in source.items() if k not in ("task", "instruction", "output", "id")}
    clashing = ", ".join(f"`{key}`" for key in others if key in (*row, "entities"))
    return {k: v for k, v in others.items() if k != "entities"} | row, lost, clashing


# Data sets of the Hub -------------------------------------------------------------------------------------------------

RowMapping = Callable[[Mapping[str, Any]], "Mapping[str, Any] | None"]
"""From a row of some data set to a row of the JSONL format, with or without `id`; None leaves the row out."""


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

    The mapping runs in `num_proc` processes, its result is cached by `datasets`, which also shows the progress. With
    `streaming`, rows are mapped as they arrive, and only those that `limit` asks for are fetched.

    Args:
        name: the data set, as in `load_dataset`.
        mapping: from a row to a row of the JSONL format, e.g. a `TokenTags`; without `id`, the row's number is taken.
            None: the rows are in that format.
        split: the split, e.g. "test".
        limit: read at most so many rows, the first ones.
        streaming: do not download the data set first.
        num_proc: number of processes for the mapping; not with `streaming`.
        on_error: "raise" at the first error, or "collect" them all.
        load_options: of `load_dataset`: `name` of the configuration as `subset`, `revision`, `data_files`, ...

    Raises:
        ReadError: at the first error, where asked to.
        ValueError: if `num_proc` is given together with `streaming`.
    """
    from datasets import load_dataset
    from tqdm.auto import tqdm

    if streaming and num_proc is not None:
        raise ValueError(
            "A stream is read in one process. Leave num_proc out, or pass streaming=False."
        )
    reading = _Reading(on_error)
    if "subset" in load_options:
        load_options["name"] = load_options.pop("subset")
    rows = load_dataset(name, split=split, streaming=streaming, **load_options)
    mapped: Iterable[Mapping[str, Any]]
    if streaming:
        rows = rows if limit is None else rows.take(limit)
        mapped = (_mapped(row, mapping) for row in tqdm(rows, desc=f"Reading {name}", total=limit))
    else:
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        mapped = rows.map(
            _mapped,
            fn_kwargs={"mapping": mapping},
            remove_columns=rows.column_names,
            num_proc=num_proc,
            desc=f"Mapping {name}",
        )
    place, found = f"{name}[{split}]", 0
    for number, outcome in enumerate(mapped, 1):
        found += 1
        if outcome["error"]:
            reading.error("mapping", outcome["error"], place, number)
        elif outcome["row"] == "null":
            reading.note("The mapping leaves the row out.", place, number)
        else:
            row = json.loads(outcome["row"])
            reading.add({"id": str(number)} | row if isinstance(row, dict) else row, place, number)
    reading.finish(place, found)
    return reading.report


def _mapped(row: Mapping[str, Any], mapping: RowMapping | None) -> dict[str, str]:
    """A row as JSON, which Arrow holds whatever keys its schema has; or what went wrong."""
    try:
        outcome = _without_nulls(row) if mapping is None else mapping(row)
        return {"row": json.dumps(outcome), "error": ""}
    except (
        Exception
    ) as error:  # whatever a user's function raises is reported with the row's number
        return {"row": "", "error": f"The mapping raised {type(error).__name__}: {error}."}


def _without_nulls(value: Any) -> Any:
    """The value without keys that are None: Arrow gives every row of a column the keys of all."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class TokenTags:
    """Maps rows of tokens and tags, as most NER data sets of the Hub have them, to the JSONL format.

    Args:
        schema: `{label: description}`.
        names: the tag of each number, where tags are numbers: `dataset.features["ner_tags"].feature.names`.
        tokens: column of the tokens.
        tags: column of the tags.
        id_: column of the id; None: rows are numbered.
        scheme: as in `read_conll`; a tag that it does not allow is an error.
    """

    schema: Mapping[str, str]
    names: Sequence[str] | None = None
    tokens: str = "tokens"
    tags: str = "ner_tags"
    id_: str | None = None
    scheme: TagScheme = "IOB2"

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row of the JSONL format.

        Raises:
            ValueError: if tags are numbers without names, are not as many as the tokens, or break the scheme.
        """
        tokens, tags = row[self.tokens], row[self.tags]
        if len(tokens) != len(tags):
            raise ValueError(f"there are {len(tokens)} tokens, but {len(tags)} tags")
        if self.names is None and any(not isinstance(tag, str) for tag in tags):
            raise ValueError(
                'tags are numbers: pass names=dataset.features["ner_tags"].feature.names'
            )
        if self.names is not None:
            tags = [self.names[tag] for tag in tags]
        mentions, faults = _tagged_mentions(tokens, tags, self.scheme, 0)
        if faults:
            raise ValueError(f"tag {faults[0][0]}: {faults[0][1]}")
        out = {
            "text": " ".join(tokens),
            "task": "NER",
            "schema": dict(self.schema),
            "annotations": mentions,
        }
        return out if self.id_ is None else {"id": str(row[self.id_])} | out


# Conversion -----------------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[..., ReadReport]] = {
    "jsonl": read_jsonl,
    "conll": read_conll,
    "brat": read_brat,
    "iepile": read_iepile,
}
"""The formats that `convert` reads, by name."""


def convert(
    source: str | Path, target: str | Path, source_format: str, **options: Any
) -> ReadReport:
    """Read a file or folder in any of the formats and write its documents as JSONL.

    Args:
        source: what to read.
        target: the JSONL file to write.
        source_format: a key of `READERS`.
        options: of that reader, e.g. `on_error="collect"`, `scheme="BIOES"`, `task="RE"`.

    Returns:
        The report of the reader; all its documents have been written.

    Raises:
        ReadError: at the first error, unless they are collected; nothing is written then.
        ValueError: if there is no such format.
    """
    if source_format not in READERS:
        raise ValueError(
            f"There is no format `{source_format}`. Choose one of {', '.join(READERS)}."
        )
    report = READERS[source_format](source, **options)
    write_jsonl(report.documents, target)
    return report


def read_datasets(
    sources: Iterable[str | Path], *, split: str, limit: int | None = None, seed: int = 0
) -> dict[str, list[Document]]:
    """Read several data sets, each from a JSONL file or of the Hub, as a command line names them.

    `conll04/train.jsonl` is of the data set `conll04`, as are all files whose names say only which split they hold
    (train, test, dev, validation); any other file is a data set of its own name. What does not end in `.jsonl` is the id
    of a Hub data set whose rows are in the JSONL format.

    Args:
        sources: the files and ids.
        split: the split to read of Hub data sets.
        limit: draw at most so many documents of each data set.
        seed: of that draw.

    Returns:
        For each data set, its documents.

    Raises:
        ReadError: at the first error in a data set.
    """
    found: dict[str, list[Document]] = {}
    for source in sources:
        path = Path(source)
        if path.suffix == ".jsonl":
            name = (
                path.parent.name
                if path.stem in ("train", "test", "dev", "validation")
                else path.stem
            )
            report = read_jsonl(path)
        else:
            name, report = str(source), read_hub(str(source), split=split)
        found.setdefault(name, []).extend(report.documents)
    return {
        name: docs if limit is None else sample(docs, limit, seed) for name, docs in found.items()
    }


# Training examples ----------------------------------------------------------------------------------------------------


def sample(documents: Sequence[Document], n: int, seed: int = 0) -> list[Document]:
    """At most `n` documents, drawn without replacement, in their own order.

    Those drawn for a smaller `n` with the same seed are among those drawn for a larger one.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return [documents[i] for i in sorted(order[:n])]


def mix(
    documents: Mapping[str, Sequence[Document]],
    *,
    max_per_dataset: int | None = None,
    seed: int = 0,
) -> list[tuple[str, Document]]:
    """The documents of several data sets in one order in which every stretch has of each its share.

    Each data set is shuffled by itself, cut to `max_per_dataset`, and spread evenly: document k of n takes place
    (k + u) / n, with one u in [0, 1) for each data set. The order follows from the seed; which documents a data set
    gives, and their order, does not depend on the other data sets.

    Args:
        documents: for each data set, its documents.
        max_per_dataset: draw at most so many of each.
        seed: the seed.

    Returns:
        Pairs of data set and document.
    """
    placed: list[tuple[float, str, int]] = []
    shuffled: dict[str, list[Document]] = {}
    for name, of_dataset in documents.items():
        rng = random.Random(
            f"{seed}/{name}"
        )  # seeded by SHA-512 of the string, whatever PYTHONHASHSEED
        shuffled[name] = rng.sample(list(of_dataset), len(of_dataset))[:max_per_dataset]
        shift = rng.random()
        placed += [((k + shift) / len(shuffled[name]), name, k) for k in range(len(shuffled[name]))]
    return [(name, shuffled[name][k]) for _, name, k in sorted(placed)]


def to_dataset(documents: Iterable[tuple[str, Document]]) -> Dataset:
    """Documents as a `datasets.Dataset`: columns id, dataset, task, text and the document as JSON.

    Args:
        documents: pairs of data set and document, as `mix` gives them.
    """
    from datasets import Dataset

    columns: dict[str, list[str]] = {
        "id": [],
        "dataset": [],
        "task": [],
        "text": [],
        "document": [],
    }
    for name, document in documents:
        values = (document.id, name, document.task, document.text, json.dumps(document.to_dict()))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return Dataset.from_dict(columns)


def to_prompt_completion(
    documents: Iterable[tuple[str, Document]],
    *,
    task_text: Literal["prompt", "schema"] = "prompt",
    format: PromptFormat | None = None,
    regularisers: Regularisers | None = None,
    seed: int = 0,
    mentions: MentionPool | None = None,
    negative_pool: Schema | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Training examples in the prompt-completion format of TRL.

    Args:
        documents: pairs of data set and document, as `mix` gives them.
        task_text: what the task encoder reads: the whole "prompt" (the paper's task-aware) or the part before the
            input text, the "schema" (schema-aware).
        format: how prompts are written.
        regularisers: what varies from example to example; another `seed` gives other examples, e.g. for each epoch.
        seed: of the regularisers.
        mentions: example mentions for the regularisers.
        negative_pool: labels for the regularisers.
        num_proc: number of processes.

    Returns:
        A dataset with the string columns id, dataset, prompt, completion and task_text, one row a document.

    Raises:
        ValueError: if there is no such `task_text`, or a record has a label that its schema does not have.
    """
    if task_text not in ("prompt", "schema"):
        raise ValueError(
            f'Found task_text="{task_text}". The task encoder reads the "prompt" or the "schema".'
        )
    options = {
        "format": format,
        "regularisers": regularisers,
        "seed": seed,
        "mentions": mentions,
        "negative_pool": negative_pool,
    }
    return to_dataset(documents).map(
        _training_row,
        fn_kwargs={"task_text": task_text, "options": options},
        remove_columns=["task", "text", "document"],
        num_proc=num_proc,
        desc="Writing prompts",
    )


def _training_row(
    row: Mapping[str, str], task_text: str, options: Mapping[str, Any]
) -> dict[str, str]:
    example = build_example(Document.from_dict(json.loads(row["document"])), **options)
    texts = {"prompt": example.prompt, "schema": example.schema_text}
    return {
        "prompt": example.prompt,
        "completion": example.completion,
        "task_text": texts[task_text],
    }
