"""Parses hostile answers until the time is over: `python tests/fuzz.py --seconds 600`.

Answers of valid records are cut, repeated and spliced with pieces that have a meaning to a parser.
Every answer has to be parsed, without side effect, into records whose spans are in the text.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from peft_taskmoe.uie import (
    Argument,
    Entity,
    Event,
    PromptFormat,
    Relation,
    Schema,
    Span,
    completion_text,
    parse_answer,
)
from peft_taskmoe.uie.records import spans_of
from strategies import PIECES

parsing = False
TEXTS = [
    "Ada met Bob in Bergen.",
    "Ada, Ada Lovelace & Bob's “Bergen”: Ada met.",
    "अदा met 👨\u200d👩. " * 4,
]
SCHEMA = Schema.of(
    {
        "Person": "",
        "creative-work": "",
        "Works": {"head": ["Person"], "tail": []},
        "Meet": {"roles": ["Who", "पात्र"]},
    }
)


def valid_answer(rng: random.Random, text: str) -> str:
    """The answer for some records of a text."""

    def span() -> Span:
        start = rng.randrange(len(text))
        end = min(len(text), start + rng.randint(1, 9))
        return Span(text[start:end], start, end)

    makers = [
        lambda: Entity(rng.choice(["Person", "creative-work"]), span()),
        lambda: Relation("Works", span(), span()),
        lambda: Event("Meet", span(), (Argument("Who", span()), Argument("पात्र", span()))),
    ]
    records = [rng.choice(makers)() for _ in range(rng.randrange(4))]
    style = rng.choice(("dataclass", "compact"))
    return completion_text(records, text, SCHEMA, format=PromptFormat(style))


def broken(rng: random.Random, answer: str) -> str:
    """An answer after some edits."""
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(answer) + 1), rng.randrange(12)
        piece = rng.choice((rng.choice(PIECES), answer[at : at + size] * rng.randint(1, 3), ""))
        answer = answer[:at] + piece + answer[at + rng.randrange(size + 1) :]
    return answer


def check(answer: str, text: str) -> int:
    """Parse an answer; the number of records."""
    global parsing
    parsing = True
    try:
        parsed = parse_answer(answer, SCHEMA, text)
    finally:
        parsing = False
    for record in parsed.records:
        assert all(text[span.start : span.end] == span.text for span in spans_of(record))
    return len(parsed.records)


def main() -> int:
    """Fuzz, and print what was tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--answers", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    rng, tried, records, longest = random.Random(args.seed), 0, 0, 0.0
    sys.addaudithook(_forbid)
    end = time.monotonic() + args.seconds
    while time.monotonic() < end and tried < args.answers:
        text = rng.choice(TEXTS)
        valid = valid_answer(rng, text)
        for _ in range(50):
            answer, start = broken(rng, valid), time.process_time()
            try:
                records += check(answer, text)
            except BaseException:
                print(f"FOUND, seed {args.seed}: parse_answer({answer!r}, SCHEMA, {text!r})")
                raise
            longest = max(longest, time.process_time() - start)
            tried += 1
        if tried % 100_000 == 0:
            print(f"{tried} answers", flush=True)
    print(
        f"seed {args.seed}: {tried} answers, {records} records, the longest {longest:.3f} s of CPU"
    )
    return 0


def _forbid(event: str, args: tuple[object, ...]) -> None:
    """What reading an answer must never do."""
    if parsing and event in (
        "exec",
        "open",
        "import",
        "os.system",
        "subprocess.Popen",
        "socket.connect",
    ):
        raise RuntimeError(f"parsing an answer led to `{event}` {args!r:.200}")


if __name__ == "__main__":
    sys.exit(main())
