"""Gates recorded by layer and task, and summarised; outputs change by float rounding alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .conditioning import base_model_of, conditioner_of
from .layer import Linear
from .optional import needed
from .task_scope import GateRecorder, TaskState, current_state, user_scope

Measure = Literal["cosine", "js"]


@dataclass(frozen=True, slots=True)
class GateStats:
    """The gates of one adapter at one layer over the tokens of one task; padding does not count.

    Attributes:
        adapter: Name of the adapter.
        layer: Name of the layer in the base model.
        task: The name given to `GateRecord.task`.
        tokens: Number of tokens.
        mean: Mean gate of each expert; they sum to 1.
        load: Share of the (token, slot) choices that fall on each expert, with `top_k` slots per
            token (1, the largest gate, where all gates are kept); they sum to 1.
        entropy: Mean over tokens of `-sum_i g_i ln g_i`, in nats.
        normalized_entropy: `entropy / ln E`: 0 if each token uses one expert, 1 if all experts
            alike.
        token_variance: Variance of the gates over the tokens, summed over the experts.
    """

    adapter: str
    layer: str
    task: str
    tokens: int
    mean: tuple[float, ...]
    load: tuple[float, ...]
    entropy: float
    normalized_entropy: float
    token_variance: float


@dataclass(frozen=True, slots=True)
class GateVariance:
    """Where the gates of one layer vary: total variance = `within_tasks` + `between_tasks`.

    Attributes:
        adapter: Name of the adapter.
        layer: Name of the layer in the base model.
        within_tasks: Mean over tasks of `GateStats.token_variance`.
        between_tasks: Variance over tasks of the mean gates, summed over the experts.
        task_share: `between_tasks / (within_tasks + between_tasks)`; 0 where nothing varies.
    """

    adapter: str
    layer: str
    within_tasks: float
    between_tasks: float
    task_share: float


class GateRecord:
    """The gates of every forward run inside `record_gates`, summed by adapter, layer and task.

    Args:
        layers: The adapted layers to look at, by name.
    """

    def __init__(self, layers: dict[str, Linear]) -> None:
        self._names = {id(layer): name for name, layer in layers.items()}
        self._layers = layers  # keeps the ids above from being given to other objects
        self._labels: str | list[str] = "all"
        self._sums: dict[tuple[str, str, str], torch.Tensor] = {}

    @contextmanager
    def task(self, names: str | Sequence[str]) -> Iterator[None]:
        """Name the task of the forwards inside the block; `"all"` without it.

        Args:
            names: One name for all rows, or one for each row of the batch (each document, where
                rows are packed).
        """
        before = self._labels
        self._labels = names if isinstance(names, str) else list(names)
        try:
            yield
        finally:
            self._labels = before

    @torch.compiler.disable
    def __call__(
        self, layer: Any, adapter: str, gates: torch.Tensor, token_rows: torch.Tensor | None
    ) -> None:
        """Take the gates `(tokens, e)` of one layer."""
        name = self._names.get(id(layer))
        if name is None:
            return
        slots = layer.shapes[adapter].top_k or 1
        chosen = torch.zeros_like(gates).scatter(-1, gates.topk(slots, dim=-1).indices, 1.0 / slots)
        entropy = torch.special.entr(gates).sum(-1, keepdim=True)
        per_token = torch.cat(
            (gates, gates.square(), chosen, entropy, torch.ones_like(entropy)), dim=-1
        )
        mask = counted_tokens(token_rows, gates.shape[0])
        if mask is not None:
            per_token = per_token * mask.to(gates.device).unsqueeze(-1)
        if isinstance(self._labels, str):
            self._add(adapter, name, self._labels, per_token.sum(0))
            return
        owners = _owners(token_rows, gates.shape[0], self._labels).to(gates.device)
        sums = per_token.new_zeros(len(self._labels), per_token.shape[1]).index_add_(
            0, owners, per_token
        )
        for label, row in zip(self._labels, sums, strict=True):
            self._add(adapter, name, label, row)

    def _add(self, adapter: str, layer: str, task: str, sums: torch.Tensor) -> None:
        if sums[-1] > 0:
            key = (adapter, layer, task)
            sums = sums.to("cpu").to(torch.float64)
            self._sums[key] = sums + self._sums[key] if key in self._sums else sums

    @property
    def adapters(self) -> list[str]:
        """The adapters whose gates were recorded."""
        return list(dict.fromkeys(adapter for adapter, _, _ in self._sums))

    def layers(self, adapter: str | None = None) -> list[str]:
        """The layers recorded for an adapter, in the order they ran."""
        adapter = self._adapter(adapter)
        return list(dict.fromkeys(layer for found, layer, _ in self._sums if found == adapter))

    def tasks(self, adapter: str | None = None) -> list[str]:
        """The tasks recorded for an adapter, in the order they came."""
        adapter = self._adapter(adapter)
        return list(dict.fromkeys(task for found, _, task in self._sums if found == adapter))

    def _adapter(self, adapter: str | None) -> str:
        found = self.adapters
        if adapter is None and len(found) == 1:
            return found[0]
        if adapter is not None and adapter in found:
            return adapter
        if not found:
            raise ValueError(
                "No gates were recorded. Run the model, its adapter active and not merged, inside "
                "`with record_gates(model) as record:`, in this thread."
            )
        raise ValueError(f"`adapter` must be one of those recorded, {found}, got {adapter!r}.")

    def _task_sums(self, adapter: str, layer: str, task: str) -> torch.Tensor:
        sums = self._sums.get((adapter, layer, task))
        if sums is None:
            raise ValueError(
                f'No token of task "{task}" was recorded at layer "{layer}" of adapter "{adapter}" '
                f"(tasks: {self.tasks(adapter)}). Run the task's batches inside "
                f'`with record_gates(model) as record, record.task("{task}"):`.'
            )
        return sums

    def mean_gates(self, task: str, adapter: str | None = None) -> torch.Tensor:
        """Mean gates of a task, `(layers, e)` float64, layers in the order of `layers()`."""
        adapter = self._adapter(adapter)
        return torch.stack([self._mean(adapter, layer, task) for layer in self.layers(adapter)])

    def _mean(self, adapter: str, layer: str, task: str) -> torch.Tensor:
        sums = self._task_sums(adapter, layer, task)
        return sums[: (len(sums) - 2) // 3] / sums[-1]

    def stats(self, adapter: str | None = None) -> list[GateStats]:
        """One entry for every layer and task of an adapter (of all adapters, by default)."""
        wanted = self.adapters if adapter is None else [self._adapter(adapter)]
        return [_stats(*key, sums) for key, sums in self._sums.items() if key[0] in wanted]

    def variances(self, adapter: str | None = None) -> list[GateVariance]:
        """For every layer, the gates' variance between tasks and between tokens."""
        adapter = self._adapter(adapter)
        found = []
        for layer in self.layers(adapter):
            per_task = [s for s in self.stats(adapter) if s.layer == layer]
            within = sum(s.token_variance for s in per_task) / len(per_task)
            means = torch.tensor([s.mean for s in per_task], dtype=torch.float64)
            between = means.var(0, correction=0).sum().item()
            total = within + between
            found.append(
                GateVariance(adapter, layer, within, between, between / total if total else 0.0)
            )
        return found

    def similarity(
        self, measure: Measure = "cosine", adapter: str | None = None
    ) -> dict[str, dict[str, float]]:
        """How alike the tasks use the experts, from their mean gates over all layers.

        Args:
            measure: `"cosine"` of the concatenated mean gates (soft gates lie near `1 / E`, so
                values are high; compare them with each other), or `"js"`: 1 - the Jensen-Shannon
                divergence in bits, mean over layers.
            adapter: Which adapter, if several were recorded.

        Returns:
            `similarity[task][other]`, 1.0 for equal gates.
        """
        if measure not in ("cosine", "js"):
            raise ValueError(f'`measure` is {measure!r}, which is unknown. Pass "cosine" or "js".')
        adapter = self._adapter(adapter)
        gates = {task: self.mean_gates(task, adapter) for task in self.tasks(adapter)}
        return {a: {b: _similarity(gates[a], gates[b], measure) for b in gates} for a in gates}

    def nearest(
        self,
        task: str,
        among: Sequence[str] | None = None,
        k: int = 3,
        measure: Measure = "cosine",
        adapter: str | None = None,
    ) -> list[tuple[str, float]]:
        """The tasks whose experts a task borrows: the `k` most similar ones, best first.

        Args:
            task: E.g. one that was not trained on.
            among: The tasks to choose from, e.g. those that were; None for all others.
            k: How many.
            measure: See `similarity`.
            adapter: Which adapter, if several were recorded.
        """
        similarity = self.similarity(measure, adapter)
        others = [name for name in similarity if name != task] if among is None else list(among)
        for name in (task, *others):
            if name not in similarity:
                raise ValueError(f'Task "{name}" was not recorded; these were: {list(similarity)}.')
        return sorted(((o, similarity[task][o]) for o in others), key=lambda pair: -pair[1])[:k]

    def to_dicts(self) -> list[dict[str, Any]]:
        """`stats()` of all adapters as plain dicts, e.g. for JSON."""
        return [asdict(stats) for stats in self.stats()]

    def to_frame(self) -> Any:
        """`stats()` of all adapters as a pandas `DataFrame`.

        Raises:
            ImportError: If pandas is not installed.
        """
        return needed("pandas", "uie").DataFrame(self.to_dicts())


@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateRecord]:
    """Record the gates of every forward and `generate` that runs inside the block.

    Outputs stay what they were, beyond float rounding. Under gradient checkpointing a layer runs
    twice and counts twice, which leaves means as they are. Batches whose rows carry different
    tasks need one name per row; base layers that see a part of a batch's tokens only, as in sparse
    mixture-of-experts blocks, count padding too and need one task per batch. In an encoder-decoder
    the padding of the decoder counts (and the encoder's mask is taken for both, where both
    sequences have the same length).

    Args:
        model: A model with a Task-Aware MoELoRA adapter, wrapped in `PeftModel` or not.

    Yields:
        The `GateRecord`, which stays readable after the block.

    Raises:
        ValueError: If the model has no such adapter.

    Example:
        ```python
        with record_gates(model) as record, torch.no_grad():
            for name, batch in batches:
                with record.task(name):
                    model(**batch)
        record.nearest("unseen task")
        ```
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            f"`{type(model).__name__}` has no Task-Aware MoELoRA adapter. Call "
            "`get_peft_model(model, TaskMoELoraConfig(...))` or `PeftModel.from_pretrained(...)`."
        )
    record = GateRecord(layers)
    with recording(record):
        yield record


@contextmanager
def recording(recorder: GateRecorder) -> Iterator[None]:
    """Have the layers show their gates to `recorder` inside the block."""
    with user_scope(replace(current_state() or TaskState(), recorder=recorder)):
        yield


def gates_by_token(
    model: nn.Module, prompt: str, tokenizer: Any = None, adapter: str | None = None
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The gates of every token of one prompt.

    Args:
        model: A causal language model with a Task-Aware MoELoRA adapter.
        prompt: The prompt.
        tokenizer: The model's tokenizer; None: the attached one, or that of the model's name.
        adapter: Which adapter, if several are active.

    Returns:
        The tokens as text, and for each layer its gates, `(tokens, e)` float32.

    Raises:
        ValueError: If no adapter, or not the named one, has gates for the prompt.
    """
    base: Any = base_model_of(model)
    conditioner = conditioner_of(base)
    assert conditioner is not None
    tokenizer = tokenizer or conditioner.encoders.reader_for(base).tokenizer
    names = {id(layer): name for name, layer in adapted_layers(model).items()}
    found: dict[str, dict[str, torch.Tensor]] = {}

    def keep(
        layer: Any, adapter: str, gates: torch.Tensor, token_rows: torch.Tensor | None
    ) -> None:
        if id(layer) in names:
            found.setdefault(adapter, {})[names[id(layer)]] = gates.float().cpu()

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(base.device)
    with evaluating(model), recording(keep):
        model(input_ids=ids)
    wanted = adapter if adapter is not None or len(found) != 1 else next(iter(found))
    if wanted not in found:
        raise ValueError(f"`adapter` must be one with gates, {[*found]}, got {adapter!r}.")
    return [tokenizer.decode([token]) for token in ids[0].tolist()], found[wanted]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients and dropout; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """The adapted layers of a model by their names in the base model."""
    outer: Any = model
    base: nn.Module = outer.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: module for name, module in base.named_modules() if isinstance(module, Linear)}


def counted_tokens(token_rows: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Which of the tokens a layer just saw are no padding.

    Args:
        token_rows: See `GateRecorder`.
        tokens: Number of tokens the layer saw.

    Returns:
        `(tokens,)` bool, or None if all count: no mask was given, or it is of another sequence.
    """
    state = current_state()
    if state is None or state.token_mask is None:
        return None
    mask = state.token_mask
    if token_rows is None:
        return mask.reshape(-1) if mask.numel() == tokens else None
    mask = mask[token_rows.unique().to(mask.device)]
    if mask.numel() != tokens:
        return None
    counted = torch.empty(tokens, dtype=torch.bool)
    counted[token_rows.argsort(stable=True)] = mask.reshape(-1).to(counted.device)
    return counted


def _owners(token_rows: torch.Tensor | None, tokens: int, labels: list[str]) -> torch.Tensor:
    """Index of each token's label, `(tokens,)`.

    Raises:
        ValueError: If there is not one label per row (or per packed document).
    """
    state = current_state()
    assert state is not None
    documents = state.token_tasks
    rows = state.rows if documents is None else int(documents.max()) + 1
    repeated = state.decoding is not None and rows and rows % len(labels) == 0
    if token_rows is None or not (rows == len(labels) or repeated):
        found = f"{tokens} tokens" if token_rows is None else f"{rows} rows or documents"
        raise ValueError(
            f"{len(labels)} task names were given for {found}. Pass `record.task([...])` one name "
            "per row (per document, where rows are packed), or one name for all."
        )
    assert rows
    return token_rows // (rows // len(labels))


def _stats(adapter: str, layer: str, task: str, sums: torch.Tensor) -> GateStats:
    num_experts = (len(sums) - 2) // 3
    tokens = sums[-1]
    mean, square, load, entropy = (sums[:-1] / tokens).split(
        [num_experts, num_experts, num_experts, 1]
    )
    return GateStats(
        adapter=adapter,
        layer=layer,
        task=task,
        tokens=int(tokens),
        mean=tuple(mean.tolist()),
        load=tuple(load.tolist()),
        entropy=entropy.item(),
        normalized_entropy=entropy.item() / math.log(num_experts) if num_experts > 1 else 0.0,
        token_variance=(square - mean.square()).clamp(min=0.0).sum().item(),
    )


def _similarity(a: torch.Tensor, b: torch.Tensor, measure: Measure) -> float:
    """Of mean gates `(layers, e)`; see `GateRecord.similarity`."""
    if measure == "cosine":
        return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    entropies = [torch.special.entr(gates).sum(-1) for gates in ((a + b) / 2, a, b)]
    divergence = (entropies[0] - (entropies[1] + entropies[2]) / 2).mean() / math.log(2.0)
    return 1.0 - divergence.clamp(min=0.0).item()
