"""Wraps `forward` and `generate` of one model instance: where the task of a call comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .adapters import TaskMoELoraLayer, missing_task_message, wrong_dimension_message
from .aux_loss import AuxLossLog
from .base_layers import mark_positions
from .call_arguments import answers_are_in_input, aux_loss_of, bind, continues, note_shape
from .config import TaskMoELoraConfig
from .continuous_batching import check_paged_generate, routed_batch, routed_manager
from .prompts import packed_documents
from .recompute import carry_into_recompute
from .router import check_task_embeds
from .task_encoders import TaskEncoders
from .task_scope import GateRecorder, TaskState, current_state, entered
from .wrapping import ConditionedMethod

_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
_KEY = "_taskmoe_conditioner"


class Conditioner:
    """The adapted layers of one model, its encoders and its load-balancing loss.

    A plain attribute of the model, no module.

    Args:
        model: The base model, with adapters injected.
    """

    def __init__(self, model: nn.Module) -> None:
        self.encoders = TaskEncoders()
        self.aux_log = AuxLossLog()
        self.recorder: GateRecorder | None = None
        self.find_layers(model)

    def find_layers(self, model: nn.Module) -> None:
        """Look up the adapted layers; again after every injection."""
        self.layers = [m for m in model.modules() if isinstance(m, TaskMoELoraLayer)]

    def active(self, adapter_names: Sequence[str] | None = None) -> dict[str, int]:
        """Number of layers that each adapter acts on in a forward."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if not (layer.disable_adapters or layer.merged):
                for name in layer.active_adapters if adapter_names is None else adapter_names:
                    if name in layer.configs:
                        found[name] = found.get(name, 0) + 1
        return found

    def configs(self) -> dict[str, TaskMoELoraConfig]:
        """The configs of all adapters."""
        return {name: layer.configs[name] for layer in self.layers for name in layer.configs}

    def task_readers(
        self, adapter_names: Sequence[str] | None = None
    ) -> dict[str, TaskMoELoraConfig]:
        """The adapters of a forward whose router reads the task, with their configs."""
        configs, active = self.configs(), self.active(adapter_names)
        return {name: configs[name] for name in active if configs[name].reads_task}

    def aux_coefficients(self) -> dict[str, float]:
        """The weight of one layer's load-balancing loss, of the active adapters that have one."""
        configs = self.configs()
        return {
            name: configs[name].router_aux_loss_coef / layers
            for name, layers in self.active().items()
            if configs[name].router_aux_loss_coef > 0
        }


def install_conditioning(model: nn.Module) -> Conditioner:
    """Wrap the methods of this model instance. Idempotent.

    Args:
        model: The base model, with adapters injected.

    Returns:
        Its `Conditioner`.
    """
    conditioner = conditioner_of(model)
    if conditioner is None:
        conditioner = model.__dict__[_KEY] = Conditioner(model)
        wrap_outermost(model)
        mark_positions(model)
    conditioner.find_layers(model)
    return conditioner


def wrap_outermost(model: nn.Module) -> None:
    """Put the wrappers around whatever methods this instance has now, unless they are outermost.

    TRL's trainers set a `forward` of their own over the model's, which calls the backbone
    directly: a wrapper inside of it would see neither the call nor the labels.
    """
    for name in _METHODS:
        own = model.__dict__.get(name)
        if hasattr(model, name) and not isinstance(own, ConditionedMethod):
            model.__dict__[name] = ConditionedMethod(model, name, own, _METHODS[name])


def remove_conditioning(model: nn.Module) -> None:
    """Undo `install_conditioning`; what others wrapped around it since stays."""
    if model.__dict__.pop(_KEY, None) is None:
        return
    mark_positions(model, mark=False)
    for name in _METHODS:
        wrapper = model.__dict__.get(name)
        if isinstance(wrapper, ConditionedMethod):
            del model.__dict__[name]
            if wrapper.own is not None:
                model.__dict__[name] = wrapper.own


def conditioner_of(model: nn.Module) -> Conditioner | None:
    """The conditioner of a base model, or None."""
    return model.__dict__.get(_KEY)


def base_model_of(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel` (or inside DDP, or compiled), or the model itself.

    Raises:
        ValueError: If no Task-Aware MoELoRA adapter is on it.
    """
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "module", model) if not hasattr(model, "get_base_model") else model
    base: Any = model
    if hasattr(model, "get_base_model"):
        base = model.get_base_model()  # type: ignore[operator]
    if conditioner_of(base) is None:
        raise ValueError(
            f"`{type(model).__name__}` has no Task-Aware MoELoRA adapter. Call "
            "`get_peft_model(model, TaskMoELoraConfig(...))` or `PeftModel.from_pretrained(...)`."
        )
    return base


def _forward(
    model: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model's `forward` under the task of the call."""
    task_embeds = kwargs.pop("task_embeds", None)
    conditioner = conditioner_of(model)
    if conditioner is None:
        return inner(*args, **kwargs)
    outer = current_state()
    if outer is not None and task_embeds is None and outer.owner is conditioner:
        if outer.decoding is None:
            return inner(*args, **kwargs)  # inside a wrapper of its own
        note_shape(outer, bind(type(model), args, kwargs))  # a step of `generate`
        return inner(*args, **kwargs)
    call = bind(type(model), args, kwargs)
    if "write_index" in call and conditioner.task_readers():  # a manager that was made before
        raise ValueError(
            "This continuous batching manager was made before an adapter whose router reads the "
            "task. Make a new one."
        )
    state = _state_for(model, conditioner, call, task_embeds, outer)
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _carry_task_into_recompute(model)
    with entered(state):
        outputs = inner(*args, **kwargs)
    return outputs if state.aux is None else conditioner.aux_log.add_to_outputs(state.aux, outputs)


def _generate(
    model: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model's `generate` under the task of the call."""
    task_embeds = kwargs.pop("task_embeds", None)
    conditioner = conditioner_of(model)
    if conditioner is None:
        return inner(*args, **kwargs)
    call = {name: value for name, value in kwargs.items() if name != "labels"}
    if args:
        call["input_ids"] = args[0]
    elif "inputs" in call:
        call["input_ids"] = call["inputs"]
    state = _state_for(model, conditioner, call, task_embeds, current_state(), generates=True)
    if kwargs.get("cache_implementation") == "paged" and conditioner.task_readers():
        check_paged_generate(call)
    state.decoding = {}
    with entered(state):
        return inner(*args, **kwargs)


def _routed(
    run: Callable[..., Any],
    model: nn.Module,
    inner: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A method of continuous batching, as it was where the model has no adapter any more."""
    conditioner = conditioner_of(model)
    if conditioner is None:
        return inner(*args, **kwargs)
    call = dict(inspect.signature(inner).bind(*args, **kwargs).arguments)
    further = call.pop("kwargs", {})
    return run(model, conditioner, inner, {**call, **further})


_METHODS: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "generate": _generate,
    "generate_batch": partial(_routed, routed_batch),
    "init_continuous_batching": partial(_routed, routed_manager),
}


def _carry_task_into_recompute(model: nn.Module) -> None:
    """Make whatever checkpoints recompute under the task of its forward.

    At each forward, so that it does not matter when and how checkpointing was switched on.
    """
    for module in model.modules():
        for attribute in _CHECKPOINT_ATTRIBUTES:
            checkpoint = module.__dict__.get(attribute)
            if checkpoint is not None:
                setattr(module, attribute, carry_into_recompute(checkpoint))


def _state_for(
    model: nn.Module,
    conditioner: Conditioner,
    call: dict[str, Any],
    task_embeds: torch.Tensor | dict[str, torch.Tensor] | None,
    outer: TaskState | None,
    generates: bool = False,
) -> TaskState:
    """The state of one call: the given task, the outer scope's, or the encoders', in this order.

    Raises:
        ValueError: If a task is needed and missing, or does not fit the batch.
    """
    outer = outer or TaskState()
    learns = model.training and torch.is_grad_enabled() and not generates
    recorder = outer.recorder or (conditioner.recorder if learns else None)
    state = TaskState(adapter_names=outer.adapter_names, recorder=recorder, owner=conditioner)
    note_shape(state, call)
    readers = conditioner.task_readers(outer.adapter_names)
    input_ids = call.get("input_ids")
    if isinstance(task_embeds, dict):  # by adapter
        for embeds in task_embeds.values():
            check_task_embeds(embeds)
        state.adapter_embeds = task_embeds
    elif task_embeds is not None:
        check_task_embeds(task_embeds)
        state.task_embeds = task_embeds
    elif outer.task_embeds is not None:
        state.task_embeds, state.token_tasks = outer.task_embeds, outer.token_tasks
    elif input_ids is not None and any(
        conditioner.encoders.known(name, config) for name, config in readers.items()
    ):
        if continues(call) and not generates and answers_are_in_input(model):
            raise ValueError(
                "This forward goes on from a cache, so its `input_ids` are not the whole prompt. "
                "Pass `task_embeds=encoder(prompts)` at each step, decode with `generate`, or run "
                "the loop inside `with task_context(encoder(prompts)):`."
            )
        prompts = conditioner.encoders.reader_for(model).read(
            input_ids,
            call.get("labels"),
            call.get("attention_mask"),
            call.get("position_ids"),
            answers=answers_are_in_input(model) and not generates,
            training=model.training and not generates,
        )
        state.token_tasks = prompts.token_tasks
        state.adapter_embeds = conditioner.encoders.embed(readers, prompts.texts, input_ids.device)
    if readers:
        _check_fit(state, readers, call)
    if learns:
        state.aux = aux_loss_of(model, call, conditioner.aux_coefficients())
    return state


def _check_fit(
    state: TaskState, readers: dict[str, TaskMoELoraConfig], call: dict[str, Any]
) -> None:
    """Check the task embeddings of a call against its adapters and rows; find packed documents."""
    for name, config in readers.items():
        embeds = state.embeds_of(name)
        if embeds is None:
            raise ValueError(missing_task_message(name))
        if embeds.shape[1] != config.task_dim:
            raise ValueError(wrong_dimension_message(name, embeds.shape[1], config.task_dim))
        count = embeds.shape[0]
        if state.rows is None or state.token_tasks is not None or count == state.rows:
            continue
        documents = packed_documents(call.get("position_ids"), call.get("attention_mask"))
        if documents is not None and count == int(documents[-1]) + 1:
            state.token_tasks = documents
            continue
        ids = call.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.dim() > 2 and count == ids.shape[0]:
            continue  # one task for all choices of a row
        raise ValueError(
            f"There are {count} task embeddings for a batch of {state.rows} rows. Pass "
            f"`task_embeds` of shape ({state.rows}, {embeds.shape[1]}), one row per example."
        )
    if state.token_tasks is not None and state.adapter_names is not None:
        raise ValueError(
            "`adapter_names` name one adapter a row, but these rows hold several documents. "
            "Pass them unpacked."
        )
