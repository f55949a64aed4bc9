"""`experiments`: a comparison of tiny models as a user runs it, and its parts one by one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer, TrlParser

from peft_taskmoe.uie import (
    PromptFormat,
    build_example,
    load_format,
    read_datasets,
    read_jsonl,
)
from running import run
from versions import needs_transformers_5

pytestmark = needs_transformers_5

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
DEMO = ROOT / "examples" / "data" / "demo"
PRESETS = ("smoke", "small", "many_tasks", "codellama-7b")


def arguments_of(parts, preset: str, **changes):
    """A preset's arguments, read as the script reads them."""
    words = ["--config", str(FOLDER / "configs" / f"{preset}.yaml"), "--bf16", "false"]
    for name, value in {"model_name_or_path": "models/lm", **changes}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    parser = TrlParser((parts.settings.ExperimentArguments, SFTConfig))
    return parser.parse_args_and_config(words)


class Smoke:
    """The smoke preset with tiny models and few documents, run as a process."""

    def __init__(self, tmp_path: Path, models, where: str = "out", **options: object) -> None:
        self.output, self.results = tmp_path / where, tmp_path / f"{where}-results"
        options = {
            "config": FOLDER / "configs" / "smoke.yaml",
            "model_name_or_path": models[0],
            "task_encoder": models[1],
            "output_dir": self.output,
            "results_dir": self.results,
            "zero_shot_documents": 3,
            "supervised_documents": 2,
            "dev_documents": 2,
            "max_new_tokens": 4,
            "train_documents": 8,
            **options,
        }
        self.arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def run(self, *arguments: object) -> str:
        """What it printed."""
        return run("run.py", *self.arguments, *arguments, folder="experiments", **self.home)

    def outcome(self, name: str) -> dict:
        """What the file of a run holds."""
        return json.loads((self.results / "runs" / f"{name}.json").read_text())

    def names(self) -> list[str]:
        """Of the runs that have a file."""
        return sorted(path.stem for path in (self.results / "runs").glob("*.json"))

    def report(self) -> str:
        """The report."""
        return (self.results / "README.md").read_text()


@pytest.mark.slow
def test_a_comparison_from_training_to_report_resumes_and_skips(tmp_path, models) -> None:
    smoke = Smoke(tmp_path, models)
    name = "task-aware_lr0.001_seed0"
    printed = smoke.run("--only", "task-aware")
    assert "1 runs, 0 of them done before." in printed and f"Run 1 of 1: {name}" in printed
    folder, finished = smoke.output / name, smoke.outcome(name)
    assert load_format(folder / "adapter") == PromptFormat(style="compact", occurrences=False)

    # Killed after its training and first answers: what is there stays, the rest is made alike.
    (smoke.results / "runs" / f"{name}.json").unlink()
    answers = folder / "answers" / "test_unseen.json"
    answers.unlink()
    kept = [path for path in folder.rglob("*.json") if "checkpoints" not in path.parts]
    kept.append(folder / "adapter" / "adapter_model.safetensors")
    times = {path: path.stat().st_mtime_ns for path in kept}
    printed = smoke.run()
    assert "3 runs, 0 of them done before." in printed and "min left" in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == times and answers.is_file()
    again = smoke.outcome(name)
    for outcome in (finished, again):
        outcome["figures"].pop("generation_seconds")
    assert again == finished
    assert str(tmp_path / "lm") not in json.dumps(again)  # no place of this machine

    names = ("lora-36", "task-aware", "token-only")
    assert smoke.names() == [f"{one}_lr0.001_seed0" for one in names]
    assert {path.name for path in smoke.results.glob("*.png")} == {
        f"learning_rate_0-001_{plot}.png" for plot in ("f1", "gain", "similarity")
    }
    text = smoke.report()
    labels = (smoke.results / "learning_rate_0-001_labels.md").read_text()
    assert "## task-aware, seed 0" in labels
    for words in (
        *("| task-aware - lora-36 | 1 |", "| task-aware - token-only | 1 |", "| RE |"),
        *("NLL per token, zero-shot", "| torch |"),
    ):
        assert words in text, words

    printed = smoke.run()
    assert "3 runs, 3 of them done before." in printed and "Run 1" not in printed

    # The report, and what is kept of a study, need the results folder only.
    (smoke.results / "README.md").unlink()
    run("report.py", smoke.results, folder="experiments", **smoke.home)
    assert smoke.report() == text
    study = tmp_path / "study"
    run("study.py", "keep", smoke.results, study, folder="experiments", **smoke.home)
    figures = json.loads((study / "figures.json").read_text())
    assert figures["training_schemas"] > 1
    assert {(one["a"], one["b"]) for one in figures["differences"]} == {
        ("token-only", "lora-36"),
        ("task-aware", "lora-36"),
        ("task-aware", "token-only"),
    }

    with pytest.raises(
        AssertionError, match=r"was made with `benchmark\.max_new_tokens` = 4, and now it is 5"
    ):
        smoke.run("--max_new_tokens", 5)


@pytest.mark.slow
def test_learning_rates_are_chosen_before_the_rest_is_measured(tmp_path, models) -> None:
    smoke = Smoke(tmp_path, models, only="lora-36")
    names = ["lora-36_lr0.001_seed0", "lora-36_lr0.01_seed0"]
    rates = ("--learning_rates", "1e-3", "1e-2")

    def loss(name: str, part: str) -> str:
        paths = (smoke.output / name / f"nll_{part}").iterdir()
        sums = [
            map(sum, zip(*json.loads(path.read_text()).values(), strict=True)) for path in paths
        ]
        means = [loss / tokens for loss, tokens in sums]
        return f"{sum(means) / len(means):.4f}"

    def rows(*of_parts: str) -> list[str]:
        return [
            f"| lora-36 | {rate} | 0 | " + " | ".join(loss(name, part) for part in of_parts) + " |"
            for name, rate in zip(names, ("0.001", "0.01"), strict=True)
        ]

    smoke.run("--measure", "dev", *rates)
    assert smoke.names() == names
    assert all(f"{row} - | - |" in smoke.report() for row in rows("dev"))
    assert not any((smoke.output / name / "nll_zero_shot").exists() for name in names)
    trained = (smoke.output / names[0] / "training.json").stat().st_mtime_ns

    smoke.run("--measure", "likelihood", *rates)
    assert all(row in smoke.report() for row in rows("dev", "supervised", "zero_shot"))
    assert not any((smoke.output / name / "answers").exists() for name in names)

    smoke.run("--learning_rates", "1e-3")
    assert ["scores" in smoke.outcome(name)["figures"] for name in names] == [True, False]
    assert (smoke.output / names[0] / "training.json").stat().st_mtime_ns == trained
    assert "2 runs, 2 of them done before." in smoke.run("--measure", "likelihood", *rates)


@pytest.mark.slow
def test_a_killed_training_resumes_from_its_checkpoint(tmp_path, models) -> None:
    options = {"train_documents": 32, "max_new_tokens": 2, "only": "task-aware"}
    whole, killed = (Smoke(tmp_path, models, name, **options) for name in ("whole", "killed"))
    killing = f"""
import os, runpy, sys
sys.path.insert(0, {str(FOLDER)!r})
import training

class Killer(training.StepClock):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 3:
            os._exit(9)

training.StepClock = Killer
runpy.run_path({str(FOLDER / "run.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", killing, *map(str, killed.arguments)],
        env={**os.environ, **killed.home, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    name = "task-aware_lr0.001_seed0"
    assert done.returncode == 9, done.stderr[-2000:]
    assert not (killed.output / name / "adapter").exists()
    for smoke in (whole, killed):
        smoke.run()
    expected, resumed = (smoke.outcome(name)["figures"] for smoke in (whole, killed))
    assert resumed["training"]["steps"] == expected["training"]["steps"] == 4
    for part in ("nll_dev", "nll_zero_shot"):
        assert resumed[part] == expected[part]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path, models) -> None:
    """DDP over `codellama-7b.yaml`, without dropout and bfloat16, whose roundings differ."""
    preset = yaml.safe_load((FOLDER / "configs" / "codellama-7b.yaml").read_text())
    for adapter in preset["configurations"].values():
        adapter["lora_dropout"] = 0.0
    for part, source in (
        ("train_data", "train"),
        ("supervised_data", "test_seen"),
        ("zero_shot_data", "test_unseen"),
    ):
        lines = (DEMO / f"{source}.jsonl").read_text().splitlines()
        paths = [tmp_path / path for path in preset[part]]
        for i, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join((lines * 2)[2 * i : 2 * i + 8]) + "\n")
        preset[part] = [str(path) for path in paths]
    preset |= {"train_documents": 4, "dev_documents": 1, "epochs": 1, "max_new_tokens": 2}
    preset |= {"zero_shot_documents": 3, "supervised_documents": 3, "only": ["task-aware"]}
    preset |= {"dtype": "float32", "bf16": False, "use_cpu": True, "max_length": 16384}
    preset |= {"learning_rates": [0.01]}
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))
    found = {}
    for processes in (1, 2):
        smoke = Smoke(tmp_path, models, str(processes))
        run(
            "run.py",
            *("--config", tmp_path / "preset.yaml", "--model_name_or_path", models[0]),
            *("--task_encoder", models[1], "--results_dir", smoke.results),
            *("--output_dir", smoke.output, "--gradient_accumulation_steps", 4 // processes),
            *(("--measure", "likelihood") if processes == 1 else ()),
            folder="experiments",
            launcher=(
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ),
            **smoke.home,
        )
        outcome = smoke.outcome("task-aware_lr0.01_seed42")
        assert outcome["settings"]["training"]["world_size"] == processes
        found[processes] = outcome["figures"]
    alone, shared = found[1], found[2]
    # 24 examples in batches of 4, four batches a step.
    assert alone["training"]["steps"] == shared["training"]["steps"] == 2
    for part, sets in (("nll_dev", 6), ("nll_zero_shot", 19), ("nll_supervised", 6)):
        assert len(shared[part]) == sets
        for name, losses in shared[part].items():
            assert losses.keys() == alone[part][name].keys(), name
            for key, values in losses.items():
                assert values == pytest.approx(alone[part][name][key], rel=1e-4), (name, key)
    measured = shared["nll_zero_shot"].keys() | shared["nll_supervised"].keys()
    assert shared["scores"]["answers"].keys() == measured


def trainer_of(cls, model: Path, tmp_path: Path, rows: list, *, config=None, **settings):
    """A trainer on rows of prompts and completions."""
    return cls(
        str(model),
        SFTConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        peft_config=config,
    )


def test_a_head_on_answer_tokens_alone_changes_no_loss(parts, models, tmp_path) -> None:
    rows = [
        {"prompt": f"w{5 + i} " * (i + 1), "completion": f"w{20 + i} w{9 + i}"} for i in range(4)
    ]
    found, asked = [], []
    for cls in (SFTTrainer, parts.answer_head.AnswerTrainer):
        trainer = trainer_of(cls, models[0], tmp_path, rows, per_device_train_batch_size=4)
        model = trainer.model.eval()
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _, args, out: asked.append(out.shape[:-1].numel()))
        batch = next(iter(trainer.get_train_dataloader()))
        counts = {}
        for items in (None, torch.tensor(24)):
            model.zero_grad()
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
            loss.backward()
            counts[items] = loss.item(), {name: p.grad for name, p in model.named_parameters()}
        found.append(counts)
    for ours, theirs in zip(found[1].values(), found[0].values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    labelled = (batch["labels"] != -100).sum()
    assert asked[-2:] == [labelled, labelled]  # of ours; TRL does it outside the head, or for all
    with pytest.raises(NotImplementedError, match="no logits of most tokens"):
        trainer.compute_loss(model, dict(batch), return_outputs=True)


def test_routers_have_their_own_learning_rate_and_first_weights(parts, models, tmp_path) -> None:
    settings = {"method": "moelora", "num_experts": 3, "r": 2, "lora_alpha": 6}
    settings |= {"router_inputs": "token", "router_lr_ratio": 4, "router_init_scale": 0}
    configuration = parts.configurations.Configuration.of("x", settings, "encoder")
    rows = [{"prompt": "w5 w6", "completion": "w7"}] * 8
    config = configuration.peft_config(None)
    trainer = trainer_of(SFTTrainer, models[0], tmp_path, rows, config=config, learning_rate=1e-3)
    weights = dict(trainer.model.named_parameters())
    routers = [p for name, p in weights.items() if "router" in name]
    others = [p for name, p in weights.items() if p.requires_grad and "router" not in name]
    assert routers and all(weight.any() for weight in routers)
    parts.training.scale_routers(trainer.model, configuration.router_init_scale)
    assert not any(weight.any() for weight in routers)
    parts.training.scale_router_rate(trainer, configuration.router_lr_ratio)
    groups = trainer.create_optimizer().param_groups
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert rates == {id(p): 4e-3 for p in routers} | {id(p): 1e-3 for p in others}


def test_every_configuration_of_a_seed_trains_on_the_same_examples_in_order(parts) -> None:
    args, sft = arguments_of(parts, "smoke")
    data = parts.documents.Data.read(args)

    def rows(seed: int, text: str) -> list:
        documents = data.training_documents(args, seed)
        found = parts.documents.training_examples(documents, args, sft, seed, text)
        return list(zip(found["id"], found["prompt"], found["completion"], strict=True))

    of_seed = rows(0, "prompt")
    assert of_seed == rows(0, "schema") and of_seed != rows(1, "prompt")
    sampled = {one.id for one in data.training_documents(args, 0)["demo"]}
    assert len(of_seed) == 16 and sampled == {id_ for id_, *_ in of_seed}
    kept_back = {document.id for document in data.dev["demo"]}
    assert len(kept_back) == 4 and not kept_back & {document.id for document in data.train["demo"]}


def test_batches_hold_documents_of_like_length(parts) -> None:
    args, sft = arguments_of(parts, "smoke", train_documents=150, per_device_train_batch_size=5)
    documents = parts.documents.Data.read(args).training_documents(args, 0)
    examples = parts.documents.training_examples(documents, args, sft, 0)
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in examples]

    def longest(found: list[int]) -> list[int]:
        return [max(found[i : i + 5]) for i in range(0, len(found), 5)]

    padded, best = (5 * sum(longest(one)) / sum(lengths) for one in (lengths, sorted(lengths)))
    assert padded < best + 0.1
    assert longest(lengths) != sorted(longest(lengths))


def test_an_example_longer_than_max_length_is_refused(parts) -> None:
    parts.training.check_length([5, 9], None)
    parts.training.check_length([5, 9], 9)
    with pytest.raises(ValueError, match=r"1 of 2 training examples .* `max_length=8` .* has 9"):
        parts.training.check_length([5, 9], 8)


def test_likelihoods_are_those_of_each_document_alone(parts, models) -> None:
    args, _ = arguments_of(parts, "smoke", likelihood_batch_size=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(models[0]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[0])
    documents = read_datasets(args.zero_shot_data, split="test", limit=7)["test_unseen"]
    found = parts.measuring.Measure(model, tokenizer, None, args).likelihoods(documents)
    assert set(found) == {document.id for document in documents}
    for document in documents:
        example = build_example(document, format=args.format)
        prompt = tokenizer(example.prompt).input_ids
        answer = [*tokenizer(example.completion).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        expected = -sum(logs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1]))
        assert found[document.id] == pytest.approx([expected, len(answer)], rel=1e-4)


def test_swapped_embeddings_come_from_another_data_set(parts) -> None:
    documents = read_jsonl(DEMO / "test_unseen.jsonl").documents
    sets = {"a": documents[:3], "b": documents[3:5], "c": documents[5:9]}
    other = parts.documents.swapped(sets)
    assert len(other) == 9
    for (name, id_), document in other.items():
        assert document.id not in {one.id for one in sets[name]} and id_ != document.id
    families = {name: documents[i : i + 2] for i, name in enumerate(("ner1", "ner2", "re1", "re2"))}
    for (name, _), document in parts.documents.swapped(families).items():
        assert any(document in found for key, found in families.items() if key[:2] != name[:2])


def test_schemas_are_counted_by_their_labels(parts) -> None:
    documents = read_jsonl(DEMO / "train.jsonl").documents
    one = documents[0]
    other = next(d for d in documents if d.schema != one.schema)
    assert parts.documents.count_schemas({"a": [one, one, other], "b": [one]}) == 3


def test_files_written_at_once_by_many_are_whole(parts, tmp_path) -> None:
    path = tmp_path / "plan.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: parts.files.write_json(path, {"command": str(n)}), range(400)))
    assert json.loads(path.read_text())["command"].isdigit() and list(tmp_path.iterdir()) == [path]


def test_the_seconds_of_steps_are_kept_with_every_checkpoint(parts, tmp_path) -> None:
    state = transformers.TrainerState(is_world_process_zero=True)
    clock = parts.training.StepClock(tmp_path / "steps.json")
    for state.global_step in (1, 2):
        clock.on_step_begin(None, state, None)
        clock.on_step_end(None, state, None)
    assert not (tmp_path / "steps.json").exists()
    clock.on_save(None, state, None)
    resumed = parts.training.StepClock(tmp_path / "steps.json")
    assert resumed.seconds == clock.seconds and set(clock.seconds) == {"1", "2"}


def test_the_table_of_seen_labels_is_chosen_and_checked_against_the_data(parts, tmp_path) -> None:
    for changes, known in (({"seen_labels": "none"}, False), ({}, True)):
        assert ("crossner_ai" in arguments_of(parts, "smoke", **changes)[0].seen_table()) is known
    table = {"datasets": {"test_unseen": {"seen": {"no such label": "why"}, "unseen": []}}}
    (tmp_path / "seen.json").write_text(json.dumps(table))
    changes = {"seen_labels": tmp_path / "seen.json", "results_dir": tmp_path / "results"}
    with pytest.raises(ValueError, match="knows data set `test_unseen` but not its label"):
        parts.run.main(*arguments_of(parts, "smoke", **changes), "command")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_and_of_equal_effective_scale(parts, preset) -> None:
    args, _ = arguments_of(parts, preset)
    configurations = {run.configuration.name: run.configuration for run in args.plan()}
    names = {"lora-36", "token-only", "task-aware"}
    if preset in ("small", "codellama-7b"):
        names |= {"lora-32", "schema-aware", "task-only"}
    assert configurations.keys() >= names
    for one in configurations.values():
        assert one.effective_scale == 1.0
        one.peft_config(768)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        ({"method": "lora", "r": 16, "lora_alpha": 32}, 2.0),
        ({"method": "moelora", "num_experts": 8, "r": 4, "lora_alpha": 16}, 0.5),
    ],
)
def test_the_effective_scale_is_that_of_uniform_gates(parts, adapter, scale, rslora) -> None:
    settings = adapter | {"use_rslora": rslora}
    configuration = parts.configurations.Configuration.of("x", settings, "encoder")
    assert configuration.effective_scale == scale * (math.sqrt(adapter["r"]) if rslora else 1)
    config = configuration.peft_config(8)
    config.task_type, config.target_modules = None, {"0"}
    layer = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model[0]
    expected = configuration.effective_scale * adapter.get("num_experts", 1)
    assert layer.scaling["default"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "many_tasks"])
def test_presets_train_on_enough_and_never_on_what_they_test(parts, preset) -> None:
    settings = yaml.safe_load((FOLDER / "configs" / f"{preset}.yaml").read_text())
    few = settings["train_documents_of"]
    names = [Path(path).parent.name for path in settings["train_data"]]
    wanted = sum(few.get(name, settings["train_documents"]) for name in names)
    assert (len(names), wanted) == {"small": (9, 1550), "many_tasks": (19, 1548)}[preset]
    assert not set(names) & {Path(path).parent.name for path in settings["zero_shot_data"]}
    assert settings["zero_shot_documents"] >= 100
    shared = ROOT.parent / "shared"
    if not (shared / "data" / "uie").is_dir():
        pytest.skip("the public data sets are not here: their texts cannot be compared")
    sources = ("train_data", "zero_shot_data", "supervised_data")
    where = {one: [str(shared / path) for path in settings[one]] for one in sources}
    args, _ = arguments_of(parts, preset, **where)
    data = parts.documents.Data.read(args)
    trained = {
        document.text
        for seed in args.seeds
        for documents in data.training_documents(args, seed).values()
        for document in documents
    }
    assert len(trained) > 1500
    zero_shot = {Path(path).parent.name for path in settings["zero_shot_data"]}
    for name, documents in data.measured.items():
        # Some of the many sets repeat a sentence of another one.
        repeated = trained & {document.text for document in documents}
        assert len(repeated) <= (2 if preset == "many_tasks" and name not in zero_shot else 0)


def test_wrong_settings_are_refused(parts) -> None:
    lora = {"method": "lora", "r": 36, "lora_alpha": 36}
    good = {"model_name_or_path": "m", "train_data": ["t"], "configurations": {"lora-36": lora}}
    parts.settings.ExperimentArguments(**good)
    sizes = {"lora": {}, "moelora": {"num_experts": 8}}
    for changes, message in (
        ({"model_name_or_path": ""}, "A comparison needs `model_name_or_path`"),
        ({"only": ["lora-35"]}, r"`only` names \['lora-35'\], which is no configuration"),
        ({"baseline": "lora-32"}, '`baseline` is "lora-32", which is no configuration'),
        ({"ablated": "task-aware"}, '`ablated` is "task-aware", which is no configuration'),
        *(
            ({"configurations": {"lora-36": configuration}}, message)
            for configuration, message in (
                ({"method": "dora"}, 'Configuration "lora-36" has `method: dora`'),
                ({"method": "lora", "rank": 3}, r"has \['rank'\], which `LoraConfig` does not"),
                ({"method": "moelora", "r": 4}, "does not say its num_experts, lora_alpha"),
                *(
                    (
                        lora | sizes[method] | {"method": method, setting: value},
                        f"`{setting}: {value}`",
                    )
                    for setting, wrong in (("router_lr_ratio", 0), ("router_init_scale", -1))
                    for method, value in (("lora", 2), ("moelora", wrong))
                ),
            )
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parts.settings.ExperimentArguments(**{**good, **changes})


def test_public_data_become_documents(parts) -> None:
    def read(task: str, row: dict, schema: list):
        rows = parts.prepare_data.instruction_rows(task, [json.dumps(row)], schema)
        (document,), errors = parts.prepare_data.documents(task, rows)
        return document, errors

    mentions = [{"entity": "Ada", "entity_type": "person"}] * 2
    row = {"text": "Ada saw Kourou and Ada .", "entity": mentions}
    document, errors = read("NER", row, [["person", "place"], [], {}])
    assert [(r.label, r.span.start) for r in document.records] == [("person", 0), ("person", 19)]
    assert [label.name for label in document.schema.labels] == ["person", "place"] and not errors

    lives = [{"head": name, "relation": "lives in", "tail": "Kourou"} for name in ("Ada", "Eve")]
    row = {"text": "Ada lives in Kourou .", "relation": lives}
    document, errors = read("RE", row, [[], ["lives in"], {}])
    found = [(r.label, r.head.text, r.tail.text) for r in document.records]
    assert found == [("lives in", "Ada", "Kourou")] and errors == 1  # Eve is not in the text

    roles = [{"role": "who", "argument": "Ada"}, {"role": "place", "argument": "Kourou"}]
    event = {"event_trigger": "left", "event_type": "leave", "arguments": roles}
    row = {"text": "Ada left Kourou .", "event": [event]}
    document, errors = read("EE", row, [[], [], {"leave": ["who", "place", "when"]}])
    (event,) = document.records
    assert (event.label, event.trigger.start, errors) == ("leave", 4, 0)
    assert {a.role: a.span.text for a in event.arguments} == {"who": "Ada", "place": "Kourou"}


def test_confidences_are_calibrated_on_other_documents(parts, monkeypatch, tmp_path) -> None:
    from peft_taskmoe.uie import Document, Entity, Extractor, Schema, Span, write_jsonl
    from scripted import Scripted, byte_tokenizer

    schema = Schema.of({"Person": ""})
    model = Scripted(lambda prompt: ' [Person("Ada")]')
    monkeypatch.setattr(
        Extractor,
        "from_pretrained",
        lambda adapter, calibrated, **options: Extractor(model, byte_tokenizer(), **options),
    )
    for name, right in (("a", 1), ("b", 3), ("c", 0)):  # of four answers each
        gold = [(Entity("Person", Span("Ada", 0, 3)),) if i < right else () for i in range(4)]
        documents = [Document(str(i), "Ada", "NER", schema, of) for i, of in enumerate(gold)]
        write_jsonl(documents, tmp_path / f"{name}.jsonl")
    files = [f"--{name}={tmp_path / file}.jsonl" for name, file in (("fit", "a"), ("same", "b"))]
    output = tmp_path / "figures.json"
    options = [f"--adapter={tmp_path}", "--save", f"--output={output}", "--min_records=2"]
    parts.calibration.main([*files, f"--other={tmp_path / 'c'}.jsonl", *options])
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert [figures[name]["right"] for name in ("fit", "same", "other")] == [0.25, 0.75, 0.0]
    assert [figures[name]["after"]["ece"] for name in ("fit", "same", "other")] == [0, 0.5, 0.25]
    assert figures["same"]["before"]["confidence"] > 0.5
    assert (tmp_path / "uie_calibration.json").is_file()
