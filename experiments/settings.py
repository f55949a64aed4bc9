"""The settings of an experiment, as YAML file and command line give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configurations import Configuration, Run

from peft_taskmoe.uie import PromptFormat, Regularisers, SeenLabels


def told(help_: str) -> dict[str, str]:
    """The metadata of a field: what the command line's help says."""
    return {"help": help_}


@dataclass
class ExperimentArguments:
    """A comparison; everything that training takes is a field of TRL's `SFTConfig`."""

    model_name_or_path: str = field(default="", metadata=told("The base model: Hub id or folder."))
    dtype: str = field(default="bfloat16", metadata=told("Of the base model's weights."))
    task_encoder: str = field(
        default="Salesforce/codet5-base",
        metadata=told("Hub id or folder, for configurations that name no encoder."),
    )
    train_data: list[str] = field(
        default_factory=list, metadata=told("JSONL files or Hub data sets to train on.")
    )
    zero_shot_data: list[str] = field(
        default_factory=list, metadata=told("JSONL files or Hub data sets never trained on.")
    )
    supervised_data: list[str] = field(
        default_factory=list, metadata=told("The test parts of the sets that are trained on.")
    )
    train_documents: int | None = field(
        default=None, metadata=told("At most this many of each training set.")
    )
    train_documents_of: dict[str, int] = field(
        default_factory=dict, metadata=told("Another number for some sets, by name.")
    )
    dev_documents: int = field(
        default=20,
        metadata=told(
            "Kept back from each training set; their likelihood chooses the learning rate."
        ),
    )
    zero_shot_documents: int | None = field(
        default=None, metadata=told("At most this many of each zero-shot set.")
    )
    supervised_documents: int | None = field(
        default=None, metadata=told("At most this many of each supervised set.")
    )
    epochs: int = field(
        default=1, metadata=told("Each in another order, with other shuffled labels.")
    )
    configurations: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata=told(
            "Name -> what to train: `method` (lora or moelora), its PEFT config, task encoder."
        ),
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata=told("One run for each."))
    learning_rates: list[float] = field(
        default_factory=lambda: [0.0003],
        metadata=told("One run for each; the best is chosen afterwards."),
    )
    measure: Literal["all", "likelihood", "dev"] = field(
        default="all",
        metadata=told(
            "What to measure after training. `dev`: the likelihood of the documents kept "
            "back; `likelihood`: that of all data sets; `all`: answers as well. Each "
            "resumes the one before."
        ),
    )
    only: list[str] = field(
        default_factory=list, metadata=told("Names of the configurations to run now; default: all.")
    )
    baseline: str = field(
        default="lora-36", metadata=told("The configuration that the others are compared with.")
    )
    ablated: str | None = field(
        default=None,
        metadata=told("The configuration that others which read the task are ablations of."),
    )
    prompt_style: Literal["dataclass", "compact"] = field(
        default="dataclass", metadata=told("The paper's, or one of half the tokens.")
    )
    occurrences: bool = field(default=True, metadata=told("Number repeated mentions in answers."))
    shuffle_labels: bool = field(
        default=True, metadata=told("Show a schema's labels in random order in training.")
    )
    label_dropout: float = field(
        default=0.0, metadata=told("Leave each label out in training with this probability.")
    )
    mask_labels: float = field(
        default=0.0, metadata=told("Hide label names in training with this probability.")
    )
    answer_head: bool = field(
        default=False,
        metadata=told(
            "In training, ask the language-model head about answer tokens only: the same "
            "loss, and most of a step saved on a CPU."
        ),
    )
    max_new_tokens: int = field(default=256, metadata=told("The longest answer."))
    eval_batch_size: int = field(default=16, metadata=told("Prompts of a generation."))
    likelihood_batch_size: int = field(default=8, metadata=told("Documents of a likelihood batch."))
    gate_documents: int = field(
        default=20, metadata=told("Documents of each set whose gates are recorded.")
    )
    swapped_embeddings: bool = field(
        default=True,
        metadata=told(
            "Measure the zero-shot likelihood also with other data sets' task embeddings."
        ),
    )
    seen_labels: str | None = field(
        default=None,
        metadata=told(
            "JSON table of the labels that training has seen; default: the package's, which "
            "is for the training sets of `small.yaml`; `none`: no split by seen labels."
        ),
    )
    clusters: dict[str, str] = field(
        default_factory=dict,
        metadata=told(
            "Data set -> regular expression whose first group, in a document's id, names "
            "what several documents are parts of: intervals then speak of other such "
            "wholes."
        ),
    )
    results_dir: str = field(
        default="results", metadata=told("Where the figures, tables and plots go.")
    )

    def __post_init__(self) -> None:
        if not self.model_name_or_path or not self.train_data or not self.configurations:
            raise ValueError(
                "A comparison needs `model_name_or_path`, `train_data` and `configurations`. "
                "Start from a preset: `--config experiments/configs/small.yaml`."
            )
        known = f"which is no configuration; there are {sorted(self.configurations)}."
        if missing := sorted(set(self.only) - set(self.configurations)):
            raise ValueError(f"`only` names {missing}, {known}")
        for role, named in (("baseline", self.baseline), ("ablated", self.ablated)):
            if named is not None and named not in self.configurations:
                raise ValueError(f'`{role}` is "{named}", {known}')
        for name in self.configurations:
            Configuration.of(name, self.configurations[name], self.task_encoder)

    @property
    def format(self) -> PromptFormat:
        """How prompts are written."""
        return PromptFormat(style=self.prompt_style, occurrences=self.occurrences)

    @property
    def regularisers(self) -> Regularisers:
        """What varies from one training prompt to the next."""
        return Regularisers(
            shuffle=self.shuffle_labels, dropout=self.label_dropout, mask=self.mask_labels
        )

    def seen_table(self) -> SeenLabels:
        """Which labels count as seen."""
        if self.seen_labels == "none":
            return SeenLabels({}, {})
        return SeenLabels.load() if self.seen_labels is None else SeenLabels.load(self.seen_labels)

    def comparison(self) -> dict[str, Any]:
        """What a report needs to know of the experiment beside its runs."""
        return {
            "baseline": self.baseline,
            "ablated": self.ablated,
            "configurations": list(self.configurations),
            "clusters": self.clusters,
        }

    def plan(self) -> list[Run]:
        """The runs of the configurations in `only`, seed by seed.

        So a comparison of one seed is whole before the next begins.
        """
        return [
            Run(Configuration.of(name, settings, self.task_encoder), rate, seed)
            for seed in self.seeds
            for rate in self.learning_rates
            for name, settings in self.configurations.items()
            if not self.only or name in self.only
        ]
