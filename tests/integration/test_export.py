"""Export to plain LoRA, merging, experts from LoRAs, the layout of the paper's authors.

Expected values come from the adapted model itself, from stock PEFT, or from the loops below.
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from peft_taskmoe import (
    TaskMoELoraConfig,
    attach_task_encoder,
    experts_from_loras,
    from_reference_checkpoint,
    task_context,
    to_lora,
)
from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.task_scope import current_state
from tiny import TASK_DIM

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])

# Base model and settings of the adapter. All read the task only, so the export has to be exact.
CAUSAL = {"task_type": "CAUSAL_LM"}
RANKS = {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 1}}
LAYERS = {"exclude_modules": ["o_proj"], "layers_to_transform": [1]}
SAVED = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 8]}
EXACT = {
    "llama": ("llama", CAUSAL),
    "top_k": ("llama", CAUSAL | {"top_k": 2}),
    "patterns": ("llama", CAUSAL | RANKS | {"alpha_pattern": {"k_proj": 5.0, "q_proj": 9.0}}),
    "rslora": ("llama", CAUSAL | RANKS | {"use_rslora": True, "alpha_pattern": {"q_proj": 9.0}}),
    "layers": ("llama", {"target_modules": LLAMA_TARGETS, **LAYERS}),
    "saved": ("llama", CAUSAL | SAVED),
    "gpt2": ("gpt2", CAUSAL),
    "gpt2_all_biases": ("gpt2", {"bias": "all"}),
    "gpt2_own_biases": ("gpt2", {"bias": "taskmoe_lora_only", "target_modules": ["c_attn"]}),
    "bert": ("bert", {"task_type": "SEQ_CLS"}),
}

STOCK_PEFT = """
import json, sys
import torch, transformers
torch.set_num_threads(1)
from peft import PeftModel
from safetensors.torch import save_file
found = {}
for name, base_class, base, adapter in json.loads(sys.argv[1]):
    model = getattr(transformers, base_class).from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        found[name] = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.contiguous()
assert not [m for m in sys.modules if "taskmoe" in m]
save_file(found, sys.argv[3])
"""


@pytest.fixture
def task():
    return torch.randn(1, TASK_DIM, generator=torch.Generator().manual_seed(7))


def logits(model, task_embeds=None, **inputs):
    inputs = inputs or {"input_ids": IDS}
    if task_embeds is not None:
        inputs["task_embeds"] = task_embeds.expand(inputs["input_ids"].shape[0], -1)
    with torch.no_grad():
        return model(**inputs).logits


def disturb(model, seed=5):
    """Move what the adapter trains beside its experts away from the base model's values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "taskmoe_lora_" not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def close(found, expected, within):
    torch.testing.assert_close(found, expected, atol=within, rtol=within)


def averaged(model, *args, **kwargs):
    """The export of an adapter whose router reads the token."""
    with pytest.warns(UserWarning, match="approximation"):
        return to_lora(model, *args, **kwargs)


@pytest.mark.slow
def test_stock_peft_loads_what_was_exported(adapted, tiny_model, tmp_path, task):
    """In one process without this package: the same logits, and for averaged gates the report's."""
    jobs, expected, moved = [], {}, 0

    def save(export, name, base):
        export.save_pretrained(tmp_path / name)
        tiny_model(base).save_pretrained(tmp_path / f"base_{base}")
        folders = [str(tmp_path / f"base_{base}"), str(tmp_path / name)]
        jobs.append([name, type(tiny_model(base)).__name__, *folders])

    for name, (base, settings) in EXACT.items():
        model = disturb(adapted(base, router_inputs="task", **settings))
        export = to_lora(model, task)
        assert export.report.exact and export.report.tokens == 0
        save(export, name, base)
        expected[name] = logits(model, task)
        with model.disable_adapter():
            moved += not torch.allclose(expected[name], logits(model), atol=1e-2)
    assert moved == len(EXACT)  # every adapter does something
    model = adapted(task_type="CAUSAL_LM")
    export = averaged(model, task, calibration=[{"input_ids": IDS}])
    save(export, "averaged", "llama")

    arguments = [json.dumps(jobs), json.dumps(IDS.tolist()), str(tmp_path / "out")]
    command = [sys.executable, "-c", STOCK_PEFT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out")
    for name, values in expected.items():
        close(found[name], values, 1e-5)
    apart = found["averaged"] - logits(model, task)
    assert apart.abs().max().item() == pytest.approx(export.report.logits_max_abs, rel=1e-3)
    report = json.loads((tmp_path / "averaged" / "export_report.json").read_text())
    assert report == export.report.to_dict()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"top_k": 2}])
def test_exact_to_1e_6(adapted, tiny_model, tmp_path, task, settings):
    """In float64, so that what is compared is the export and not the models' own rounding."""
    model = adapted(router_inputs="task", **settings).double()
    to_lora(model, task.double()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model(dtype=torch.float64), tmp_path, autocast_adapter_dtype=False
    ).double()
    close(logits(loaded.eval()), logits(model, task.double()), 1e-10)
    ranks = {p.shape[0] for n, p in loaded.named_parameters() if "lora_A" in n}
    assert ranks == {3 * 2} == {loaded.peft_config["default"].r}


def test_measuring_an_exact_export_finds_rounding_only(adapted, task):
    report = to_lora(adapted(router_inputs="task"), task, calibration=[{"input_ids": IDS}]).report
    assert report.exact and report.tokens == 10 and len(report.layer_errors) == 14
    assert max(report.layer_errors.values()) < 1e-5
    assert report.logits_max_abs < 1e-3 and report.logits_kl < 1e-6


def test_an_alpha_of_zero_is_exported(adapted, tiny_model, task, tmp_path):
    to_lora(adapted(router_inputs="task", lora_alpha=0), task).save_pretrained(tmp_path)
    close(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path).eval()), logits(tiny_model()), 1e-5
    )


def test_a_scale_that_was_set_goes_along(adapted, tiny_model, task, tmp_path):
    model = adapted(router_inputs="task")
    for layer in model.modules():
        if isinstance(layer, TaskMoELoraLayer):
            layer.set_scale("default", 0.25)
    to_lora(model, task).save_pretrained(tmp_path)
    close(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path).eval()), logits(model, task), 1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["v_proj"]},
    ],
)
def test_the_lora_has_the_layers_of_the_adapter(adapted, tiny_model, task, tmp_path, settings):
    model = adapted(router_inputs="task", **settings)
    to_lora(model, task).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    found, own = (
        {name for name, layer in one.get_base_model().named_modules() if isinstance(layer, kind)}
        for one, kind in ((loaded, LoraLayer), (model, TaskMoELoraLayer))
    )
    assert found == own


def test_bare_model_of_inject_adapter(tiny_model, task, tmp_path):
    settings = {"router_inputs": "task", "init_weights": False, "target_modules": ["q_proj"]}
    config = TaskMoELoraConfig(num_experts=2, r=2, task_dim=TASK_DIM, **settings)
    model = inject_adapter_in_model(config, tiny_model()).eval()
    to_lora(model, task[0]).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    close(logits(loaded), logits(model, task), 1e-5)


def test_another_adapter_than_the_active_one(adapted, tiny_model, task, tmp_path):
    model = adapted()  # "default" reads the token, "other" does not
    settings = {"router_inputs": "task", "init_weights": False}
    other = TaskMoELoraConfig(num_experts=2, r=1, task_dim=TASK_DIM, **settings)
    model.add_adapter("other", other)
    to_lora(model, task, adapter_name="other").save_pretrained(tmp_path)
    assert model.active_adapter == "default"
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    model.set_adapter("other")
    close(logits(loaded), logits(model.eval(), task), 1e-5)
    message = r'adapter "default" alone.*the adapters are active: \[\'other\'\].*set_adapter'
    with pytest.raises(ValueError, match=message):
        to_lora(model, task, adapter_name="default", calibration=[{"input_ids": IDS}])


def reference_updates(model, task_embeds, batches, name):
    """Exact updates and those with mean gates of a layer over the tokens that count, by loops."""
    layer = model.get_base_model().get_submodule(name)
    parts = layer.taskmoe_lora_A, layer.taskmoe_lora_B, layer.taskmoe_lora_router
    a, b, router = (part["default"].weight.detach().double() for part in parts)
    r, scaling = layer.r["default"], layer.scaling["default"]
    rows = []
    hook = layer.register_forward_pre_hook(lambda m, args: rows.append(args[0].detach()))
    for batch in batches:
        logits(model, task_embeds, **batch)
    hook.remove()
    both = zip(rows, batches, strict=True)
    tokens = [x for rows_, batch in both for x in rows_[batch["attention_mask"].bool()].double()]
    e = task_embeds[0].double()
    e = e / e.norm() * 0.25 * layer.in_features**0.5
    gates = torch.stack([torch.softmax(router @ torch.cat((x, e)), dim=0) for x in tokens])

    def update(x, g):
        parts = [slice(i * r, (i + 1) * r) for i in range(len(g))]
        return sum(scaling * g[i] * (b[:, part] @ (a[part] @ x)) for i, part in enumerate(parts))

    exact = torch.stack([update(x, g) for x, g in zip(tokens, gates, strict=True)])
    mean = torch.stack([update(x, gates.mean(0)) for x in tokens])
    return exact, mean


def test_average_and_its_report(adapted, tiny_model, task, tmp_path):
    model = adapted(task_type="CAUSAL_LM", task_norm="matched")
    batches = [
        {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])},
        {"input_ids": IDS[:1, :3], "attention_mask": torch.ones(1, 3, dtype=torch.long)},
    ]
    message = r"approximation.*11 calibration tokens.*and the logits by up.*Score it"
    with pytest.warns(UserWarning, match=message) as caught:
        export = to_lora(model, task, calibration=batches)
    assert len([w for w in caught if "approximation" in str(w.message)]) == 1
    report = export.report
    assert not report.exact and report.tokens == 11 and report.rank == 6
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        exact, mean = reference_updates(model, task, batches, name)
        error = ((mean - exact).norm() / exact.norm()).item()
        assert report.layer_errors[name] == pytest.approx(error, rel=1e-4) and error > 1e-3

    export.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    counted = [batch.pop("attention_mask").bool() for batch in batches]
    both = list(zip(batches, counted, strict=True))
    theirs = torch.cat([logits(loaded, **x, attention_mask=m.long())[m] for x, m in both])
    ours = torch.cat([logits(model, task, **x, attention_mask=m.long())[m] for x, m in both])
    assert report.logits_max_abs == pytest.approx((ours - theirs).abs().max().item(), rel=1e-3)
    kl = nn.functional.kl_div(
        theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert report.logits_kl == pytest.approx(kl.item(), rel=1e-3)


def test_calibration_leaves_the_model_alone(adapted, task):
    model = adapted().train()
    model.get_base_model().lm_head.eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    averaged(model, task, calibration=[{"input_ids": IDS}])
    assert [m.training for m in model.modules()] == modes and current_state() is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_calibration_on_texts_and_on_the_tasks_of_the_encoder(
    adapted, word_tokenizer, tiny_encoder, task
):
    model, texts = adapted(), ["w5 w6 w7", "w8 w9"]
    batches = [dict(word_tokenizer(text, return_tensors="pt")) for text in texts]
    of_texts = averaged(model, task, calibration=texts, tokenizer=word_tokenizer)
    of_batches = averaged(model, task, calibration=batches)
    assert of_texts.report == of_batches.report and of_texts.report.tokens == 5
    for one in (texts[0], batches[0]):  # needs no list
        assert averaged(model, task, calibration=one, tokenizer=word_tokenizer).report.tokens == 3
    attach_task_encoder(model, tiny_encoder, word_tokenizer)
    automatic = averaged(model, calibration=texts, tokenizer=word_tokenizer)
    for batch, text in zip(batches, texts, strict=True):
        batch["task_embeds"] = tiny_encoder([text])
    explicit = averaged(model, calibration=batches)
    for key, value in automatic.state_dict.items():
        torch.testing.assert_close(value, explicit.state_dict[key])
    assert automatic.report.layer_errors != of_texts.report.layer_errors


def test_token_router_and_encoder_decoder(adapted, tiny_model, tmp_path):
    model = adapted("t5", router_inputs="token", task_type="SEQ_2_SEQ_LM")
    batch = {
        "input_ids": IDS,
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "labels": IDS[:, :3].contiguous(),
    }
    export = averaged(model, calibration=[batch])
    export.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("t5"), tmp_path).eval()
    apart = (logits(loaded, **batch) - logits(model, **batch)).abs().max().item()
    assert export.report.logits_max_abs == pytest.approx(apart, rel=1e-3)


class TwoPaths(nn.Module):
    """A plain model without logits, one of whose layers is not always used."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, both):
        return self.second(self.first(x)) if both else self.first(x)


def test_plain_model_and_layers_that_calibration_does_not_reach():
    settings = {"router_inputs": "token", "init_weights": False}
    targets = ["first", "second"]
    config = TaskMoELoraConfig(num_experts=2, r=1, target_modules=targets, **settings)
    model = get_peft_model(TwoPaths(), config)
    with pytest.raises(ValueError, match=r"never reached 1 of the 2 adapted layers, e.g. `second`"):
        to_lora(model, calibration=[{"x": torch.randn(3, 4), "both": False}])
    with pytest.warns(UserWarning, match=r"differ by up to \d+\.\d% \(`\w+`\)\. Score it"):
        report = to_lora(model, calibration=[{"x": torch.randn(3, 4), "both": True}]).report
    assert report.tokens == 3 and report.logits_max_abs is None
    assert report.layer_errors["second"] > 0


def test_errors_of_to_lora(adapted, tiny_model, task):
    exact, token = adapted(router_inputs="task"), adapted(router_inputs="token")
    calibration = [{"input_ids": IDS}]

    def refused(message, model, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            to_lora(model, *args, **kwargs)

    refused(r"`LlamaForCausalLM` has no Task-Aware MoELoRA adapter", tiny_model(), task)
    refused(r'"default" reads the task, and a plain LoRA is .* for one task', exact)
    shape = r"`task_embeds` has the shape \(2, 6\).*shape \(1, 6\).*once per task"
    refused(shape, exact, task.expand(2, -1))
    refused(r"`task_embeds` has the shape \(1, 5\)", exact, task[:, :5])
    no_float = r"`task_embeds` is torch.int64\. Pass a float tensor of shape \(1, 6\)"
    refused(no_float, exact, task.long())
    refused(r"`task_embeds` is str\. Pass a float tensor", exact, "a task")
    no_effect = r"reads the token only, so `task_embeds` would have no effect"
    refused(no_effect, token, task, calibration=calibration)
    refused(r'reads the token \(`router_inputs="token"`\).*Pass `calibration=', token)
    for item, message in (
        ("w5", r"Item 0 of `calibration` is a text.*`tokenizer=tokenizer`"),
        ([1, 2], r"Item 0 of `calibration` is a list without tensors"),
        ({"input_ids": [1, 2]}, r"Item 0 of `calibration` is a dict without tensors"),
    ):
        refused(message, token, calibration=[item])
    own = [{"input_ids": IDS, "task_embeds": task}]
    refused(r"brings its own `task_embeds`.*Leave one", exact, task, calibration=own)
    refused(r"`calibration` is empty", token, calibration=[])
    unknown = r'no Task-Aware MoELoRA adapter "x" on this model; it has \[\'default\'\]'
    refused(unknown, exact, task, adapter_name="x")
    exact.base_model.set_adapter([])
    none_active = r"0 Task-Aware MoELoRA adapters are active.*Pass `adapter_name`"
    refused(none_active, exact, task)
    with token.disable_adapter():
        refused(r"the adapters are disabled", token, calibration=calibration)


# Merging


def test_merging_where_conv1d_and_linear_are_both_adapted(adapted, task):
    settings = {"target_modules": ["c_attn", "lm_head"], "router_inputs": "task"}
    model = adapted("gpt2", **settings, model_changes={"tie_word_embeddings": False}).double()
    unmerged = logits(model, task.double())
    with task_context(task.double()):
        model.merge_adapter()
    close(logits(model), unmerged, 1e-9)


# Experts from LoRAs


@pytest.fixture
def lora(tiny_model):
    """`lora(seed, base, **settings)`: a PEFT LoRA with random A and B."""

    def make(seed, base="llama", **settings):
        settings = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", **settings}
        model = get_peft_model(tiny_model(base), LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    return make


def lora_delta(model, name):
    return model.get_base_model().get_submodule(name).get_delta_weight("default")


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_uniform_gates_give_the_mean_or_the_sum(
    adapted, tiny_model, lora, tmp_path, task, base, combine
):
    one = {"c_attn" if base == "gpt2" else "q_proj": 5}
    sources = [lora(1, base), lora(2, base, lora_alpha=7, use_rslora=True)]
    sources.append(lora(3, base, r=4, alpha_pattern=one))  # becomes two experts
    sources[0].save_pretrained(tmp_path)
    share = 1 / 3 if combine == "mean" else 1
    model = adapted(base, num_experts=4, r=2, lora_alpha=11).double()
    experts_from_loras(model, [tmp_path, *sources[1:]], combine=combine)
    reference = tiny_model(base, dtype=torch.float64).eval()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, TaskMoELoraLayer):
            delta = sum(lora_delta(source.double(), name) for source in sources) * share
            reference.get_submodule(name).weight.data += delta.detach()
    close(logits(model, task.double()), logits(reference), 1e-5)


def test_an_expert_alone_is_its_lora(adapted, lora):
    sources = [lora(1), lora(2, lora_alpha=7)]
    model = adapted(num_experts=2, r=2)
    experts_from_loras(model, sources)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = layer.taskmoe_lora_A["default"].weight, layer.taskmoe_lora_B["default"].weight
    for i, source in enumerate(sources):
        own = b[:, 2 * i : 2 * i + 2] @ a[2 * i : 2 * i + 2] * layer.scaling["default"]
        torch.testing.assert_close(own, lora_delta(source, "model.layers.0.self_attn.q_proj"))


def test_the_router_can_stay_and_training_can_start(adapted, lora, task):
    model, sources = adapted(num_experts=2, r=2), [lora(1), lora(2)]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    router = layer.taskmoe_lora_router["default"].weight
    before = router.detach().clone()
    experts_from_loras(model, sources, zero_router=False)
    assert torch.equal(router, before)
    experts_from_loras(model, sources)
    assert not router.any()
    model(input_ids=IDS, labels=IDS, task_embeds=task.expand(2, -1)).loss.backward()
    assert router.grad.abs().max() > 0  # experts differ, so a zero router learns


def test_there_and_back(adapted, task, tmp_path):
    """An exported adapter, taken in again as experts, is the export."""
    model = adapted(router_inputs="task")
    to_lora(model, task).save_pretrained(tmp_path)
    back = adapted()  # 3 experts of rank 2 from one LoRA of rank 6
    experts_from_loras(back, [tmp_path])
    close(logits(back, task), logits(model, task), 1e-4)


def test_errors_of_experts_from_loras(adapted, lora, tiny_model):
    model = adapted(num_experts=2, r=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(message, loras, model=model, **settings):
        with pytest.raises(ValueError, match=message):
            experts_from_loras(model, loras, **settings)

    first, both = lora(1), [lora(1), lora(2)]
    refused(r"The 1 LoRAs make 1 experts of rank 2 at `.*q_proj`.*num_experts=1, r=2", [first])
    rank = r"LoRA 0 \(adapter \"default\"\) has rank 3 at .*cut into experts of rank 2.*`r=3`"
    refused(rank, [lora(1, r=3), lora(2)])
    infinite = r"LoRA 1 .*alpha .* must be a finite"
    targets = r"LoRA 1 .*not adapt `.*layers.0.self_attn.k_proj`.*target_modules=\['q_proj'\]"
    for settings, message in (
        ({"target_modules": ["q_proj"]}, targets),
        ({"use_dora": True}, r"LoRA 1 .*has `use_dora`"),
        ({"modules_to_save": ["lm_head"]}, r"LoRA 1 .*also holds `lm_head.weight`.*no expert"),
        ({"lora_alpha": float("inf")}, infinite),
        ({"lora_alpha": True}, infinite),
        ({"init_lora_weights": "pissa"}, r'LoRA 1 .*="pissa"`, which changes the base weights'),
        ({"init_lora_weights": "olora"}, r'LoRA 1 .*="olora"`, which changes the base weights'),
    ):
        refused(message, [first, lora(2, **settings)])
    refused(r"LoRA 0 .*has the PEFT type TASKMOE_LORA", [model, first])
    refused(r"Item 0 of `loras` is a int", [3])
    refused(r"`loras` is empty", [])
    broken = lora(2)
    next(p for n, p in broken.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    refused(r"LoRA 1 .*has NaN or infinite values in `.*lora_B.weight`", [first, broken])
    lost = r"LoRA 0 .*adapts `.*`, which adapter \"default\" does not \(12 such.*be lost"
    refused(lost, both, adapted(num_experts=2, r=2, target_modules=["q_proj"]))
    refused(r"`combine` is 'max', which is unknown", both, combine="max")
    tie = r"With a zero router all gates tie, and `top_k=1`.*`zero_router=False`"
    refused(tie, both, adapted(num_experts=2, top_k=1))
    config = LoraConfig(r=2, target_modules="all-linear")
    wide = get_peft_model(tiny_model(intermediate_size=20), config)
    base = r"at `model.layers.0.mlp.gate_proj`, which takes 16 features to 24.*another base"
    refused(base, [first, wide])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# The published layout

E, R, D_TASK = 3, 2, 5


def reference_checkpoint(base, d_task=D_TASK, prefix="base_model.model."):
    """Random tensors in the published layout for every linear layer of a Llama but the head."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            shapes = {
                "lora_A_weight": (E, module.in_features, R),
                "lora_B_weight": (E, R, module.out_features),
                "lora_route.weight": (E, module.in_features + d_task),
            }
            for part, shape in shapes.items():
                found[f"{prefix}{name}.{part}"] = torch.randn(shape, generator=generator) * 0.3
    return found


def install_reference_layers(base, checkpoint, task_embeds, alpha):
    """The method as loops over tokens and experts, from the tensors of the published layout."""
    for name, module in list(base.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        parts = ("lora_A_weight", "lora_B_weight", "lora_route.weight")
        a, b, route = (checkpoint[f"base_model.model.{name}.{part}"] for part in parts)

        def forward(x, weight=module.weight, a=a, b=b, route=route):
            y = x @ weight.T
            for row in range(x.shape[0]):
                for t in range(x.shape[1]):
                    task = () if task_embeds is None else (task_embeds[row],)
                    gates = torch.softmax(route @ torch.cat((x[row, t], *task)), dim=0)
                    for i in range(E):
                        y[row, t] += alpha / R * gates[i] * ((x[row, t] @ a[i]) @ b[i])
            return y

        module.forward = forward
    return base


@pytest.mark.parametrize(
    "form", ["safetensors", "bin", "file", "tensors", "no prefix", "token only", "config"]
)
def test_published_layout_equals_the_plain_loops(tiny_model, tmp_path, form):
    base = tiny_model(num_hidden_layers=3).eval()  # 21 layers: more than PEFT lists in full
    d_task = 0 if form == "token only" else D_TASK
    checkpoint = reference_checkpoint(base, d_task)
    source, settings = tmp_path / "theirs", {"lora_alpha": 4}
    source.mkdir()
    given = source
    if form == "bin":
        torch.save(checkpoint, source / "adapter_model.bin")
    elif form == "tensors":
        given = checkpoint
    elif form == "no prefix":
        given = {key.removeprefix("base_model.model."): value for key, value in checkpoint.items()}
    else:
        save_file(checkpoint, source / "adapter_model.safetensors")
    if form == "file":
        given = source / "adapter_model.safetensors"
    if form == "config":
        theirs = {"r": R, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": LLAMA_TARGETS}
        theirs["base_model_name_or_path"] = "some/base"
        (source / "adapter_config.json").write_text(json.dumps(theirs))
        settings = {}
    config = from_reference_checkpoint(given, tmp_path / "ours", base_model=base, **settings)
    assert (config.num_experts, config.r, config.lora_alpha, config.task_norm) == (E, R, 4, "none")
    assert config.router_inputs == ("token" if form == "token only" else "token+task")
    if form == "config":
        assert (config.lora_dropout, config.base_model_name_or_path) == (0.1, "some/base")

    model = PeftModel.from_pretrained(tiny_model(num_hidden_layers=3), tmp_path / "ours").eval()
    task_embeds = None if form == "token only" else torch.randn(2, D_TASK)
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        expected = install_reference_layers(base, checkpoint, task_embeds, alpha=4)(IDS).logits
    assert not torch.allclose(expected, plain, atol=0.1)
    close(logits(model, task_embeds), expected, 1e-4)


def test_errors_of_the_published_layout(tiny_model, tmp_path):
    base = tiny_model(num_hidden_layers=1)
    whole = reference_checkpoint(base)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    out = tmp_path / "ours"

    def refused(message, change=None, error=ValueError, given=None, **settings):
        checkpoint = dict(whole)
        for key, value in (change or {}).items():
            if value is None:
                del checkpoint[key]
            else:
                checkpoint[key] = value
        with pytest.raises(error, match=message):
            from_reference_checkpoint(given or checkpoint, out, **{"lora_alpha": 4, **settings})
        assert not out.exists()

    ones, nan = torch.ones, float("nan")
    rest = r"They must be \(experts, in, r\), \(experts, r, out\) and \(experts, in \+ task dim"
    for key, value, message in (
        (f"{q}.lora_B_weight", None, r"q_proj.lora_B_weight` is missing, while `.*lora_A_weight`"),
        ("lm_head.weight", ones(2, 2), r"`lm_head.weight` is no part of the published layout"),
        (f"{q}.lora_B_weight", ones(3, 4, 16), rf"q_proj` has .*_B_weight \(3, 4, 16\).*{rest}"),
        (f"{q}.lora_route.weight", ones(3, 15), rf"q_proj` has .*route.weight \(3, 15\).*{rest}"),
        (f"{q}.lora_route.weight", ones(2, 21), rf"q_proj` has .*route.weight \(2, 21\).*{rest}"),
        (f"{q}.lora_A_weight", ones(3, 2), r"A_weight` of shape \(3, 2\) is not .* 3 dimensions"),
        (f"{q}.lora_A_weight", ones(3, 16, 2).long(), r"lora_A_weight` is torch.int64"),
        (f"{q}.lora_A_weight", [1.0], r"lora_A_weight` is list, but a float tensor"),
        (f"{q}.lora_A_weight", ones(3, 16, 2) * nan, r"q_proj.lora_A_weight` .* finite values"),
        (
            f"{q}.lora_route.weight",
            ones(3, 22),
            r"`.*self_attn.k_proj` has .* = \(3, 2, 5\), but .*q_proj` has \(3, 2, 6\)",
        ),
    ):
        refused(message, {key: value})
    refused(r"does not say its `lora_alpha`.*`lora_alpha=32`", lora_alpha=None)
    refused(r"`model.layers.0.self_attn.q_proj`.*no such layer", base_model=nn.Linear(2, 2))
    refused(
        r"\(out, in\) = \(24, 16\) at `model.layers.0.mlp.gate_proj`, but .* \(20, 16\)",
        base_model=tiny_model(intermediate_size=20),
    )
    refused(r"The checkpoint is empty", dict.fromkeys(whole))
    nothing = (
        r"holds neither `adapter_model.safetensors` nor `adapter_model.bin`.*snapshot_download"
    )
    refused(nothing, error=FileNotFoundError, given=tmp_path)

    source = tmp_path / "theirs"
    source.mkdir()
    torch.save(SimpleNamespace(weights=whole), source / "adapter_model.bin")
    refused(r"is broken, or holds more than tensors, which could run code", given=source)
    torch.save([1], source / "adapter_model.bin")
    refused(r"The checkpoint is empty", given=source)
    (source / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused(r"`.*adapter_model.safetensors` is broken", given=source)
    save_file(whole, source / "adapter_model.safetensors")
    for theirs, message in (
        ({"r": 8}, r"says `r=8`, but the tensors have experts of rank 2"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"lists the target `lm_head`, but no key"),
        ({"target_modules": [5]}, r"lists the target `5`, but no key"),
        ({"bias": "all"}, r"says `bias='all'`"),
        ({"r": "2"}, r"adapter_config.json` has `r` '2'. It must be a whole number"),
        ({"lora_alpha": nan}, r"has `lora_alpha` nan. It must be a finite number"),
        ({"lora_alpha": True}, r"has `lora_alpha` True. It must be a finite number"),
        ({"lora_dropout": "0.1"}, r"has `lora_dropout` '0.1'. It must be a finite number"),
        ({"target_modules": {"a": 1}}, r"has `target_modules` {'a': 1}. It must be names"),
        ({"base_model_name_or_path": 5}, r"has `base_model_name_or_path` 5. It must be a name"),
        ([1], r"holds a list, but an object belongs there"),
    ):
        (source / "adapter_config.json").write_text(json.dumps(theirs))
        refused(message, given=source)
    (source / "adapter_config.json").write_text("{")
    refused(r"adapter_config.json` is no JSON", given=source)
    (source / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"`output_folder` is where the checkpoint is"):
        from_reference_checkpoint(source, source, lora_alpha=4)
