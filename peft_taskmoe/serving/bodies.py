"""What requests and answers look like, and the texts and schemas of a request."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from ..uie import Extractor, prompt_text
from ..uie.extraction.questions import Question, check_thresholds
from ..uie.schema import Schema
from ..uie.strict_json import parse_json
from .adapters import Adapters
from .batching import Ticket
from .limits import Limits

SchemaOf = Annotated[
    dict[str, Any] | list[Any] | None,
    Field(alias="schema", description="`{label: description}`, a list of names, or several."),
]

Threshold = Annotated[float, Field(strict=True)]  # no booleans


class Strict(BaseModel):
    """Refuses fields that it does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextWithSchema(Strict):
    """A text that brings its own schema."""

    text: str
    schema_: SchemaOf = None


class ExtractRequest(Strict):
    """What to extract, and from what."""

    texts: list[str | TextWithSchema] = Field(min_length=1)
    schema_: SchemaOf = None
    adapter: str | None = None
    thresholds: Threshold | dict[str, Threshold] | None = None
    constrained: bool | None = None
    timeout: float | None = Field(None, gt=0, description="Seconds.")


class Result(BaseModel):
    """All that was found in one text."""

    text: str
    records: list[dict[str, Any]]
    problems: list[dict[str, str]]
    answers: list[str]
    seconds: float


class ExtractResponse(BaseModel):
    """The results, in the order of the texts, and the seconds that the request took."""

    results: list[Result]
    seconds: float


class StrictRoute(APIRoute):
    """Reads bodies with `parse_json`: no key twice, bounded nesting."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Any]]:
        """The handler, given requests that read their bodies so."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Any:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return parse_json((await self.body()).decode("utf-8"))
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


def tickets_of(body: ExtractRequest, adapters: Adapters, limits: Limits) -> list[Ticket]:
    """Read a request.

    Raises:
        ValueError: It cannot be answered, or is beyond a limit; the message names it.
    """
    lane = adapters.lane(body.adapter, body.constrained)
    texts = [(one, None) if isinstance(one, str) else (one.text, one.schema_) for one in body.texts]
    texts = [(text, body.schema_ if data is None else data) for text, data in texts]
    for text, data in texts:
        if len(text) > limits.max_text_characters:
            raise ValueError(
                f"A text has {len(text)} characters. `max_text_characters` is "
                f"{limits.max_text_characters}."
            )
        if data is None:
            raise ValueError("A text has no schema. Give it one, or the request one for all.")
    data_of = {id(data): data for _, data in texts}
    schemas = {key: _schemas(data, limits) for key, data in data_of.items()}
    check_thresholds(body.thresholds, [one for several in schemas.values() for one in several])
    for several in schemas.values():
        lane.reading.check(several)
    tickets, prompts = [], 0
    for text, data in texts:
        several = schemas[id(data)]
        more = sum(_fewest_prompts(lane.reading, text, one) for one in several)
        if prompts + more <= limits.max_waiting:
            jobs = lane.text_jobs([Question(text, one) for one in several])
            tickets.append(Ticket(lane, jobs, body.thresholds))
            more = len(jobs.jobs)
        prompts += more
        if prompts > limits.max_waiting:
            raise TooManyError(
                f"The texts make {prompts} prompts or more. `max_waiting` is {limits.max_waiting}."
            )
    return tickets


class TooManyError(ValueError):
    """A request makes more prompts than may ever wait."""


def _fewest_prompts(reading: Extractor, text: str, schema: Schema) -> int:
    """How many prompts a long text makes at least, 0 for others; to make them takes much longer."""
    most = reading.max_prompt_tokens
    if len(text) < most or not text.strip():
        return 0

    def length(part: str) -> int:
        return len(reading.generator.ids(prompt_text(part, schema, format=reading.format)))

    return (length(text) - length("")) // max(most - length(""), 1)


def _schemas(data: Any, limits: Limits) -> list[Schema]:
    """One schema or several; names are labels, never files."""
    several = isinstance(data, list) and any(isinstance(part, (dict, list)) for part in data)
    parts = data if several else [data]
    labels = sum(_labels(part) for part in parts)
    if labels > limits.max_labels:
        raise ValueError(f"A text asks for {labels} labels. `max_labels` is {limits.max_labels}.")
    return [Schema.from_dict("UIE", part) for part in parts]


def _labels(data: Any) -> int:
    """Labels of one schema and roles of its events, before anything is made of them."""
    if not isinstance(data, dict):
        return len(data) if isinstance(data, list) else 1
    inner = [value for value in data.values() if isinstance(value, (dict, list))]
    return len(data) + sum(map(_labels, inner))
