"""The methods that benchmarks compare, on a Llama of SmolLM2-135M's shape."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_taskmoe import TaskMoELoraConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK_DIM = 768
COMMON = {"task_type": "CAUSAL_LM", "target_modules": LINEARS}


@dataclass
class Method:
    """A model and how it is called."""

    name: str
    model: nn.Module
    call: dict[str, torch.Tensor] = field(default_factory=dict)


def base_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A frozen Llama of SmolLM2-135M's shape, with the same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(device=args.device, dtype=getattr(torch, args.dtype))
    return model.requires_grad_(False)


def build(name: str, args: argparse.Namespace, task: torch.Tensor, dropout: float) -> Method:
    """The method of a name, such as "frozen base", "LoRA-36", "ours 8x4" or "ours 8x4 token".

    Args:
        name: Its name.
        args: `vocab`, `layers`, `device`, `dtype`, `autocast`.
        task: `(rows, TASK_DIM)` task embeddings.
        dropout: Of the adapters.
    """
    kind, _, size = name.replace("LoRA-", "LoRA ", 1).partition(" ")
    if name == "frozen base":
        method = Method(name, base_model(args))
    elif kind == "LoRA":
        config = LoraConfig(r=int(size), lora_alpha=int(size), lora_dropout=dropout, **COMMON)
        method = Method(name, adapted(config, args))
    elif kind == "ours":
        method = _ours(name, args, task, dropout)
    elif name == "Poly":
        config = PolyConfig(r=4, n_tasks=1, n_skills=8, n_splits=1, poly_type="poly", **COMMON)
        ids = torch.zeros(task.shape[0], dtype=torch.long, device=args.device)
        method = Method(name, adapted(config, args), {"task_ids": ids})
    elif name == "X-LoRA":
        method = Method(name, _x_lora(args))
    elif name == "loop 8x4":
        model = replaced(
            base_model(args), lambda base: LoopedExperts(base, 8, 4, 32, dropout, task)
        )
        method = Method(name, model)
    elif name == "bare products":
        method = Method(name, replaced(base_model(args), lambda base: BareLinear(base, 8, 4)))
    else:
        raise ValueError(f"There is no method `{name}`.")
    for parameter_name, parameter in method.model.named_parameters():
        if parameter.requires_grad and "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)  # as after some training: no product is with zeros
    method.model.to(args.device)
    return method


def adapted(config: Any, args: argparse.Namespace) -> nn.Module:
    """The base model with an adapter of PEFT's."""
    return get_peft_model(base_model(args), config, autocast_adapter_dtype=args.autocast)


def _ours(name: str, args: argparse.Namespace, task: torch.Tensor, dropout: float) -> Method:
    _, size, *inputs = name.split()
    num_experts, r = map(int, size.split("x"))
    config = TaskMoELoraConfig(
        num_experts=num_experts,
        r=r,
        lora_alpha=num_experts * r,
        lora_dropout=dropout,
        task_dim=TASK_DIM,
        router_inputs=inputs[0] if inputs else "token+task",
        **COMMON,
    )
    call = {} if inputs == ["token"] else {"task_embeds": task}
    return Method(name, adapted(config, args), call)


def _x_lora(args: argparse.Namespace) -> nn.Module:
    model = base_model(args)
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        adapted(LoraConfig(r=4, lora_alpha=4, **COMMON), args).save_pretrained(folder)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=576,
            xlora_depth=1,
            adapters={str(i): folder for i in range(8)},
        )
        return get_peft_model(model, config)


def replaced(model: nn.Module, layer_of: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with other layers in the place of its linears."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS:
                setattr(module, name, layer_of(child))
    return model


class LoopedExperts(nn.Module):
    """The method as most codes write it: a loop over experts, a pair of products each."""

    def __init__(
        self,
        base: nn.Linear,
        num_experts: int,
        r: int,
        alpha: float,
        dropout: float,
        task: torch.Tensor,
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout, self.task = base, alpha / r, dropout, task
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        experts = range(num_experts)
        self.a = nn.ModuleList(nn.Linear(base.in_features, r, **options) for _ in experts)
        self.b = nn.ModuleList(nn.Linear(r, base.out_features, **options) for _ in experts)
        self.router = nn.Linear(base.in_features + TASK_DIM, num_experts, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One product pair per expert."""
        out, task = self.base(x), self.task.to(x.dtype)
        task = task.repeat_interleave(x.shape[0] // task.shape[0], 0)[:, None]
        inputs = torch.cat((x, task.expand(-1, x.shape[1], -1)), -1)
        gates = torch.softmax(self.router(inputs).float(), -1).to(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            out = out + gates[..., i : i + 1] * b(a(dropped)) * self.scaling
        return out


class BareLinear(nn.Module):
    """The matrix products of our method alone: no softmax, gates, task or dropout."""

    def __init__(self, base: nn.Linear, num_experts: int, r: int) -> None:
        super().__init__()
        options = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base, rank = base, num_experts * r
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        self.router = nn.Parameter(torch.randn(num_experts, base.in_features, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`W x + B A x`; the router's rows beside A get no use."""
        return BareProducts.apply(x, self.base.weight, self.a, self.lora_B, self.router)


class BareProducts(torch.autograd.Function):
    """Each product in the memory order that is fastest on a CPU by itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        """The output `(..., out)` of base weight, A, B and the router's rows."""
        weight, a, b, router = weights
        h = (x.flatten(0, -2) @ torch.cat((a, router)).t())[:, : a.shape[0]].clone()
        out = F.linear(x, weight)
        out.view(-1, out.shape[-1]).addmm_(h, b.t())
        ctx.save_for_backward(x, h, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, h, weight, a, b, router = ctx.saved_tensors
        tokens_x, dy, rank = x.flatten(0, -2), grad_out.flatten(0, -2), a.shape[0]
        left = x.new_zeros(tokens_x.shape[0], rank + router.shape[0])
        torch.mm(dy, b, out=left[:, :rank])
        if x.dtype == torch.float32:  # as MKL has it; half precision as oneDNN
            grad_b, grads = dy.t() @ h, (tokens_x.t() @ left).t()
        else:
            grad_b, grads = (h.t() @ dy).t(), left.t() @ tokens_x
        grad_x = (dy @ weight).addmm_(left, torch.cat((a, router)))
        return grad_x.view(x.shape), None, grads[:rank], grad_b, None
