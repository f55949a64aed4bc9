"""BRAT standoff: pairs of `name.txt` and `name.ann`."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.file_schema import GivenSchema
from peft_taskmoe.uie.data.graph import Graph, GraphEvent, GraphTask, Link, add_graphs
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.wording import shown

_MENTION = re.compile(r"(T\S+)\t(\S+) (\d+ \d+(?:;\d+ \d+)*)(?:\t(.*))?")
_RELATION = re.compile(r"(R\S+)\t(\S+) (\S+?):(\S+) (\S+?):(\S+)\s*")
_EVENT = re.compile(r"(E\S+)\t(\S+?):(\S+)((?: \S+?:\S+)*)\s*")
_OTHER = {
    **{"A": "attribute", "M": "attribute", "N": "normalisation"},
    **{"#": "note", "*": "equivalence"},
}


def read_brat(
    path: str | Path,
    task: GraphTask = "UIE",
    *,
    schema: GivenSchema = None,
    on_error: OnError = "raise",
) -> ReadReport:
    r"""Read BRAT standoff: pairs of `name.txt` and `name.ann`, one document each.

    Read are T lines (mentions), R lines (relations, from `Arg1` to `Arg2`, whichever is
    written first; of other names from the first to the second) and E lines (events).
    NER takes the mentions that are no event's trigger, RE the relations with those mentions as
    `entities`, EE the events, UIE all of them. A number behind a role (`Theme2`) is left out where
    the event also has the role without it; an event as argument stands for its trigger. What the
    task does not ask for, and attributes, normalisations, notes and equivalences, become notes.
    Where the offsets count a Windows line end as one character, as BRAT does, the text gets `\n`.

    Args:
        path: A folder, searched with its subfolders, or one of the two files.
        task: What to read: "NER", "RE", "EE" or "UIE".
        schema: As in the JSONL format; `None`: the labels and roles of all files.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: At the first error, where asked to.
        ValueError: BRAT has no such task.
    """
    if task not in ("NER", "RE", "EE", "UIE"):
        raise ValueError(f'Found task="{task}". BRAT files hold NER, RE and EE, or UIE for all.')
    path, reading = Path(path), Reading(path, on_error)
    stems = [path.with_suffix("")]
    if path.is_dir():
        files = (file for suffix in ("*.ann", "*.txt") for file in path.rglob(suffix))
        stems = sorted({file.with_suffix("") for file in files})
    graphs = []
    for stem in stems:
        name = stem.relative_to(path).as_posix() if path.is_dir() else stem.name
        if (graph := _graph(name, stem, reading)) is not None:
            graphs.append(graph)
    add_graphs(graphs, task, schema, reading)
    if not reading.report.problems and not graphs:
        reading.empty()
    return reading.report


def _graph(name: str, stem: Path, reading: Reading) -> Graph | None:
    text_file = stem.with_name(stem.name + ".txt")
    file = stem.with_name(stem.name + ".ann")
    for needed in (text_file, file):
        if not needed.is_file():
            message = "The file is missing. BRAT needs a .txt and an .ann for every document."
            reading.error("brat", message, file=needed)
            return None
    raw = text_file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    text = reading.decoded(raw, file=text_file)
    if text is None:
        return None
    lines = [(n, x) for n, x in reading.lines(file) if x is not None and x.strip()]
    graph = Graph(name, _as_counted(text, [line for _, line in lines]), reading, file=file)
    for number, line in lines:
        _take(line, number, graph)
    return graph


def _as_counted(text: str, lines: list[str]) -> str:
    r"""The text, with `\n` for `\r\n` where more mentions fit it so."""
    if "\r\n" not in text:
        return text
    mentions = [match for line in lines if (match := _MENTION.fullmatch(line))]

    def fitting(text: str) -> int:
        return sum(_words(match, text) is not None for match in mentions if ";" not in match[3])

    unix = text.replace("\r\n", "\n")
    return unix if fitting(unix) > fitting(text) else text


def _take(line: str, number: int, graph: Graph) -> None:
    """Take one line of an .ann file."""
    if line[0] in _OTHER:
        message = f"The {_OTHER[line[0]]} `{shown(line)}` has no place in a document."
        graph.reading.note(message, number, graph.file)
    elif line[0] == "T" and (match := _MENTION.fullmatch(line)):
        mention = _mention(match, number, graph)
        if mention is not None and _is_new(match[1], graph.mentions, number, graph):
            graph.mentions[match[1]] = mention
    elif line[0] == "R" and (match := _RELATION.fullmatch(line)):
        ends = [(match[3], match[4]), (match[5], match[6])]
        if ends[0][0] == "Arg2" and ends[1][0] == "Arg1":
            ends.reverse()
        graph.links.append(Link(match[2], ends[0][1], ends[1][1], number))
    elif line[0] == "E" and (match := _EVENT.fullmatch(line)):
        pairs = [pair.split(":", 1) for pair in match[4].split()]
        bare = {role for role, _ in pairs}
        arguments = []
        for role, argument in pairs:
            unnumbered = role.rstrip("0123456789")
            arguments.append((unnumbered if unnumbered in bare else role, argument))
        if _is_new(match[1], graph.events, number, graph):
            graph.events[match[1]] = GraphEvent(match[2], match[3], arguments, number)
    else:
        message = f"Cannot read `{shown(line)}`. Expected a T, R or E line of BRAT."
        graph.reading.error("brat", message, number, graph.file)


def _is_new(name: str, known: Container[Any], number: int, graph: Graph) -> bool:
    """Whether no earlier line has the id; an error if one has."""
    if name in known:
        message = f"An earlier line has the id `{name}`. Give every line its own; it is left out."
        graph.reading.error("brat", message, number, graph.file)
    return name not in known


def _mention(match: re.Match[str], number: int, graph: Graph) -> dict[str, Any] | None:
    found = f"The mention `{match[1]}`"
    if ";" in match[3]:
        message = f"{found} has several pieces ({match[3]}), but a span has one. It is left out."
        graph.reading.error("discontinuous", message, number, graph.file)
        return None
    start, end = map(int, match[3].split())
    words = _words(match, graph.text)
    if words is None:
        stands = shown(graph.text[start:end])
        message = f"{found} says `{shown(match[4])}`, but text[{start}:{end}] is `{stands}`."
        advice = "Offsets count characters of the .txt. The mention is left out."
        graph.reading.error("offsets", f"{message} {advice}", number, graph.file)
        return None
    return {"label": match[2], "text": words, "start": start, "end": end}


def _words(match: re.Match[str], text: str) -> str | None:
    """What stands at a mention's offsets, or `None` if that is not what the mention says."""
    start, end = map(int, match[3].split())
    words = text[start:end]
    # BRAT writes line breaks inside a mention as spaces.
    said = words if match[4] is None else match[4]
    return words if words and re.sub(r"\s", " ", words) == re.sub(r"\s", " ", said) else None
