"""The parser of all commands, and how a command ends.

Parsed with argparse: importing transformers for `HfArgumentParser` alone takes over a second.
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from .messages import Exit, StoppedError, print_any_character, say, show
from .parquet import is_parquet
from .shares import parts_of

_COMMANDS = {
    "extract": "extract records from texts",
    "score": "score records against gold documents",
    "report": "write a page about an adapter: scores, routing, examples",
    "serve": "answer HTTP requests",
    "convert": "turn data sets into JSONL documents",
}
_CODES = (
    "Exit codes: 0 done; 1 done, but some lines could not be used; 2 nothing done; 3 stopped by an "
    "error, what was written stays; 130 interrupted."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: As on the command line; None takes those of the process.

    Returns:
        The exit code, an `Exit`.
    """
    print_any_character()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT's own
    args = parser().parse_args(arguments)
    try:
        code: Exit = args.run(args)
    except StoppedError as error:
        say(f"Error: {error}\n{_what_stays(args)}")
        return Exit.STOPPED
    except (ValueError, OSError, ImportError) as error:
        say(f"Error: {error}")
        return Exit.NOTHING_DONE
    except Exception:
        say(traceback.format_exc())
        return Exit.NOTHING_DONE
    except KeyboardInterrupt:
        say(f"Interrupted. {_what_stays(args)}")
        return Exit.INTERRUPTED
    return code


def _what_stays(args: argparse.Namespace) -> str:
    """What the same command does after it was stopped."""
    overwrite = getattr(args, "overwrite", None)
    if overwrite is None:
        return "The same command starts anew."
    if not overwrite or parts_of(args.output):
        return "What was written stays; the same command goes on from there."
    if is_parquet(args.output) and args.output.exists():
        return "The old output stays; the same command starts anew."
    return "What was written stays; without --overwrite the same command goes on from there."


def parser() -> argparse.ArgumentParser:
    """The parser; the arguments have the function of their command as `run`."""
    whole = argparse.ArgumentParser(
        prog="peft-taskmoe", description="Information extraction from files.", epilog=_CODES
    )
    whole.add_argument("--version", action="version", version=version("peft_taskmoe"))
    whole.set_defaults(run=lambda args: _print_help(whole))
    commands = whole.add_subparsers(metavar="command")
    for name, words in _COMMANDS.items():
        module = import_module(f"{__package__}.{name}")
        command = commands.add_parser(name, help=words, description=words, epilog=_CODES)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return whole


def _print_help(whole: argparse.ArgumentParser) -> Exit:
    show(whole.format_help())
    return Exit.NOTHING_DONE
