"""How much each input of a trained router weighs: the token's hidden state against the task embedding.

The router computes `W_r [x ; e] = W_x x + W_e e`. What chooses between experts is how the logits of a part differ from expert to
expert, so each part's weight is its standard deviation over the experts: of `W_x x` for every token, of `W_e e` for every task. What a
part adds alike for all tokens and tasks, it could also have learned as a bias; so the deviation from its own mean is shown as well. A
ratio task / token far below 1 says that the hidden state drowns the task, far above 1 that the token has no say.

    python benchmarks/trained_router.py --adapter my-adapter --files data/a/test.jsonl data/b/test.jsonl
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from on_adapter import load, parser
from rich.console import Console
from rich.table import Table

from peft_taskmoe.conditioning import current_state
from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.uie import build_example, read_datasets


def parts(
    model: Any, tokenizer: Any, prompts: Sequence[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each adapted layer `W_x x` of all tokens `(tokens, e)` and `W_e e` of all prompts `(prompts, e)`."""
    token_parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    task_parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def see(name: str, layer: TaskMoELoraLayer, x: torch.Tensor) -> None:
        (adapter,) = layer.active_adapters
        weight = layer.taskmoe_lora_router[adapter].weight
        config, state = layer.configs[adapter], current_state()
        assert state is not None
        task = state.normalized_embeds(config.task_norm, layer.in_features, x.device)
        token_parts[name].append(x[0] @ weight[:, : layer.in_features].T)
        task_parts[name].append(task @ weight[:, layer.in_features :].T)

    hooks = [
        layer.register_forward_pre_hook(lambda m, args, n=name: see(n, m, args[0]))
        for name, layer in model.named_modules()
        if isinstance(layer, TaskMoELoraLayer)
    ]
    with torch.no_grad():
        for prompt in prompts:
            model(**tokenizer(prompt, return_tensors="pt").to(model.device))
    for hook in hooks:
        hook.remove()
    return {
        name: (torch.cat(token_parts[name]), torch.cat(task_parts[name])) for name in token_parts
    }


def spread(logits: torch.Tensor) -> float:
    """Root mean square over tokens or tasks of the standard deviation over the experts."""
    return float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    args = parser(__doc__, limit=5).parse_args(arguments)
    extractor = load(args)
    sets = read_datasets(args.files, split="test", limit=args.limit)
    prompts = [
        build_example(one, extractor.format).prompt
        for documents in sets.values()
        for one in documents
    ]
    by_kind: dict[str, list[list[float]]] = defaultdict(list)
    for name, (token, task) in parts(extractor.model, extractor.tokenizer, prompts).items():
        varying = spread(token - token.mean(0)), spread(task - task.mean(0))
        row = [
            spread(token),
            spread(task),
            spread(task) / spread(token),
            *varying,
            varying[1] / varying[0],
        ]
        by_kind[name.rsplit(".", 1)[-1]].append(row)
    table = Table(
        title=f"Spread of the logits over the experts, {len(prompts)} prompts of {len(sets)} data sets: median layer (least .. most)"
    )
    header = ("token", "task", "task / token")
    for column in ("linear", *header, *(f"{one}, less its mean" for one in header)):
        table.add_column(column, justify="right")
    for kind, rows in by_kind.items():
        columns = torch.tensor(rows)
        cells = [f"{c.median():.2f} ({c.min():.2f} .. {c.max():.2f})" for c in columns.T]
        table.add_row(kind, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
