"""Mentions from token tags: IOB1, IOB2 and BIOES (BILOU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

TagScheme = Literal["IOB1", "IOB2", "BIOES"]

_PREFIXES: dict[str, str] = {"IOB1": "BI", "IOB2": "BI", "BIOES": "BIESLU"}
SCHEMES = tuple(_PREFIXES)


class Tagged(NamedTuple):
    """A label, its first token, and the token behind its last."""

    label: str
    first: int
    behind: int


def is_tag(tag: str, scheme: TagScheme) -> bool:
    """Whether the scheme has such a tag."""
    prefix, _, label = tag.partition("-")
    return tag == "O" or (bool(label) and len(prefix) == 1 and prefix in _PREFIXES[scheme])


def mentions_of_tags(
    tags: Sequence[str], scheme: TagScheme
) -> tuple[list[Tagged], list[tuple[int, str]]]:
    """The mentions of one sentence.

    Args:
        tags: The tag of each token.
        scheme: What the tags mean.

    Returns:
        The mentions, and (index of a token, message) for each tag that the scheme does not allow.
    """
    sentence = _Sentence(scheme)
    for i, tag in enumerate(tags):
        sentence.take(i, tag)
    sentence.close(len(tags), ended=False)
    return sentence.mentions, sentence.faults


class _Sentence:
    """The mentions of the tags so far."""

    def __init__(self, scheme: TagScheme) -> None:
        self.scheme = scheme
        self.mentions: list[Tagged] = []
        self.faults: list[tuple[int, str]] = []
        self.label: str | None = None  # of the mention that is open, and where it began
        self.first = 0

    def close(self, behind: int, ended: bool = True) -> None:
        if self.label is None:
            return
        if self.scheme == "BIOES" and not ended:
            message = f"The entity `{self.label}` does not end with E- or S-. "
            self.faults.append((behind - 1, f"{message}It is read as ending here."))
        self.mentions.append(Tagged(self.label, self.first, behind))
        self.label = None

    def take(self, i: int, tag: str) -> None:
        prefix, _, label = tag.partition("-")
        if tag == "O" or not is_tag(tag, self.scheme):
            self.close(i, ended=False)
            if tag != "O":
                message = f"The tag `{tag}` is none of {self.scheme}. It is read as O; "
                self.faults.append((i, f"{message}pass another scheme if the file has one."))
            return
        if prefix not in "IEL" or label != self.label:
            self.close(i, ended=False)
            if prefix in "IEL" and self.scheme != "IOB1":
                message = f"The tag `{tag}` continues no entity in {self.scheme}. It is read as "
                advice = 'the start of one; pass scheme="IOB1" if that is what the file has.'
                self.faults.append((i, message + advice))
            self.label, self.first = label, i
        if prefix in "ESLU":
            self.close(i + 1)
