"""What the arguments of a model's call say: rows, lengths, padding, where answers are."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .aux_loss import AuxLoss
from .prompts import IGNORED_LABEL
from .task_scope import TaskState


def bind(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def note_shape(state: TaskState, call: dict[str, Any]) -> None:
    """Note the rows of a call, the numbers of tokens in them and, for a recorder, the padding."""
    sequences = [
        value
        for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
        if isinstance(value := call.get(name), torch.Tensor) and value.dim() >= 2
    ]
    others = [v for v in call.values() if isinstance(v, torch.Tensor) and v.dim() >= 1]
    if sequences:
        state.rows = sequences[0].shape[0]
        if sequences[0].dim() > 2 and not sequences[0].is_floating_point():  # several choices a row
            state.rows *= sequences[0].shape[1]
        lengths = [value.shape[1 if value.is_floating_point() else -1] for value in sequences]
        labels = call.get("labels")
        if isinstance(labels, torch.Tensor) and labels.dim() == 2:  # shifted into decoder inputs
            lengths.append(labels.shape[1])
        hidden = call.get("encoder_outputs")
        if hidden is not None and isinstance(hidden[0], torch.Tensor):
            lengths.append(hidden[0].shape[1])
        state.lengths = tuple(lengths)
    elif others:
        state.rows, state.lengths = others[0].shape[0], ()
    if state.recorder is not None:
        state.token_mask = _token_mask(call, state)


def _token_mask(call: dict[str, Any], state: TaskState) -> torch.Tensor | None:
    """Which tokens of a call are no padding, `(rows, length)`; None where all count."""
    given = call.get("attention_mask")
    mask = given.bool() if isinstance(given, torch.Tensor) and given.dim() == 2 else None
    if call.get("input_ids") is None and call.get("inputs_embeds") is None:
        return None if state.lengths else mask  # a decoder's step has the mask of the encoder
    if mask is not None:
        state.prompt_mask = mask
        # A cache's mask covers earlier tokens as well.
        return mask[:, -state.lengths[0] :] if state.lengths else mask
    whole, rows = state.prompt_mask, state.rows
    if given is None or whole is None or rows is None or not state.lengths:
        return None
    if whole.shape[1] != state.lengths[0] or rows % whole.shape[0]:  # a step behind the prompt
        return None
    return whole.repeat_interleave(rows // whole.shape[0], dim=0)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def answers_are_in_input(model: nn.Module) -> bool:
    """Whether `input_ids` hold prompt and answer: in language models without an encoder.

    A classifier's labels stand for the whole text or for its tokens, all of which are prompt.
    """
    can_generate = getattr(model, "can_generate", None)
    return not _is_encoder_decoder(model) and (can_generate is None or bool(can_generate()))


def continues(call: dict[str, Any]) -> bool:
    """Whether a call goes on from the state of earlier calls, so that it has no whole prompt."""
    cache = call.get("past_key_values")
    if cache is not None and hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length())
    return bool(cache) or any(
        call.get(name) is not None for name in ("cache_params", "mems", "state")
    )


def aux_loss_of(
    model: nn.Module, call: dict[str, Any], coefficients: dict[str, float]
) -> AuxLoss | None:
    """What collects the load-balancing loss of a call; None where no adapter has one."""
    if not coefficients:
        return None
    mask = call.get("attention_mask")
    whole = isinstance(mask, torch.Tensor) and mask.dim() == 2
    aux = AuxLoss(coefficients, (mask.reshape(-1).bool() if whole else None,))  # type: ignore[union-attr]
    labels = call.get("labels")
    if isinstance(labels, torch.Tensor):
        labelled = labels != IGNORED_LABEL
        if _is_encoder_decoder(model):
            aux.masks += (labelled.reshape(-1),)
        if call.get("num_items_in_batch") is not None:
            predicted = labelled[..., 1:] if answers_are_in_input(model) else labelled
            aux.share = predicted.sum() / call["num_items_in_batch"]
    return aux
