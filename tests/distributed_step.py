"""Gradients of a tiny model, computed by two processes that share the batch and, by FSDP, the
weights.

    torchrun --nproc-per-node 2 distributed_step.py OUT

Run by `test_distributed.py`. `OUT` gets, for each way of sharing, the gradient of every trained
parameter by name, and the adapter as it is saved; `"alone"` are those of one process with the
whole batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_taskmoe import TaskMoELoraConfig
from scripted import tiny_llama

IDS = torch.arange(4 * 12).view(4, 12) % 200 + 5
TASK = torch.linspace(-1, 1, 4 * 6).view(4, 6)
PREFIXES = ("_fsdp_wrapped_module.", "module.")


def adapted(checkpointing: bool) -> nn.Module:
    """The same model in every process."""
    model = get_peft_model(
        tiny_llama(),
        TaskMoELoraConfig(task_type="CAUSAL_LM", task_dim=6, num_experts=3, r=2, lora_dropout=0.0),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "taskmoe_lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.double()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def with_ddp(model: nn.Module) -> nn.Module:
    """A copy of everything in every process."""
    return DistributedDataParallel(model)


def with_fsdp1(model: nn.Module) -> nn.Module:
    """As the Trainer wraps a PEFT model: every trained leaf by itself, every layer of the model,
    and the rest.
    """
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def with_fsdp2(model: nn.Module) -> nn.Module:
    """The same units by `fully_shard`."""
    mesh = init_device_mesh("cpu", (2,))
    policy = fsdp_auto_wrap_policy(model)
    for module in reversed(list(model.modules())):
        if module is not model and policy(module=module, recurse=False, nonwrapped_numel=0):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def with_fsdp2_by_layer(model: nn.Module) -> nn.Module:
    """Units are whole layers, adapters included."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of all trained parameters, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            for prefix in PREFIXES:
                name = name.replace(prefix, "")
            found[name] = (
                None if grad is None else getattr(grad, "full_tensor", lambda g=grad: g)().clone()
            )
    return found


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter, gathered from all processes."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return get_peft_model_state_dict(getattr(model, "module", model), state_dict=state)


def step(
    wrap: Callable[[nn.Module], nn.Module] | None, checkpointing: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients after forward and backward, and the adapter; without `wrap`, of the mean of both
    processes' losses.
    """
    model = adapted(checkpointing)
    if wrap is None:
        losses = [
            model(input_ids=IDS[i::2], labels=IDS[i::2], task_embeds=TASK[i::2]).loss
            for i in (0, 1)
        ]
        (sum(losses) / 2).backward()
        return gradients(model), get_peft_model_state_dict(model)
    model = wrap(model)
    mine = slice(dist.get_rank(), None, 2)
    model(input_ids=IDS[mine], labels=IDS[mine], task_embeds=TASK[mine]).loss.backward()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return gradients(model), {}  # its state dict needs an accelerator
    return gradients(model), saved(model)


def main(out: str) -> None:
    """All ways, with and without gradient checkpointing."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways = {
        "alone": None,
        "ddp": with_ddp,
        "fsdp1": with_fsdp1,
        "fsdp2": with_fsdp2,
        "fsdp2 by layer": with_fsdp2_by_layer,
    }
    found = {(name, on): step(wrap, on) for name, wrap in ways.items() for on in (False, True)}
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    # gloo's threads may still let go of tensors: an interpreter that ends meanwhile is aborted by
    # them.
    os._exit(0)
