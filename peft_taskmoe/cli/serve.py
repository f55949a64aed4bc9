"""`peft-taskmoe serve`: extraction over HTTP, from one model and any number of adapters."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..optional import needed
from .messages import Exit, say
from .model_options import add_model_options, count, load

if TYPE_CHECKING:
    from ..serving.adapters import Adapters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    named = "folder or Hub id, or NAME=FOLDER; again for more, the first one answers by default"
    add("--adapter", required=True, action="append", help=named)
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    add("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    key = "what clients must send as a bearer token (default: $PEFT_TASKMOE_API_KEY, or none)"
    add("--api-key", default=os.environ.get("PEFT_TASKMOE_API_KEY"), help=key)
    engine = "what answers: the Extractor's batches, or transformers' continuous batching"
    engine += " (default: %(default)s)"
    add("--engine", choices=["batches", "continuous"], default="batches", help=engine)
    page = "a page at / to try the first adapter; needs peft_taskmoe[app] (default: if it can be)"
    add("--page", action=argparse.BooleanOptionalAction, help=page)
    add_model_options(parser)
    limits = parser.add_argument_group("limits of a request").add_argument
    shown = "(default: %(default)s)"
    limits("--max-body-bytes", type=count, default=2**20, help=f"bytes of its body {shown}")
    limits("--max-texts", type=count, default=64, help=f"its texts {shown}")
    characters = f"characters of a text {shown}"
    limits("--max-text-characters", type=count, default=100_000, help=characters)
    limits("--max-labels", type=count, default=500, help=f"labels and roles of a text {shown}")
    waiting = f"prompts in the queue, of all clients {shown}"
    limits("--max-waiting", type=count, default=1024, help=waiting)
    limits("--timeout", type=count, default=300, help=f"seconds until it is given up {shown}")


def run(args: argparse.Namespace) -> Exit:
    """Serve until SIGTERM or SIGINT; what runs then is finished."""
    uvicorn = needed("uvicorn", "serve")
    from ..serving.app import make_app, why_no_page
    from ..serving.limits import Limits
    from ..uie.extraction.loading import load_centroids

    if args.api_key == "":
        raise ValueError("The API key is empty. Pass one, or unset $PEFT_TASKMOE_API_KEY.")
    # A thread that computed keeps OpenMP threads, besides which those of the model's thread would
    # wait by sleeping: 10 % slower. Those of a thread that has ended are gone.
    with ThreadPoolExecutor(1) as loading:
        adapters = loading.submit(_load, args).result()
    known = vars(Limits())
    limits = Limits(**{key: value for key, value in vars(args).items() if key in known})
    if args.page is None:
        args.page = (why := why_no_page(adapters, args.api_key)) is None
        if why:
            say(f"There is no page. {why}")
    centroids = load_centroids(_name_of(args.adapter[0])[1]) if args.page else None
    options = {"api_key": args.api_key, "engine": args.engine, "page": args.page}
    app = make_app(adapters, limits, centroids=centroids, **options)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=args.timeout, lifespan="on"
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # before and after uvicorn's own handlers
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family, backlog=2048) as listener:
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(f"Serving at http://{host}:{listener.getsockname()[1]}")
        if args.api_key is None and args.host not in ("127.0.0.1", "::1", "localhost"):
            say("Whoever reaches this address may use the server; --api-key asks for a key.")
        server.run(sockets=[listener])
    return Exit.DONE


def _port(value: str) -> int:
    if not 0 <= (port := int(value)) < 2**16:
        raise argparse.ArgumentTypeError(f"{port} is no port; they go from 0 to 65535")
    return port


def _load(args: argparse.Namespace) -> Adapters:
    """The model with all adapters."""
    from ..serving.adapters import Adapters

    (name, first), *others = map(_name_of, args.adapter)
    adapters = Adapters(load(args, first), name)
    for name, adapter in others:
        adapters.load(name, adapter)
    return adapters


def _name_of(adapter: str) -> tuple[str, str]:
    """The name of an adapter and where it is."""
    name, equals, folder = adapter.partition("=")
    if equals and name and folder and not Path(adapter).exists():
        return name, folder
    return Path(adapter).name or Path(adapter).resolve().name, adapter
