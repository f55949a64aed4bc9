"""Speed and memory of Task-Aware MoELoRA against what users would pick instead, all in one run.

    python benchmarks/adapters.py                      # the table of the README
    python benchmarks/adapters.py --dtype bfloat16 --device cuda --layers 8
    python benchmarks/adapters.py --dtype bfloat16 --autocast --methods "frozen base" LoRA-36 "ours 8x4"
    python benchmarks/adapters.py --compile --methods "frozen base" LoRA-36 "ours 8x4"
    python benchmarks/adapters.py --methods "frozen base" "bare products" LoRA-36 "ours 8x4" --skip-decoding  # how low it can go

Every method adapts all seven linears of a Llama of SmolLM2-135M's shape. Rounds are interleaved: each round times every method
once, and a figure is the median over rounds of its ratio to LoRA r=36 in the same round, so that a machine whose speed drifts
slows both sides. Bytes are those that autograd keeps between forward and backward, counted exactly: each storage once, weights left
out. "bare products" is no method: it is ours without softmax, gates, task and dropout, the matrix products alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_taskmoe import TaskMoELoraConfig, layer
from peft_taskmoe.fused import ExpertShape, FusedUpdate, LayerTensors

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK_DIM = 768


@dataclass
class Method:
    """A model, how it is called, and what takes the place of our fused function."""

    name: str
    model: nn.Module
    call: dict[str, torch.Tensor]
    update: type[torch.autograd.Function] = FusedUpdate


class BareProducts(torch.autograd.Function):
    """The matrix products of `FusedUpdate` and nothing else: `y = W x + B A x`, with the router's rows beside A, which get no use.

    Each product in the memory order that is fastest on a CPU by itself (`dy^T h` and `x^T left` for MKL's, turned for oneDNN's).
    """

    @staticmethod
    def stacked(layers: list[LayerTensors], in_features: int) -> torch.Tensor:
        """A of all layers, then the token part of their routers."""
        routers = [one.router_weight[:, :in_features] for one in layers]
        return torch.cat([one.weight_a for one in layers] + routers)

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, task: Any, token_tasks: Any, shape: ExpertShape, scalings: Any, dropout: Any,
        *tensors: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """The outputs of all layers that read x."""
        layers = [LayerTensors(*tensors[i : i + 6]) for i in range(0, len(tensors), 6)]
        rank, tokens_x = shape.num_experts * shape.r, x.flatten(0, -2)
        h = (tokens_x @ BareProducts.stacked(layers, x.shape[-1]).t())[
            :, : rank * len(layers)
        ].clone()
        outs = []
        for one, of_one in zip(layers, h.split(rank, 1), strict=True):
            out = F.linear(x, one.weight)
            out.view(-1, out.shape[-1]).addmm_(of_one, one.weight_b.t())
            outs.append(out)
        ctx.save_for_backward(x, h, *(tensor for one in layers for tensor in one[1:]))
        ctx.shape = shape
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grad_outs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, h, *tensors = ctx.saved_tensors
        layers = [LayerTensors(None, *tensors[i : i + 5]) for i in range(0, len(tensors), 5)]
        tokens_x, num_experts = x.flatten(0, -2), ctx.shape.num_experts
        rank = num_experts * ctx.shape.r
        long_first = x.dtype == torch.float32
        left = x.new_zeros(tokens_x.shape[0], len(layers) * (rank + num_experts))
        grads_b, grad_x = [], None
        for i, (one, grad_out) in enumerate(zip(layers, grad_outs, strict=True)):
            dy, of_one = grad_out.flatten(0, -2), h[:, i * rank : (i + 1) * rank]
            torch.mm(dy, one.weight_b, out=left[:, i * rank : (i + 1) * rank])
            grads_b.append(dy.t() @ of_one if long_first else (of_one.t() @ dy).t())
            grad_x = dy @ one.weight if grad_x is None else grad_x.addmm_(dy, one.weight)
        grads = (tokens_x.t() @ left).t() if long_first else left.t() @ tokens_x
        assert grad_x is not None
        grad_x.addmm_(left, BareProducts.stacked(layers, x.shape[-1]))
        found: list[torch.Tensor | None] = [grad_x.view(x.shape), None, None, None, None, None]
        for i, grad_b in enumerate(grads_b):
            found += [None, None, None, grads[i * rank : (i + 1) * rank], grad_b, None]
        return tuple(found)


class LoopedExperts(nn.Module):
    """The method as most codes write it: a loop over experts, each with its own pair of products."""

    def __init__(
        self, base: nn.Linear, num_experts: int, r: int, alpha: float, dropout: float, holder: dict
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout, self.holder = base, alpha / r, dropout, holder
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.a = nn.ModuleList(
            nn.Linear(base.in_features, r, **options) for _ in range(num_experts)
        )
        self.b = nn.ModuleList(
            nn.Linear(r, base.out_features, **options) for _ in range(num_experts)
        )
        self.router = nn.Linear(base.in_features + TASK_DIM, num_experts, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One product pair per expert."""
        out = self.base(x)
        task = self.holder["task"].to(x.dtype)
        task = task.repeat_interleave(x.shape[0] // task.shape[0], 0)[:, None].expand(
            -1, x.shape[1], -1
        )
        gates = torch.softmax(self.router(torch.cat((x, task), -1)).float(), -1).to(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            out = out + gates[..., i : i + 1] * b(a(dropped)) * self.scaling
        return out


def base_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of SmolLM2-135M's shape, with the same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=576, intermediate_size=1536, num_hidden_layers=args.layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device=args.device, dtype=getattr(torch, args.dtype))
    return model.requires_grad_(False)


def build(name: str, args: argparse.Namespace, task: torch.Tensor, dropout: float) -> Method:
    """One row of the table."""
    model: nn.Module = base_model(args)
    common = {"task_type": "CAUSAL_LM", "target_modules": LINEARS}
    call: dict[str, torch.Tensor] = {}
    keep = {"autocast_adapter_dtype": args.autocast}
    if name == "frozen base":
        pass
    elif name.startswith("LoRA"):
        r = int(name.rpartition("-")[2])
        model = get_peft_model(
            model, LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, **common), **keep
        )
    elif name.startswith("ours"):
        num_experts, r = map(int, name.split()[1].split("x"))
        inputs = "token+task" if len(name.split()) == 2 else name.split()[2]
        config = TaskMoELoraConfig(
            num_experts=num_experts, r=r, lora_alpha=num_experts * r, lora_dropout=dropout, task_dim=TASK_DIM,
            router_inputs=inputs, **common,
        )  # fmt: skip
        model = get_peft_model(model, config, **keep)
        call = {} if inputs == "token" else {"task_embeds": task}
    elif name == "bare products":
        ours = build("ours 8x4", args, task, 0.0)
        return Method(name, ours.model, ours.call, BareProducts)
    elif name == "Poly":
        config = PolyConfig(r=4, n_tasks=1, n_skills=8, n_splits=1, poly_type="poly", **common)
        model = get_peft_model(model, config, **keep)
        call = {"task_ids": torch.zeros(task.shape[0], dtype=torch.long, device=args.device)}
    elif name == "X-LoRA":
        with tempfile.TemporaryDirectory() as folder:
            lora = get_peft_model(base_model(args), LoraConfig(r=4, lora_alpha=4, **common), **keep)
            lora.save_pretrained(folder)
            adapters = {str(i): folder for i in range(8)}
            model.config.use_cache = False
            config = XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=576, xlora_depth=1, adapters=adapters
            )
            model = get_peft_model(model, config)
    elif name == "loop 8x4":
        holder = {"task": task}
        for module in list(model.modules()):
            for child_name, child in list(module.named_children()):
                if child_name in LINEARS:
                    setattr(module, child_name, LoopedExperts(child, 8, 4, 32, dropout, holder))
    else:
        raise ValueError(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in parameter_name:
            nn.init.normal_(
                parameter, std=0.02
            )  # as after some training, so that no product is with zeros
    model.to(args.device)
    return Method(name, model, call)


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that a call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def loss_of(
    method: Method, embeds: torch.Tensor, labels: torch.Tensor, autocast: bool
) -> torch.Tensor:
    """Forward from the embeddings, which ask for a gradient, as gradient checkpointing and input gradients make every method do."""
    leaf = embeds.detach().requires_grad_()
    with (
        mock.patch.object(layer, "FusedUpdate", method.update),
        torch.autocast(embeds.device.type, embeds.dtype, enabled=autocast),
    ):
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
    """Bytes that autograd keeps for backward: each storage once, parameters and buffers left out."""
    weights = {
        t.untyped_storage().data_ptr()
        for t in (*method.model.parameters(), *method.model.buffers())
    }
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
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
            use_cache=True, **method.call,
        )  # fmt: skip


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--vocab",
        type=int,
        default=1024,
        help="small: the head is no adapted layer, and its cost is the same for all",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--skip-decoding", action="store_true")
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="adapters in float32, trained under autocast to --dtype; no decoding then",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the models; no decoding then"
    )
    parser.add_argument(
        "--methods", nargs="+",
        default=["frozen base", "LoRA-32", "LoRA-36", "ours 8x4", "ours 32x1", "Poly", "X-LoRA", "loop 8x4"],
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=None, help="write the figures here as JSON")
    args = parser.parse_args()
    if args.compile and "bare products" in args.methods:
        parser.error(
            "compiled layers take their plain form, so that there are no bare products of them"
        )
    torch.set_num_threads(args.threads)
    console = Console(width=110)
    reference = "LoRA-36"
    torch.manual_seed(1)
    dtype = getattr(torch, args.dtype)
    task = torch.randn(args.batch, TASK_DIM, device=args.device)
    embeds = torch.randn(args.batch, args.length, 576, device=args.device, dtype=dtype)
    labels = torch.randint(0, args.vocab, (args.batch, args.length), device=args.device)
    prompt = torch.randint(0, args.vocab, (args.batch, 64), device=args.device)
    results: dict[str, object] = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "torch": torch.__version__,
    }

    for dropout in args.dropouts:
        names = [name for name in args.methods if not dropout or name != "bare products"]
        methods = [build(name, args, task, dropout) for name in names]
        for method in methods:
            method.model.train()
            if args.compile:
                method.model.compile()
        step = partial(train_step, embeds=embeds, labels=labels, autocast=args.autocast)
        seconds = interleaved(methods, step, args.rounds, args.device)
        byte_counts = {m.name: kept_bytes(m, embeds, labels, args.autocast) for m in methods}
        table = Table(
            title=f"train step, {args.dtype}, dropout {dropout}, {args.batch} x {args.length} tokens, {args.layers} layers"
            + (", autocast" if args.autocast else "")
            + (", compiled" if args.compile else "")
        )
        for column in (
            "method",
            "time / LoRA-36",
            "min .. max",
            "ms",
            "bytes / LoRA-36",
            "MiB",
            "trainable",
        ):
            table.add_column(column, justify="left" if column == "method" else "right")
        found = ratios(seconds, reference)
        rows = {}
        for method in methods:
            middle, low, high = found[method.name]
            trainable = sum(p.numel() for p in method.model.parameters() if p.requires_grad)
            rows[method.name] = {
                "time": middle, "seconds": statistics.median(seconds[method.name]),
                "bytes": byte_counts[method.name] / byte_counts[reference], "trainable": trainable,
            }  # fmt: skip
            table.add_row(
                method.name, f"{middle:.3f}", f"{low:.2f} .. {high:.2f}", f"{1e3 * rows[method.name]['seconds']:.0f}",
                f"{rows[method.name]['bytes']:.3f}", f"{byte_counts[method.name] / 2**20:.0f}", f"{trainable:,}",
            )  # fmt: skip
        console.print(table)
        results[f"train dropout {dropout}"] = rows
        if dropout == args.dropouts[0] and not (
            args.skip_decoding or args.compile or args.autocast
        ):
            decoding = [m for m in methods if m.name not in ("X-LoRA", "Poly", "bare products")]
            for method in decoding:
                method.model.eval()
            seconds = interleaved(
                decoding, lambda m: decode(m, prompt, args.new_tokens), args.rounds, args.device
            )
            table = Table(
                title=f"greedy decoding, {args.dtype}, batch {args.batch}, 64 + {args.new_tokens} tokens, KV cache"
            )
            for column in ("method", "time / LoRA-36", "min .. max", "tokens/s"):
                table.add_column(column, justify="left" if column == "method" else "right")
            rows = {}
            for name, (middle, low, high) in ratios(seconds, reference).items():
                speed = args.batch * args.new_tokens / statistics.median(seconds[name])
                rows[name] = {"time": middle, "tokens_per_second": speed}
                table.add_row(name, f"{middle:.3f}", f"{low:.2f} .. {high:.2f}", f"{speed:.0f}")
            console.print(table)
            results["decoding"] = rows
        del methods
        torch.compiler.reset()
        gc.collect()
    if args.output is not None:
        args.output.write_text(
            json.dumps(results, indent=2, default=lambda v: None if math.isnan(v) else v) + "\n"
        )


if __name__ == "__main__":
    main()
