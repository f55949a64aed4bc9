"""How much each input of a fresh router weighs: the token's hidden state against the task embedding.

The router computes `W_r [x ; e] = W_x x + W_e e`. With independent entries of standard deviation `s` in `W_r`, the
spread of the first logits over the experts is `s |x|` from the token and `s |e|` from the task, whatever the number of
experts: what decides is the ratio `|e| / |x|`. This script measures it on a real language model and a real encoder, for every
kind of linear layer and for several ways to scale the two inputs:

- `raw`: the pooled vector as it is (the paper's);
- `unit`: `e / |e|`, as sentence encoders publish it;
- `rms`: `e / rms(e)`, so `|e| = sqrt(d_task)`;
- `width`: `|e| = C sqrt(d_in)` with one constant `C` (`--constant`), the norm of a token state whose entries have RMS `C`;
- `token`: `e` scaled for every token to `|e| = |x|`;
- `both`: `x / rms(x)` and `e / rms(e)`, which changes the token's part too.

It knows nothing of PEFT and builds no adapter: routers are drawn here as `torch.nn.Linear` draws its weight.

    python benchmarks/router_scale.py --model HuggingFaceTB/SmolLM2-135M --encoder sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_taskmoe.encoder import TaskEncoder

RESULT = "# The annotation instances that take place in the text above are listed here\nresult ="

# (guidelines, text): four tasks over several domains, written for this project.
TASKS = [
    (
        'class Launcher(Entity):\n    """A vehicle designed to carry a payload to space."""\n    span: str\n\n'
        'class Spaceport(Entity):\n    """A site from which launchers take off."""\n    span: str',
        "Bad weather over Kourou kept the heavier booster on its pad for a third day.",
    ),
    (
        'class Launcher(Entity):\n    """A vehicle designed to carry a payload to space."""\n    span: str\n\n'
        'class Spaceport(Entity):\n    """A site from which launchers take off."""\n    span: str',
        "The crew capsule rode a refurbished first stage from the Cape on Sunday evening.",
    ),
    (
        'class Cheese(Entity):\n    """A dairy product made of curd, named by kind or by origin."""\n    span: str\n\n'
        'class Region(Entity):\n    """A part of a country known for a product."""\n    span: str',
        "In the hills of Auvergne they still turn each wheel by hand before it is sold.",
    ),
    (
        'class Gene(Entity):\n    """A named stretch of DNA or its product."""\n    span: str\n\n'
        'class Disorder(Entity):\n    """A condition that impairs the body\'s normal function."""\n    span: str',
        "Carriers of the shortened allele developed night blindness a decade earlier than their siblings.",
    ),
    (
        'class FoundedBy(Relation):\n    """The organisation was started by the person."""\n    head: str\n    tail: str',
        "Marta Oliveira set up the Lisbon Tide Observatory with a grant meant for her thesis.",
    ),
    (
        'class CausedBy(Relation):\n    """The adverse effect was brought about by the drug."""\n    head: str\n    tail: str',
        "Two patients on the higher dose of the blocker reported a slow pulse and cold hands.",
    ),
    (
        'class LocatedIn(Relation):\n    """The place lies inside the other place."""\n    head: str\n    tail: str',
        "The archive occupies a former tannery in the old quarter of Fez.",
    ),
    (
        'class DataBreach(Event):\n    """Someone gains access to data they have no right to."""\n    mention: str\n'
        "    attacker: list[str]\n    victim: list[str]",
        "Attackers copied the payroll of a shipping company before anyone noticed the open port.",
    ),
    (
        'class Merger(Event):\n    """Two organisations become one."""\n    mention: str\n    buyer: list[str]\n    bought: list[str]',
        "After a year of talks the two dairies joined, and the smaller one gave up its name.",
    ),
    (
        'class Treatment(Event):\n    """A therapy is given to a patient."""\n    mention: str\n    drug: list[str]\n    dose: list[str]',
        "She was given 40 mg of the steroid for five days, and the swelling went down.",
    ),
]
PROMPTS = [
    f'{guidelines}\n\n# This is the text to analyze\ntext = "{text}"\n\n{RESULT}'
    for guidelines, text in TASKS
]
SCALES = ("raw", "unit", "rms", "width", "token", "both")


def token_inputs(model_path: str) -> dict[str, list[torch.Tensor]]:
    """Inputs of every linear but the head, by kind (`q_proj`, ...): one `(tokens, d_in)` tensor a layer."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    seen: dict[str, list[list[torch.Tensor]]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            rows: list[torch.Tensor] = []
            seen[name.rsplit(".", 1)[-1]].append(rows)
            module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0]))
    with torch.no_grad():
        for prompt in PROMPTS:
            model(**tokenizer(prompt, return_tensors="pt"))
    return {kind: [torch.cat(rows) for rows in layers] for kind, layers in seen.items()}


def logit_parts(
    x: torch.Tensor, e: torch.Tensor, num_experts: int, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First logits from the token `(draws, tokens, experts)` and from the unit task vector `(draws, 1, experts)`."""
    d_in, d_task = x.shape[-1], e.shape[-1]
    unit = e / e.norm(dim=-1, keepdim=True)
    weight = torch.empty(draws, num_experts, d_in + d_task)
    weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).mul_((d_in + d_task) ** -0.5)
    task = torch.stack([weight[i, :, d_in:] @ unit[i % len(unit)] for i in range(draws)])
    return x @ weight[:, :, :d_in].mT, task[:, None]


def measure(
    layers: list[torch.Tensor], e: torch.Tensor, num_experts: int, draws: int, constant: float
) -> dict[str, torch.Tensor]:
    """For every scaling: `(layers, 3)` with the spread from the token, its ratio task / token (medians over tokens), and the mean top gate."""
    rows: dict[str, list[list[float]]] = {how: [] for how in SCALES}
    for x in layers:
        norm = x.norm(dim=-1, keepdim=True)  # (tokens, 1)
        d_in, d_task = x.shape[-1], e.shape[-1]
        token_logits, task_logits = logit_parts(x, e, num_experts, draws)
        lengths = {
            "raw": e.norm(dim=-1).mean(),
            "unit": 1.0,
            "rms": math.sqrt(d_task),
            "width": constant * math.sqrt(d_in),
            "token": norm,
            "both": math.sqrt(d_task),
        }
        for how, length in lengths.items():
            token = token_logits * (math.sqrt(d_in) / norm) if how == "both" else token_logits
            task = (task_logits * length).expand_as(token)
            token_spread = (
                token.var(-1).mean(0).sqrt()
            )  # (tokens,): over the experts, averaged over the draws
            task_spread = task.var(-1).mean(0).sqrt()
            top = (token + task).softmax(-1).amax(-1).mean()
            rows[how].append(
                [
                    float(token_spread.median()),
                    float((task_spread / token_spread).median()),
                    float(top),
                ]
            )
    return {how: torch.tensor(values) for how, values in rows.items()}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="causal language model: Hub id or folder")
    parser.add_argument("--encoder", required=True, help="task encoder: Hub id or folder")
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--draws", type=int, default=20, help="routers drawn for every layer")
    parser.add_argument("--constant", type=float, default=0.25, help="C of the scaling `width`")
    args = parser.parse_args()
    console = Console(width=160)

    e = TaskEncoder(args.encoder, pooling=args.pooling)(PROMPTS)
    norm = e.norm(dim=-1)
    unit = e / norm[:, None]
    cosine = (unit @ unit.T).fill_diagonal_(0).sum() / (len(e) * (len(e) - 1))
    common = e.mean(0).square().sum() / norm.square().mean()
    console.print(
        f"Task vectors of {len(e)} prompts, {args.pooling}-pooled, {e.shape[-1]}-d: norm {norm.mean():.3g} ({norm.min():.3g} .. {norm.max():.3g}), "
        f"RMS of an entry {e.square().mean().sqrt():.3g}, mean cosine {cosine:.2f}, {common:.0%} of the squared norm common to all."
    )

    inputs = token_inputs(args.model)
    table = Table(title="Inputs of the linears: RMS of an entry, per token")
    for column in (
        "linear",
        "d_in",
        "layers",
        "10 %",
        "median",
        "90 %",
        "max",
        "median by layer (min .. max)",
    ):
        table.add_column(column, justify="right")
    for kind, layers in inputs.items():
        rms = torch.stack([x.square().mean(-1).sqrt() for x in layers])  # (layers, tokens)
        low, middle, high = rms.flatten().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        by_layer = rms.median(dim=1).values
        table.add_row(
            kind,
            str(layers[0].shape[-1]),
            str(len(layers)),
            *(f"{v:.3g}" for v in (low, middle, high, float(rms.max()))),
            f"{by_layer.min():.3g} .. {by_layer.max():.3g}",
        )
    console.print(table)

    ratios = Table(
        title="Spread of the first logits over the experts: task / token, median layer (least .. most)"
    )
    gates = Table(
        title=f"Mean top gate of a fresh router of {args.num_experts} experts (uniform: {1 / args.num_experts:.3f})"
    )
    ratios.add_column("linear")
    ratios.add_column("token alone", justify="right")
    gates.add_column("linear")
    for how in SCALES:
        ratios.add_column(how, justify="right")
        gates.add_column(how, justify="right")
    for kind, layers in inputs.items():
        found = measure(layers, e, args.num_experts, args.draws, args.constant)
        ratio = {how: found[how][:, 1] for how in SCALES}
        cells = [
            f"{ratio[how].median():.2f} ({ratio[how].min():.2f} .. {ratio[how].max():.2f})"
            for how in SCALES
        ]
        ratios.add_row(kind, f"{found['raw'][:, 0].median():.3f}", *cells)
        gates.add_row(kind, *(f"{found[how][:, 2].median():.3f}" for how in SCALES))
    console.print(ratios)
    console.print(gates)


if __name__ == "__main__":
    main()
