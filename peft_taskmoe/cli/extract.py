"""`peft-taskmoe extract`: a line of records for each line of texts, continued where it stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import check_output, lines
from .inputs import items_of
from .messages import Exit, StoppedError, say
from .parquet import is_parquet, read_finished, write_parquet
from .shares import Processes, parts_of, plan_shares

if TYPE_CHECKING:
    from ..uie import Extractor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    add("--adapter", required=True, help="folder or Hub id of the adapter")
    named = "(default: the one that the adapter names)"
    add("--base-model", help=f"folder or Hub id of the base model {named}")
    add("--task-encoder", help=f"folder or Hub id of the task encoder {named}")
    add("--schema", type=Path, help="JSON file; without it, every line needs its own")
    texts = 'JSONL, {"text": ...} or a string on each line; or .txt, a text a line'
    add("--input", type=Path, required=True, help=texts)
    output = ".jsonl, a line for each line, continued if it is there; or .parquet"
    add("--output", type=Path, required=True, help=output)
    anew = "start anew; the old output is kept until there is a new line"
    add("--overwrite", action="store_true", help=anew)
    add("--threshold", type=_probability, help="leave out records of lower confidence")
    batch = "prompts per generation (default: %(default)s)"
    add("--batch-size", type=_count, default=8, help=batch)
    longest = "the longest answer (default: %(default)s)"
    add("--max-new-tokens", type=_count, default=256, help=longest)
    windows = "longer texts are read in windows (default: the model's context)"
    add("--max-prompt-tokens", type=_count, help=windows)
    add("--device", help="such as cpu or cuda:1 (default: the accelerator that is there)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="precision of the base model (default: as it is stored)")
    grammar = "constrain decoding to the schema's grammar"
    add("--constrained", action="store_true", help=grammar)
    once = "read what prompts share once; not where the encoder reads whole prompts"
    add("--prefix-caching", action="store_true", help=once)


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")


def _probability(text: str) -> float:
    try:
        if 0 <= (value := float(text)) <= 1:  # NaN is not
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")


def run(args: argparse.Namespace) -> Exit:
    """Extract what is not done yet, and report all error lines of the output."""
    from ..uie import Schema
    from ..uie.extraction.jobs import checksum, write_lines

    if not args.input.is_file():
        raise ValueError(f"There is no file `{args.input}` to read.")
    check_output(args.output, args.input, args.schema)
    written = args.output
    if is_parquet(args.output):  # a file beside it, which becomes the output
        written = args.output.with_name(f"{args.output.name}.jsonl")
        check_output(written, args.input, args.schema)
    schema = Schema.from_json(args.schema) if args.schema else None
    sources = [checksum(line) for line in lines(args.input)]
    processes = Processes.of_environment()
    extractor = _load(args, processes)
    job = extractor.fingerprint(
        [] if schema is None else extractor.check(schema, args.threshold), args.threshold
    )
    if is_parquet(args.output) and args.output.exists() and not args.overwrite:
        return _report(args, read_finished(args.output, sources, job))

    def write(path: Path, first: int, last: int, *, progress: bool | None = None) -> int:
        items = items_of(args.input, schema, first, last)
        return write_lines(
            extractor,
            items,
            path,
            job,
            thresholds=args.threshold,
            progress=progress,
            total=last - first,
            overwrite=args.overwrite and path == written,
        )

    before = _state(written)
    try:
        shares = plan_shares(written, job, sources, args.overwrite, processes)
        if shares is None and processes.rank == 0:
            done = len(sources) - write(written, 0, len(sources))
            if done:
                say(f"{done} of {len(sources)} lines were done already.")
        elif shares is None or not shares.write(write, processes):
            return Exit.DONE  # another process puts the parts together
        code = _report(args, map(json.loads, lines(written)))
        if is_parquet(args.output):
            write_parquet(written, args.output)
    except Exception as error:
        if _state(written) == before:
            raise
        raise StoppedError(f"{type(error).__name__}: {error}") from error
    return code


def _state(path: Path) -> list[tuple[Path, int, int]]:
    """What differs once a line was written: the files, and their numbers of whole lines."""
    files = [file for file in [path, *parts_of(path)] if file.is_file()]
    return [(f, f.stat().st_ino, f.read_bytes().count(b"\n")) for f in files]


def _report(args: argparse.Namespace, rows: Iterable[dict[str, Any]]) -> Exit:
    """Report the error lines of the output, those of earlier runs included."""
    bad = 0
    for number, row in enumerate(rows, 1):
        if "error" in row:
            bad += 1
            say(f"{args.input}:{number}: {row['error']}")
    say(f"Wrote {args.output}." + (f" {bad} lines could not be used." if bad else ""))
    return Exit.SOME_LINES_BAD if bad else Exit.DONE


def _load(args: argparse.Namespace, processes: Processes) -> Extractor:
    from ..uie import Extractor

    return Extractor.from_pretrained(
        args.adapter,
        base_model=args.base_model,
        encoder=_encoder(args),
        device=_device(args.device, processes.local_rank),
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        constrained=args.constrained,
        prefix_caching=args.prefix_caching,
    )


def _encoder(args: argparse.Namespace) -> Any:
    """The task encoder that is asked for, with the settings that the adapter's config names."""
    if args.task_encoder is None:
        return None
    from peft import PeftConfig

    from .. import TaskEncoder, TaskEncoderConfig

    config = PeftConfig.from_pretrained(args.adapter)
    if not hasattr(config, "task_encoder"):
        raise ValueError(f"--task-encoder says nothing about a {config.peft_type.value} adapter.")
    settings = config.task_encoder or TaskEncoderConfig()
    return TaskEncoder.from_config(replace(settings, name_or_path=args.task_encoder, revision=None))


def _device(asked: str | None, local_rank: int) -> str:
    """The device of this process: what is asked for, or its accelerator, or the CPU."""
    import torch

    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu"] if here is None else ["cpu", here.type]
    if asked is not None and asked.partition(":")[0] not in known:
        raise ValueError(f"--device is {asked!r}, but this machine has {' and '.join(known)}.")
    if asked is not None or here is None:
        return asked or "cpu"
    return f"{here.type}:{local_rank % torch.accelerator.device_count()}"
