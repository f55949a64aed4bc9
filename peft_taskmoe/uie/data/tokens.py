"""Text from tokens, and where each token stands in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from peft_taskmoe.uie.alignment import stands_alone

Detokenize = bool | Callable[[Sequence[str]], str]
"""Whether tokens are joined as people write, or a function that joins those of a sentence."""

_TO_THE_LEFT = re.compile(
    r"[.,;:!?%)\]}»’”…、。，；：！？）」』】]+|n['’]t|['’](?:s|m|d|re|ve|ll)", re.IGNORECASE
)
_TO_THE_RIGHT = re.compile(r"[(\[{«‘“$£€¥¿¡（「『【]+")
_QUOTES = ('"', "``", "''")
_MARKS = {"``": '"', "''": '"', "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]"}


def join_tokens(
    tokens: Sequence[str], detokenize: Detokenize = False
) -> tuple[str, list[tuple[int, int]]]:
    """Join the tokens of a sentence.

    Args:
        tokens: The tokens.
        detokenize: `False` puts a blank between any two. `True` leaves it out where English and
            scripts without spaces have none (`it 's 5 %.`), and writes Penn Treebank's brackets and
            quotes as characters. A function has to keep the tokens and their order.

    Returns:
        The text, and start and end of each token.

    Raises:
        ValueError: The function's text does not have the tokens.
    """
    if callable(detokenize):
        return _found(tokens, detokenize(tokens))
    text, places, open_quote, glued, before = "", [], False, True, ""
    for token in tokens:
        quote = detokenize and token in _QUOTES
        closes = quote and (token == "''" or (token == '"' and open_quote))
        word = _MARKS.get(token, token) if detokenize else token
        together = glued or closes or (detokenize and not quote and _together(before, word))
        text += word if together else f" {word}"
        places.append((len(text) - len(word), len(text)))
        glued, before = quote and not closes, word
        open_quote = open_quote != (token == '"')
    return text, places


def _together(before: str, after: str) -> bool:
    """Whether there is no blank between two tokens."""
    if _TO_THE_LEFT.fullmatch(after) or _TO_THE_RIGHT.fullmatch(before):
        return True
    # Letters of a script without spaces stand alone even where they touch.
    letters = before[-1:].isalpha() and after[:1].isalpha()
    return letters and stands_alone(before + after, 0, len(before))


def _found(tokens: Sequence[str], text: str) -> tuple[str, list[tuple[int, int]]]:
    places, at = [], 0
    for token in tokens:
        start = text.find(token, at)
        if start < 0:
            raise ValueError(f"The detokenized text has no `{token}` behind character {at}.")
        at = start + len(token)
        places.append((start, at))
    return text, places
