"""How benchmarks measure methods: interleaved rounds, ratios, bytes kept for backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from methods import Method


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that a call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    methods: list[Method], run: Callable[[Method], None], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds per method and round; the order turns from round to round."""
    for method in methods:
        run(method)
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    for i in range(rounds):
        for j in range(len(methods)):
            method = methods[(i + j) % len(methods)]
            seconds[method.name].append(timed(lambda method=method: run(method), device))
    return seconds


def ratios(
    seconds: dict[str, list[float]], reference: str
) -> dict[str, tuple[float, float, float]]:
    """Median, smallest and largest ratio to the reference of the same round."""
    found = {}
    for name, values in seconds.items():
        per_round = [value / ref for value, ref in zip(values, seconds[reference], strict=True)]
        found[name] = (statistics.median(per_round), min(per_round), max(per_round))
    return found


def loss_of(
    method: Method, embeds: torch.Tensor, labels: torch.Tensor, autocast: bool
) -> torch.Tensor:
    """Forward from embeddings that ask for a gradient, as under gradient checkpointing."""
    leaf = embeds.detach().requires_grad_()
    with torch.autocast(embeds.device.type, embeds.dtype, enabled=autocast):
        return method.model(inputs_embeds=leaf, labels=labels, **method.call).loss


def train_step(
    method: Method, embeds: torch.Tensor, labels: torch.Tensor, autocast: bool = False
) -> None:
    """Forward and backward."""
    loss_of(method, embeds, labels, autocast).backward()
    for parameter in method.model.parameters():
        parameter.grad = None


def kept_bytes(
    method: Method, embeds: torch.Tensor, labels: torch.Tensor, autocast: bool = False
) -> int:
    """Bytes that autograd keeps for backward: each storage once, weights and buffers left out."""
    tensors = (*method.model.parameters(), *method.model.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(method, embeds, labels, autocast)
    total = sum(kept.values())
    del loss
    return total


def decode(method: Method, prompt: torch.Tensor, new_tokens: int) -> None:
    """Greedy generation with a KV cache."""
    with torch.no_grad():
        method.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            **method.call,
        )
