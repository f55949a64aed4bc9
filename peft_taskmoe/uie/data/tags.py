"""Mentions from token tags: IOB1, IOB2 and BIOES (BILOU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from peft_taskmoe.uie.data.tokens import Detokenize, join_tokens

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
    mentions: list[Tagged] = []
    faults: list[tuple[int, str]] = []
    label, first = None, 0  # of the mention that is open
    for i, tag in enumerate((*tags, "O")):
        prefix, _, name = tag.partition("-")
        known = is_tag(tag, scheme)
        continues = known and prefix in "IEL" and name == label
        if label is not None and not continues:
            if scheme == "BIOES":
                message = f"The entity `{label}` does not end with E- or S-."
                faults.append((i - 1, f"{message} It is read as ending here."))
            mentions.append(Tagged(label, first, i))
            label = None
        if not known:
            message = f"The tag `{tag}` is none of {scheme}. It is read as O;"
            faults.append((i, f"{message} pass another scheme if the file has one."))
        elif tag != "O":
            if not continues:
                label, first = name, i
                if prefix in "IEL" and scheme != "IOB1":
                    message = f"The tag `{tag}` continues no entity in {scheme}. It is read as"
                    advice = "the start of one; pass the scheme IOB1 if that is what the file has."
                    faults.append((i, f"{message} {advice}"))
            if prefix in "ESLU":
                mentions.append(Tagged(name, first, i + 1))
                label = None
    return mentions, faults


def annotated(
    tokens: Sequence[str], tags: Sequence[str], scheme: TagScheme, detokenize: Detokenize
) -> tuple[str, list[dict[str, Any]], list[tuple[int, str]]]:
    """The text of a sentence, its annotations, and the faults of `mentions_of_tags`."""
    mentions, faults = mentions_of_tags(tags, scheme)
    text, places = join_tokens(tokens, detokenize)
    annotations = []
    for label, first, behind in mentions:
        start, end = places[first][0], places[behind - 1][1]
        annotations.append({"label": label, "text": text[start:end], "start": start, "end": end})
    return text, annotations, faults
