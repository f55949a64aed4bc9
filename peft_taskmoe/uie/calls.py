"""Finds the calls in an answer: lists of records, whole, broken or cut off.

Nothing that a model wrote is evaluated: a call is made of names, strings, numbers and lists. Time
is linear in the length of the answer.
"""

from __future__ import annotations

import ast
import re
from typing import Literal, NamedTuple, Protocol

from peft_taskmoe.uie.identifiers import IDENTIFIER
from peft_taskmoe.uie.records import ProblemKind

MAX_DEPTH = 8
"""Brackets within brackets that a record may have; a well-formed one has two."""

MAX_TOKENS = 10_000
"""Strings, names, numbers and signs that one record may have."""

MAX_NUMBER = 100
"""Characters of a number; Python cannot print the longest that it can read."""


class CallReader(Protocol):
    """What is told of the calls of an answer."""

    def knows(self, name: str) -> bool:
        """Whether the schema has such a class."""

    def read(self, call: str, source: str, where: tuple[int, int]) -> None:
        """Read a well-formed call."""

    def problem(self, kind: ProblemKind, message: str, source: str) -> None:
        """Take note of what is no record."""


_STRING = (
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"[^"\\]*(?:\\.[^"\\]*)*"'
    r"|'[^'\\]*(?:\\.[^'\\]*)*'"
)
_INSIDE = re.compile(
    rf"(?P<space>(?:\s+|\#[^\n]*)+)|(?P<string>{_STRING})|(?P<name>{IDENTIFIER})|(?P<number>-?\d[\w.]*)"
    r"|(?P<open>[\[(])|(?P<close>[\])])|(?P<sign>[=,])|(?P<quote>[\"'])|(?P<other>.)",
    re.DOTALL,
)
_OUTSIDE = re.compile(
    rf"(?P<space>\s+)|(?P<fence>```\w*)|(?P<echo>result\s*=(?!=))|(?P<name>{IDENTIFIER})|(?P<word>\d\w*)"
    r"|(?P<open>\[)|(?P<close>\])|(?P<comma>,)|(?P<other>.)",
    re.DOTALL,
)
_GAP = re.compile(r"\s*\(")
# What Python reads as an escape without complaint; any other backslash stands for itself.
_LITERAL_PART = re.compile(
    r"""\\(?:\r?\n|[\\'"abfnrtv]|[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}"'\\\n]{1,80}\})"""
    "|[\\\\\0\n\r\ud800-\udfff]"
)
_CONSTANTS = ("None", "True", "False")


class _Call(NamedTuple):
    """What became of a call: where its scan ended, and, if well formed, its source for `ast`."""

    status: Literal["whole", "broken", "cut"]
    end: int
    source: str = ""


class Scanner:
    """Finds the calls of an answer from left to right; tells a reader of each and of the rest."""

    def __init__(self, answer: str, text: str, reader: CallReader) -> None:
        self.answer, self.text, self.reader = answer, text, reader
        # A broken record is looked through again for whole records inside; this much in all, so
        # that time stays linear.
        self.budget = 8 * len(answer) + 10_000
        self.rest: int | None = None  # where words that belong to no record began
        self.rest_kind: ProblemKind = "extra_text"

    def run(self) -> None:
        """Go through the answer once."""
        answer, at, depth = self.answer, 0, 0
        list_start, calls_before, calls, closed = 0, 0, 0, False
        while at < len(answer):
            match = _OUTSIDE.match(answer, at)
            assert match is not None  # the pattern has an alternative for any character
            kind, start, at = match.lastgroup, at, match.end()
            if kind == "name":
                after = self._call(match.group(), start, at)
                if after is not None:
                    calls, at = calls + 1, after
                    continue
            if self._recovering or kind in ("space", "fence", "echo", "comma"):
                continue
            if kind == "open":
                if depth == 0:
                    list_start, calls_before = start, calls
                depth += 1
            elif kind == "close" and depth:
                depth -= 1
                if depth == 0:
                    empty = not answer[list_start + 1 : start].strip()
                    closed = closed or empty or calls > calls_before
            elif self.rest is None:
                self.rest, self.rest_kind = start, "extra_text"
                if closed and kind != "close":
                    break  # a run-on: another text and its records, not ours
        # A record that is malformed or cut off says enough about the end.
        in_record = self.rest is not None and self.rest_kind != "extra_text"
        self._flush(len(answer))
        if not in_record and not closed:
            message = (
                "The answer has no list." if not calls and not depth else "The list is not closed."
            )
            self.reader.problem(
                "truncated", message, answer[list_start:] if depth and not calls else ""
            )

    def _call(self, name: str, start: int, behind: int) -> int | None:
        """Read the call that may begin here; returns where to go on, or `None` if there is none."""
        gap = _GAP.match(self.answer, behind)
        known = self.reader.knows(name)
        if gap is None:
            return None
        # Prose has words before brackets, and strings have anything: only the schema's classes
        # count there.
        if not known and (self._recovering or gap.end() > behind + 1 or self.budget <= 0):
            return None
        call = self._scan(gap.end())
        if call.status == "whole":
            self._flush(start)
            self.reader.read(
                f"{name}({call.source}", self.answer[start : call.end], (start, call.end)
            )
            return call.end
        if call.status == "cut":
            self._flush(start)
            self.rest, self.rest_kind = start, "truncated"
            return len(self.answer)
        self.budget -= call.end - start
        if not known:
            return None
        self._flush(start)
        self.rest, self.rest_kind = start, "malformed"
        return gap.end() if self.budget > 0 else call.end

    @property
    def _recovering(self) -> bool:
        """Whether we are behind the beginning of a broken record, and in it for all we know."""
        return self.rest is not None and self.rest_kind == "malformed"

    def _flush(self, end: int) -> None:
        """Report the words that belong to no record, up to here."""
        if self.rest is None:
            return
        source = self.answer[self.rest : end].rstrip()
        self.reader.problem(self.rest_kind, MESSAGES[self.rest_kind], source)
        self.rest = None

    def _scan(self, at: int) -> _Call:
        """Check the call whose bracket has just been opened.

        The grammar: `call = [item {"," item} [","]] ")"`, `item = [name "="] value`, `value =
        strings | number | constant | "[" [value {"," value} [","]] "]"`, and round brackets for
        square ones.
        """
        answer, brackets = self.answer, ["("]
        source: list[str] = []
        expected = "item"  # or "value", "equals", "operand" (a value or the end of a list), "comma"
        for _ in range(MAX_TOKENS):
            match = _INSIDE.match(answer, at)
            if match is None:
                return _Call("cut", at)
            kind, token = match.lastgroup, match.group()
            if kind == "space":
                at = match.end()
                if source and source[-1] != " ":
                    source.append(" ")
                continue
            if kind == "quote" and expected in ("item", "value", "operand", "comma*"):
                return _Call("cut" if self._could_go_on(at) else "broken", len(answer))
            if kind == "string" and expected in ("item", "value", "operand", "comma*"):
                token, following = (
                    _literal(token),
                    "comma*",
                )  # another string may follow: they are one
            elif expected in ("item", "value", "operand") and (
                (kind == "number" and len(token) <= MAX_NUMBER) or token in _CONSTANTS
            ):
                following = "comma"
            elif kind == "name" and expected == "item" and len(brackets) == 1:
                following = "equals"
            elif token == "=" and expected == "equals":
                following = "value"
            elif token == "," and expected.startswith("comma"):
                following = "item" if len(brackets) == 1 else "operand"
            elif (
                kind == "open"
                and expected in ("item", "value", "operand")
                and len(brackets) < MAX_DEPTH
            ):
                brackets.append(token)
                following = "operand"
            elif (
                kind == "close"
                and (expected in ("item", "operand") or expected.startswith("comma"))
                and _PAIRS[brackets[-1]] == token
            ):
                brackets.pop()
                following = "comma"
            else:
                return _Call("broken", match.end())
            source.append(token)
            at, expected = match.end(), following
            if not brackets:
                return _Call("whole", at, "".join(source))
        return _Call("broken", at)

    def _could_go_on(self, quote: int) -> bool:
        """Whether a string that the end of the answer cuts off may be words of the text so far."""
        begun = self.answer[quote + 1 :]
        escape = begun.rfind("\\", max(len(begun) - 10, 0))  # it may be cut off as well
        for words in (begun, begun[:escape]) if escape >= 0 else (begun,):
            value = _value(_literal(f'"{words}"'))
            if value is not None and value in self.text:
                return True
        return False


_PAIRS = {"(": ")", "[": "]"}
MESSAGES: dict[ProblemKind, str] = {
    "malformed": "This is no well-formed record; it is left out.",
    "truncated": "The answer ends inside this record; it is left out.",
    "extra_text": "These words belong to no record.",
}


def _literal(token: str) -> str:
    """A string token as a literal that `ast.parse` takes on one line and without warnings."""
    return _LITERAL_PART.sub(_literal_part, token)


def _literal_part(match: re.Match[str]) -> str:
    part = match.group()
    if len(part) > 1:
        return part
    return "\\\\" if part == "\\" else f"\\u{ord(part):04x}"


def _value(literal: str) -> str | None:
    node = expression(literal)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def expression(source: str, tries: int = 5) -> ast.expr | None:
    """The syntax tree of a Python expression; nothing is evaluated. None where there is none.

    Python 3.11 counts the depth of all running parses together, and raises `SystemError` when
    another one ran in between, in a thread or during garbage collection (gh-106905).
    """
    try:
        return ast.parse(source, mode="eval").body
    except SystemError:
        if tries == 1:
            raise
        return expression(source, tries - 1)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
