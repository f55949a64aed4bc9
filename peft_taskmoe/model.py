"""The tuner: injects the adapted layers and gives every forward of the model its task.

It wraps `forward` and `generate` of the base model's instance, so that the scope opens wherever the model is called from: through
`PeftModel`, through a Trainer, or bare after `inject_adapter_in_model`. Nothing of the model's class is touched.
"""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .automatic import IGNORED_LABEL, PromptEncoder, packed_documents
from .conditioning import (
    AddAuxLoss,
    AuxLoss,
    TaskState,
    WeighAuxLoss,
    carry_into_recompute,
    check_task_embeds,
    current_state,
    entered,
)
from .config import TaskMoELoraConfig
from .encoder import TaskEncoder, TaskEncoderConfig
from .layer import (
    Linear,
    TaskMoELoraLayer,
    missing_task_message,
    repeat_names,
    wrong_dimension_message,
)
from .peft_type import PREFIX

_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
_READ_THE_SAME = (  # names of children of one module
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
_TRAINED_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class Conditioner:
    """What the wrapped `forward` and `generate` of one model need: its adapted layers and its encoder.

    It is a plain attribute of the model, no module: the encoder's weights stay out of parameters and state dicts.

    Args:
        model: The base model, with adapters injected.
    """

    def __init__(self, model: nn.Module) -> None:
        self.prompt_encoder: PromptEncoder | None = None
        self._aux_losses: deque[torch.Tensor] = deque(maxlen=10_000)  # since `take_aux_loss`
        self._warned_of_aux_loss = False
        self.find_layers(model)

    def find_layers(self, model: nn.Module) -> None:
        """Look up the adapted layers; again after every injection."""
        self.layers = [m for m in model.modules() if isinstance(m, TaskMoELoraLayer)]
        self.group(layers_that_read_the_same(model))

    def group(self, groups: Iterable[tuple[Linear, ...]]) -> None:
        """Let the layers of each group be computed together, when the first of them is called."""
        self.together = {group[0]: group for group in groups if len(group) > 1}
        for layer in self.layers:
            layer.together = self.together.get(layer, ())

    def part(self, state: TaskState) -> None:
        """Take layers out of their groups that were called with other tensors than expected in a forward, or not at all."""
        left = state.apart.union(state.made_ahead)
        state.made_ahead.clear()
        if left:
            halves = [
                tuple(layer for layer in group if (layer in left) is taken_out)
                for group in self.together.values()
                for taken_out in (
                    False,
                    True,
                )  # k and v may still read the same, if it was q that did not
            ]
            self.group(halves)

    def adapters_that_read_the_task(
        self, adapter_names: Sequence[str] | None
    ) -> list[tuple[str, int]]:
        """Names and task dimensions of the adapters this forward uses whose router reads the task."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if layer.disable_adapters or layer.merged:
                continue
            for name in layer.active_adapters if adapter_names is None else adapter_names:
                shape = layer.shapes.get(name)
                if shape is not None and shape.reads_task:
                    found[name] = layer.configs[name].task_dim
        return list(found.items())

    def aux_layers(self) -> dict[str, int]:
        """Number of layers per active adapter that has a load-balancing loss."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if layer.disable_adapters or layer.merged:
                continue
            for name in layer.active_adapters:
                if name in layer.configs and layer.configs[name].router_aux_loss_coef > 0:
                    found[name] = found.get(name, 0) + 1
        return found

    @torch.compiler.disable
    def add_aux_loss(self, aux: AuxLoss, outputs: Any) -> Any:
        """Add the collected load-balancing loss to the loss of the outputs; see to its gradient where a trainer computes that loss."""
        by_name = isinstance(outputs, dict)
        loss = (
            outputs.get("loss")
            if by_name
            else outputs[0]
            if isinstance(outputs, tuple) and outputs
            else None
        )
        log_probs, counted = (
            (outputs.get("log_probs"), outputs.get("label_mask")) if by_name else (None, None)
        )
        added = isinstance(loss, torch.Tensor) and loss.dim() == 0
        if added and by_name:
            outputs["loss"] = AddAuxLoss.apply(loss, aux)
        elif added:
            outputs = (AddAuxLoss.apply(loss, aux), *outputs[1:])
        if isinstance(log_probs, torch.Tensor) and isinstance(counted, torch.Tensor):
            outputs["log_probs"] = WeighAuxLoss.apply(
                log_probs, counted, aux, self.warn_of_aux_loss
            )
        elif not added:
            self.warn_of_aux_loss()
            return outputs
        self._aux_losses.append(torch.as_tensor(aux.value))
        return outputs

    def warn_of_aux_loss(self) -> None:
        """Say once that the load-balancing loss does not reach the loss that is trained on."""
        if self._warned_of_aux_loss:
            return
        self._warned_of_aux_loss = True
        warnings.warn(
            f"`router_aux_loss_coef` of {list(self.aux_layers())} has no effect here: the model adds its load-balancing loss to the "
            "loss it returns, but this loss is computed outside of it (label smoothing, DPO, a loss function of your own). "
            "Train with the model's own loss, or set the coefficient to 0.",
            UserWarning,
            stacklevel=3,
        )

    @property
    def aux_loss(self) -> float | None:
        """The load-balancing loss (coefficient included) of the last forward that had one since `take_aux_loss`."""
        return float(self._aux_losses[-1]) if self._aux_losses else None

    def take_aux_loss(self) -> float | None:
        """Its mean since this was last called; None where there was none."""
        if not self._aux_losses:
            return None
        mean = float(torch.stack(list(self._aux_losses)).mean())
        self._aux_losses.clear()
        return mean


def layers_that_read_the_same(model: nn.Module) -> list[tuple[Linear, ...]]:
    """Adapted layers that are expected to be given the very same tensor, in the order of their calls: q, k and v, gate and up.

    By the names that transformers gives them. In an encoder-decoder q is left out, which its cross-attention gives another tensor
    than k and v. A layer whose expectation fails is parted from the others (`Conditioner.part`).
    """
    found = []
    for parent in model.modules():
        for names in _READ_THE_SAME:
            named = names[1:] if len(names) > 2 and _is_encoder_decoder(model) else names
            layers = [parent._modules.get(name) for name in named]
            group = tuple(layer for layer in layers if isinstance(layer, Linear))
            if len({layer.in_features for layer in group}) == 1:
                found.append(group)
    return found


def install_conditioning(model: nn.Module) -> Conditioner:
    """Wrap `forward` and `generate` of this model instance; harmless when done already.

    Args:
        model: The base model, with adapters injected.

    Returns:
        Its `Conditioner`.
    """
    conditioner = conditioner_of(model)
    if conditioner is not None:
        conditioner.find_layers(model)
        return conditioner
    conditioner = Conditioner(model)
    model.__dict__["_taskmoe_conditioner"] = conditioner
    wrap_outermost(model)
    return conditioner


def wrap_outermost(model: nn.Module) -> None:
    """Put the wrappers around whatever `forward` and `generate` this instance has now, unless they are outermost already.

    TRL's trainers set a `forward` of their own over the model's, which hands labels to the LM head and calls the
    backbone directly: a wrapper inside of it would see neither the call nor the labels.
    """
    for name, conditioned in (("forward", _forward), ("generate", _generate)):
        own = model.__dict__.get(name)
        if hasattr(model, name) and getattr(own, "func", None) is not conditioned:
            model.__dict__[name] = _bound(
                conditioned, model, own, name, _with_task_embeds(getattr(model, name))
            )


def remove_conditioning(model: nn.Module) -> None:
    """Undo `install_conditioning`; what others wrapped around it since stays, and finds the model as it was."""
    if model.__dict__.pop("_taskmoe_conditioner", None) is None:
        return
    for name, conditioned in (("forward", _forward), ("generate", _generate)):
        wrapper = model.__dict__.get(name)
        if getattr(wrapper, "func", None) is not conditioned:
            continue
        own = wrapper.args[1]  # type: ignore[union-attr]
        if own is None:
            del model.__dict__[name]
        else:
            model.__dict__[name] = own


def _bound(
    conditioned: Callable[..., Any],
    model: nn.Module,
    own: Callable[..., Any] | None,
    name: str,
    signature: inspect.Signature,
) -> Callable[..., Any]:
    """`conditioned` for one model, around the instance's `own` method or, if None, its class's.

    It is a partial, which copies and pickles with the model, as a bound method would not.
    """
    bound = partial(conditioned, model, own)
    bound.__signature__ = signature  # type: ignore[attr-defined]
    bound.__name__ = name  # type: ignore[attr-defined]
    return bound


def conditioner_of(model: nn.Module) -> Conditioner | None:
    """The conditioner of a base model, or None."""
    return model.__dict__.get("_taskmoe_conditioner")


def _forward(
    model: nn.Module,
    own: Callable[..., Any] | None,
    /,
    *args: Any,
    task_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The model's `forward` under the task of the call."""
    inner = own or partial(type(model).forward, model)
    outer = current_state()
    conditioner = conditioner_of(model)
    if conditioner is None:
        return inner(*args, **kwargs)
    if outer is not None and task_embeds is None:
        if outer.owner is conditioner:
            return inner(
                *args, **kwargs
            )  # inside a wrapper of its own, around what was wrapped since
        if outer.memo is not None:
            if outer.recorder is not None:
                outer.token_mask = _token_mask(_bind(type(model), args, kwargs))
            outputs = inner(*args, **kwargs)  # a step of `generate`, whose state is set
            if outer.made_ahead:
                conditioner.part(outer)
                outer.together = conditioner.together
            return outputs
    call = _bind(type(model), args, kwargs)
    state = _state_for_forward(model, conditioner, call, task_embeds, outer)
    state.owner = conditioner
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _carry_task_into_recompute(model)
    with entered(state):
        outputs = inner(*args, **kwargs)
    if state.made_ahead or state.apart:
        conditioner.part(state)
    return outputs if state.aux is None else conditioner.add_aux_loss(state.aux, outputs)


def _carry_task_into_recompute(model: nn.Module) -> None:
    """Make whatever checkpoints recompute under the task of its forward.

    Done at each forward, so that it does not matter when and by which method checkpointing was switched on.
    """
    for module in model.modules():
        for attribute in _CHECKPOINT_ATTRIBUTES:
            checkpoint = module.__dict__.get(attribute)
            if checkpoint is not None:
                setattr(module, attribute, carry_into_recompute(checkpoint))


def _generate(
    model: nn.Module,
    own: Callable[..., Any] | None,
    /,
    *args: Any,
    task_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The model's `generate` under the task of the call."""
    inner = own or partial(type(model).generate, model)  # type: ignore[attr-defined]
    conditioner = conditioner_of(model)
    if conditioner is None:
        return inner(*args, **kwargs)
    call = dict(kwargs)
    if args:
        call["input_ids"] = args[0]
    elif "inputs" in call:
        call["input_ids"] = call["inputs"]
    call.pop("labels", None)
    outer = current_state()
    state = _state_for_forward(model, conditioner, call, task_embeds, outer, generates=True)
    state.rows = state.length = None
    state.memo = {}
    with entered(state):
        return inner(*args, **kwargs)


def _with_task_embeds(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of `function` with `task_embeds` in it, so that a Trainer keeps a column of that name."""
    signature = inspect.signature(function)
    if "task_embeds" in signature.parameters:
        return signature  # wrapped before, with something of others' in between
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
    ]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extra = inspect.Parameter("task_embeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    return inspect.Signature([*parameters, extra, *rest])


def _bind(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _batch_shape(call: dict[str, Any]) -> tuple[int | None, int | None]:
    """Rows and tokens per row of a batch, as far as its arguments tell."""
    for name in ("input_ids", "inputs_embeds"):
        value = call.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    for value in call.values():
        if isinstance(value, torch.Tensor) and value.dim() >= 1:
            return value.shape[0], None
    return None, None


def _token_mask(call: dict[str, Any]) -> torch.Tensor | None:
    """Which of the tokens given to this forward are no padding; a cache's mask covers earlier tokens as well."""
    mask = call.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    length = _batch_shape(call)[1]
    return (mask if length is None else mask[:, -length:]).bool()


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _answers_are_in_input(model: nn.Module) -> bool:
    """Whether `input_ids` hold prompt and answer, told apart by `labels`: in language models without an encoder.

    A classifier's labels stand for the whole text or for its tokens, all of which are prompt.
    """
    can_generate = getattr(model, "can_generate", None)
    return not _is_encoder_decoder(model) and (can_generate is None or bool(can_generate()))


def _state_for_forward(
    model: nn.Module,
    conditioner: Conditioner,
    call: dict[str, Any],
    task_embeds: torch.Tensor | None,
    outer: TaskState | None,
    generates: bool = False,
) -> TaskState:
    """The state of one forward (or generation): the given task, the outer scope's, or the encoder's, in this order.

    Raises:
        ValueError: If a task is needed and missing, or does not fit the batch.
    """
    adapter_names = None if outer is None else outer.adapter_names
    rows, length = _batch_shape(call)
    state = TaskState(
        adapter_names=adapter_names,
        rows=rows,
        length=length,
        recorder=None if outer is None else outer.recorder,
        together=conditioner.together,
    )
    if state.recorder is not None:
        state.token_mask = _token_mask(call)
    readers = conditioner.adapters_that_read_the_task(adapter_names)
    if task_embeds is not None:
        check_task_embeds(task_embeds)
        state.task_embeds = task_embeds
    elif outer is not None and outer.task_embeds is not None:
        state.task_embeds, state.token_tasks = outer.task_embeds, outer.token_tasks
    elif readers and conditioner.prompt_encoder is not None and call.get("input_ids") is not None:
        found = conditioner.prompt_encoder.tasks_of(
            call["input_ids"],
            call.get("labels"),
            call.get("attention_mask"),
            call.get("position_ids"),
            answers=_answers_are_in_input(model),
            training=model.training and not generates,
        )
        state.task_embeds, state.token_tasks = found.task_embeds, found.token_tasks
    if readers:
        _check_fit(state, readers, rows, call)
    aux_layers = conditioner.aux_layers() if model.training and torch.is_grad_enabled() else None
    if aux_layers:
        mask = call.get("attention_mask")
        whole = isinstance(mask, torch.Tensor) and mask.dim() == 2
        state.aux = AuxLoss(mask.reshape(-1).bool() if whole else None, aux_layers)  # type: ignore[union-attr]
        labels = call.get("labels")
        if isinstance(labels, torch.Tensor):
            labelled = labels != IGNORED_LABEL
            if _is_encoder_decoder(model):
                state.aux.decoder_mask = labelled.reshape(-1)
            if call.get("num_items_in_batch") is not None:
                predicted = labelled[..., 1:] if _answers_are_in_input(model) else labelled
                state.aux.share = predicted.sum() / call["num_items_in_batch"]
    return state


def _check_fit(
    state: TaskState, readers: list[tuple[str, int]], rows: int | None, call: dict[str, Any]
) -> None:
    embeds = state.task_embeds
    if embeds is None:
        raise ValueError(missing_task_message(readers[0][0]))
    for name, task_dim in readers:
        if embeds.shape[1] != task_dim:
            raise ValueError(wrong_dimension_message(name, embeds.shape[1], task_dim))
    if rows is None or state.token_tasks is not None or embeds.shape[0] == rows:
        return
    documents = packed_documents(call.get("position_ids"), call.get("attention_mask"))
    if documents is not None and embeds.shape[0] == int(documents[-1]) + 1:
        state.token_tasks = documents
        return
    raise ValueError(
        f"There are {embeds.shape[0]} task embeddings for a batch of {rows} rows, but every row is routed by its own. "
        f"Pass `task_embeds` of shape ({rows}, {embeds.shape[1]}): one row per example, repeated where examples share a task."
    )


class TaskMoELoraModel(BaseTuner):
    """Task-Aware MoELoRA on a model: what `get_peft_model(model, TaskMoELoraConfig(...))` builds.

    Args:
        model: The model to adapt, in place.
        config: A `TaskMoELoraConfig`.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create empty adapter weights on the meta device, to be loaded.

    Source: the method of Guo, Sanz-Cruzado, McCreadie, ECAI 2025, DOI 10.3233/FAIA251308.
    """

    prefix: str = PREFIX
    tuner_layer_cls = TaskMoELoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name; "all-linear" is the default

    def _prepare_adapter_config(
        self, peft_config: TaskMoELoraConfig, model_config: dict[str, Any]
    ) -> TaskMoELoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: TaskMoELoraConfig, key: str) -> Any:
        """As every tuner matches, with two gaps of `"all-linear"` closed.

        It keeps off the heads that PEFT trains in full for every task type, not for `SEQ_CLS` alone, and it goes together
        with `layers_to_transform`.
        """
        name = key.rpartition(".")[2]
        if name in _TRAINED_HEADS.get(peft_config.task_type or "", ()):
            return False
        if peft_config.layers_to_transform is not None and key in (
            peft_config.target_modules or ()
        ):
            peft_config = copy(
                peft_config
            )  # PEFT counts layers for names that end a path, not for whole paths
            peft_config.target_modules = {name}  # type: ignore[assignment]
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: TaskMoELoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        r = peft_config.rank_pattern.get(rank_key, peft_config.r)
        lora_alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        is_conv1d = isinstance(base, Conv1D)
        if is_conv1d or isinstance(base, nn.Linear):
            peft_config.fan_in_fan_out = is_conv1d
        if isinstance(target, TaskMoELoraLayer):
            target.update_layer(adapter_name, r, lora_alpha, peft_config)
            return
        layer = Linear(target, adapter_name, r, lora_alpha, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Create the adapted layers, as every tuner does, and open the way for the task."""
        super().inject_adapter(model, *args, **kwargs)
        install_conditioning(model)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what LoRA's adapters can do and routed ones cannot.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Adapters with a router cannot be combined by weights: each routes its own experts, and no mean of two routers routes "
            "both. Activate them together (`model.base_model.set_adapter([...])`), which adds their updates, or combine what "
            "`to_lora` makes of each."
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_conditioning(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around `forward` and `generate`: here `adapter_names` enter the scope."""
        wrap_outermost(self.model)
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        outer = current_state() or TaskState()
        state = TaskState(
            task_embeds=outer.task_embeds, adapter_names=list(names), recorder=outer.recorder
        )
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, names=list(names)), with_kwargs=True
            )
            for module in self.model.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            with entered(state):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first."
            )
        known = set(self.peft_config)
        unknown = sorted(set(names) - known - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f'This model has {", ".join(sorted(known))}, and "__base__" for none.'
            )
        if any(
            layer.merged for layer in self.model.modules() if isinstance(layer, TaskMoELoraLayer)
        ):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> Any:
    """Hand each row's adapter to a module that is saved with the adapters."""
    rows = next(
        value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)
    )
    kwargs["adapter_names"] = repeat_names(names, rows)
    return args, kwargs


def base_model_of(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel` (or inside DDP, or compiled), or the model itself.

    Raises:
        ValueError: If no Task-Aware MoELoRA adapter is on it.
    """
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "module", model) if not hasattr(model, "get_base_model") else model
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if conditioner_of(base) is None:
        raise ValueError(
            f"`{type(model).__name__}` has no Task-Aware MoELoRA adapter, so there is no router to give a task to. "
            "Call `get_peft_model(model, TaskMoELoraConfig(...))` or `PeftModel.from_pretrained(...)` first."
        )
    return base


def attach_task_encoder(
    model: nn.Module, encoder: TaskEncoder | None = None, tokenizer: Any = None
) -> nn.Module:
    """Give a model its task encoder: from here on the task embedding follows from `input_ids`.

    In `forward` the task text is what precedes the first label that is not -100 (everything, where there are no labels), in
    `generate` it is `input_ids`; special tokens and padding are left out. Works in any trainer, with packing, in
    pipelines. A `task_embeds` argument still wins. The encoder stays outside the model: not trained, not saved.

    Args:
        model: A model with a Task-Aware MoELoRA adapter, wrapped in `PeftModel` or not.
        encoder: The encoder; None reads its name and settings from the adapter's config and loads it.
        tokenizer: The tokenizer of the adapted model; None loads it from the base model's name.

    Returns:
        The same model.

    Raises:
        ValueError: If the encoder's dimension differs from the adapter's `task_dim`, or the config names no encoder.
    """
    base = base_model_of(model)
    wrap_outermost(base)
    conditioner = conditioner_of(base)
    assert conditioner is not None
    configs: dict[str, TaskMoELoraConfig] = {
        name: layer.configs[name] for layer in conditioner.layers for name in layer.configs
    }
    active = [
        name
        for layer in conditioner.layers
        for name in layer.active_adapters
        if name in layer.configs
    ]
    if encoder is None:
        encoder = TaskEncoder.from_config(_encoder_config(configs, active))
    if tokenizer is None:
        from transformers import AutoTokenizer

        name = getattr(getattr(base, "config", None), "_name_or_path", None) or getattr(
            base, "name_or_path", None
        )
        if not name:
            raise ValueError(
                "The base model has no name to load its tokenizer from, and without the tokenizer `input_ids` cannot be read. "
                "Pass it: `attach_task_encoder(model, encoder, tokenizer)`."
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
    for name, config in configs.items():
        if "task" not in config.router_inputs:
            continue
        if config.task_dim != encoder.task_dim:
            raise ValueError(
                f'The encoder gives vectors of {encoder.task_dim} dimensions, but the router of adapter "{name}" was built '
                f"for `task_dim={config.task_dim}`. Build the adapter with `TaskMoELoraConfig(task_dim={encoder.task_dim})`, or "
                "attach the encoder it was trained with."
            )
        if config.task_encoder is None:
            config.task_encoder = encoder.config
    conditioner.prompt_encoder = PromptEncoder(encoder, tokenizer)
    return model


def _encoder_config(
    configs: dict[str, TaskMoELoraConfig], active: Sequence[str]
) -> TaskEncoderConfig:
    for name in [*active, *configs]:
        found = configs[name].task_encoder
        if isinstance(found, TaskEncoderConfig):
            return found
    raise ValueError(
        "The adapter's config names no task encoder (`task_encoder` is None), so none can be loaded. "
        'Pass one: `attach_task_encoder(model, TaskEncoder("Salesforce/codet5-base"), tokenizer)`.'
    )
