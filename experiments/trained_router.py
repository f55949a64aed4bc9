"""How much each input of a trained router weighs: the hidden state against the task embedding.

The router computes `W_r [x ; e] = W_x x + W_e e`. What chooses between experts is how the logits of
a part differ from expert to expert, so a part's weight is their standard deviation over the
experts: of `W_x x` for every token, of `W_e e` for every task. What a part adds alike for all could
also be a bias, so the deviation from its mean is shown as well. A ratio task / token far below 1
says that the hidden state drowns the task, far above 1 that the token has no say.

    python experiments/trained_router.py --adapter my-adapter --files a.jsonl b.jsonl
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from measuring import Measure
from on_adapter import load, parser, routers, show

from peft_taskmoe.router import normalize_task
from peft_taskmoe.uie import Document, build_example, read_datasets


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    args = parser(__doc__, limit=5).parse_args(arguments)
    sets = read_datasets(args.files, split="test", limit=args.limit)
    documents = [one for of_set in sets.values() for one in of_set]
    by_kind: dict[str, list[list[float]]] = defaultdict(list)
    for name, (token, task) in parts(load(args), documents).items():
        varying = spread(token - token.mean(0)), spread(task - task.mean(0))
        row = [spread(token), spread(task), spread(task) / spread(token)]
        by_kind[name.rsplit(".", 1)[-1]].append([*row, *varying, varying[1] / varying[0]])
    rows = [
        [
            kind,
            *(f"{c.median():.2f} ({c.min():.2f} .. {c.max():.2f})" for c in torch.tensor(found).T),
        ]
        for kind, found in by_kind.items()
    ]
    header = ("token", "task", "task / token")
    title = f"Spread of the logits over the experts, {len(documents)} prompts of {len(sets)} sets"
    columns = ("linear", *header, *(f"{one}, less its mean" for one in header))
    show(f"{title}: median layer (least .. most)", columns, rows)


def parts(
    measure: Measure, documents: Sequence[Document]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each layer `W_x x` `(tokens, e)` of all tokens, `W_e e` `(prompts, e)` of all prompts."""
    assert measure.encoder is not None, "The adapter's router reads no task."
    model, found = measure.model, routers(measure.model)
    token_parts: dict[str, list[torch.Tensor]] = {name: [] for name in found}

    def see(name: str, x: torch.Tensor) -> None:
        _, weight, edge = found[name]
        token_parts[name].append(x[0] @ weight[:, :edge].T)

    hooks = [
        one.layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, one in found.items()
    ]
    with torch.no_grad():
        for document in documents:
            prompt = build_example(document, format=measure.args.format).prompt
            model(**measure.tokenizer(prompt, return_tensors="pt").to(model.device))
    for hook in hooks:
        hook.remove()
    embeds = measure.encoder([measure.task_text(one) for one in documents]).to(model.device)
    norm = model.active_peft_config.task_norm
    return {
        name: (
            torch.cat(token_parts[name]),
            normalize_task(embeds, norm, one.token_features)
            @ one.weight[:, one.token_features :].T,
        )
        for name, one in found.items()
    }


def spread(logits: torch.Tensor) -> float:
    """Root mean square over tokens or tasks of the standard deviation over the experts."""
    return float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt())


if __name__ == "__main__":
    main()
