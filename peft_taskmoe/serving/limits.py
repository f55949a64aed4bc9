"""What a client may ask for, and the guard that refuses the rest before it is read."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

_OPEN = {"/", "/health", "/ready", "/docs", "/redoc", "/openapi.json"}  # without a key


@dataclass(frozen=True)
class Limits:
    """The limits of one server; a request beyond one is refused by its name.

    Attributes:
        max_body_bytes: Bytes of a request.
        max_texts: Texts of a request.
        max_text_characters: Characters of a text.
        max_labels: Labels of all schemas of a text.
        max_waiting: Prompts that may wait, those of all clients together.
        timeout: Seconds until a request is given up.
        body_timeout: Seconds that a client may take to send a request.
    """

    max_body_bytes: int = 2**20
    max_texts: int = 64
    max_text_characters: int = 100_000
    max_labels: int = 500
    max_waiting: int = 1024
    timeout: float = 300.0
    body_timeout: float = 30.0


class Guard:
    """ASGI middleware: the API key, and bodies that are too large or too slow.

    A body is read whole before it is passed on.
    """

    def __init__(self, app: Any, limits: Limits, api_key: str | None) -> None:
        self._app, self._limits = app, limits
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._key and scope["path"] not in _OPEN and not hmac.compare_digest(given, self._key):
            why = "Send the API key: `Authorization: Bearer KEY`."
            reply = _refusal(401, why, {"WWW-Authenticate": "Bearer"})
            await reply(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(headers, receive), self._limits.body_timeout)
        except _TooLargeError:
            why = f"The body is larger than `max_body_bytes` ({self._limits.max_body_bytes})."
            await _refusal(413, why, {"Connection": "close"})(scope, receive, send)
            return
        except asyncio.TimeoutError:  # another class than the builtin one before Python 3.11
            why = f"The body took longer than `body_timeout` ({self._limits.body_timeout:g} s)."
            await _refusal(408, why, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Any) -> bytes | None:
        """The whole body; None if the client left."""
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated[:20]) > self._limits.max_body_bytes:
            raise _TooLargeError
        body = bytearray()
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > self._limits.max_body_bytes:
                raise _TooLargeError
            if not message.get("more_body"):
                return bytes(body)
        return None


class _TooLargeError(Exception):
    """The body is beyond the limit."""


def _refusal(status: int, why: str, headers: Mapping[str, str]) -> JSONResponse:
    return JSONResponse({"detail": why}, status, dict(headers))
