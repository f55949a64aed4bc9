"""The routes of the extraction server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer

from ..nearest import TaskCentroids
from ..optional import needed
from ..page import page as make_page
from ..uie import Extraction
from .adapters import Adapters
from .batching import ClosedError, Ticket, Worker
from .bodies import ExtractRequest, ExtractResponse, StrictRoute
from .continuous import ContinuousWorker
from .limits import Guard, Limits
from .metrics import Measured
from .service import Service

ENGINES = {"batches": Worker, "continuous": ContinuousWorker}
_LANDING = """<!doctype html><title>peft_taskmoe</title><h1>peft_taskmoe</h1>
<p>Information extraction. <a href="docs">How to ask</a>, <a href="v1/adapters">adapters</a>."""


def make_app(
    adapters: Adapters,
    limits: Limits | None = None,
    *,
    api_key: str | None = None,
    engine: str = "batches",
    page: bool = False,
    centroids: TaskCentroids | None = None,
) -> FastAPI:
    """The ASGI application of a server.

    Args:
        adapters: The model with its adapters. From here on only the server may call it.
        limits: What a client may ask for.
        api_key: What clients must send as a bearer token; None asks for none.
        engine: `"batches"`, the Extractor's, which rows leave early, or `"continuous"`,
            transformers' continuous batching.
        page: Whether the demonstration page of the first adapter stands at `/`.
        centroids: The known tasks that the page shows beside a prompt.

    Raises:
        ValueError: There is no such engine, or the page cannot be, as `why_no_page` says.
    """
    if engine not in ENGINES:
        raise ValueError(f"There is no engine {engine!r}. Pass one of {', '.join(ENGINES)}.")
    if page and (why := why_no_page(adapters, api_key)):
        raise ValueError(f"There can be no page. {why}")
    service = Service(adapters, limits or Limits(), ENGINES[engine])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.thread.start()
        yield
        service.queue.close()
        await asyncio.to_thread(service.worker.thread.join)
        service.reader.shutdown(wait=False, cancel_futures=True)

    named = [Depends(HTTPBearer(auto_error=False))] if api_key else []  # for the OpenAPI pages
    app = FastAPI(title="peft_taskmoe", lifespan=lifespan, dependencies=named)
    app.router.route_class = StrictRoute
    app.add_middleware(Guard, limits=service.limits, api_key=api_key)
    app.add_middleware(Measured, metrics=service.metrics)
    app.add_exception_handler(RequestValidationError, _unreadable)
    app.add_exception_handler(HTTPException, _refused)
    _add_status_routes(app, service)
    _add_extraction_routes(app, service)
    if not page:
        app.add_api_route("/", lambda: HTMLResponse(_LANDING), include_in_schema=False)

    if page:  # behind the routes above, for it answers all others
        _mount_page(app, service, centroids)
    return app


def why_no_page(adapters: Adapters, api_key: str | None) -> str | None:
    """Why there can be no page, if it cannot be."""
    if api_key is not None:
        return "A browser sends no API key."
    method = adapters.methods[adapters.default]
    if method != "TASKMOE_LORA":
        return f"It shows how experts are routed, and `{adapters.default}` is `{method}`."
    try:
        needed("gradio", "app")
        needed("matplotlib", "plot")
    except ImportError as error:
        return str(error)
    return None


def _mount_page(app: FastAPI, service: Service, centroids: TaskCentroids | None) -> None:
    lane = service.adapters.lane(None, None)

    def alone(work: Callable[[], Any]) -> Any:
        def routed() -> Any:
            lane.activate()
            return work()

        return service.queue.call(routed)

    blocks = make_page(lane.extractor, centroids, alone)
    gradio = needed("gradio", "app")
    gradio.mount_gradio_app(app, blocks, path="/", max_file_size=1)  # it takes no files


def _add_extraction_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/extract", responses={200: {"model": ExtractResponse}})
    async def extract(body: ExtractRequest, request: Request) -> Response:
        """Extract records from texts, with their offsets."""
        start = time.perf_counter()
        tickets = await service.admit(body)
        found: dict[int, Extraction] = {}
        try:
            async for number in service.answered(tickets, request, body.timeout, start):
                found[number] = tickets[number].future.result()
        except TimeoutError:
            raise HTTPException(504, service.too_late(body.timeout)) from None
        except ConnectionError:
            return Response(status_code=499)
        except ClosedError as error:
            raise HTTPException(503, str(error)) from None
        except Exception as error:
            raise HTTPException(
                500, f"A text could not be answered: {type(error).__name__}."
            ) from None
        results = [found[number].to_dict() for number in range(len(tickets))]
        content = {"results": results, "seconds": round(time.perf_counter() - start, 4)}
        return _Ascii(content)

    @app.post("/v1/extract/stream", response_class=StreamingResponse)
    async def stream(body: ExtractRequest, request: Request) -> StreamingResponse:
        """The same, a line of JSON as soon as a text is done, with its `index`."""
        start = time.perf_counter()
        tickets = await service.admit(body)
        lines = _lines(service, tickets, request, body.timeout, start)
        return StreamingResponse(lines, media_type="application/x-ndjson")


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the model's thread lives."""
        alive = service.worker.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are answered now."""
        yes = service.worker.ready and not service.queue.closed
        return JSONResponse({"status": "ready" if yes else "not ready"}, 200 if yes else 503)

    @app.get("/v1/adapters")
    async def list_adapters() -> list[dict[str, Any]]:
        """The adapters that a request may name."""
        default = service.adapters.default
        methods = service.adapters.methods
        return [
            {"name": name, "method": method, "default": name == default}
            for name, method in methods.items()
        ]

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _lines(
    service: Service,
    tickets: Sequence[Ticket],
    request: Request,
    timeout: float | None,
    start: float,
) -> AsyncIterator[str]:
    left = set(range(len(tickets)))
    with suppress(ConnectionError):
        try:
            async for number in service.answered(tickets, request, timeout, start):
                left.remove(number)
                error = tickets[number].future.exception()
                if error is None:
                    result = tickets[number].future.result().to_dict()
                else:
                    result = {"error": f"The text could not be answered: {type(error).__name__}."}
                yield f"{json.dumps({'index': number, **result})}\n"
        except TimeoutError:
            for number in sorted(left):
                late = {"index": number, "error": service.too_late(timeout)}
                yield f"{json.dumps(late)}\n"


async def _unreadable(request: Request, error: Any) -> JSONResponse:
    """Say what is wrong with a body, without sending it back."""
    faults = [
        {"loc": one["loc"], "msg": one.get("ctx", {}).get("error", one["msg"])}
        for one in error.errors()
    ]
    return _Ascii({"detail": json.loads(json.dumps(faults, default=str))}, 422)


async def _refused(request: Request, error: Any) -> Response:
    """The answer that an `HTTPException` stands for."""
    return _Ascii({"detail": error.detail}, error.status_code, error.headers)


class _Ascii(JSONResponse):
    """JSON in ASCII: words of clients and models may have characters that UTF-8 has not."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")
