"""Continuous batching: each token of a packed engine batch is routed by the task of its request."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import generation

from .adapters import TaskMoELoraLayer, missing_task_message, wrong_dimension_message
from .config import TaskMoELoraConfig
from .router import check_task_embeds
from .task_encoders import TaskEncoders
from .task_scope import TaskState, current_state, entered, user_scope

_KEY = "task_embeds"
_LACKING = ("stop_strings", "max_time", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers")
TaskEmbeds = torch.Tensor | Mapping[str, torch.Tensor] | None

# A packed forward changes the model's config while it runs: managers of one model take turns.
_LOCKS: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


class TaskSource(Protocol):
    """What is read of a model's `Conditioner`."""

    encoders: TaskEncoders
    layers: list[TaskMoELoraLayer]
    configs: Callable[[], dict[str, TaskMoELoraConfig]]
    task_readers: Callable[[], dict[str, TaskMoELoraConfig]]


@dataclass(frozen=True, slots=True, eq=False)
class RequestTask:
    """The task embedding `(task_dim,)` of one request, for each adapter that reads it.

    The engine keeps it with the request and hands it on to forks and restarts, so it lives as long.
    """

    embeds: dict[str, torch.Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> RequestTask:
        return self  # forks and restarts share it


class RoutedRequests:
    """Replaces the methods of one manager through which requests come in and batches run."""

    def __init__(self, manager: Any, model: Any, source: TaskSource) -> None:
        self.manager, self.model, self.source = manager, model, source
        self._add_request, self._add_requests = manager.add_request, manager.add_requests
        self._step = manager._generation_step
        self._lock = _LOCKS.setdefault(model, threading.Lock())
        self._attention = model.config._attn_implementation
        manager.logit_processor.supported_keys[_KEY] = RequestTask
        for name in ("add_request", "add_requests", "_generation_step"):
            setattr(manager, name, getattr(self, name))

    def add_request(self, input_ids: list[int], *args: Any, **kwargs: Any) -> str | None:
        """The manager's `add_request`; `task_embeds` is `(task_dim,)` or `(1, task_dim)`."""
        given = kwargs.pop(_KEY, None)
        if isinstance(given, torch.Tensor) and given.dim() == 1:
            given = given.unsqueeze(0)
        if not isinstance(given, Iterator):
            given = iter(self._tasks([input_ids], given))
        return self._add_request(input_ids, *args, **kwargs, **{_KEY: next(given)})

    def add_requests(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> list[str]:
        """The manager's `add_requests`; `task_embeds` is `(requests, task_dim)`."""
        kwargs[_KEY] = iter(self._tasks(inputs, kwargs.get(_KEY)))  # `add_request` takes one each
        return self._add_requests(inputs, *args, **kwargs)

    def _generation_step(self) -> None:
        """Run the prepared batch, in the manager's own thread."""
        if self.model.config._attn_implementation != self._attention:
            raise ValueError("Another manager of this model changed its attention implementation.")
        batch = self.manager.batch_processor.inputs_and_outputs
        with self._lock, entered(self._state(batch.requests_in_batch, batch.num_q_tokens)):
            self._step()

    def _tasks(self, inputs: list[list[int]], task_embeds: TaskEmbeds) -> list[RequestTask]:
        embeds = embeds_of_requests(self.model, self.source, inputs, task_embeds)
        return [
            RequestTask({name: rows[i].clone() for name, rows in embeds.items()})
            for i in range(len(inputs))
        ]

    def _state(self, requests: Sequence[Any], tokens: int) -> TaskState:
        """The state of one packed batch, from the engine's own list of its requests."""
        tasks = [request.state.logit_processor_kwargs[_KEY].embeds for request in requests]
        lengths = [request.query_length for request in requests]
        lengths[-1] += tokens - sum(lengths)  # padding, which nobody reads
        owners = torch.arange(len(tasks)).repeat_interleave(torch.tensor(lengths))
        state = TaskState(rows=1, lengths=(tokens,), owner=self.source)
        state.token_tasks = owners.to(self.model.device)
        state.adapter_embeds = by_adapter = {}
        for name in self.source.task_readers():
            if not all(name in embeds for embeds in tasks):
                raise ValueError(
                    f'Adapter "{name}" was not active when a running request was added, so there '
                    "is no task for it. Change adapters between requests."
                )
            by_adapter[name] = torch.stack([embeds[name] for embeds in tasks])
        return state


def embeds_of_requests(
    model: Any, source: TaskSource, inputs: Sequence[Sequence[int]], task_embeds: TaskEmbeds
) -> dict[str, torch.Tensor]:
    """`(requests, task_dim)` for each adapter: the given ones, those in scope, or the encoders'."""
    readers, scope = source.task_readers(), _checked_scope()
    if isinstance(task_embeds, torch.Tensor):
        task_embeds = dict.fromkeys(readers, task_embeds)
    elif task_embeds is None:
        encoders = source.encoders
        task_embeds = scope.adapter_embeds
        if scope.task_embeds is not None:
            task_embeds = dict.fromkeys(readers, scope.task_embeds)
        elif not task_embeds and any(encoders.known(*reader) for reader in readers.items()):
            texts = [encoders.reader_for(model).text_of(ids) for ids in inputs]
            task_embeds = encoders.embed(readers, texts, model.device)
    found = {}
    for name, config in readers.items():
        rows = task_embeds.get(name)
        if rows is None:
            raise ValueError(missing_task_message(name))
        check_task_embeds(rows)
        if rows.shape[1] != config.task_dim:
            raise ValueError(wrong_dimension_message(name, rows.shape[1], config.task_dim))
        if rows.shape[0] != len(inputs):
            raise ValueError(
                f"There are {rows.shape[0]} task embeddings for {len(inputs)} requests. Pass "
                f"`task_embeds` of shape ({len(inputs)}, {config.task_dim}), one row per request."
            )
        found[name] = rows.detach().to(model.device)
    return found


def routed_manager(
    model: Any, source: TaskSource, inner: Callable[..., Any], call: dict[str, Any]
) -> Any:
    """`init_continuous_batching` whose manager routes each request by its task."""
    _checked_scope()
    if not any(config.reads_task for config in source.configs().values()):
        return inner(**call)
    cached = getattr(model, "_cached_continuous_batching_manager", None)
    if cached is not None:
        if "_generation_step" in vars(cached):
            return inner(**call)
        raise ValueError(
            "The manager kept for this model was made before an adapter whose router reads the "
            "task. Call `model.destroy_cached_continuous_batching_manager()` first."
        )
    _check_engine()
    settings = call.get("generation_config") or model.generation_config
    _check_supported(model, source, settings)
    given = call.get("continuous_batching_config")
    call["continuous_batching_config"] = _engine_config(
        given or getattr(settings, "continuous_batching_config", None)
    )
    manager = inner(**call)
    RoutedRequests(manager, model, source)
    return manager


def routed_batch(
    model: Any, source: TaskSource, inner: Callable[..., Any], call: dict[str, Any]
) -> Any:
    """`generate_batch` whose requests are embedded first, so that errors are raised, not logged."""
    task_embeds = call.pop(_KEY, None)
    if not source.task_readers() or not call["inputs"]:
        return inner(**call)
    _check_engine()
    unread = set(call) - set(inspect.signature(inner).parameters) - {"max_new_tokens"}
    if unread and (current_state() or TaskState()).owner is not source:  # not within `generate`
        raise ValueError(f"`generate_batch` does not read {sorted(unread)}. Use `generate`.")
    embeds = embeds_of_requests(model, source, call["inputs"], task_embeds)
    with user_scope(TaskState(adapter_embeds=embeds)):
        return inner(**call)


def check_paged_generate(call: Mapping[str, Any]) -> None:
    """Refuse what `generate(cache_implementation="paged")` would leave out in silence."""
    mask = call.get("attention_mask")
    if isinstance(mask, torch.Tensor) and not bool(mask.all()):
        raise ValueError("Padding is read as prompt. Pass lists of ids to `generate_batch`.")
    if call.get("logits_processor"):
        raise ValueError("Continuous batching drops a `logits_processor`. Use `generate`.")


def _check_engine() -> None:
    """Refuse the engines before transformers 5.18: they keep requests and settings otherwise."""
    if not hasattr(getattr(generation, "ContinuousBatchingConfig", None), "page_size"):
        raise ImportError(
            "Continuous batching by task needs the engine of transformers 5.18 or newer. Run "
            "`pip install 'transformers>=5.18'`, or use `generate`."
        )


def _checked_scope() -> TaskState:
    """The scope of this thread; refuses what it says to layers of this thread only."""
    scope = current_state() or TaskState()
    if scope.adapter_names is not None or scope.recorder is not None:
        raise ValueError("`adapter_names` and `record_gates` do not reach the engine's thread.")
    return scope


def _engine_config(config: Any) -> Any:
    """The engine's config without what is wrong for routers that read the task."""
    config = generation.ContinuousBatchingConfig() if config is None else deepcopy(config)
    compiled = config.varlen_compile_config or config.decode_compile_config
    compiled = compiled or config.default_compile_level
    if compiled or config.use_async_batching or any(config.cuda_graph_booleans):
        raise ValueError(
            "CUDA graphs, asynchronous batching and compilation cannot be used with routers that "
            "read the task. Leave them out of `continuous_batching_config`."
        )
    config.allow_block_sharing = False  # shared by token content, which is not all that is read
    config.use_cuda_graph = config.use_async_batching = False
    return config


def _check_supported(model: Any, source: TaskSource, settings: Any) -> None:
    """Refuse what the engine lacks, and layers that it gives a part of the tokens."""
    lacking = [name for name in _LACKING if getattr(settings, name, None)]
    if (settings.num_beams or 1) > 1:
        lacking.append("num_beams")
    if getattr(model.config.get_text_config(), "compile_config", None):
        lacking.append("compile_config")
    if getattr(model, "_device_mesh", None) is not None:
        lacking.append("tensor parallelism")
    if lacking:
        raise ValueError(f"Continuous batching does not support {lacking}. Use `generate`.")
    for layer in source.layers:
        if layer.layout.partial or layer is model.get_output_embeddings():
            raise ValueError(
                f"Layer `{layer.layout.name}` is given a part of the tokens of a packed batch. "
                "Leave it out with `exclude_modules`, or use `generate`."
            )
