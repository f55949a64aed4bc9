"""What a command tells its user: messages on stderr, and the exit code."""

from __future__ import annotations

import os
import sys
from enum import IntEnum
from io import TextIOWrapper
from typing import TextIO


class Exit(IntEnum):
    """The exit code of a command."""

    DONE = 0
    SOME_LINES_BAD = 1
    NOTHING_DONE = 2
    STOPPED = 3
    INTERRUPTED = 130


class StoppedError(Exception):
    """An error after a part of the work was written."""


def say(words: str) -> None:
    """Print a message to stderr."""
    _print(words, sys.stderr)


def show(words: str) -> None:
    """Print a result to stdout."""
    _print(words, sys.stdout)


def _print(words: str, stream: TextIO) -> None:
    """Print; where the reader has closed the pipe, nowhere, and the work goes on."""
    try:
        print(words, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_any_character() -> None:
    """Have the streams print every text: UTF-8 into files and pipes, escapes in a terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
