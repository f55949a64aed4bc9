"""Hostile adapters: refused with the field or the weight named, and nothing of them is run."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

import scripted
from cases import adapted
from peft_taskmoe import TaskEncoder, TaskMoELoraConfig
from peft_taskmoe.config_checks import check_regex
from peft_taskmoe.uie import Extractor
from peft_taskmoe.uie.extraction.format_file import FORMAT_FILE, load_format

NAN, HUGE = float("nan"), 10**400


class Payload:
    """What a pickle runs where it is read without `weights_only`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny Llama that can be loaded by its config."""
    folder = tmp_path_factory.mktemp("good")
    base = scripted.tiny_llama()
    base.save_pretrained(folder / "base")
    scripted.byte_tokenizer().save_pretrained(folder / "base")
    from peft import get_peft_model

    config = TaskMoELoraConfig(
        task_type="CAUSAL_LM", num_experts=2, r=1, router_inputs="token", target_modules=["q_proj"]
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def change_weights(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def load(folder: Path) -> Any:
    return Extractor.from_pretrained(folder, device="cpu")


# --- weights


WEIGHTS = {
    "renamed": (lambda w: {f"z.{k}": v for k, v in w.items()}, "lack `base_model"),
    "none": (lambda w: {}, "lack `base_model"),
    "missing experts": (lambda w: dict(list(w.items())[1:]), "lack `base_model"),
    "NaN": (lambda w: {k: v * NAN for k, v in w.items()}, "are NaN or infinite"),
    "infinite": (lambda w: {k: v / 0 for k, v in w.items()}, "are NaN or infinite"),
    "another shape": (lambda w: {k: v[:, :1].clone() for k, v in w.items()}, "size mismatch"),
    "another rank": (lambda w: {k: torch.cat([v, v]) for k, v in w.items()}, "size mismatch"),
    "a scalar": (lambda w: {k: torch.tensor(1.0) for k in w}, "size mismatch"),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_broken_weights_are_refused(bad: Path, change: Callable, message: str) -> None:
    change_weights(bad, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(bad)


def test_whole_numbers_as_weights_are_not_silently_another_adapter(bad: Path) -> None:
    change_weights(bad, lambda w: {k: torch.ones_like(v).to(torch.int8) for k, v in w.items()})
    weights = load(bad).model.state_dict()
    assert all(bool((v == 1).all()) for k, v in weights.items() if "taskmoe_lora_" in k)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0[[[[[[[["])
def test_a_file_that_holds_no_weights_is_refused(bad: Path, content: bytes) -> None:
    (bad / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(Exception, match=r"(?i)safetensors|header|deserializ"):
        load(bad)


def test_a_payload_in_pickled_weights_does_not_run(bad: Path, tmp_path: Path) -> None:
    """`weights_only` is what stops it: without, the same file runs."""
    ran = tmp_path / "ran"
    (bad / "adapter_model.safetensors").unlink()
    torch.save({"w": Payload(ran)}, bad / "adapter_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load(bad)
    assert not ran.exists()
    torch.load(bad / "adapter_model.bin", weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("file", ["router.bin", "training_args.bin", "optimizer.pt", "x.pkl"])
def test_pickles_beside_an_adapter_are_not_read(bad: Path, tmp_path: Path, file: str) -> None:
    torch.save(Payload(tmp_path / "ran"), bad / file)
    load(bad)
    assert not (tmp_path / "ran").exists()


# --- code


@pytest.mark.parametrize("where", ["adapter_config.json", "tokenizer_config.json", "base"])
def test_code_of_a_repository_is_not_run(bad: Path, tmp_path: Path, where: str) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass A: pass\n"
    auto_map = {"AutoConfig": "evil.A", "AutoTokenizer": ["evil.A", None], "AutoModel": "evil.A"}
    folder = bad
    if where == "base":
        base = json.loads((bad / "adapter_config.json").read_text())["base_model_name_or_path"]
        folder = Path(shutil.copytree(base, tmp_path / "base"))
        change_config(bad, base_model_name_or_path=str(folder))
        path = folder / "config.json"
    else:
        scripted.byte_tokenizer().save_pretrained(bad)
        path = bad / where
    (folder / "evil.py").write_text(code)
    key = "auto_mapping" if where == "adapter_config.json" else "auto_map"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: auto_map}))
    load(bad)  # with what transformers knows
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_a_task_encoder_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.A", "AutoModel": "evil.A"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="wants code from its repository to run"):
        TaskEncoder.from_config(TaskMoELoraConfig(task_encoder=str(tmp_path)).task_encoder)


def test_a_task_encoder_without_a_name_says_what_it_was() -> None:
    config = TaskMoELoraConfig(task_encoder={"name_or_path": ""})
    with pytest.raises(OSError, match="it was a loaded model without a name"):
        TaskEncoder.from_config(config.task_encoder)


# --- adapter_config.json


FIELDS: dict[str, list[Any]] = {
    "num_experts": [None, True, 0, -1, 1.5, NAN, "8", [8], {}],
    "r": [None, False, 0, 2.0, "4", [], {"a": 1}],
    "lora_alpha": [None, True, NAN, 1e308, HUGE, float("inf"), "32", []],
    "lora_dropout": [None, -0.1, 1.0, NAN, HUGE, "0", []],
    "router_inputs": [None, "x", "", ["token"], 1, {}],
    "task_norm": [None, "", 1, [], {}],
    "bias": [None, "x", 1, []],
    "top_k": [True, 0, 99, 1.5, "2", []],
    "router_aux_loss_coef": [None, -1, NAN, HUGE, "0", []],
    "task_dim": [True, 0, -1, 1.5, "6", []],
    "task_encoder": [5, "", [], True],
    "target_modules": [5, [1], {"a": 1}, True, "(", "(a+)+$", "[", "*"],
    "exclude_modules": [5, [None], "(", "(a|aa)*$"],
    "layers_to_transform": [True, -1, 1.5, "x", ["0"], [True], {}],
    "layers_pattern": [5, [1]],
    "rank_pattern": [5, [], {"q": 0}, {"q": "1"}, {"(": 1}, {"(a+)+": 1}],
    "alpha_pattern": ["x", {"q": NAN}, {"q": None}, {"(.*)*": 1}],
    "modules_to_save": [5, "lm_head", [1], ["("], ["(x*)*"]],
    "trainable_token_indices": [5, "x", [-1], ["a"], [True], {"e": 5}, {"e": ["x"]}],
    "init_weights": [None, "no", 1, []],
    "use_rslora": [None, "false", 0],
    "fan_in_fan_out": [None, "x", 1],
    "inference_mode": ["x", 1],
    "base_model_name_or_path": [5, [], {}, True],
    "revision": [5, []],
}
VALUES = [(name, value) for name, values in FIELDS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), VALUES, ids=lambda x: repr(x)[:20])
def test_a_wrong_value_names_its_field(good: Path, tmp_path: Path, name: str, value: Any) -> None:
    content = json.loads((good / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(ValueError, match=rf"`{name}.* must "):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "5", "null", "{", "[" * 10_000, '{"peft_type": 1}'])
def test_a_config_that_is_none_is_an_error(bad: Path, content: str) -> None:
    (bad / "adapter_config.json").write_text(content)
    with pytest.raises((ValueError, TypeError, KeyError, RecursionError, AttributeError)):
        load(bad)


@pytest.mark.parametrize("field", ["r", "num_experts", "task_dim"])
@pytest.mark.parametrize("value", [10**7, 10**12, HUGE], ids=["1e7", "1e12", "1e400"])
def test_sizes_beyond_the_base_are_refused_before_memory_is_taken(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=r"`r` and `task_dim` give [\d,]+ weights beside a layer"):
        adapted("llama", **{field: value})


def test_a_large_adapter_of_a_small_layer_is_still_one() -> None:
    assert adapted("llama", r=64, num_experts=64)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*x", "(a*){30}", "a?" * 40 + "a" * 40,
        "(a|aa)" * 40 + "b", ".*" * 20 + "x", r"(a+)\1+(.*)+", "((((a+))))+b", "(?:a{1,30}){1,30}",
    ],
)  # fmt: skip
def test_an_expression_that_hangs_is_refused_at_once(pattern: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="`target_modules` must be a regex with at most"):
        TaskMoELoraConfig(target_modules=pattern)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)", ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"model\.layers\.([0-9]|[12][0-9]|3[01])\.(mlp|self_attn)\..*_proj",
        r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    ],
)  # fmt: skip
def test_usual_expressions_are_taken(pattern: str) -> None:
    check_regex("target_modules", pattern)


def test_peft_loads_what_is_missing_with_a_warning_by_name(bad: Path) -> None:
    change_weights(bad, lambda w: dict(list(w.items())[1:]))
    base = json.loads((bad / "adapter_config.json").read_text())["base_model_name_or_path"]
    from transformers import AutoModelForCausalLM

    with pytest.warns(UserWarning, match="taskmoe_lora_"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(bad))
    assert isinstance(model, PeftModel)


NO_STYLE = [None, 1, 1.5, NAN, -3, "", "x", "x" * 10**6, [], [1], {}, {"a": 1}, True, "\ud800"]
NO_FORMATS = [
    *({"prompt_format": {"style": value}} for value in NO_STYLE),
    *({"prompt_format": {"occurrences": value}} for value in NO_STYLE if value is not True),
    *({"prompt_format": value} for value in (None, 1, "compact", [], [{}], {"": 1}, {"x": {}})),
    *(None, 1, [], {}, {"prompt_format": {}, "other": 1}),
]
NO_FILES = [
    b"",
    b"\xff\xfe{",
    b"[" * 100_000,
    b'{"prompt_format": {}} x',
    b"\x00",
    b"\xef\xbb\xbf{}",
]


@pytest.mark.parametrize("content", [json.dumps(one).encode() for one in NO_FORMATS] + NO_FILES)
def test_a_wrong_prompt_format_is_refused_by_its_field(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_format(tmp_path)
    field = next((name for name in (b"style", b"occurrences") if name in content), FORMAT_FILE)
    assert (field if isinstance(field, str) else field.decode()) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("field", ["r", "lora_dropout", "router_inputs", "top_k", "use_rslora"])
def test_a_config_is_refused_in_a_short_message_however_long_its_value(field: str) -> None:
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        TaskMoELoraConfig(**{field: "x" * 10**6})
    assert len(str(error.value)) < 600
