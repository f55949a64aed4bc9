"""The one rule for identifiers that stand for names: how they are made, found and compared."""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Collection, Sequence

# What an identifier may have and `\w` does not: combining marks, middle dots, connectors. Of the
# planes behind the second, those of ideographs have only `\w`, and one block has marks.
_BEYOND_WORDS = "".join(
    character
    for character in map(chr, (*range(0x80, 0x20000), *range(0xE0000, 0xE1000)))
    if not character.isalnum() and f"_{character}".isidentifier()
)
_STARTS = "".join(filter(str.isidentifier, _BEYOND_WORDS))

IDENTIFIER = rf"(?:[^\W\d]|[{_STARTS}])[\w{_BEYOND_WORDS}]*"
"""Regular expression that finds whole identifiers in an answer (and words that are none)."""


def canonical(identifier: str) -> str:
    """The form in which identifiers are compared: NFKC, as Python's own parser has it."""
    return unicodedata.normalize("NFKC", identifier)


def identifier_of(name: str) -> str:
    """The identifier for one name: the name, with `_` for every character that cannot be in one."""
    word = "".join(c if f"_{c}".isidentifier() else "_" for c in canonical(name))
    word = canonical(word)
    if not word.strip("_"):
        return "label"
    return word if word.isidentifier() else f"_{word}"


def identifiers_of(names: Sequence[str], reserved: Collection[str]) -> list[str]:
    """An identifier for each name, no two the same: numbers stand behind those that would be.

    Args:
        names: Any strings; the earlier has the first choice.
        reserved: Identifiers that mean something else; `_` is put behind them, as behind keywords.
    """
    taken = set(reserved)
    numbers: dict[str, int] = {}
    identifiers = []
    for name in names:
        stem = identifier_of(name)
        # Masked labels are called LABEL_1, LABEL_2, ...
        if keyword.iskeyword(stem) or stem in reserved or stem.startswith("LABEL_"):
            stem += "_"
        identifier, number = stem, numbers.get(stem, 2)
        while identifier in taken:
            identifier, number = f"{stem}_{number}", number + 1
        numbers[stem] = number
        taken.add(identifier)
        identifiers.append(identifier)
    return identifiers
