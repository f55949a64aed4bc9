"""One run of the comparison: train an adapter, then measure it on every data set.

Every stage leaves a file in the run's folder as soon as it is done, and is skipped where that file is: a killed run goes
on from its last checkpoint or data set. Knows nothing of other runs.

Under `accelerate launch` every process trains its share. Measuring loads the finished adapter anew, unsharded, in
every process, and each takes its share of the documents; so it needs neither FSDP nor DeepSpeed.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from rich.console import Console
from settings import BenchmarkArguments, Run
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.integrations import deepspeed
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer

import peft_taskmoe
from peft_taskmoe import TaskCollator, TaskEncoder, attach_task_encoder, record_gates
from peft_taskmoe.uie import (
    Document,
    Extractor,
    Problem,
    build_example,
    mix,
    read_datasets,
    record_from_dict,
    sample,
    save_format,
    score,
    to_prompt_completion,
)

Documents = dict[str, list[Document]]
PACKAGES = ("peft", "transformers", "trl", "torch", "datasets", "accelerate")
SORTED_TOGETHER = 16
"""Batches whose documents are sorted by length together; more saves padding, fewer mix the tasks better."""


@dataclass
class Data:
    """The documents of the comparison by data set, the same for all runs but for `train`, which a seed samples."""

    train: Documents
    dev: Documents
    zero_shot: Documents
    supervised: Documents

    @classmethod
    def read(cls, args: BenchmarkArguments) -> Data:
        """Read all data sets; a bad line stops the run with its file and number."""
        pool = read_datasets(args.train_data, split="train")
        dev = {name: sample(documents, args.dev_documents, 0) for name, documents in pool.items()}
        kept = {name: {document.id for document in documents} for name, documents in dev.items()}
        train = {name: [d for d in documents if d.id not in kept[name]] for name, documents in pool.items()}
        return cls(
            train,
            dev,
            read_datasets(args.zero_shot_data, split="test", limit=args.zero_shot_documents),
            read_datasets(args.supervised_data, split="test", limit=args.supervised_documents),
        )

    def training_documents(self, args: BenchmarkArguments, seed: int) -> Documents:
        """A seed's sample of the training documents."""
        wanted = {name: args.train_documents_of.get(name, args.train_documents) for name in self.train}
        return {
            name: documents if wanted[name] is None else sample(documents, wanted[name] or 0, seed)
            for name, documents in self.train.items()
        }

    def checksum(self) -> str:
        """Tells whether two comparisons read the same documents."""
        parts = (self.train, self.dev, self.zero_shot, self.supervised)
        content = [[name, [d.to_dict() for d in docs]] for part in parts for name, docs in part.items()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def measured(self) -> Documents:
        """All data sets that answers are scored on; a supervised set goes by its own name."""
        return {**self.supervised, **self.zero_shot}


class Encoders:
    """The task encoders, loaded once for all runs, with their caches."""

    def __init__(self) -> None:
        self._found: dict[Any, TaskEncoder] = {}

    def of(self, run: Run) -> TaskEncoder | None:
        """The encoder of a run's configuration, on this process's device."""
        config = run.configuration.encoder
        if config is None:
            return None
        key = json.dumps(config.to_dict(), sort_keys=True)
        if key not in self._found:
            self._found[key] = TaskEncoder.from_config(config).to(PartialState().device)
        return self._found[key]


def carry_out(
    run: Run, args: BenchmarkArguments, sft: SFTConfig, data: Data, encoders: Encoders, console: Console
) -> dict[str, Any]:
    """Train and measure, as far as `args.measure` says; what was done before is not done again.

    Returns:
        The run's figures, JSON-ready; the same on every process.
    """
    folder = Path(sft.output_dir) / run.name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    encoder = encoders.of(run)
    figures: dict[str, Any] = {
        "training": _once(
            folder / "training.json", lambda: train(run, args, sft, data, encoder, tokenizer, folder)
        )
    }
    gc.collect()  # the model that was trained
    with unsharded():
        base = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    # In the base's dtype, in which mixed precision computes with it in training as well.
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), autocast_adapter_dtype=False)
    model.eval().to(PartialState().device)
    if encoder is not None:
        attach_task_encoder(model, encoder, tokenizer)
    measure = Measure(model, tokenizer, encoder, args)

    console.print(f"{run.name}: likelihood of the gold answers")
    for part, sets in (("dev", data.dev), ("zero_shot", data.zero_shot), ("supervised", data.supervised)):
        figures[f"nll_{part}"] = {
            name: _once(folder / f"nll_{part}" / f"{name}.json", lambda d=docs: measure.likelihoods(d))
            for name, docs in sets.items()
        }
        if args.measure == "dev":
            return figures
    if encoder is not None and args.swapped_embeddings and len(data.zero_shot) > 1:
        other = swapped(data.zero_shot)
        figures["nll_swapped"] = {
            name: _once(
                folder / "nll_swapped" / f"{name}.json",
                lambda d=docs, n=name: measure.likelihoods(d, [other[n, one.id] for one in d]),
            )
            for name, docs in data.zero_shot.items()
        }
    if args.measure == "likelihood":
        return figures
    if run.configuration.method == "moelora":
        sets = {name: docs[: args.gate_documents] for name, docs in {**data.dev, **data.zero_shot}.items()}
        figures["gates"] = _once(folder / "gates.json", lambda: measure.gates(sets))

    console.print(f"{run.name}: answers")
    answers, seconds = {}, {}
    for name, docs in data.measured.items():
        found = _once(folder / "answers" / f"{name}.json", lambda d=docs: measure.answers(d))
        seconds[name] = found["seconds"]
        answers[name] = {
            document.id: SimpleNamespace(
                records=[
                    record_from_dict(document.task, one) for one in found["answers"][document.id]["records"]
                ],
                problems=[Problem(**one) for one in found["answers"][document.id]["problems"]],
            )
            for document in docs
        }
    figures["scores"] = score(data.measured, answers, seen=args.seen_table()).to_dict(documents=True)
    figures["identification"] = score(data.measured, answers, identification=True).to_dict(documents=True)
    figures["generation_seconds"] = seconds
    return figures


@contextmanager
def unsharded() -> Iterator[None]:
    """Models loaded inside are whole in every process, also where DeepSpeed's ZeRO-3 would shard them while they load."""
    found = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = found


def _once(path: Path, work: Callable[[], Any]) -> Any:
    """What a file holds, or the outcome of the work, which is then written there by the main process."""
    if not path.is_file():
        done = work()
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            write_json(path, done)
        PartialState().wait_for_everyone()
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a file that is either whole or not there, also where several comparisons share a results folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False) + "\n")
    partial.replace(path)


def training_examples(
    documents: Documents, args: BenchmarkArguments, sft: SFTConfig, seed: int, task_text: str = "prompt"
) -> Dataset:
    """Prompts and completions in the order in which they are trained on: the same for every configuration of a seed.

    An epoch's documents are shuffled, sorted by length within blocks of a few batches, cut into batches of one device's
    size, and the batches shuffled: documents of like length share a batch, whatever their task.
    """
    size = sft.per_device_train_batch_size
    epochs = []
    for epoch in range(args.epochs):
        examples = to_prompt_completion(
            mix(documents, seed=seed + epoch),
            task_text=task_text,  # type: ignore[arg-type]
            format=args.format,
            regularisers=args.regularisers,
            seed=seed + 1000 * epoch,
        )
        lengths = [len(row["prompt"]) + len(row["completion"]) for row in examples]
        chance = random.Random(f"{seed} {epoch}")
        order = list(range(len(lengths)))
        chance.shuffle(order)
        block = size * SORTED_TOGETHER
        order = [
            i
            for start in range(0, len(order), block)
            for i in sorted(order[start : start + block], key=lambda i: lengths[i])
        ]
        batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        chance.shuffle(batches)
        epochs.append(examples.select([i for batch in batches for i in batch]))
    return concatenate_datasets(epochs)


class StepClock(TrainerCallback):
    """Keeps how long every step took, in a file that is written with every checkpoint, so that the figure survives a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step's seconds."""
        self.seconds[str(state.global_step)] = time.perf_counter() - self.start

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file."""
        if state.is_world_process_zero:
            write_json(self.path, self.seconds)


@contextmanager
def head_asked_about(model: Any, labels: torch.Tensor) -> Iterator[None]:
    """The language-model head sees the positions alone that are to predict a label: logits are `(labelled tokens, vocabulary)`.

    Args:
        model: The model, not wrapped for several processes.
        labels: `(rows, length)`, -100 where there is none.
    """
    asked = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, hidden: (hidden[0][asked],))
    try:
        yield
    finally:
        hook.remove()


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every labelled token, in nats, row after row, from the logits of `head_asked_about`."""
    following = labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.float(), following[following != -100], reduction="none")


class AnswerTrainer(SFTTrainer):
    """`SFTTrainer` whose language-model head is asked about the tokens that have a label, and no others: the same loss."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean loss of the labelled tokens of all micro-batches that make a step.

        Raises:
            NotImplementedError: If the logits are asked for, as in evaluation: there are none of most tokens.
        """
        if return_outputs:
            raise NotImplementedError("This trainer has no logits of most tokens. Evaluate with SFTTrainer.")
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with head_asked_about(self.accelerator.unwrap_model(model), labels):
            logits = model(**rest, use_cache=False).logits
        loss = answer_losses(logits, labels).sum()
        if num_items_in_batch is None:
            return loss / max(len(logits), 1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss / num_items_in_batch * processes


def scale_routers(model: torch.nn.Module, factor: float) -> None:
    """Multiply the routers' weights by a factor."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "taskmoe_lora_router" in name:
                weight.mul_(factor)


def scale_router_rate(trainer: SFTTrainer, ratio: float) -> None:
    """Let the routers be trained at `ratio` times the learning rate of the rest: they get parameter groups of their own."""
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create(*args, **kwargs)
        routers = {
            id(weight) for name, weight in trainer.model.named_parameters() if "taskmoe_lora_router" in name
        }
        for group in list(optimizer.param_groups):
            own = [weight for weight in group["params"] if id(weight) in routers]
            group["params"] = [weight for weight in group["params"] if id(weight) not in routers]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})
        return optimizer

    trainer.create_optimizer = create_optimizer


def train(
    run: Run,
    args: BenchmarkArguments,
    sft: SFTConfig,
    data: Data,
    encoder: TaskEncoder | None,
    tokenizer: Any,
    folder: Path,
) -> dict[str, Any]:
    """Train the run's adapter and save it in `folder/adapter`.

    Raises:
        ValueError: If an example is longer than `max_length`: its answer would be cut, which teaches to stop early.
    """
    documents = data.training_documents(args, run.seed)
    text = "prompt" if encoder is None else encoder.config.text
    examples = training_examples(documents, args, sft, run.seed, text)
    tokens = [len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in examples]
    if sft.max_length is not None and max(tokens) > sft.max_length:
        raise ValueError(
            f"{sum(n > sft.max_length for n in tokens)} of {len(tokens)} training examples are longer than "
            f"`max_length={sft.max_length}` tokens (the longest has {max(tokens)}), and their answers would be cut. "
            "Raise `max_length`, or take the compact `prompt_style`."
        )
    columns = ["prompt", "completion"]
    if encoder is not None:
        examples = encoder.encode_dataset(examples)
        columns.append("task_embeds")

    config = copy.copy(sft)
    config.output_dir = str(folder / "checkpoints")
    config.learning_rate, config.seed = run.learning_rate, run.seed
    config.num_train_epochs = 1
    config.train_sampling_strategy = "sequential"
    config.remove_unused_columns = False
    set_seed(run.seed)
    base = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    clock = StepClock(folder / "steps.json")
    trainer = (AnswerTrainer if args.answer_head else SFTTrainer)(
        model=base,
        args=config,
        train_dataset=examples.select_columns(columns),
        processing_class=tokenizer,
        peft_config=run.configuration.peft_config(None if encoder is None else encoder.task_dim),
        callbacks=[clock],
    )
    if run.configuration.router_init_scale != 1:
        scale_routers(trainer.model, run.configuration.router_init_scale)
    if run.configuration.router_lr_ratio != 1:
        scale_router_rate(trainer, run.configuration.router_lr_ratio)
    if encoder is not None:
        trainer.data_collator = TaskCollator(trainer.data_collator, task_dim=encoder.task_dim)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(config.output_dir)))
    trainer.save_model(str(folder / "adapter"))
    PartialState().wait_for_everyone()  # until the main process has written it
    if PartialState().is_main_process:  # so that `Extractor.from_pretrained` asks as in training
        save_format(args.format, folder / "adapter")
    trainable, total = trainer.model.get_nb_trainable_parameters()
    seconds = sum(clock.seconds.values())
    return {
        "documents": {name: len(found) for name, found in documents.items()},
        "examples": len(examples),
        "tokens": sum(tokens),
        "steps": trainer.state.global_step,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "seconds": seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "adapter": {
            name: value
            for name, value in json.loads((folder / "adapter" / "adapter_config.json").read_text()).items()
            if name not in ("base_model_name_or_path", "task_encoder")  # places of this machine
        },
        "versions": versions(),
        "loss": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
    }


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint: a kill may have left one without the trainer's state, which is written last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return max(map(str, whole), key=lambda path: int(path.rpartition("-")[2]), default=None)


def versions() -> dict[str, str]:
    """What the figures were made with; `sources` tells states of the package apart that have one version."""
    found = {"peft_taskmoe": peft_taskmoe.__version__}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    package = Path(peft_taskmoe.__file__).parent
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py"))))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        **found,
        "sources": sources.hexdigest()[:12],
        "python": platform.python_version(),
        "device": device,
    }


def swapped(sets: Documents) -> dict[tuple[str, str], Document]:
    """For every document another one, whose task embedding it gets when embeddings are swapped.

    It is of the data set half-way round the list: data sets of one family stand side by side.
    """
    names = list(sets)
    found = {}
    for i, name in enumerate(names):
        other = sets[names[(i + len(names) // 2) % len(names)]]
        for j, document in enumerate(sets[name]):
            found[name, document.id] = other[j % len(other)]
    return found


class Measure:
    """What is measured of a finished adapter. Every method takes all documents and returns all figures on every process.

    Args:
        model: The model with its adapter, on this process's device.
        tokenizer: Its tokenizer.
        encoder: The task encoder, attached to the model; None where the router reads no task.
        args: The comparison's settings.
    """

    def __init__(
        self, model: Any, tokenizer: Any, encoder: TaskEncoder | None, args: BenchmarkArguments
    ) -> None:
        self.model, self.tokenizer, self.encoder, self.args = model, tokenizer, encoder, args

    def likelihoods(
        self, documents: Sequence[Document], task_of: Sequence[Document] | None = None
    ) -> dict[str, list[float]]:
        """Negative log-likelihood in nats and number of tokens of every document's gold answer, by its id.

        Args:
            documents: The documents.
            task_of: For each document the one whose task embedding it gets; None: its own.
        """
        pairs = list(zip(documents, documents if task_of is None else task_of, strict=True))
        return _shared(pairs, self._likelihoods)

    def _likelihoods(self, pairs: list[tuple[Document, Document]]) -> list[tuple[str, list[float]]]:
        found = []
        for batch in self._batches(pairs):
            logits, labels = self._forward([pair[0] for pair in batch], [pair[1] for pair in batch])
            counts = (labels[:, 1:] != -100).sum(1).tolist()
            losses = answer_losses(logits, labels).split(counts)
            for (document, _), loss, count in zip(batch, losses, counts, strict=True):
                found.append((document.id, [loss.sum().item(), count]))
        return found

    def _batches(self, pairs: list[tuple[Document, Document]]) -> Iterable[list[tuple[Document, Document]]]:
        """Batches by length, longest first: what does not fit fails at once."""
        ordered = sorted(pairs, key=lambda pair: -sum(map(len, self._tokens(pair[0]))))
        size = self.args.likelihood_batch_size
        for start in tqdm(range(0, len(ordered), size), desc="Likelihood", leave=False):
            yield ordered[start : start + size]

    def _tokens(self, document: Document) -> tuple[list[int], list[int]]:
        """The tokens of prompt and gold answer, as in training: the answer's begin where the two texts part."""
        example = build_example(document, format=self.args.format)
        prompt = self.tokenizer(example.prompt).input_ids
        whole = [*self.tokenizer(example.prompt + example.completion).input_ids, self.tokenizer.eos_token_id]
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        return whole[:same], whole[same:]

    @torch.no_grad()
    def _forward(
        self, documents: Sequence[Document], task_of: Sequence[Document]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the answers' tokens, row after row, and all labels."""
        rows = [self._tokens(document) for document in documents]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad = (
            self.tokenizer.eos_token_id
            if self.tokenizer.pad_token_id is None
            else self.tokenizer.pad_token_id
        )
        device = next(self.model.parameters()).device
        padding = [width - len(prompt) - len(answer) for prompt, answer in rows]
        ids = torch.tensor(
            [[pad] * p + prompt + answer for p, (prompt, answer) in zip(padding, rows, strict=True)]
        )
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding])
        labels = torch.tensor([[-100] * (width - len(answer)) + answer for _, answer in rows]).to(device)
        task = {}
        if self.encoder is not None:
            task["task_embeds"] = self.encoder([self._task_text(one) for one in task_of]).to(device)
        with head_asked_about(self.model, labels):
            logits = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
                use_cache=False,
                **task,
            ).logits
        return logits, labels

    def _task_text(self, document: Document) -> str:
        example = build_example(document, format=self.args.format)
        assert self.encoder is not None
        return example.prompt if self.encoder.config.text == "prompt" else example.schema_text

    def gates(self, sets: Documents) -> dict[str, Any]:
        """How every layer weighs its experts, by data set: prompts with their gold answers."""
        with record_gates(self.model) as record:
            for name, documents in sets.items():
                pairs = [(document, document) for document in documents]
                for batch in self._batches(pairs):
                    with record.task(name):
                        self._forward([one for one, _ in batch], [one for one, _ in batch])
        stats = record.stats()
        return {
            "layers": record.layers(),
            "mean": {
                name: [[round(g, 5) for g in layer] for layer in record.mean_gates(name).tolist()]
                for name in sets
            },
            "entropy": {
                name: sum(s.entropy for s in stats if s.task == name) / len(record.layers()) for name in sets
            },
            "variance": [[v.within_tasks, v.between_tasks] for v in record.variances()],
        }

    def answers(self, documents: Sequence[Document]) -> dict[str, Any]:
        """What the model answers about every document, by its id, and how long that took."""
        start = time.perf_counter()
        found = _shared(list(documents), self._answers)
        return {"seconds": time.perf_counter() - start, "answers": found}

    def _answers(self, documents: list[Document]) -> list[tuple[str, dict[str, Any]]]:
        extractor = Extractor(
            self.model,
            self.tokenizer,
            self.encoder,
            format=self.args.format,
            batch_size=self.args.eval_batch_size,
            max_new_tokens=self.args.max_new_tokens,
            prefix_caching=self.encoder is None or self.encoder.config.text == "schema",
        )
        return [(name, one.to_dict()) for name, one in extractor.documents(documents, progress=True).items()]


def _shared(items: list[Any], work: Callable[[list[Any]], list[tuple[str, Any]]]) -> dict[str, Any]:
    """Let every process work on its share, and give all of them everything, by document."""
    state = PartialState()
    found = work(items[state.process_index :: state.num_processes])
    return dict(gather_object(found) if state.num_processes > 1 else found)
