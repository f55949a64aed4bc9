"""Documents a second of six ways to answer the same prompts with one adapter.

    python benchmarks/extraction.py --adapter outputs/demo --schemas 1 --rounds 3
    python benchmarks/extraction.py --adapter outputs/demo --schemas 16 --rounds 3

Text i is asked with schema i modulo `--schemas`, so every way has one prompt a text. The order of
the ways turns from round to round, and a ratio is that of one round; the medians are printed. One
by one is measured on some texts only. `--cpu-time` counts the processor's seconds, which other
programs on the machine do not lengthen.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

from answering import load, parser
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from peft_taskmoe import TaskEncoder, attach_task_encoder
from peft_taskmoe.uie import Document, Extractor, Schema, read_datasets
from peft_taskmoe.uie.extraction.generation import Written
from peft_taskmoe.uie.extraction.questions import Question
from peft_taskmoe.uie.extraction.reading import read_answer
from peft_taskmoe.uie.tables import markdown_table

ALONE = "`generate`, one by one"
DEMO = [f"examples/data/demo/test_{name}.jsonl" for name in ("seen", "unseen")]


class Ways:
    """The ways; each returns how many tokens of answers it has written.

    Args:
        extractor: The adapter, with its base model and tokenizer.
        batch_size: Prompts of a batch.
        max_new_tokens: The longest answer.
    """

    def __init__(self, extractor: Extractor, batch_size: int, max_new_tokens: int) -> None:
        self.extractor, self.format = extractor, extractor.format
        self.model, self.tokenizer = extractor.model, extractor.tokenizer
        self.sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        self.ends = sorted(extractor.generator.ends.tokens)
        config = self.model.peft_config[self.model.active_adapter]
        self.encoder = config.task_encoder
        self.ways: dict[str, Callable[[Sequence[Question]], int]] = {
            ALONE: lambda asked: self.generate(asked, 1),
            "`generate`, batches": lambda asked: self.generate(asked, batch_size),
            "continuous batching": self.continuous,
            "Extractor": self.extract,
            "Extractor, constrained": lambda asked: self.extract(asked, constrained=True),
            'Extractor, `text="schema"`, prefix caching': lambda asked: self.extract(
                asked, prefix_caching=True
            ),
        }

    def attach(self, way: str) -> None:
        """Attach a new encoder, which remembers no prompt."""
        if self.encoder is not None:
            text = "schema" if "schema" in way else "prompt"
            encoder = TaskEncoder(self.encoder.name_or_path, text=text)
            attach_task_encoder(self.model, encoder, self.tokenizer)

    def extract(self, asked: Sequence[Question], **options: bool) -> int:
        """The Extractor."""
        extractor = Extractor(
            self.model, self.tokenizer, format=self.format, **self.sizes, **options
        )
        found = list(extractor.answer([[one] for one in asked], progress=False))
        return sum(answer.tokens for one in found for answer in one.answers)

    def generate(self, asked: Sequence[Question], size: int) -> int:
        """`generate` on batches in the order of the texts, padded on the left."""
        jobs = [self.extractor.text_jobs([question]).jobs[0] for question in asked]
        tokens = 0
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            padded = self.tokenizer.pad(
                {"input_ids": [job.ids for job in batch]}, padding_side="left", return_tensors="pt"
            ).to(self.model.device)
            sequences = self.model.generate(**padded, generation_config=self.greedy())
            new = sequences[:, padded.input_ids.shape[1] :].tolist()
            tokens += self.read(batch, new)
        return tokens

    def continuous(self, asked: Sequence[Question]) -> int:
        """The continuous batching of transformers."""
        jobs = [self.extractor.text_jobs([question]).jobs[0] for question in asked]
        config = ContinuousBatchingConfig(num_blocks=128)
        ids = [job.ids for job in jobs]
        found = self.model.generate_batch(ids, self.greedy(), config)
        return self.read(jobs, [output.generated_tokens for output in found.values()])

    def greedy(self) -> GenerationConfig:
        """Greedy decoding up to the end token."""
        longest = self.sizes["max_new_tokens"]
        ends = {"eos_token_id": self.ends, "pad_token_id": self.ends[0]}
        return GenerationConfig(do_sample=False, max_new_tokens=longest, **ends)

    def read(self, jobs: Sequence, new: Sequence[list[int]]) -> int:
        """Read records from tokens, as the Extractor does."""
        ends, longest = self.extractor.generator.ends, self.sizes["max_new_tokens"]
        return sum(
            read_answer(
                Written(tokens, [0.0] * len(tokens)), ends, job.question.schema, job.part, longest
            ).tokens
            for job, tokens in zip(jobs, new, strict=True)
        )


def questions(documents: Sequence[Document], texts: int, schemas: int) -> list[Question]:
    """Each text with one of the first schemas."""
    known: dict[str, Schema] = {}
    for document in documents:
        if document.task != "EAE":
            known.setdefault(document.schema.fingerprint(), document.schema)
    chosen = list(known.values())[:schemas]
    assert len(chosen) == schemas, f"The files have {len(chosen)} schemas."
    words = list(dict.fromkeys(document.text for document in documents))[:texts]
    return [Question(text, chosen[i % schemas]) for i, text in enumerate(words)]


def main() -> None:
    """Measure and print."""
    add = (asked := parser(__doc__ or "", limit=64, files=DEMO)).add_argument
    add("--texts", type=int, default=64)
    add("--schemas", type=int, default=1)
    add("--rounds", type=int, default=3)
    add("--batch-size", type=int, default=16)
    add("--max-new-tokens", type=int, default=48)
    add("--one-by-one", type=int, default=16, help="texts of that way (default: %(default)s)")
    add("--cpu-time", action="store_true", help="seconds of the processor, not of the clock")
    args = asked.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    files = read_datasets(args.files, split="test", limit=args.limit).values()
    texts = questions([one for file in files for one in file], args.texts, args.schemas)
    extractor = load(args, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    ways = Ways(extractor, args.batch_size, args.max_new_tokens)
    drawn = random.Random(0).sample(texts, min(args.one_by_one, len(texts)))
    speeds: dict[str, list[float]] = {way: [] for way in ways.ways}
    tokens: dict[str, float] = {}
    names = list(ways.ways)
    for way in names:  # what only the first call pays for
        ways.attach(way)
        ways.ways[way](texts[:2])
    for number in range(args.rounds):
        for way in [*names[number % len(names) :], *names[: number % len(names)]]:
            some = drawn if way == ALONE else texts
            ways.attach(way)
            start = clock()
            written = ways.ways[way](some)
            speeds[way].append(len(some) / (clock() - start))
            tokens[way] = written / len(some)
    rows = []
    for way, of_way in speeds.items():
        ratios = [one / alone for one, alone in zip(of_way, speeds[ALONE], strict=True)]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        figures = [statistics.median(of_way), statistics.median(ratios), spread, tokens[way]]
        rows.append([way, *(one if isinstance(one, str) else f"{one:.2f}" for one in figures)])
    header = ["way", "documents/s", "to one by one", "rounds", "tokens an answer"]
    print(f"{len(texts)} texts, {args.schemas} schemas, batches of {args.batch_size}, ", end="")
    print(f"{args.threads} threads, {args.device}, {args.rounds} rounds, {clock.__name__}")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
