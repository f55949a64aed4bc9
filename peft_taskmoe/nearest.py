"""The training tasks nearest to a prompt, by task embedding and by gates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .conditioning import base_model_of, conditioner_of
from .inspection import GateRecord, evaluating, record_gates

CENTROIDS_FILE = "task_centroids.safetensors"
_PROMPT = "the prompt"


@dataclass(frozen=True)
class TaskCentroids:
    """What the prompts of each task look like on average.

    Attributes:
        tasks: The n tasks.
        layers: Names of the adapted layers.
        gates: Mean gates of the tasks, `(n, layers, e)`.
        embeds: Mean task embeddings, `(n, task_dim)`; None where the router reads no task.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    gates: torch.Tensor
    embeds: torch.Tensor | None

    @classmethod
    def of(
        cls, record: GateRecord, embeds: Mapping[str, torch.Tensor], adapter: str | None = None
    ) -> TaskCentroids:
        """The centroids of what `measure_tasks` returned."""
        tasks = record.tasks(adapter)
        gates = torch.stack([record.mean_gates(task, adapter) for task in tasks]).float()
        means = [embeds[task].mean(0).float().cpu() for task in tasks if task in embeds]
        return cls(
            tuple(tasks),
            tuple(record.layers(adapter)),
            gates,
            torch.stack(means) if means else None,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the file beside an adapter."""
        path = Path(folder) / CENTROIDS_FILE
        tensors = {"gates": self.gates.contiguous()}
        if self.embeds is not None:
            tensors["embeds"] = self.embeds.contiguous()
        names = {"tasks": json.dumps(self.tasks), "layers": json.dumps(self.layers)}
        save_file(tensors, path, metadata=names)
        return path

    @classmethod
    def load(cls, path: str | Path) -> TaskCentroids:
        """Read the file that `save` wrote, or the one in a folder.

        Raises:
            ValueError: If the file holds no centroids.
            OSError: If there is none.
        """
        path = Path(path) / CENTROIDS_FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no `{path}`. Write it with `save_task_centroids(model, tasks, folder)`."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                names, keys = file.metadata() or {}, set(file.keys())
                tensors = {key: file.get_tensor(key) for key in keys & {"gates", "embeds"}}
            tasks, layers = (tuple(json.loads(names[key])) for key in ("tasks", "layers"))
            found = cls(tasks, layers, tensors["gates"], tensors.get("embeds"))
            found._check()
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"`{path}` holds no task centroids ({type(error).__name__}: {error}). Write it "
                "with `save_task_centroids(model, tasks, folder)`."
            ) from error
        return found

    def _check(self) -> None:
        if not all(isinstance(name, str) for name in (*self.tasks, *self.layers)):
            raise ValueError("a name is no string")
        sizes = [len(self.tasks), len(self.layers)]
        for tensor, known in ((self.gates, sizes), (self.embeds, sizes[:1])):
            if tensor is None:
                continue
            if tensor.dim() != len(known) + 1 or [*tensor.shape[:-1]] != known:
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} for {known}")
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ValueError("numbers that are not finite")


@dataclass(frozen=True, slots=True)
class NearTask:
    """How much a prompt resembles a task.

    Attributes:
        task: The task.
        gates: Cosine of the mean gates of all layers. Soft gates lie near `1 / E`: values are
            high, compare them with each other.
        embedding: Cosine of the task embeddings; None where the router reads no task.
    """

    task: str
    gates: float
    embedding: float | None


def nearest_tasks(
    model: nn.Module,
    prompt: str | Sequence[str],
    centroids: TaskCentroids | str | Path,
    *,
    tokenizer: Any = None,
    adapter: str | None = None,
) -> list[NearTask]:
    """The training tasks that a prompt resembles, the most alike in gates first.

    `prompt` is that of an unseen task, or several of the same task; `centroids` those of the
    training tasks, their file, or the folder of the adapter. The other arguments are those of
    `measure_tasks`.

    Raises:
        ValueError: If the centroids are not those of this adapter's layers, experts or encoder.

    Example:
        ```python
        save_task_centroids(model, {"conll04": prompts, "wnut17": others}, "outputs/demo")
        nearest_tasks(model, prompt, "outputs/demo")[0]
        # NearTask(task='conll04', gates=0.998, embedding=0.97)
        ```
    """
    if not isinstance(centroids, TaskCentroids):
        centroids = TaskCentroids.load(centroids)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    own = TaskCentroids.of(
        *measure_tasks(model, {_PROMPT: prompts}, tokenizer=tokenizer, adapter=adapter), adapter
    )
    return compared(own, centroids)[_PROMPT]


def compared(own: TaskCentroids, known: TaskCentroids) -> dict[str, list[NearTask]]:
    """For each task of `own`, those of `known`, the most alike in gates first.

    Raises:
        ValueError: If the two are not of the same layers, experts and encoder.
    """
    sizes = [
        (len(one.layers), one.gates.shape[-1], None if one.embeds is None else one.embeds.shape[1])
        for one in (own, known)
    ]
    if sizes[0] != sizes[1] or own.layers != known.layers:
        raise ValueError(
            f"The centroids have (layers, experts, task_dim) = {sizes[1]}, the adapter "
            f"{sizes[0]}{', of other names' if sizes[0] == sizes[1] else ''}. Write them again "
            "with `save_task_centroids`."
        )
    found = {}
    for i, task in enumerate(own.tasks):
        gates = _cosines(own.gates[i], known.gates)
        embeds: Sequence[float | None] = [None] * len(known.tasks)
        if own.embeds is not None and known.embeds is not None:
            embeds = _cosines(own.embeds[i], known.embeds)
        near = map(NearTask, known.tasks, gates, embeds)
        found[task] = sorted(near, key=lambda one: -one.gates)
    return found


def _cosines(one: torch.Tensor, others: torch.Tensor) -> list[float]:
    values: list[float] = F.cosine_similarity(
        one.flatten().double(), others.flatten(1).double(), dim=-1
    ).tolist()
    return values


def save_task_centroids(
    model: nn.Module,
    tasks: Mapping[str, Sequence[str]],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    adapter: str | None = None,
) -> Path:
    """Write the centroid of each training task beside an adapter, for `nearest_tasks`.

    Some dozen prompts a task are enough. The file has `4 * (layers * e + task_dim)` bytes a task,
    and lies in `folder`, that of the adapter. The other arguments are those of `measure_tasks`.
    """
    measured = measure_tasks(model, tasks, tokenizer=tokenizer, adapter=adapter)
    return TaskCentroids.of(*measured, adapter).save(folder)


def measure_tasks(
    model: nn.Module,
    tasks: Mapping[str, Sequence[str]],
    *,
    tokenizer: Any = None,
    adapter: str | None = None,
) -> tuple[GateRecord, dict[str, torch.Tensor]]:
    """Read the prompts of some tasks.

    Args:
        model: A causal language model with the adapter.
        tasks: Prompts of each task.
        tokenizer: The model's tokenizer; None: the attached one, or that of the model's name.
        adapter: Which adapter, if several are active.

    Returns:
        The gates, recorded by task; and for each task the embeddings of its prompts,
        `(n, task_dim)`, nothing where the router reads no task.

    Raises:
        ValueError: If a task has no prompt.
    """
    if empty := [task for task, prompts in tasks.items() if not prompts]:
        raise ValueError(f"Task {empty[0]!r} has no prompt. Pass one or more for every task.")
    base: Any = base_model_of(model)
    conditioner = conditioner_of(base)
    assert conditioner is not None
    encoders, readers = conditioner.encoders, conditioner.task_readers()
    tokenizer = tokenizer or encoders.reader_for(base).tokenizer
    embeds: dict[str, list[torch.Tensor]] = {}
    with evaluating(model), record_gates(model) as record:
        for task, prompts in tasks.items():
            for prompt in prompts:
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(base.device)
                of_adapter = encoders.embed(readers, [prompt], ids.device)
                with record.task(task):
                    model(input_ids=ids, task_embeds=of_adapter or None)
                name = adapter if adapter is not None else next(iter(of_adapter), None)
                if name in of_adapter:
                    embeds.setdefault(task, []).append(of_adapter[name])
    return record, {task: torch.cat(found) for task, found in embeds.items()}
