"""A page that extracts from a text and shows how its prompt is routed, with Gradio."""

from __future__ import annotations

import copy
import html
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from .inspection import record_gates
from .nearest import TaskCentroids, compared, nearest_tasks
from .optional import needed
from .plots import gate_panels
from .task_scope import task_context
from .uie import Extraction, Extractor, Schema
from .uie.extraction.questions import Question
from .uie.extraction.report import nearest_table, prompts_of
from .uie.strict_json import parse_json
from .uie.view import tables_to_html, to_html

Alone = Callable[[Callable[[], Any]], Any]
AWARE, TOKEN, BASE = "task-aware", "token-only", "base"
WAYS = {
    AWARE: "as it was trained",
    TOKEN: "the router sees no task",
    BASE: "the base model without the adapter",
}
MAX_CHARACTERS = 20_000
_MOST_WAITING = 64  # questions of all who look at it
SCHEMAS = {
    "People and spaceflight": {
        "person": "names of people",
        "spacecraft": "vehicles, probes and stations in space",
        "space-agency": "organisations that run space flights",
        "launcher": "rockets that carry spacecraft",
    },
    "Work": {
        "relations": {"works-for": {"description": "", "head": ["person"], "tail": ["company"]}}
    },
    "Attacks": {"events": {"attack": {"description": "", "roles": ["attacker", "target"]}}},
}
TEXT = "The probe Wayfarer 2, built by the Nordic Space Agency, left for Titan on a Helion rocket."


class Demonstration:
    """Answers one question at a time: the ways of routing are a state of the model.

    Args:
        extractor: What answers.
        centroids: The known tasks.
        alone: Calls a function while nobody else uses the model.
    """

    def __init__(
        self, extractor: Extractor, centroids: TaskCentroids | None, alone: Alone | None = None
    ) -> None:
        self.extractor, self.centroids = copy.copy(extractor), centroids
        self.extractor.batch_size = 1  # the task that is taken away belongs to one row
        self._alone = alone or _one_at_a_time()

    def __call__(self, schema: str, text: str, way: str) -> tuple[str, str, str, Any, str]:
        """Extract: what was found as HTML and JSON, the prompt, its gates, the nearest tasks."""
        try:
            asked = Schema.of(self._checked(schema, text))
            found, prompt, picture, near = self._alone(lambda: self._answer(asked, text, way))
        except ValueError as error:
            return f'<p role="alert">{html.escape(str(error))}</p>', "", "", None, ""
        records = [record.to_dict() for record in found.records]
        shown = to_html([found])
        if not found.records:
            shown += "<p>Nothing of these kinds was found.</p>"
        return shown, json.dumps(records, ensure_ascii=False, indent=1), prompt, picture, near

    def _answer(self, asked: Schema, text: str, way: str) -> tuple[Extraction, str, Any, str]:
        with self._routed(way):
            (found,) = self.extractor([text], asked, progress=False)
            (prompt,) = prompts_of(self.extractor, [Question(text, asked)], 1)
            picture, near = (None, "") if way == BASE else self._routing(prompt, way)
        return found, prompt, picture, near

    @staticmethod
    def _checked(schema: str, text: str) -> Any:
        if not text.strip():
            raise ValueError("The text is empty. Paste one.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"The text has {len(text):,} characters, more than {MAX_CHARACTERS:,}. Shorten it."
            )
        try:
            found = parse_json(schema)
        except ValueError as error:
            raise ValueError(f"The schema is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError('The schema is no JSON object. Write {"label": "description"}.')
        return found

    def _routed(self, way: str) -> AbstractContextManager[Any]:
        model = self.extractor.model
        config = model.peft_config[model.active_adapter]
        if way == BASE:
            return model.disable_adapter()
        if way == AWARE or not config.reads_task:
            return nullcontext()
        return task_context(torch.zeros(1, config.task_dim, device=model.device))

    def _routing(self, prompt: str, way: str) -> tuple[Any, str]:
        """The gates of a prompt beside those of the nearest task, and a table of the nearest."""
        model, tokenizer = self.extractor.model, self.extractor.tokenizer
        with record_gates(model) as record, record.task("this prompt"), torch.no_grad():
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
            model(input_ids=ids)
        panels = {"this prompt": record.mean_gates("this prompt")}
        known = self.centroids
        if known is None:
            return gate_panels(record.layers(), panels), "No task centroids beside the adapter."
        if way == AWARE:
            near = nearest_tasks(model, prompt, known, tokenizer=tokenizer)
        else:  # there is no embedding to compare
            own = TaskCentroids.of(record, {})
            near = compared(own, replace(known, embeds=None))["this prompt"]
        panels[near[0].task] = known.gates[known.tasks.index(near[0].task)]
        table = nearest_table({"this prompt": near}, limit=8)
        return gate_panels(record.layers(), panels), tables_to_html([table])


def _one_at_a_time() -> Alone:
    lock = threading.Lock()

    def alone(work: Callable[[], Any]) -> Any:
        with lock:
            return work()

    return alone


def page(
    extractor: Extractor, centroids: TaskCentroids | None = None, alone: Alone | None = None
) -> Any:
    """The page, a `gradio.Blocks`; arguments as of `Demonstration`.

    Raises:
        ImportError: Gradio is not installed.
    """
    gr = needed("gradio", "app")
    needed("matplotlib", "plot")
    answer = Demonstration(extractor, centroids, alone)
    first = next(iter(SCHEMAS))
    with gr.Blocks(title="Information extraction", analytics_enabled=False) as blocks:
        gr.Markdown("# Information extraction with Task-Aware MoELoRA")
        with gr.Row():
            with gr.Column():
                pick = gr.Dropdown(list(SCHEMAS), value=first, label="Schema to start from")
                schema = gr.Textbox(
                    _text_of(first), lines=8, max_lines=20, label="Schema (JSON)", elem_id="schema"
                )
                text = gr.Textbox(TEXT, lines=6, max_lines=15, label="Text", elem_id="text")
                choices = [(f"{way}: {words}", way) for way, words in WAYS.items()]
                way = gr.Radio(choices, value=AWARE, label="Routing", elem_id="way")
                button = gr.Button("Extract", variant="primary", elem_id="extract")
            with gr.Column():
                found = gr.HTML(label="Found", elem_id="found")
                near = gr.HTML(elem_id="near")
        gates = gr.Plot(label="Mean gates of the prompt", elem_id="gates")
        with gr.Accordion("Prompt and records", open=False):
            prompt = gr.Code(label="First prompt", language="python", elem_id="prompt")
            records = gr.Code(label="Records", language="json", elem_id="records")
        pick.change(_text_of, pick, schema)
        button.click(answer, [schema, text, way], [found, records, prompt, gates, near])
    return blocks.queue(max_size=_MOST_WAITING)


def _text_of(name: str) -> str:
    return json.dumps(SCHEMAS[name], ensure_ascii=False, indent=1)
