"""The options of commands that load an adapter, and the extractor that they ask for."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..uie import Extractor


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model answers, and how."""
    add = parser.add_argument
    named = "(default: the one that the adapter names)"
    add("--base-model", help=f"folder or Hub id of the base model {named}")
    add("--task-encoder", help=f"folder or Hub id of the task encoder {named}")
    batch = "prompts per generation (default: %(default)s)"
    add("--batch-size", type=count, default=8, help=batch)
    longest = "the longest answer (default: %(default)s)"
    add("--max-new-tokens", type=count, default=256, help=longest)
    windows = "longer texts are read in windows (default: the model's context)"
    add("--max-prompt-tokens", type=count, help=windows)
    add("--device", help="such as cpu or cuda:1 (default: the accelerator that is there)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="precision of the base model (default: as it is stored)")
    grammar = "constrain decoding to the schema's grammar"
    add("--constrained", action="store_true", help=grammar)
    once = "read what prompts share once; not where the encoder reads whole prompts"
    add("--prefix-caching", action="store_true", help=once)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")


def probability(text: str) -> float:
    """A number from 0 to 1."""
    try:
        if 0 <= (value := float(text)) <= 1:  # NaN is not
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")


def load(args: argparse.Namespace, adapter: str, local_rank: int = 0) -> Extractor:
    """The extractor that the options ask for."""
    from ..uie import Extractor

    return Extractor.from_pretrained(
        adapter,
        base_model=args.base_model,
        encoder=_encoder(args, adapter),
        device=_device(args.device, local_rank),
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        constrained=args.constrained,
        prefix_caching=args.prefix_caching,
    )


def _encoder(args: argparse.Namespace, adapter: str) -> Any:
    """The task encoder that is asked for, with the settings that the adapter's config names."""
    if args.task_encoder is None:
        return None
    from peft import PeftConfig

    from .. import TaskEncoder, TaskEncoderConfig

    config = PeftConfig.from_pretrained(adapter)
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
