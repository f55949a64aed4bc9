"""CoNLL columns: one token a line, a blank line behind each sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft_taskmoe.uie.data.file_schema import GivenSchema, schema_of_file
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.data.tags import SCHEMES, TagScheme, annotated, is_tag
from peft_taskmoe.uie.data.tokens import Detokenize
from peft_taskmoe.uie.wording import shown


def read_conll(
    path: str | Path,
    *,
    schema: GivenSchema = None,
    scheme: TagScheme = "IOB2",
    token_column: int = 0,
    tag_column: int = -1,
    separator: str | None = None,
    unit: Literal["sentence", "document"] = "sentence",
    comment: str | None = None,
    detokenize: Detokenize = False,
    on_error: OnError = "raise",
) -> ReadReport:
    """Read named entities from columns, one token a line, a blank line behind each sentence.

    A tag that the scheme does not allow (I- behind O in IOB2, an entity without its end in BIOES)
    is an error; collected, it is read as an entity that starts, or ends, there. An entity does not
    cross a sentence. A line with other columns than its neighbours costs its sentence.

    Tokens joined by blanks make another text than people write ("it 's 5 % ."): a model that is
    trained on it is worse on theirs. `detokenize=True` makes it likelier; tags stay where they are.

    Args:
        path: The file.
        schema: `{label: description}`; `None`: the labels of the file, without descriptions.
        scheme: "IOB1" (B- only between neighbours of one label), "IOB2" (B- at every start) or
            "BIOES" (also BILOU).
        token_column: Column of the token, from 0; negative from the end.
        tag_column: Column of the tag.
        separator: What stands between columns; `None`: tabs in lines that have one, else blanks.
            Other white space belongs to tokens.
        unit: A document is a "sentence", or what stands between -DOCSTART- lines ("document"),
            its sentences on lines of their own.
        comment: Lines that start with it are skipped, e.g. "# id"; `None`: lines before a sentence
            that start with `#` and have no tag.
        detokenize: How tokens are joined; see `join_tokens`.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: At the first error, where asked to.
        ValueError: There is no such scheme or unit.
    """
    if scheme not in SCHEMES or unit not in ("sentence", "document"):
        raise ValueError(
            f"Found scheme={scheme!r}, unit={unit!r}. "
            "Choose IOB1, IOB2 or BIOES; sentence or document."
        )
    path, reading = Path(path), Reading(path, on_error)
    columns = _Columns(reading, scheme, token_column, tag_column, separator, comment)
    documents = _documents(columns.sentences(path), unit)
    rows = [_row(sentences, scheme, detokenize, reading) for sentences in documents]
    described = schema_of_file("NER", schema, rows, reading)
    if described is not None:
        for n, (sentences, row) in enumerate(zip(documents, rows, strict=True)):
            row = {"id": f"{path.stem}-{n}", "schema": described} | row
            reading.add(row, sentences[0][0].line)
    if not documents and not reading.report.errors:
        reading.empty()
    return reading.report


class _Token(NamedTuple):
    line: int
    word: str
    tag: str


def _documents(sentences: Iterable[list[_Token]], unit: str) -> list[list[list[_Token]]]:
    """The sentences of each document; an empty one says that a document begins."""
    documents: list[list[list[_Token]]] = []
    new = True
    for sentence in sentences:
        if sentence and (new or unit == "sentence"):
            documents.append([sentence])
        elif sentence:
            documents[-1].append(sentence)
        new = not sentence
    return documents


@dataclass
class _Columns:
    """Finds the sentences of a file and the two columns that count."""

    reading: Reading
    scheme: TagScheme
    token_column: int
    tag_column: int
    separator: str | None
    comment: str | None

    def sentences(self, path: Path) -> Iterator[list[_Token]]:
        """The sentences that can be read; an empty one where a document begins."""
        sentence: list[_Token] = []
        width, broken, comments = 0, False, []
        for number, line in self.reading.lines(path):
            if line is None:
                broken = True
                continue
            fields = self.fields(line)
            begins = not fields or fields[0] == "-DOCSTART-"
            if begins:
                if sentence and not broken:
                    yield sentence
                if fields:
                    yield []
                sentence, width, broken = [], 0, False
            elif self.is_comment(line, fields, between=not width):
                comments.append(number)
            else:
                token = self.token(number, line, fields, width or len(fields))
                if token is not None:
                    width = len(fields)
                    sentence.append(token)
                broken = broken or token is None
        if sentence and not broken:
            yield sentence
        if comments and self.comment is None:
            message = f"{len(comments)} lines that start with `#` were taken for comments."
            self.reading.note(message, comments[0])

    def fields(self, line: str) -> list[str]:
        if not line.strip():
            return []
        if self.separator is not None:
            return line.split(self.separator)
        if "\t" in line:
            return [part.strip(" ") or part for part in line.rstrip("\t ").split("\t")]
        return [part for part in line.split(" ") if part]

    def is_comment(self, line: str, fields: Sequence[str], between: bool) -> bool:
        if self.comment is not None:
            return line.startswith(self.comment)
        tag = fields[self.tag_column] if self.has(self.tag_column, fields) else ""
        return between and line.startswith("#") and not is_tag(tag, self.scheme)

    def has(self, column: int, fields: Sequence[str]) -> bool:
        return -len(fields) <= column < len(fields) and fields[column] != ""

    def token(self, number: int, line: str, fields: Sequence[str], width: int) -> _Token | None:
        asked = (self.token_column, self.tag_column)
        if len(fields) == width and all(self.has(column, fields) for column in asked):
            return _Token(number, fields[self.token_column], fields[self.tag_column])
        wanted = f"asked for token_column={asked[0]} and tag_column={asked[1]}"
        if len(fields) != width:
            wanted = f"its sentence begins with {width}. Pass a separator if a token has blanks"
        message = f"Found `{shown(line)}`: {len(fields)} columns, {wanted}."
        self.reading.error("columns", message, number)
        return None


def _row(
    sentences: Sequence[Sequence[_Token]],
    scheme: TagScheme,
    detokenize: Detokenize,
    reading: Reading,
) -> dict[str, Any]:
    """Text and annotations of a document."""
    text, annotations = "", []
    for sentence in sentences:
        text += "\n" if text else ""
        words, tags = [token.word for token in sentence], [token.tag for token in sentence]
        joined, found, faults = annotated(words, tags, scheme, detokenize)
        for one in found:
            shifted = {"start": len(text) + one["start"], "end": len(text) + one["end"]}
            annotations.append(one | shifted)
        for i, message in faults:
            reading.error("tags", message, sentence[i].line)
        text += joined
    return {"text": text, "task": "NER", "annotations": annotations}
