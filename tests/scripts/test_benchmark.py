"""`examples/benchmark`: a comparison of tiny models as a user runs it, and its parts one by one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import get_peft_model
from torch import nn

from peft_taskmoe.uie import (
    Entity,
    PromptFormat,
    build_example,
    load_format,
    read_datasets,
    read_jsonl,
    score,
)
from running import run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "benchmark"
PRESETS = ("smoke", "small", "codellama-7b")


@pytest.fixture(scope="module")
def parts():
    """The modules of the comparison, which are found as scripts find their neighbours."""
    sys.path.insert(0, str(FOLDER))
    try:
        import one_run
        import prepare_data
        import report
        import run as run_script
        import settings

        yield type(
            "Parts",
            (),
            {
                "one_run": one_run,
                "report": report,
                "run": run_script,
                "settings": settings,
                "data": prepare_data,
            },
        )
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("one_run", "prepare_data", "report", "run", "settings"):
            sys.modules.pop(name, None)


def arguments_of(parts, preset: str, **changes):
    """A preset's arguments, read as the script reads them."""
    from trl import SFTConfig, TrlParser

    parser = TrlParser((parts.settings.BenchmarkArguments, SFTConfig))
    values = {"model_name_or_path": "models/lm", **changes}
    extra = [
        str(word)
        for name, value in values.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    return parser.parse_args_and_config(
        ["--config", str(FOLDER / f"{preset}.yaml"), *extra, "--bf16", "false"]
    )


def smoke(tmp_path, models, where: str, **options: object) -> tuple[tuple, dict[str, str]]:  # noqa: F811
    """Arguments and environment of the smoke preset with tiny models and few documents, writing below `where`."""
    language_model, encoder = models
    options = {
        "config": FOLDER / "smoke.yaml",
        "model_name_or_path": language_model,
        "task_encoder": encoder,
        "output_dir": tmp_path / where,
        "results_dir": tmp_path / f"{where}-results",
        "zero_shot_documents": 3,
        "supervised_documents": 2,
        "dev_documents": 2,
        **options,
    }
    arguments = tuple(word for name, value in options.items() for word in (f"--{name}", value))
    return arguments, {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}


def test_a_comparison_from_training_to_report_is_resumed_and_skipped(tmp_path, models) -> None:  # noqa: F811
    common, home = smoke(tmp_path, models, "out", train_documents=8, max_new_tokens=4)
    results = tmp_path / "out-results"
    printed = run("benchmark/run.py", *common, "--only", "task-aware", **home)
    assert (
        "1 runs, 0 of them done before." in printed
        and "Run 1 of 1: task-aware_lr0.001_seed0" in printed
    )
    folder = tmp_path / "out" / "task-aware_lr0.001_seed0"
    finished = json.loads((results / "runs" / "task-aware_lr0.001_seed0.json").read_text())
    assert load_format(folder / "adapter") == PromptFormat(style="compact", occurrences=False)

    # Killed after its training and the first answers: what is there stays, what is not is made again, alike.
    (results / "runs" / "task-aware_lr0.001_seed0.json").unlink()
    answers = folder / "answers" / "test_unseen.json"
    answers.unlink()
    kept = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.json")
        if "checkpoints" not in path.parts
    }
    kept[folder / "adapter" / "adapter_model.safetensors"] = (
        (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    )
    printed = run("benchmark/run.py", *common, **home)
    assert "3 runs, 0 of them done before." in printed and "min left" in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and answers.is_file()
    again = json.loads((results / "runs" / "task-aware_lr0.001_seed0.json").read_text())
    for figures in (finished["figures"], again["figures"]):
        figures.pop("generation_seconds")
    assert again == finished

    assert {path.stem for path in (results / "runs").glob("*.json")} == {
        f"{name}_lr0.001_seed0" for name in ("lora-36", "token-only", "task-aware")
    }
    assert {path.name for path in results.glob("*.png")} == {
        f"learning_rate_0-001_{name}.png" for name in ("f1", "gain", "similarity")
    }
    text = (results / "README.md").read_text()
    assert "## task-aware, seed 0" in (results / "learning_rate_0-001_labels.md").read_text()
    for words in (
        "| task-aware - lora-36 | 1 |",
        "| task-aware - token-only | 1 |",
        "| RE |",
        "NLL per token, zero-shot",
        "| torch |",
    ):
        assert words in text, words
    assert str(tmp_path / "lm") not in json.dumps(again)  # no place of this machine
    figures = json.loads((results / "figures.json").read_text())
    assert set(figures["learning rate 0.001"]) == {
        "token-only - lora-36",
        "task-aware - lora-36",
        "task-aware - token-only",
    }

    printed = run("benchmark/run.py", *common, **home)
    assert "3 runs, 3 of them done before." in printed and "Run 1" not in printed

    # The report needs the results folder only.
    (results / "README.md").unlink()
    run("benchmark/report.py", results, **home)
    assert (results / "README.md").read_text() == text

    with pytest.raises(
        AssertionError, match=r"was made with `benchmark\.max_new_tokens` = 4, and now it is 5"
    ):
        run("benchmark/run.py", *common, "--max_new_tokens", 5, **home)


def test_learning_rates_can_be_chosen_before_the_rest_is_measured(tmp_path, models) -> None:  # noqa: F811
    common, home = smoke(
        tmp_path, models, "out", train_documents=8, max_new_tokens=4, only="lora-36"
    )
    results = tmp_path / "out-results"
    names = ["lora-36_lr0.001_seed0", "lora-36_lr0.01_seed0"]
    rates = ("--learning_rates", "1e-3", "1e-2")

    def loss(run: str, part: str) -> str:
        found = [
            json.loads(path.read_text()).values()
            for path in (tmp_path / "out" / run / f"nll_{part}").iterdir()
        ]
        means = [sum(loss for loss, _ in one) / sum(tokens for _, tokens in one) for one in found]
        return f"{sum(means) / len(means):.4f}"

    def stems(kind: str) -> list[str]:
        return sorted(path.stem for path in (results / kind).glob("*.json"))

    run("benchmark/run.py", *common, "--measure", "dev", *rates, **home)
    assert (stems("likelihoods"), stems("runs")) == (names, [])
    report = (results / "README.md").read_text()
    for name, rate in zip(names, ("0.001", "0.01"), strict=True):
        assert f"| lora-36 | {rate} | 0 | {loss(name, 'dev')} | - | - |" in report
        assert not (tmp_path / "out" / name / "nll_zero_shot").exists()
    trained = (tmp_path / "out" / names[0] / "training.json").stat().st_mtime_ns

    run("benchmark/run.py", *common, "--measure", "likelihood", *rates, **home)
    assert (stems("likelihoods"), stems("runs")) == (names, [])
    report = (results / "README.md").read_text()
    for name, rate in zip(names, ("0.001", "0.01"), strict=True):
        losses = " | ".join(loss(name, part) for part in ("dev", "supervised", "zero_shot"))
        assert f"| lora-36 | {rate} | 0 | {losses} |" in report
        assert not (tmp_path / "out" / name / "answers").exists()

    run("benchmark/run.py", *common, "--learning_rates", "1e-3", **home)
    assert stems("runs") == names[:1]
    assert (tmp_path / "out" / names[0] / "training.json").stat().st_mtime_ns == trained
    printed = run("benchmark/run.py", *common, "--measure", "likelihood", *rates, **home)
    assert "2 runs, 2 of them done before." in printed


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path, models) -> None:  # noqa: F811
    def train(where: str, kill: bool = False) -> dict:
        common, home = smoke(
            tmp_path, models, where, train_documents=32, max_new_tokens=2, only="task-aware"
        )
        if kill:
            killing = f"""
import os, runpy, sys
sys.path.insert(0, {str(FOLDER)!r})
import one_run

class Killer(one_run.StepClock):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 3:
            os._exit(9)

one_run.StepClock = Killer
runpy.run_path({str(FOLDER / "run.py")!r}, run_name="__main__")
"""
            done = subprocess.run(
                [sys.executable, "-c", killing, *map(str, common)],
                env={**os.environ, **home, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 9, done.stderr[-2000:]
            assert not (tmp_path / where / "task-aware_lr0.001_seed0" / "adapter").exists()
        run("benchmark/run.py", *common, **home)
        return json.loads(
            (tmp_path / f"{where}-results" / "runs" / "task-aware_lr0.001_seed0.json").read_text()
        )["figures"]

    whole, resumed = train("whole"), train("killed", kill=True)
    assert resumed["training"]["steps"] == whole["training"]["steps"] == 4
    for part in ("nll_dev", "nll_zero_shot"):
        assert resumed[part] == whole[part]


def test_two_processes_carry_out_the_papers_preset_as_one_does(tmp_path, models) -> None:  # noqa: F811
    """DDP over `codellama-7b.yaml` but for sizes, dropout and bfloat16, which differ with the random numbers and roundings."""
    preset = yaml.safe_load((FOLDER / "codellama-7b.yaml").read_text())
    for adapter in preset["configurations"].values():
        adapter["lora_dropout"] = 0.0
    for part, source in (
        ("train_data", "train"),
        ("supervised_data", "test_seen"),
        ("zero_shot_data", "test_unseen"),
    ):
        lines = (ROOT / "examples" / "data" / "demo" / f"{source}.jsonl").read_text().splitlines()
        paths = [tmp_path / path for path in preset[part]]
        for i, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join((lines * 2)[2 * i : 2 * i + 8]) + "\n")
        preset[part] = [str(path) for path in paths]
    preset |= {"train_documents": 4, "dev_documents": 1, "epochs": 1, "max_new_tokens": 2}
    preset |= {"zero_shot_documents": 3, "supervised_documents": 3, "only": ["task-aware"]}
    preset |= {
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "max_length": 16384,
        "learning_rates": [0.01],
    }
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))
    found = {}
    for processes in (1, 2):
        results, output = tmp_path / f"results{processes}", tmp_path / f"out{processes}"
        run(
            "benchmark/run.py",
            *("--config", tmp_path / "preset.yaml", "--model_name_or_path", models[0]),
            *("--task_encoder", models[1], "--results_dir", results, "--output_dir", output),
            *("--gradient_accumulation_steps", 4 // processes),
            *(("--measure", "likelihood") if processes == 1 else ()),
            launcher=(
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ),
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="1",
        )
        (path,) = results.glob("*/task-aware_lr0.01_seed42.json")
        found[processes] = json.loads(path.read_text())
        assert found[processes]["settings"]["training"]["world_size"] == processes
    alone, shared = (found[n]["figures"] for n in (1, 2))
    # 24 examples in batches of 4, four batches a step.
    assert alone["training"]["steps"] == shared["training"]["steps"] == 2
    for part, sets in (("nll_dev", 6), ("nll_zero_shot", 19), ("nll_supervised", 6)):
        assert len(shared[part]) == sets
        for name, losses in shared[part].items():
            assert set(losses) == set(alone[part][name]), name
            for key, (loss, tokens) in losses.items():
                assert [loss, tokens] == pytest.approx(alone[part][name][key], rel=1e-4), (
                    name,
                    key,
                )
    assert set(shared["scores"]["answers"]) == set(shared["nll_zero_shot"]) | set(
        shared["nll_supervised"]
    )


def test_a_head_asked_about_answers_only_changes_nothing(parts, models, tmp_path) -> None:  # noqa: F811
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    language_model, _ = models
    rows = [
        {"prompt": f"w{5 + i} " * (i + 1), "completion": f"w{20 + i} w{9 + i}"} for i in range(4)
    ]
    found, asked = [], []
    for trainer_of in (SFTTrainer, parts.one_run.AnswerTrainer):
        trainer = trainer_of(
            str(language_model),
            SFTConfig(
                str(tmp_path), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(language_model),
        )
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
    assert asked == [labelled, labelled]
    with pytest.raises(NotImplementedError, match="no logits of most tokens"):
        trainer.compute_loss(model, dict(batch), return_outputs=True)


def test_routers_have_a_learning_rate_and_first_weights_of_their_own(
    parts, models, tmp_path
) -> None:  # noqa: F811
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    language_model, _ = models
    settings = {
        "method": "moelora",
        "num_experts": 3,
        "r": 2,
        "lora_alpha": 6,
        "router_inputs": "token",
    }
    settings |= {"router_lr_ratio": 4, "router_init_scale": 0}
    configuration = parts.settings.Configuration.of("x", settings, "encoder")
    trainer = SFTTrainer(
        str(language_model),
        SFTConfig(
            str(tmp_path), report_to=[], use_cpu=True, bf16=False, learning_rate=1e-3
        ),
        train_dataset=Dataset.from_list([{"prompt": "w5 w6", "completion": "w7"}] * 8),
        processing_class=transformers.AutoTokenizer.from_pretrained(language_model),
        peft_config=configuration.peft_config(None),
    )  # fmt: skip
    routers = [p for n, p in trainer.model.named_parameters() if "router" in n]
    others = [
        p for n, p in trainer.model.named_parameters() if p.requires_grad and "router" not in n
    ]
    assert routers and all(weight.any() for weight in routers)
    parts.one_run.scale_routers(trainer.model, configuration.router_init_scale)
    assert not any(weight.any() for weight in routers)
    parts.one_run.scale_router_rate(trainer, configuration.router_lr_ratio)
    groups = trainer.create_optimizer().param_groups
    rates = [(id(weight), group["lr"]) for group in groups for weight in group["params"]]
    assert sorted(rates) == sorted(
        [(id(p), 4e-3) for p in routers] + [(id(p), 1e-3) for p in others]
    )


def test_every_configuration_of_a_seed_trains_on_the_same_examples_in_the_same_order(parts) -> None:
    args, sft = arguments_of(parts, "smoke")
    data = parts.one_run.Data.read(args)
    documents = data.training_documents(args, 0)

    def rows(seed: int, text: str) -> list:
        found = parts.one_run.training_examples(
            data.training_documents(args, seed), args, sft, seed, text
        )
        return list(zip(found["id"], found["prompt"], found["completion"], strict=True))

    assert rows(0, "prompt") == rows(0, "schema")
    assert rows(0, "prompt") != rows(1, "prompt")
    assert len(rows(0, "prompt")) == 16 and {d.id for d in documents["demo"]} == {
        i for i, *_ in rows(0, "prompt")
    }
    kept_back = {document.id for document in data.dev["demo"]}
    assert len(kept_back) == 4 and not kept_back & {document.id for document in data.train["demo"]}


def test_batches_hold_documents_of_like_length(parts) -> None:
    args, sft = arguments_of(parts, "smoke", train_documents=150, per_device_train_batch_size=5)
    data = parts.one_run.Data.read(args)
    examples = parts.one_run.training_examples(data.training_documents(args, 0), args, sft, 0)
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in examples]
    batches = [lengths[i : i + 5] for i in range(0, len(lengths), 5)]
    padded = sum(5 * max(batch) for batch in batches) / sum(lengths)
    longest_first = sorted(lengths)
    best = sum(5 * max(longest_first[i : i + 5]) for i in range(0, len(lengths), 5)) / sum(lengths)
    assert padded < best + 0.1
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)


def test_likelihoods_are_those_of_each_document_alone(parts, models) -> None:  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    language_model, _ = models
    args, _ = arguments_of(parts, "smoke", likelihood_batch_size=3)
    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    documents = read_datasets(args.zero_shot_data, split="test", limit=7)["test_unseen"]
    found = parts.one_run.Measure(model, tokenizer, None, args).likelihoods(documents)
    assert set(found) == {document.id for document in documents}
    for document in documents:
        example = build_example(document, format=args.format)
        prompt, answer = (
            tokenizer(example.prompt).input_ids,
            tokenizer(example.completion).input_ids,
        )
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        expected = -sum(logs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1]))
        loss, tokens = found[document.id]
        assert tokens == len(answer) + 1
        assert loss == pytest.approx(expected, rel=1e-4)


def test_swapped_embeddings_come_from_another_data_set(parts) -> None:
    documents = read_jsonl(ROOT / "examples" / "data" / "demo" / "test_unseen.jsonl").documents
    sets = {"a": documents[:3], "b": documents[3:5], "c": documents[5:9]}
    other = parts.one_run.swapped(sets)
    assert len(other) == 9
    for (name, id_), document in other.items():
        assert document.id not in {one.id for one in sets[name]} and id_ != document.id
    families = {name: documents[i : i + 2] for i, name in enumerate(("ner1", "ner2", "re1", "re2"))}
    for (name, _), document in parts.one_run.swapped(families).items():
        donor = next(
            key for key, found in families.items() if document in found and key[:2] != name[:2]
        )
        assert donor[:2] != name[:2]


def test_a_checkpoint_that_a_kill_left_half_written_is_not_gone_on_from(parts, tmp_path) -> None:
    assert parts.one_run.last_checkpoint(tmp_path / "none") is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "adapter_model.safetensors").write_text("half")
    assert parts.one_run.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_comparisons_that_share_a_results_folder_do_not_take_each_others_files(
    parts, tmp_path
) -> None:
    path = tmp_path / "plan.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: parts.one_run.write_json(path, {"command": str(n)}), range(400)))
    assert json.loads(path.read_text())["command"].isdigit() and list(tmp_path.iterdir()) == [path]


def test_the_seconds_of_the_steps_are_kept_with_every_checkpoint(parts, tmp_path) -> None:
    state = transformers.TrainerState(is_world_process_zero=True)
    clock = parts.one_run.StepClock(tmp_path / "steps.json")
    for state.global_step in (1, 2):
        clock.on_step_begin(None, state, None)
        clock.on_step_end(None, state, None)
    assert not (tmp_path / "steps.json").exists()
    clock.on_save(None, state, None)
    resumed = parts.one_run.StepClock(tmp_path / "steps.json")
    assert resumed.seconds == clock.seconds and set(clock.seconds) == {"1", "2"}


def test_the_table_of_seen_labels_is_chosen_and_held_against_the_data(parts, tmp_path) -> None:
    args, _ = arguments_of(parts, "smoke", seen_labels="none")
    assert "crossner_ai" not in args.seen_table()
    args, _ = arguments_of(parts, "smoke")
    assert "crossner_ai" in args.seen_table()
    table = {"datasets": {"test_unseen": {"seen": {"no such label": "why"}, "unseen": []}}}
    (tmp_path / "seen.json").write_text(json.dumps(table))
    args, sft = arguments_of(
        parts, "smoke", seen_labels=tmp_path / "seen.json", results_dir=tmp_path / "results"
    )
    with pytest.raises(ValueError, match="knows data set `test_unseen` but not its label"):
        parts.run.main(args, sft, "command")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_and_of_equal_effective_scale(parts, preset) -> None:
    args, _ = arguments_of(parts, preset)
    configurations = [run.configuration for run in args.plan()]
    assert {one.name for one in configurations} >= {"lora-36", "token-only", "task-aware"}
    for one in configurations:
        assert one.effective_scale == 1.0
        one.peft_config(768)
    if preset != "smoke":
        assert {one.name for one in configurations} >= {"lora-32", "schema-aware", "task-only"}


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        ({"method": "lora", "r": 16, "lora_alpha": 32}, 2.0),
        ({"method": "lora", "r": 16, "lora_alpha": 32, "use_rslora": True}, 8.0),
        ({"method": "moelora", "num_experts": 8, "r": 4, "lora_alpha": 16}, 0.5),
        (
            {"method": "moelora", "num_experts": 8, "r": 4, "lora_alpha": 16, "use_rslora": True},
            1.0,
        ),
    ],
)
def test_the_effective_scale_is_that_of_uniform_gates(parts, adapter, scale) -> None:
    configuration = parts.settings.Configuration.of("x", adapter, "encoder")
    assert configuration.effective_scale == scale
    layer = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), adapter_on(configuration)
    ).base_model.model[0]
    assert layer.scaling["default"] / adapter.get("num_experts", 1) == scale


def adapter_on(configuration):
    """Its config, for a model of one linear layer."""
    config = configuration.peft_config(8)
    config.task_type, config.target_modules = None, {"0"}
    return config


def test_a_configuration_that_does_not_say_its_size_is_refused(parts) -> None:
    with pytest.raises(
        ValueError, match=r'"x" does not say its num_experts, lora_alpha\. Write them: '
    ):
        parts.settings.Configuration.of("x", {"method": "moelora", "r": 4}, "encoder")


def test_the_small_preset_trains_on_enough_and_never_on_what_it_tests(parts) -> None:
    preset = yaml.safe_load((FOLDER / "small.yaml").read_text())
    few = preset["train_documents_of"]
    names = [Path(path).parent.name for path in preset["train_data"]]
    assert sum(few.get(name, preset["train_documents"]) for name in names) >= 1500
    assert not set(names) & {Path(path).parent.name for path in preset["zero_shot_data"]}
    assert preset["zero_shot_documents"] >= 100
    shared = ROOT.parent / "shared"
    if not (shared / "data" / "uie").is_dir():
        pytest.skip("the public data sets are not here: their texts cannot be compared")
    where = {
        f"{part}_data": [str(shared / path) for path in preset[f"{part}_data"]]
        for part in ("train", "zero_shot", "supervised")
    }
    args, _ = arguments_of(parts, "small", **where)
    data = parts.one_run.Data.read(args)
    trained = {
        d.text
        for seed in args.seeds
        for ds in data.training_documents(args, seed).values()
        for d in ds
    }
    assert len(trained) > 1500
    for documents in data.measured.values():
        assert not trained & {document.text for document in documents}


def test_wrong_settings_are_refused(parts) -> None:
    arguments = parts.settings.BenchmarkArguments
    good = {
        "model_name_or_path": "m",
        "train_data": ["t"],
        "configurations": {"lora-36": {"method": "lora", "r": 36, "lora_alpha": 36}},
    }
    arguments(**good)
    for changes, message in (
        ({"model_name_or_path": ""}, "A comparison needs `model_name_or_path`"),
        ({"only": ["lora-35"]}, r"`only` names \['lora-35'\], which is no configuration"),
        ({"baseline": "lora-32"}, '`baseline` is "lora-32", which is no configuration'),
        ({"ablated": "task-aware"}, '`ablated` is "task-aware", which is no configuration'),
        (
            {"configurations": {"lora-36": {"method": "dora"}}},
            'Configuration "lora-36" has `method: dora`',
        ),
        (
            {"configurations": {"lora-36": {"method": "lora", "rank": 3}}},
            r"has \['rank'\], which `LoraConfig` does not take",
        ),
        *(
            (
                {"configurations": {"lora-36": {"method": method, **size, setting: value}}},
                f"`{setting}: {value}`",
            )
            for setting, wrong in (("router_lr_ratio", 0), ("router_init_scale", -1))
            for method, value in (("lora", 2), ("moelora", wrong))
            for size in [
                {"r": 4, "lora_alpha": 4} | ({"num_experts": 8} if method == "moelora" else {})
            ]
        ),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(**{**good, **changes})


def fake_run(parts, name: str, rate: float, seed: int, loss: float, label: str | None = None):
    """A finished run with two zero-shot sets, whose gold answers have a given loss per token and are found all.

    `label`: what every entity is called; None: what it is called in the gold records.
    """
    documents = read_jsonl(ROOT / "examples" / "data" / "demo" / "test_unseen.jsonl").documents[:6]
    sets = {"a": documents[:3], "b": documents[3:]}
    answers = {
        key: {
            one.id: [
                replace(record, label=label) if label and isinstance(record, Entity) else record
                for record in one.records
            ]
            for one in found
        }
        for key, found in sets.items()
    }
    scores, identification = (score(sets, answers, identification=one) for one in (False, True))
    nll = {
        key: {one.id: [loss * (i + 1), i + 1] for i, one in enumerate(found)}
        for key, found in sets.items()
    }
    content = {
        "settings": {
            "configuration": {
                "name": name,
                "method": "lora",
                "adapter": {"r": 4, "lora_alpha": 4},
                "encoder": None,
            },
            "effective_scale": 1.0,
            "learning_rate": rate,
            "seed": seed,
            "benchmark": {"epochs": 1, "model_name_or_path": "m", "dtype": "float32"},
            "training": {"max_length": 512},
        },
        "versions": {},
        "figures": {
            "scores": scores.to_dict(documents=True),
            "identification": identification.to_dict(documents=True),
            "nll_dev": nll,
            "nll_zero_shot": nll,
            "nll_supervised": {},
            "generation_seconds": {"a": 60.0},
            "training": {
                "documents": {"x": 2},
                "steps": 1,
                "trainable_parameters": 10,
                "seconds": 60.0,
                "tokens_per_second": 5.0,
            },
        },
    }
    found = parts.report.Finished(content)
    found.content = content
    return found


def test_comparisons_are_made_at_each_learning_rate_and_at_each_ones_best(parts) -> None:
    losses = {
        ("lora-36", 1e-3): 2.0,
        ("lora-36", 1e-4): 1.0,
        ("task-aware", 1e-3): 0.5,
        ("task-aware", 1e-4): 3.0,
    }
    runs = [
        fake_run(parts, name, rate, seed, loss)
        for (name, rate), loss in losses.items()
        for seed in (1, 0)
    ]
    found = parts.report.selections(runs, ["lora-36", "task-aware"])
    assert list(found) == [
        "learning rate 0.0001",
        "learning rate 0.001",
        "each at its best learning rate",
    ]
    best = found["each at its best learning rate"]
    assert [(name, of[0].learning_rate, [run.seed for run in of]) for name, of in best.items()] == [
        ("lora-36", 1e-4, [0, 1]),
        ("task-aware", 1e-3, [0, 1]),
    ]
    line = parts.report.compare_likelihood(best["task-aware"], best["lora-36"], "zero_shot", {})[
        "all"
    ]
    assert line.difference == pytest.approx(-0.5) and line.high < 0
    assert best["lora-36"][0].likelihood("zero_shot", "a") == pytest.approx(
        1.0
    )  # per token, not per document


def test_the_best_learning_rate_is_chosen_over_the_seeds_that_every_rate_was_tried_with(
    parts,
) -> None:
    tried = {
        (1e-3, 0): 2.0,
        (1e-4, 0): 1.0,
        (1e-4, 1): 9.0,
    }  # seed 1 is a harder draw, and only one rate has it
    runs = [fake_run(parts, "lora-36", rate, seed, loss) for (rate, seed), loss in tried.items()]
    best = parts.report.selections(runs, ["lora-36"])["each at its best learning rate"]["lora-36"]
    assert [(run.learning_rate, run.seed) for run in best] == [(1e-4, 0), (1e-4, 1)]


def test_a_report_says_which_seeds_versions_and_documents_its_figures_are_of(
    parts, tmp_path
) -> None:
    losses = {
        ("lora-36", 0): 2.0,
        ("lora-36", 1): 3.0,
        ("task-aware", 1): 2.5,
        ("task-aware", 0): 1.9,
    }
    report = parts.report
    (tmp_path / "runs").mkdir()
    for (name, seed), loss in losses.items():
        content = fake_run(parts, name, 1e-3, seed, loss).content
        content["figures"]["nll_supervised"] = {"a": {"x": [loss, 1], "y": [2 * loss, 1]}}
        content["versions"] = {"torch": "2.13"}
        content["figures"]["training"]["versions"] = {
            "torch": "2.13",
            "sources": "old" if seed else "new",
        }
        (tmp_path / "runs" / f"{name}{seed}.json").write_text(json.dumps(content))
    plan = {"baseline": "lora-36", "configurations": ["lora-36", "task-aware"], "command": "x"}
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "clusters": {"a": "(.*)-"}}))
    text = report.write(tmp_path)
    assert (
        "| task-aware - lora-36 | 2 |" in text and "| -0.1000, -0.5000 | -0.4500 [" in text
    )  # seed by seed, in their order; then the supervised sets
    assert (
        "| sources | old | lora-36 seed 1, task-aware seed 1 |" in text
        and "| torch | 2.13 | all |" in text
    )
    assert "Parts of one whole are drawn together in a." in text
    for one in fake_run(parts, "a", 1e-3, 0, 1.0).scores.scores:
        assert f"| {one.dataset} | {one.task} | {one.total().support} |" in text
    assert "| data set | lora-36 | task-aware |" in text
    (tmp_path / "runs" / "task-aware0.json").unlink()
    assert "| data set | lora-36 (seed 0, 1) | task-aware (seed 1) |" in report.write(tmp_path)

    run_ = fake_run(parts, "a", 1e-3, 0, 1.0)
    run_.figures["nll_zero_shot"]["a"] = {
        "x-news-E1": [1.0, 1],
        "x-news-E2": [1.0, 1],
        "alone": [1.0, 1],
    }
    of_a = {"x-news-E1": "x-news", "x-news-E2": "x-news"}
    assert report.clusters_of(run_, "zero_shot", {"a": r"(.*)-E\d+$"}) == {"a": of_a}


def test_an_interval_over_trainings_is_a_paired_t_interval(parts) -> None:
    """Of -0.1, 0.0, 0.4: mean 0.1, standard error 0.15275; 2 degrees of freedom: 4.30265 times that."""
    assert parts.report.over_trainings([-0.1, 0.0, 0.4]) == "+0.1000 [-0.5572, +0.7572]"
    assert parts.report.over_trainings([-0.1, 0.0]) == "-"


def test_runs_measured_by_likelihood_alone_are_compared_by_it_and_each_at_its_best(
    parts, tmp_path
) -> None:
    for kind in ("runs", "likelihoods"):
        (tmp_path / kind).mkdir()

    def write(
        kind: str, name: str, rate: float, seed: int, loss: float, leave_out: tuple[str, ...] = ()
    ) -> None:
        content = fake_run(parts, name, rate, seed, loss).content
        content["figures"] = {
            key: of for key, of in content["figures"].items() if key not in leave_out
        }
        content["versions"] = {"torch": str(rate)}
        (tmp_path / kind / f"{name}{rate}{seed}.json").write_text(json.dumps(content))

    unscored = ("scores", "identification", "generation_seconds")
    write("runs", "lora-36", 1e-3, 0, 2.0)
    write("runs", "lora-32", 1e-3, 0, 9.0)
    write("runs", "task-aware", 1e-3, 0, 1.9)
    write(
        "likelihoods", "task-aware", 1e-3, 0, 7.0, unscored
    )  # what was measured before the rest of that run
    write("likelihoods", "task-aware", 2e-3, 0, 1.5, unscored)
    write("likelihoods", "lora-36", 2e-3, 0, 2.5, (*unscored, "nll_zero_shot", "nll_supervised"))
    plan = {
        "baseline": "lora-36",
        "configurations": ["lora-32", "lora-36", "task-aware"],
        "command": "x",
    }
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "clusters": {}}))
    text = parts.report.write(tmp_path)
    for row in (
        "| lora-36 | 0.001 | 0 | 2.0000 | - | 2.0000 | yes |",
        "| lora-36 | 0.002 | 0 | 2.5000 | - | - |  |",
        "| task-aware | 0.001 | 0 | 1.9000 | - | 1.9000 |  |",
        "| task-aware | 0.002 | 0 | 1.5000 | - | 1.5000 | yes |",
        "| learning rate 0.001 | task-aware - lora-36 | -0.1000 [-0.1000, -0.1000] | -0.1000 | - |",
        "| each at its best learning rate | task-aware - lora-36 | -0.5000 [-0.5000, -0.5000] | -0.5000 | - |",
        "| lora-32 | 0.001 | 0 | 9.0000 | - | 9.0000 |  |",  # tried with one rate: none is its best
        "| torch | 0.002 | lora-36 learning rate 0.002 seed 0, task-aware learning rate 0.002 seed 0 |",
    ):
        assert row in text, row
    assert "| each at its best learning rate | lora-32" not in text
    assert (
        "## Learning rate 0.001" in text and "## Learning rate 0.002" not in text
    )  # there are no answers
    assert "## Each at its best learning rate" not in text  # that of task-aware has no answers

    write("runs", "lora-36", 2e-3, 0, 1.8)
    write("runs", "task-aware", 2e-3, 0, 1.5)
    text = parts.report.write(tmp_path)
    # Both are best at 2e-3: the same runs are not shown again.
    assert text.count("Zero-shot differences") == 2
    assert (
        '## Each at its best learning rate\n\nThese are the runs of "learning rate 0.002" above.'
        in text
    )

    for path in (tmp_path / "runs").iterdir():
        path.unlink()
    text = parts.report.write(tmp_path)
    assert (
        "| task-aware | 0.001 | 0 | 7.0000 | - | 7.0000 |  |" in text
        and "Strict micro F1" not in text
    )


def test_a_report_tells_mentions_not_found_from_mentions_called_by_another_name(
    parts, tmp_path
) -> None:
    (tmp_path / "runs").mkdir()
    for name, label in (("lora-36", None), ("task-aware", "thing")):
        content = fake_run(parts, name, 1e-3, 0, 1.0, label=label).content
        for counts in content["figures"]["scores"]["answers"].values():
            counts |= {
                "parse_failures": 1,
                "hallucinated": 2,
                "problems": {"repeated": 7, "unknown_label": 5},
            }
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(content))
    plan = {
        "baseline": "lora-36",
        "configurations": ["lora-36", "task-aware"],
        "command": "x",
        "clusters": {},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    text = parts.report.write(tmp_path)
    strict, identified, labels = (
        text.split(heading)[1].split("\n\n")[1]
        for heading in ("Strict micro F1, zero", "F1 of identification (", "The label that most")
    )
    of_entities = [
        one for one in fake_run(parts, "x", 1e-3, 0, 1.0).scores.scores if one.task == "NER"
    ]
    assert of_entities
    for one in of_entities:
        cells = f"| {one.dataset} | NER | {one.total().support} | 100.0 |"
        assert f"{cells} 0.0 |" in strict and f"{cells} 100.0 |" in identified
    assert "| thing 100 % |" in labels
    assert "| a | 1 / 2 / 5 / 7 | 1 / 2 / 5 / 7 |" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| task-aware - lora-36 |"))
    cells = row.split(" | ")
    assert cells[2].startswith("-") and cells[5] == "+0.0 [+0.0, +0.0]"


def test_runs_of_other_settings_are_not_compared(parts) -> None:
    a, b = (fake_run(parts, name, 1e-3, 0, 1.0) for name in "ab")
    parts.report.check_comparable([a, b])
    b.settings["training"] = {"max_length": 1024}
    with pytest.raises(
        ValueError,
        match="Run b, seed 0, was made with `max_length` = 1024, run a, seed 0, with 512",
    ):
        parts.report.check_comparable([a, b])


def test_only_seeds_that_both_have_are_compared(parts) -> None:
    a = [fake_run(parts, "a", 1e-3, seed, 1.0) for seed in (0, 1, 2)]
    b = [fake_run(parts, "b", 1e-3, seed, 1.0) for seed in (2, 0)]
    assert [[run.seed for run in runs] for runs in parts.report.pair(a, b)] == [[0, 2], [2, 0]]


def test_what_reads_the_task_is_compared_with_the_token_only_and_the_ablated_configuration(
    parts,
) -> None:
    names = {}
    for name in ("lora-36", "token", "task", "pooling"):
        names[name] = [fake_run(parts, name, 1e-3, 0, 1.0)]
        settings = names[name][0].content["settings"]["configuration"]
        if name == "token":
            settings |= {"method": "moelora", "adapter": {"router_inputs": "token"}}
        elif name != "lora-36":
            settings |= {"method": "moelora", "encoder": {"name_or_path": "e"}}
    with_baseline = [("token", "lora-36"), ("task", "lora-36"), ("pooling", "lora-36")]
    with_tokens = [("task", "token"), ("pooling", "token")]
    pairs = parts.report._pairs
    assert pairs(names, "lora-36", None) == with_baseline + with_tokens
    assert pairs(names, "lora-36", "task") == [*with_baseline, *with_tokens, ("pooling", "task")]
    assert pairs(names, "task", "task") == [
        *((name, "task") for name in ("lora-36", "token", "pooling")),
        ("pooling", "token"),
    ]
    del names["task"]  # not run yet
    assert pairs(names, "lora-36", "task") == [*with_baseline[::2], ("pooling", "token")]


def test_the_nearest_training_set_is_that_with_the_likest_gates(parts) -> None:
    run_ = fake_run(parts, "a", 1e-3, 0, 1.0)
    run_.figures["nll_dev"] = {"x": {}, "y": {}}
    run_.figures["gates"] = {
        "mean": {"x": [[0.9, 0.1]], "y": [[0.2, 0.8]], "a": [[0.8, 0.2]], "b": [[0.1, 0.9]]}
    }
    near = parts.report.nearest(run_)
    assert {name: other for name, (_, other) in near.items()} == {"a": "x", "b": "y"}
    assert all(math.isclose(value, 1.0) for value, _ in near.values())


def test_public_data_become_documents(parts) -> None:
    rows = {
        "NER": (
            {
                "text": "Ada saw Kourou and Ada .",
                "entity": [
                    {"entity": "Ada", "entity_type": "person"},
                    {"entity": "Ada", "entity_type": "person"},
                ],
            },
            [["person", "place"], [], {}],
        ),
        "RE": (
            {
                "text": "Ada lives in Kourou .",
                "relation": [
                    {"head": "Ada", "relation": "lives in", "tail": "Kourou"},
                    {"head": "Eve", "relation": "lives in", "tail": "Kourou"},
                ],
            },
            [[], ["lives in"], {}],
        ),
        "EE": (
            {
                "text": "Ada left Kourou .",
                "event": [
                    {
                        "event_trigger": "left",
                        "event_type": "leave",
                        "arguments": [
                            {"role": "who", "argument": "Ada"},
                            {"role": "place", "argument": "Kourou"},
                        ],
                    }
                ],
            },
            [[], [], {"leave": ["who", "place", "when"]}],
        ),
    }
    found = {}
    for task, (row, schema) in rows.items():
        (found[task],), errors = parts.data.documents(
            task, parts.data.instruction_rows(task, [json.dumps(row)], schema)
        )
        assert errors == (1 if task == "RE" else 0)  # Eve is not in the text
    assert [(r.label, r.span.start) for r in found["NER"].records] == [
        ("person", 0),
        ("person", 19),
    ]
    assert [label.name for label in found["NER"].schema.labels] == ["person", "place"]
    assert [(r.label, r.head.text, r.tail.text) for r in found["RE"].records] == [
        ("lives in", "Ada", "Kourou")
    ]
    (event,) = found["EE"].records
    assert (event.label, event.trigger.start, {a.role: a.span.text for a in event.arguments}) == (
        "leave",
        4,
        {"who": "Ada", "place": "Kourou"},
    )
