"""One adapter to be compared, and one training of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig

from peft_taskmoe import TaskEncoderConfig, TaskMoELoraConfig

CONFIGS = {"lora": LoraConfig, "moelora": TaskMoELoraConfig}
SIZES = {"lora": ("r", "lora_alpha"), "moelora": ("num_experts", "r", "lora_alpha")}
SOURCES = ("model_name_or_path", "task_encoder")
DATA = ("train_data", "zero_shot_data", "supervised_data")
PLANNING = (
    *("configurations", "seeds", "learning_rates", "only", "measure", "baseline", "ablated"),
    *("clusters", "results_dir"),
)
"""Arguments that figures of a run do not depend on."""


@dataclass(frozen=True)
class Configuration:
    """One adapter to be compared.

    Attributes:
        name: What tables call it.
        method: "lora" (PEFT's) or "moelora" (ours).
        adapter: Arguments of `LoraConfig` or `TaskMoELoraConfig`.
        encoder: The task encoder; None where the router reads no task.
        router_lr_ratio: The routers' learning rate over that of all other weights.
        router_init_scale: Factor of the routers' first weights; 0: all gates equal at the start.
    """

    name: str
    method: Literal["lora", "moelora"]
    adapter: dict[str, Any]
    encoder: TaskEncoderConfig | None
    router_lr_ratio: float = 1.0
    router_init_scale: float = 1.0

    @classmethod
    def of(cls, name: str, settings: dict[str, Any], task_encoder: str) -> Configuration:
        """Read an entry of the YAML file.

        Args:
            name: Its name.
            settings: `method`, `encoder` (fields of `TaskEncoderConfig`), `router_lr_ratio`,
                `router_init_scale`, and the config's own fields.
            task_encoder: The encoder where the entry names none.

        Raises:
            ValueError: If a setting is unknown, missing, out of range or for another method.
        """
        adapter = dict(settings)
        method = adapter.pop("method", None)
        encoder = {"name_or_path": task_encoder, **adapter.pop("encoder", {})}
        ratio, scale = (adapter.pop(one, 1.0) for one in ("router_lr_ratio", "router_init_scale"))
        if method not in CONFIGS:
            raise ValueError(
                f'Configuration "{name}" has `method: {method}`. Write `lora` or `moelora`.'
            )
        if unknown := sorted(set(adapter) - {one.name for one in fields(CONFIGS[method])}):
            raise ValueError(
                f'Configuration "{name}" has {unknown}, '
                f"which `{CONFIGS[method].__name__}` does not take."
            )
        for setting, value, allowed in (
            ("router_lr_ratio", ratio, ratio > 0),
            ("router_init_scale", scale, scale >= 0),
        ):
            if value != 1 and (method == "lora" or not allowed):
                raise ValueError(
                    f'Configuration "{name}" has `{setting}: {value}` and `method: {method}`. '
                    "It must not be negative, the ratio not 0, and `lora` has no router."
                )
        if missing := [size for size in SIZES[method] if size not in adapter]:
            raise ValueError(
                f'Configuration "{name}" does not say its {", ".join(missing)}. Write them: '
                "configurations are compared at equal size and scale."
            )
        reads_task = method == "moelora" and adapter.get("router_inputs", "token+task") != "token"
        task = TaskEncoderConfig(**encoder) if reads_task else None
        return cls(name, method, adapter, task, ratio, scale)

    def peft_config(self, task_dim: int | None) -> PeftConfig:
        """The config for `get_peft_model`."""
        task = {} if self.encoder is None else {"task_dim": task_dim, "task_encoder": self.encoder}
        return CONFIGS[self.method](task_type="CAUSAL_LM", **task, **self.adapter)

    @property
    def effective_scale(self) -> float:
        """`alpha / (r E)`, or `alpha / (sqrt(r) E)` with `use_rslora`; E is 1 for LoRA.

        Soft gates are `1 / E` on average.
        """
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

    def settings(self, args: Any, training: dict[str, Any]) -> dict[str, Any]:
        """All that its figures depend on, JSON-ready: a run is done only if made with the same."""
        ours = {name: value for name, value in asdict(args).items() if name not in PLANNING}
        ours |= {name: without_place(ours[name]) for name in SOURCES}
        ours |= {name: [without_place(source) for source in ours[name]] for name in DATA}
        configuration = asdict(self.configuration)
        if configuration["encoder"] is not None:
            place = configuration["encoder"]["name_or_path"]
            configuration["encoder"]["name_or_path"] = without_place(place)
        for name in ("router_lr_ratio", "router_init_scale"):
            if configuration[name] == 1:  # as in runs made before there was the field
                del configuration[name]
        return {
            "configuration": configuration,
            "effective_scale": self.configuration.effective_scale,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "benchmark": ours,
            "training": training,
        }


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first setting, by name, that is not the same in both; None if all are."""
    for name in sorted({*ours, *theirs}):
        if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name)):
            return name
    return None


def without_place(source: str) -> str:
    """Two parts of a path, without its place on this machine; a Hub id as it is."""
    path = Path(source)
    return "/".join(path.parts[-2:]) if path.is_absolute() or path.exists() else source
