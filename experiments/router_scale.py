"""How much each input of a fresh router weighs: the hidden state against the task embedding.

With independent entries of standard deviation `s` in `W_r`, the first logits of `W_r [x ; e]`
spread over the experts by `s |x|` from the token and `s |e|` from the task, whatever the number of
experts. So the ratio `|e| / |x|` decides. It is measured on a real language model and encoder, for
every kind of linear layer and several scales of the inputs:

    raw    the pooled vector as it is (the paper's)
    unit   `e / |e|`, as sentence encoders publish it
    rms    `e / rms(e)`, so `|e| = sqrt(d_task)`
    width  `|e| = C sqrt(d_in)`, the norm of a token state whose entries have RMS `C` (`--constant`)
    token  `e` scaled for every token to `|e| = |x|`
    both   `x / rms(x)` and `e / rms(e)`, which changes the token's part too

    python experiments/router_scale.py --model MODEL --encoder ENCODER
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from on_adapter import show
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_taskmoe import TaskEncoder
from peft_taskmoe.uie import build_example, read_datasets

SCALES = ("raw", "unit", "rms", "width", "token", "both")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="causal language model: Hub id or folder")
    parser.add_argument("--encoder", required=True, help="task encoder: Hub id or folder")
    parser.add_argument("--files", nargs="+", default=["examples/data/demo/train.jsonl"])
    parser.add_argument("--limit", type=int, default=10, help="documents of each file")
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--draws", type=int, default=20, help="routers drawn for every layer")
    parser.add_argument("--constant", type=float, default=0.25, help="C of the scale `width`")
    args = parser.parse_args(arguments)
    sets = read_datasets(args.files, split="train", limit=args.limit)
    prompts = [build_example(one).prompt for documents in sets.values() for one in documents]
    embeds = TaskEncoder(args.encoder, pooling=args.pooling)(prompts)
    inputs = token_inputs(args.model, prompts)
    show_embeds(embeds, args.pooling)
    show_inputs(inputs)
    show_spreads(
        {kind: measure(layers, embeds, args) for kind, layers in inputs.items()}, args.num_experts
    )


def token_inputs(model_path: str, prompts: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """Inputs of every linear but the head by kind (`q_proj`): one `(tokens, d_in)` a layer."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    seen: dict[str, list[list[torch.Tensor]]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            rows: list[torch.Tensor] = []
            seen[name.rsplit(".", 1)[-1]].append(rows)
            module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0]))
    with torch.no_grad():
        for prompt in prompts:
            model(**tokenizer(prompt, return_tensors="pt"))
    return {kind: [torch.cat(rows) for rows in layers] for kind, layers in seen.items()}


def measure(
    layers: Sequence[torch.Tensor], embeds: torch.Tensor, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """For every scale `(layers, 3)`: spread from the token, ratio task / token, mean top gate."""
    rows: dict[str, list[list[float]]] = {scale: [] for scale in SCALES}
    d_task = embeds.shape[-1]
    for x in layers:
        norm, width = x.norm(dim=-1, keepdim=True), math.sqrt(x.shape[-1])
        of_token, of_task = logit_parts(x, embeds, args.num_experts, args.draws)
        lengths = {
            "raw": embeds.norm(dim=-1).mean(),
            "unit": 1.0,
            "rms": math.sqrt(d_task),
            "width": args.constant * width,
            "token": norm,
            "both": math.sqrt(d_task),
        }
        for scale, length in lengths.items():
            token = of_token * (width / norm) if scale == "both" else of_token
            task = (of_task * length).expand_as(token)
            # (tokens,): over the experts, averaged over the draws
            spreads = [logits.var(-1).mean(0).sqrt() for logits in (token, task)]
            top = (token + task).softmax(-1).amax(-1).mean()
            ratio = (spreads[1] / spreads[0]).median()
            rows[scale].append([float(spreads[0].median()), float(ratio), float(top)])
    return {scale: torch.tensor(values) for scale, values in rows.items()}


def logit_parts(
    x: torch.Tensor, embeds: torch.Tensor, num_experts: int, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First logits `(draws, tokens or 1, experts)` from the token and from the unit task."""
    d_in, d_task = x.shape[-1], embeds.shape[-1]
    unit = embeds / embeds.norm(dim=-1, keepdim=True)
    weight = torch.empty(draws, num_experts, d_in + d_task)
    generator = torch.Generator().manual_seed(0)
    weight.uniform_(-1, 1, generator=generator).mul_((d_in + d_task) ** -0.5)  # as nn.Linear's
    task = torch.stack([weight[i, :, d_in:] @ unit[i % len(unit)] for i in range(draws)])
    return x @ weight[:, :, :d_in].mT, task[:, None]


def show_embeds(embeds: torch.Tensor, pooling: str) -> None:
    """Print what the task embeddings are like."""
    norm = embeds.norm(dim=-1)
    unit = embeds / norm[:, None]
    cosine = (unit @ unit.T).fill_diagonal_(0).sum() / (len(embeds) * (len(embeds) - 1))
    common = embeds.mean(0).square().sum() / norm.square().mean()
    print(
        f"Task vectors of {len(embeds)} prompts, {pooling}-pooled, {embeds.shape[-1]}-d: norm "
        f"{norm.mean():.3g} ({norm.min():.3g} .. {norm.max():.3g}), RMS of an entry "
        f"{embeds.square().mean().sqrt():.3g}, mean cosine {cosine:.2f}, {common:.0%} of the "
        "squared norm common to all."
    )


def show_inputs(inputs: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Print the size of the linears' inputs."""
    rows = []
    for kind, layers in inputs.items():
        rms = torch.stack([x.square().mean(-1).sqrt() for x in layers])  # (layers, tokens)
        found = [*rms.flatten().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(), float(rms.max())]
        by_layer = rms.median(dim=1).values
        sizes = [str(layers[0].shape[-1]), str(len(layers)), *(f"{one:.3g}" for one in found)]
        rows.append([kind, *sizes, f"{by_layer.min():.3g} .. {by_layer.max():.3g}"])
    columns = ("linear", "d_in", "layers", "10 %", "median", "90 %", "max", "median by layer")
    show("Inputs of the linears: RMS of an entry, per token", columns, rows)


def show_spreads(found: Mapping[str, Mapping[str, torch.Tensor]], num_experts: int) -> None:
    """Print ratios of the spreads and top gates by kind of linear."""
    ratios, gates = [], []
    for kind, by_scale in found.items():
        middle = [by_scale[scale][:, 1] for scale in SCALES]
        cells = [f"{one.median():.2f} ({one.min():.2f} .. {one.max():.2f})" for one in middle]
        ratios.append([kind, f"{by_scale['raw'][:, 0].median():.3f}", *cells])
        gates.append([kind, *(f"{by_scale[scale][:, 2].median():.3f}" for scale in SCALES)])
    title = (
        "Spread of the first logits over the experts: task / token, median layer (least .. most)"
    )
    show(title, ("linear", "token alone", *SCALES), ratios)
    title = (
        f"Mean top gate of a fresh router of {num_experts} experts (uniform: {1 / num_experts:.3f})"
    )
    show(title, ("linear", *SCALES), gates)


if __name__ == "__main__":
    main()
