"""What a comparison is made of: its settings, its configurations and its plan of runs.

Knows the YAML file's fields. Does not know how a run is carried out (`one_run`) nor how runs are told of (`report`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig

from peft_taskmoe import TaskEncoderConfig, TaskMoELoraConfig
from peft_taskmoe.uie import PromptFormat, Regularisers, SeenLabels


@dataclass
class BenchmarkArguments:
    """The comparison. Everything that training takes (batch size, schedule, ...) is a field of TRL's `SFTConfig`."""

    model_name_or_path: str = field(
        default="", metadata={"help": "The base model: Hub id or folder."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Of the base model's weights."})
    task_encoder: str = field(
        default="Salesforce/codet5-base",
        metadata={"help": "Hub id or folder of the encoder, for configurations that name none."},
    )
    train_data: list[str] = field(
        default_factory=list, metadata={"help": "JSONL files or Hub data sets to train on."}
    )
    zero_shot_data: list[str] = field(
        default_factory=list,
        metadata={"help": "JSONL files or Hub data sets that are only asked about."},
    )
    supervised_data: list[str] = field(
        default_factory=list, metadata={"help": "The test parts of the sets that are trained on."}
    )
    train_documents: int | None = field(
        default=None, metadata={"help": "At most this many of each training set."}
    )
    train_documents_of: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Another number for some training sets, by name."}
    )
    dev_documents: int = field(
        default=20,
        metadata={
            "help": "Kept back from each training set; the learning rate is chosen by their likelihood."
        },
    )
    zero_shot_documents: int | None = field(
        default=None, metadata={"help": "At most this many of each zero-shot set."}
    )
    supervised_documents: int | None = field(
        default=None, metadata={"help": "At most this many of each supervised test set."}
    )
    epochs: int = field(
        default=1,
        metadata={"help": "Each shows the documents in another order, with other shuffled labels."},
    )
    configurations: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={
            "help": "Name -> what to train: `method` (lora or moelora), its PEFT config, task encoder."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run for each."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4],
        metadata={"help": "One run for each; the best is chosen afterwards."},
    )
    measure: Literal["all", "likelihood", "dev"] = field(
        default="all",
        metadata={
            "help": "What to measure after training. `dev`: the likelihood of the documents kept back, to choose learning rates; "
            "`likelihood`: that of all data sets; `all`: answers as well, which costs most. Each goes on from the one before."
        },
    )
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of the configurations to run now; default: all."},
    )
    baseline: str = field(
        default="lora-36", metadata={"help": "The configuration that the others are compared with."}
    )
    ablated: str | None = field(
        default=None,
        metadata={
            "help": "The configuration that all others which read the task are compared with as well: its ablations."
        },
    )
    prompt_style: Literal["dataclass", "compact"] = field(
        default="dataclass", metadata={"help": "The paper's, or one of half the tokens."}
    )
    occurrences: bool = field(
        default=True, metadata={"help": "Number repeated mentions in answers."}
    )
    shuffle_labels: bool = field(
        default=True, metadata={"help": "Show the labels of a schema in random order in training."}
    )
    label_dropout: float = field(
        default=0.0, metadata={"help": "Leave each label out in training with this probability."}
    )
    mask_labels: float = field(
        default=0.0, metadata={"help": "Hide label names in training with this probability."}
    )
    answer_head: bool = field(
        default=False,
        metadata={
            "help": "In training, ask the language-model head about answer tokens only. The loss is the same; TRL's own head asks "
            "about every token where there is no Triton, on a CPU most of a step."
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "The longest answer."})
    eval_batch_size: int = field(default=16, metadata={"help": "Prompts of a generation."})
    likelihood_batch_size: int = field(
        default=8, metadata={"help": "Documents of a likelihood batch."}
    )
    gate_documents: int = field(
        default=20, metadata={"help": "Documents of each set whose gates are recorded."}
    )
    swapped_embeddings: bool = field(
        default=True,
        metadata={
            "help": "Measure the likelihood also with the task embeddings of other data sets' documents: "
            "what the router makes of the task."
        },
    )
    seen_labels: str | None = field(
        default=None,
        metadata={
            "help": "JSON table of the labels that training has seen; default: the package's, which is for the training sets of "
            "`small.yaml`; `none`: no split by seen labels."
        },
    )
    clusters: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Data set -> regular expression whose first group, in a document's id, names what several documents are parts "
            "of: intervals then speak of other such wholes."
        },
    )
    results_dir: str = field(
        default="results",
        metadata={"help": "Where the figures, tables and plots go; small, to be kept."},
    )

    def __post_init__(self) -> None:
        if not self.model_name_or_path or not self.train_data or not self.configurations:
            raise ValueError(
                "A comparison needs `model_name_or_path`, `train_data` and `configurations`. Start from one of the "
                "presets: `--config examples/benchmark/small.yaml`."
            )
        if missing := sorted(set(self.only) - set(self.configurations)):
            raise ValueError(
                f"`only` names {missing}, which is no configuration; there are {sorted(self.configurations)}."
            )
        for role, named in (("baseline", self.baseline), ("ablated", self.ablated)):
            if named is not None and named not in self.configurations:
                raise ValueError(
                    f'`{role}` is "{named}", which is no configuration; there are {sorted(self.configurations)}.'
                )
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

    def plan(self) -> list[Run]:
        """All runs, seed by seed, so that a comparison of one seed is whole before the next begins.

        The runs and configurations that are not named by `only` stay as they are, and stay in the report.
        """
        return [
            Run(Configuration.of(name, settings, self.task_encoder), rate, seed)
            for seed in self.seeds
            for rate in self.learning_rates
            for name, settings in self.configurations.items()
            if not self.only or name in self.only
        ]


@dataclass(frozen=True)
class Configuration:
    """One adapter to be compared.

    Attributes:
        name: What tables call it.
        method: "lora" (PEFT's) or "moelora" (ours).
        adapter: Arguments of `LoraConfig` or `TaskMoELoraConfig`.
        encoder: The task encoder; None where the router reads no task.
        router_lr_ratio: The routers' learning rate over that of all other weights.
        router_init_scale: What the routers' first weights are multiplied by; 0: all gates equal at the start.
    """

    name: str
    method: Literal["lora", "moelora"]
    adapter: dict[str, Any]
    encoder: TaskEncoderConfig | None
    router_lr_ratio: float = 1.0
    router_init_scale: float = 1.0

    @classmethod
    def of(cls, name: str, settings: dict[str, Any], task_encoder: str) -> Configuration:
        """Read an entry of the YAML file: `method`, `encoder` (fields of `TaskEncoderConfig`), `router_lr_ratio`, `router_init_scale`, and the config's own fields.

        Raises:
            ValueError: If the method or a field is not known, the size is not given, or a router's setting is for no router or out of range.
        """
        adapter = dict(settings)
        method = adapter.pop("method", None)
        encoder = {"name_or_path": task_encoder, **adapter.pop("encoder", {})}
        ratio, init_scale = (
            adapter.pop("router_lr_ratio", 1.0),
            adapter.pop("router_init_scale", 1.0),
        )
        known = {"lora": LoraConfig, "moelora": TaskMoELoraConfig}
        if method not in known:
            raise ValueError(
                f'Configuration "{name}" has `method: {method}`. Write `lora` (PEFT\'s) or `moelora` (Task-Aware MoELoRA).'
            )
        if unknown := sorted(set(adapter) - {one.name for one in fields(known[method])}):
            raise ValueError(
                f'Configuration "{name}" has {unknown}, which `{known[method].__name__}` does not take.'
            )
        if ratio != 1 and (method == "lora" or not ratio > 0):
            raise ValueError(
                f'Configuration "{name}" has `router_lr_ratio: {ratio}` and `method: {method}`. The ratio multiplies the learning rate of '
                "routers, which `lora` has none of: write a number above 0, for `moelora` only."
            )
        if init_scale != 1 and (method == "lora" or not init_scale >= 0):
            raise ValueError(
                f'Configuration "{name}" has `router_init_scale: {init_scale}` and `method: {method}`. The scale multiplies the first weights '
                "of routers, which `lora` has none of: write 0 or a number above it, for `moelora` only."
            )
        sizes = ("r", "lora_alpha") if method == "lora" else ("num_experts", "r", "lora_alpha")
        if missing := [size for size in sizes if size not in adapter]:
            raise ValueError(
                f'Configuration "{name}" does not say its {", ".join(missing)}. Write them: configurations are compared at equal size '
                "and scale."
            )
        reads_task = method == "moelora" and adapter.get("router_inputs", "token+task") != "token"
        return cls(
            name,
            method,
            adapter,
            TaskEncoderConfig(**encoder) if reads_task else None,
            ratio,
            init_scale,
        )

    def peft_config(self, task_dim: int | None) -> PeftConfig:
        """The config for `get_peft_model`."""
        if self.method == "lora":
            return LoraConfig(task_type="CAUSAL_LM", **self.adapter)
        if self.encoder is None:
            return TaskMoELoraConfig(task_type="CAUSAL_LM", **self.adapter)
        return TaskMoELoraConfig(
            task_type="CAUSAL_LM", task_dim=task_dim, task_encoder=self.encoder, **self.adapter
        )

    @property
    def effective_scale(self) -> float:
        """`alpha / (r E)`, with `use_rslora` `alpha / (sqrt(r) E)`: soft gates are `1 / E` on average, and E is 1 for LoRA."""
        r = self.adapter["r"] ** (0.5 if self.adapter.get("use_rslora") else 1)
        return float(self.adapter["lora_alpha"] / r / self.adapter.get("num_experts", 1))


@dataclass(frozen=True)
class Run:
    """One training with what is measured afterwards."""

    configuration: Configuration
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder's and file's name."""
        return f"{self.configuration.name}_lr{self.learning_rate:g}_seed{self.seed}"

    def settings(self, args: BenchmarkArguments, training: dict[str, Any]) -> dict[str, Any]:
        """All that its figures depend on, JSON-ready; a run is done only if it was made with the same."""
        ours = asdict(args)
        for name in (
            "configurations",
            "seeds",
            "learning_rates",
            "only",
            "measure",
            "baseline",
            "ablated",
            "clusters",
            "results_dir",
        ):
            del ours[name]
        for name in ("model_name_or_path", "task_encoder"):
            ours[name] = _named(ours[name])
        for name in ("train_data", "zero_shot_data", "supervised_data"):
            ours[name] = [_named(source) for source in ours[name]]
        configuration = asdict(self.configuration)
        if configuration["encoder"] is not None:
            configuration["encoder"]["name_or_path"] = _named(
                configuration["encoder"]["name_or_path"]
            )
        for name in ("router_lr_ratio", "router_init_scale"):
            if configuration[name] == 1:  # as in runs made before there was the field
                del configuration[name]
        run = {
            "configuration": configuration,
            "effective_scale": self.configuration.effective_scale,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }
        return {**run, "benchmark": ours, "training": training}


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first setting, by name, that is not the same in both; None if all are."""
    for name in sorted({*ours, *theirs}):
        if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name)):
            return name
    return None


def _named(source: str) -> str:
    """A model or data set without the place it has on this machine: two parts of a path, or a Hub id as it is."""
    path = Path(source)
    return "/".join(path.parts[-2:]) if path.is_absolute() or path.exists() else source
