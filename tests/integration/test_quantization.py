"""bitsandbytes bases in 4 and 8 bits: adapted layers add to what the quantised layer gives."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from trl import SFTConfig, SFTTrainer

from peft_taskmoe import TaskMoELoraConfig, attach_task_encoder
from peft_taskmoe.layer import Linear
from tiny import MODELS, TASK_DIM, randomise

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR_BITS, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {**FOUR_BITS, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR_BITS, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
IDS = torch.arange(4, 16).view(2, 6)
TASKS = torch.randn(2, TASK_DIM, generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS, "task_embeds": TASKS}


def config(**settings: Any) -> TaskMoELoraConfig:
    return TaskMoELoraConfig(
        **{"task_dim": TASK_DIM, "num_experts": 3, "r": 2, "lora_dropout": 0.0, **settings}
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama on disk, wide enough for blocks of 64 weights and of 32 outputs."""
    cls, made = MODELS["llama"]()
    made.update(
        {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    cls(made).save_pretrained(folder)
    return folder


@pytest.fixture
def quantised(saved):
    def load(kind: str):
        return MODELS["llama"]()[0].from_pretrained(
            saved, quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=torch.float32
        )

    return load


def weights_of(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_added_to_the_quantised_layer(quantised, kind) -> None:
    model = randomise(get_peft_model(quantised(kind), config())).eval()
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(layers) == 7 and all(
        "bitsandbytes" in type(layer.base_layer).__module__ for layer in layers
    )
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layer = layers[0]
    layer.register_forward_hook(lambda m, args, out: seen.update(layer=(args[0], out)))
    with torch.no_grad():
        adapted = model(**BATCH).logits
        x, out = seen["layer"]
        base = layer.base_layer(x)
        with model.disable_adapter():
            plain = model(input_ids=IDS).logits
    update = plain_update(layer, x)
    torch.testing.assert_close(out - base, update.to(out.dtype), atol=1e-4, rtol=1e-3)
    assert update.abs().max() > 0.01 and not torch.allclose(adapted, plain, atol=1e-2)


def plain_update(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The update by its formula, one expert after the other."""
    x = x.double()
    a, b, router = (
        weights["default"].weight.detach().double()
        for weights in (layer.taskmoe_lora_A, layer.taskmoe_lora_B, layer.taskmoe_lora_router)
    )
    task = TASKS.double() / TASKS.double().norm(dim=-1, keepdim=True) * 0.25 * x.shape[-1] ** 0.5
    gates = (torch.cat((x, task[:, None].expand(-1, x.shape[1], -1)), -1) @ router.T).softmax(-1)
    total = torch.zeros(())
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        total = total + gates[..., i : i + 1] * (x @ a[rows].T @ b[:, rows].T)
    return total * layer.scaling["default"]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_kbit_training(quantised, kind, use_reentrant) -> None:
    """It freezes the base, casts its norms and turns checkpointing on."""
    prepared = prepare_model_for_kbit_training(
        quantised(kind), gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert prepared.is_gradient_checkpointing
    model = randomise(get_peft_model(prepared, config())).train()
    frozen = weights_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(**BATCH).loss
        loss.backward()
        assert all(
            p.grad is not None and torch.isfinite(p.grad).all()
            for p in model.parameters()
            if p.requires_grad
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = weights_of(model)
    assert frozen and all(torch.equal(after[name], weight) for name, weight in frozen.items())


def test_checkpointing_changes_no_gradient(quantised) -> None:
    found = []
    for checkpointing in (False, True):
        model = randomise(get_peft_model(quantised("nf4"), config())).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**BATCH).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_saving_and_loading(quantised, kind, tmp_path) -> None:
    model = randomise(get_peft_model(quantised(kind), config())).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH).logits, model(**BATCH).logits)
    tokens = [
        m.generate(input_ids=IDS, task_embeds=TASKS, max_new_tokens=3, do_sample=False)
        for m in (model, loaded)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_into_a_quantised_base_is_refused(quantised, kind) -> None:
    from peft_taskmoe import task_context

    model = randomise(get_peft_model(quantised(kind), config(router_inputs="task")))
    with (
        task_context(TASKS[:1]),
        pytest.raises(
            ValueError, match=r"quantised.*round the adapter away.*Keep the adapter unmerged"
        ),
    ):
        model.merge_adapter()


class Packed(nn.Module):
    """A quantised layer as other libraries make them: called like a linear one, without a weight.

    GPTQ, AWQ, HQQ and EETQ have such layers; the base here is one byte a weight.
    """

    def __init__(self, linear: nn.Linear, sizes: tuple[str, str]) -> None:
        super().__init__()
        for name, size in zip(sizes, (linear.in_features, linear.out_features), strict=True):
            setattr(self, name, size)
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().char())
        linear.weight.data = self.dequantised()

    def dequantised(self) -> torch.Tensor:
        return self.qweight * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantised().to(x.dtype).T


class Stored(Packed):
    """The same with its bytes as `weight`, the other way round, and without sizes: like EETQ's."""

    def __init__(self, linear: nn.Linear, sizes: tuple[str, str]) -> None:
        super().__init__(linear, sizes)
        self.weight = nn.Parameter(self.qweight.T.contiguous(), requires_grad=False)
        for name in ("qweight", *sizes):
            delattr(self, name)

    def dequantised(self) -> torch.Tensor:
        return (self.qweight if hasattr(self, "qweight") else self.weight.T) * self.scale


Stored.__name__ = "EetqLinear"  # by which PEFT knows how the weight lies


@pytest.mark.parametrize("kind, sizes", [
    (Packed, ("in_features", "out_features")), (Packed, ("infeatures", "outfeatures")),
    (Stored, ("in_features", "out_features")),
])  # fmt: skip
def test_layers_of_classes_of_their_own_are_adapted_by_default(saved, kind, sizes) -> None:
    """Logits, gradients and tokens are those of an adapter on the dequantised weights."""
    from peft_taskmoe import task_context

    base, plain = (MODELS["llama"]()[0].from_pretrained(saved) for _ in range(2))
    for layer, quantised in zip(plain.model.layers, base.model.layers, strict=True):
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                quantised.set_submodule(name, kind(linear, sizes))
    assert not any(isinstance(m, nn.Linear) for m in base.model.modules())
    models = [randomise(get_peft_model(m, config(router_inputs="task"))) for m in (base, plain)]
    assert all(sum(isinstance(m, Linear) for m in model.modules()) == 7 for model in models)
    outputs, gradients, tokens = [], [], []
    for model in models:
        outputs.append(model.train()(**BATCH))
        outputs[-1].loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        options = {"max_new_tokens": 4, "do_sample": False}
        tokens.append(model.eval().generate(input_ids=IDS, task_embeds=TASKS, **options))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.equal(*tokens) and all(grad.abs().max() > 0 for grad in gradients[0].values())
    quantised = models[0]
    alone = [quantised(input_ids=IDS[i : i + 1], task_embeds=TASKS[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(torch.cat([one.logits for one in alone]), outputs[0].logits)
    with task_context(TASKS[:1]), pytest.raises(ValueError, match=r"base weight is quantised"):
        quantised.merge_adapter()
    torch.testing.assert_close(quantised(**BATCH).logits, outputs[0].logits)


@pytest.mark.parametrize("router_inputs", ["token+task", "task"])
def test_torchao(saved, router_inputs, tmp_path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from peft_taskmoe import task_context

    def base():
        kind = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
        return MODELS["llama"]()[0].from_pretrained(saved, quantization_config=kind)

    plain = base()(input_ids=IDS).logits
    model = randomise(get_peft_model(base(), config(router_inputs=router_inputs))).eval()
    both = model(input_ids=IDS, task_embeds=TASKS).logits
    assert (both - plain).abs().max() > 1e-2
    alone = [model(input_ids=IDS[i : i + 1], task_embeds=TASKS[i : i + 1]).logits for i in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS, task_embeds=TASKS).logits, plain)
    if router_inputs == "task":
        with task_context(TASKS[:1]), pytest.raises(ValueError, match=r"quantised \(Int8Tensor\)"):
            model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS, task_embeds=TASKS).logits, both)
    model.train()(**BATCH).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.skipif(
    "quantization_config" not in inspect.signature(SFTTrainer).parameters,
    reason="TRL 0.26's `SFTTrainer` has no `quantization_config`",
)
def test_qlora_of_trl(saved, tiny_encoder, word_tokenizer, tmp_path) -> None:
    """`SFTTrainer` with `quantization_config`: it casts the adapter to bfloat16 and checkpoints."""
    word_tokenizer.save_pretrained(saved)
    data = Dataset.from_list(
        [{"prompt": f"w{5 + i} w6", "completion": f" w{20 + i}"} for i in range(4)]
    )
    trainer = SFTTrainer(
        str(saved),
        SFTConfig(
            str(tmp_path), report_to=[], use_cpu=True, max_steps=6, logging_steps=1,
            learning_rate=1e-2, disable_tqdm=True,
        ),
        train_dataset=data, processing_class=word_tokenizer, peft_config=config(),
        quantization_config=BitsAndBytesConfig(**KINDS["nf4"]),
    )  # fmt: skip
    model = attach_task_encoder(randomise(trainer.model), tiny_encoder, word_tokenizer)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    assert model.get_base_model().is_loaded_in_4bit
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(
        not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad
    )
