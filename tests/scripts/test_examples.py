"""The scripts a user copies, run as a user runs them: as processes, with tiny models, against the loopback Hub."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from loopback_hub import LoopbackHub
from running import ROOT, run


def test_trained_interrupted_resumed_scored_pushed_and_reloaded(tmp_path, models) -> None:
    language_model, encoder = models
    output = tmp_path / "out"
    arguments = [
        *(
            "--config",
            "examples/demo.yaml",
            "--model_name_or_path",
            language_model,
            "--task_encoder",
            encoder,
        ),
        *(
            "--output_dir",
            output,
            "--max_train_documents",
            8,
            "--max_eval_documents",
            2,
            "--max_new_tokens",
            4,
        ),
        *(
            "--per_device_train_batch_size",
            2,
            "--save_steps",
            1,
            "--logging_steps",
            1,
            "--score_before",
            "false",
        ),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run(
        "sft_uie.py",
        *arguments,
        "--max_steps",
        1,
        "--eval_data",
        "examples/data/demo/test_seen.jsonl",
        **offline,
    )
    assert (output / "checkpoint-1").is_dir()

    with LoopbackHub() as hub:
        online = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        printed = run(
            "sft_uie.py",
            *arguments,
            "--max_steps",
            2,
            "--push_to_hub",
            "--hub_model_id",
            "user/tiny",
            **online,
        )
        assert "Going on from the checkpoint" in printed
        files = hub.files("user/tiny")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "uie_config.json",
        "results.json",
        "README.md",
    } <= set(files)
    assert not [name for name in files if "optimizer" in name or name.startswith("checkpoint")]
    card = files["README.md"].decode()
    for needed in (
        "import peft_taskmoe",
        'Extractor.from_pretrained("user/tiny")',
        str(language_model),
        str(encoder),
        "demo (8 documents)",
    ):
        assert needed in card
    results = json.loads((output / "results.json").read_text())
    assert [entry["step"] for entry in results["loss"] if "loss" in entry] == [
        1,
        2,
    ]  # the first from before the interruption
    assert {row["dataset"] for row in results["scores"]["datasets"]} == {"test_seen", "test_unseen"}

    printed = run(
        "extract.py", "--adapter", output, "--text", "Ada met Bo.", "--max_new_tokens", 4, **offline
    )
    assert "Ada met Bo." in printed and "The model wrote:" in printed


@pytest.mark.parametrize("preset", ["demo", "codellama-7b"])
def test_every_field_of_a_preset_is_known(preset) -> None:
    spec = importlib.util.spec_from_file_location("sft_uie", ROOT / "examples" / "sft_uie.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["sft_uie"] = script  # dataclasses look their module up
    try:
        spec.loader.exec_module(script)
        fields = (
            script.DataArguments,
            script.TaskMoEArguments,
            script.SFTConfig,
            script.ModelConfig,
        )
        arguments = ["--config", str(ROOT / "examples" / f"{preset}.yaml"), "--bf16", "false"]
        _, adapter, training, _ = script.TrlParser(fields).parse_args_and_config(arguments)
        assert (adapter.num_experts, adapter.expert_r) == (8, 4) and training.learning_rate > 0
    finally:
        del sys.modules["sft_uie"]
