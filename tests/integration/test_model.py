"""The adapted model: fresh adapters, parameter counts, training, generation, wrong tasks."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.warning import PeftWarning
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import reference
from peft_taskmoe import TaskMoELoraConfig
from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.task_scope import TaskState, entered
from tiny import MODELS, TASK_DIM

IDS = torch.arange(4, 14).view(2, 5)
TASK = torch.randn(2, TASK_DIM, generator=torch.Generator().manual_seed(5))


def labels_for(name: str) -> torch.Tensor:
    return torch.tensor([0, 1]) if name == "bert" else IDS


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "taskmoe_lora_" in name}


# A fresh adapter


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_fresh_adapter_changes_nothing_bit_for_bit(
    name, dtype, training, autocast_adapter_dtype, tiny_model
) -> None:
    """In training with dropout; the base is frozen, as weights with gradients round otherwise."""
    model = tiny_model(name, dtype=dtype).requires_grad_(False).train(training)
    labels = labels_for(name)
    base = model(input_ids=IDS, labels=labels)
    adapted = get_peft_model(
        model,
        TaskMoELoraConfig(task_dim=TASK_DIM, lora_dropout=0.3),
        autocast_adapter_dtype=autocast_adapter_dtype,
    ).train(training)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for p in adapter_parameters(adapted).values()} == {expected}
    found = adapted(input_ids=IDS, labels=labels, task_embeds=TASK)
    assert torch.equal(found.logits, base.logits) and torch.equal(found.loss, base.loss)
    with torch.no_grad():
        assert torch.equal(
            adapted(input_ids=IDS, task_embeds=TASK, labels=labels).logits, base.logits
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_generates_the_same(dtype, tiny_model) -> None:
    model = tiny_model(dtype=dtype).requires_grad_(False).eval()
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    base = model.generate(input_ids=IDS, **options)
    adapted = get_peft_model(model, TaskMoELoraConfig(task_dim=TASK_DIM)).eval()
    found = adapted.generate(input_ids=IDS, task_embeds=TASK, **options)
    assert torch.equal(found.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, base.logits, strict=True))


# Parameters


@pytest.fixture(scope="module")
def code_llama_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32016,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )


@pytest.mark.parametrize(
    "config, expected",
    [
        (TaskMoELoraConfig(router_inputs="token"), 89_063_424),
        (TaskMoELoraConfig(router_inputs="token+task", task_dim=768), 90_439_680),
        (TaskMoELoraConfig(router_inputs="task", task_dim=768), 79_953_920 + 224 * 8 * 768),
        (LoraConfig(r=32, target_modules="all-linear"), 79_953_920),
        (LoraConfig(r=36, target_modules="all-linear"), 89_948_160),
    ],
    ids=["token", "token+task", "task", "lora-32", "lora-36"],
)
def test_trainable_parameters_on_code_llama_7b(config, expected, code_llama_7b) -> None:
    """The paper's table."""
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(code_llama_7b), config)
    assert model.get_nb_trainable_parameters()[0] == expected


# Forward and training


def test_every_adapted_layer_reads_its_own_rows_task(adapted) -> None:
    """Each layer's gates equal the reference's for the input that this layer got."""
    model = adapted().double()
    inputs, gates = {}, {}
    for module in model.modules():
        if isinstance(module, TaskMoELoraLayer):
            module.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0]))
    with (
        entered(TaskState(recorder=lambda layer, adapter, g, owners: gates.__setitem__(layer, g))),
        torch.no_grad(),
    ):
        model(input_ids=IDS, task_embeds=TASK.double())
    assert len(gates) == 14
    for layer, found in gates.items():
        x = inputs[layer].reshape(-1, layer.in_features)
        router = layer.taskmoe_lora_router["default"].weight
        owners = [0] * 5 + [1] * 5
        expected = reference.all_gates(x, router, TASK.double(), owners, task_norm="matched")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_training_learns_what_only_the_task_tells(adapted) -> None:
    """The same text has two right answers, and the task is the only hint which."""
    model = adapted(r=4).train()
    ids = IDS[:1].repeat(2, 1)
    labels = torch.tensor([[-100] * 4 + [20], [-100] * 4 + [40]])
    optimizer = torch.optim.Adam(adapter_parameters(model).values(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, task_embeds=TASK).loss.backward()
        optimizer.step()
    model.eval()
    for task, answers in ((TASK, [20, 40]), (TASK.flip(0), [40, 20])):
        assert model(input_ids=ids, task_embeds=task).logits[:, -2].argmax(-1).tolist() == answers


MISSING = r'which the router of adapter "default" reads. Pass task_embeds=.*_task_encoder\(model\)'


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize(
    "task, message",
    [
        (None, MISSING),
        (torch.zeros(3, TASK_DIM), r"are 3 task embeddings for a batch of 2 rows. Pass .*\(2, 6\)"),
        (torch.zeros(1, TASK_DIM), "There are 1 task embeddings for a batch of 2 rows"),
        (torch.zeros(2, 5), r'5 dimensions, but .* adapter "default" has `task_dim=6`. Use'),
        (torch.zeros(2, TASK_DIM).tolist(), r"must be a float tensor .*, got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_missing_or_wrong_task_says_what_to_do(name, method, task, message, adapted) -> None:
    model = adapted(name)
    call = model if method == "forward" else model.generate
    with pytest.raises(ValueError, match=message):
        call(input_ids=IDS, task_embeds=task)


# Generation


def test_generated_logits_are_those_of_one_forward(adapted) -> None:
    model = adapted()
    found = model.generate(
        input_ids=IDS,
        task_embeds=TASK,
        max_new_tokens=5,
        min_new_tokens=5,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(input_ids=found.sequences, task_embeds=TASK).logits[:, IDS.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), whole, rtol=1e-4, atol=1e-4)


# The load-balancing loss


# Several adapters, and none


# Without a PeftModel


def test_a_model_of_plain_modules() -> None:
    """Not from transformers: no config, no generate, no keyword names to read the batch from."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = TaskMoELoraConfig(target_modules=["0", "2"], task_dim=TASK_DIM, init_weights=False)
    adapted = get_peft_model(model, config).eval()
    x = torch.randn(2, 6)
    found = adapted(x, task_embeds=TASK)
    rows = [adapted(x[i : i + 1], task_embeds=TASK[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(found, torch.cat(rows))
    with pytest.raises(ValueError, match="There are 3 task embeddings for a batch of 2 rows"):
        adapted(x, task_embeds=torch.randn(3, TASK_DIM))


def test_copies_for_data_parallel_are_refused(adapted, monkeypatch) -> None:
    """Their `forward` would be the original's. Broadcasting needs GPUs, the rest of it does not."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copied(tensors: Any, devices: Any, detach: bool = False) -> list[list[torch.Tensor]]:
        return [list(tensors) for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copied)
    assert len(module.replicate(torch.nn.Linear(2, 2), [0, 1])) == 2
    for model in (adapted(), adapted().get_base_model()):
        with pytest.raises(RuntimeError, match=r"`nn.DataParallel` cannot.*DistributedDataParal"):
            module.replicate(model, [0, 1])


@pytest.mark.parametrize("part", [torch.empty(0), torch.ones(96)])
def test_saving_parts_of_sharded_weights_warns(adapted, tmp_path, part) -> None:
    """What ZeRO-3 and FSDP leave of a weight outside of their gathering contexts."""
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    q_proj.taskmoe_lora_A["default"].weight.data = part
    with pytest.warns(PeftWarning, match=r"1 adapter weights are parts.*q_proj.*GatheredParam"):
        model.save_pretrained(tmp_path)
