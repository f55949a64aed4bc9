"""A server in a thread, and a client that asks it."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from peft_taskmoe.serving import app as server
from peft_taskmoe.uie import Extractor

SCHEMA = {"Capital": "words with a capital letter"}


@contextmanager
def serving(
    extractor_or_adapters, api_key=None, engine="batches", page=False, centroids=None, **limits
):
    """A client of a server that runs in a thread."""
    adapters = extractor_or_adapters
    if isinstance(adapters, Extractor):
        adapters = server.Adapters(adapters)
    options = {"api_key": api_key, "engine": engine, "page": page, "centroids": centroids}
    app = server.make_app(adapters, server.Limits(**limits), **options)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        limit = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=url, timeout=30, trust_env=False, limits=limit) as client:
            try:
                until(lambda: client.get("/ready").status_code == 200)
                yield client
            finally:
                running.should_exit = True
                thread.join(30)
    assert not thread.is_alive()


def until(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(client, *texts, schema=SCHEMA, path="/v1/extract", **more):
    return post(client, {"texts": texts, "schema": schema, **more}, path)


def post(client, body: dict, path="/v1/extract", **options):
    headers = {"Content-Type": "application/json"}
    return client.post(path, content=json.dumps(body), headers=headers, **options)
