"""The adapted model: fresh adapters, parameter counts, training, generation, several adapters, undoing."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import reference
from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.task_scope import TaskState, entered
from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.conditioning import conditioner_of
from tiny import MODELS, TASK_DIM, randomise

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
    """Training means: with the adapter's dropout. Adapters of a bfloat16 base are float32 unless told otherwise.

    The base is frozen in both: PyTorch picks other kernels, which round differently, for weights that ask for a gradient.
    """
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


@pytest.mark.parametrize("name", sorted(MODELS))
def test_only_adapters_train_and_each_of_them_does(name, adapted) -> None:
    model = adapted(name).train()
    model(input_ids=IDS, labels=labels_for(name), task_embeds=TASK).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        trains = "taskmoe_lora_" in parameter_name or "modules_to_save" in parameter_name
        assert parameter.requires_grad == trains, parameter_name
        assert (parameter.grad is not None and parameter.grad.any().item()) == trains, (
            parameter_name
        )


def test_all_linears_but_the_head_are_adapted(adapted) -> None:
    for name, heads in (
        ("llama", ["lm_head"]),
        ("gpt2", ["lm_head"]),
        ("t5", ["lm_head"]),
        ("bert", ["classifier"]),
    ):
        base = adapted(name).get_base_model()
        linears = {n for n, m in base.named_modules() if type(m) in (nn.Linear, Conv1D)}
        bare = {
            n for n in linears if not any(part in n for part in ("taskmoe_lora_", "base_layer"))
        }
        assert {n.split(".")[0] for n in bare} <= set(heads), name


# Forward and training


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_task_reaches_the_output(name, adapted) -> None:
    model = adapted(name)
    extra = {"labels": labels_for(name)}
    one = model(input_ids=IDS, task_embeds=TASK, **extra).logits
    other = model(input_ids=IDS, task_embeds=TASK.flip(0), **extra).logits
    assert not torch.allclose(one, other, atol=1e-3)
    rows = [
        model(
            input_ids=IDS[i : i + 1], task_embeds=TASK[i : i + 1], labels=extra["labels"][i : i + 1]
        ).logits
        for i in range(2)
    ]
    torch.testing.assert_close(one, torch.cat(rows), rtol=1e-4, atol=1e-4)


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


MISSING = r'no task embedding, which the router of adapter "default" reads. Pass task_embeds=..., name a `task_encoder`.*attach_task_encoder\(model\)'


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize(
    "task, message",
    [
        (None, MISSING),
        (torch.zeros(3, TASK_DIM), rf"There are 3 task embeddings for a batch of 2 rows. Pass `task_embeds` of shape \(2, {TASK_DIM}\), one row per example"),
        (torch.zeros(1, TASK_DIM), "There are 1 task embeddings for a batch of 2 rows"),
        (torch.zeros(2, 5), rf'have 5 dimensions, but the router of adapter "default" has `task_dim={TASK_DIM}`. Use the encoder it was trained with'),
        (torch.zeros(2, TASK_DIM).tolist(), r"must be a float tensor of shape \(batch, task_dim\), got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_missing_or_wrong_task_says_what_to_do(name, method, task, message, adapted) -> None:
    model = adapted(name)
    call = model if method == "forward" else model.generate
    with pytest.raises(ValueError, match=message):
        call(input_ids=IDS, task_embeds=task)


def test_a_token_router_needs_no_task_and_takes_one(adapted) -> None:
    model = adapted(router_inputs="token")
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS, task_embeds=TASK).logits)
    model.generate(input_ids=IDS, max_new_tokens=2)


def test_the_signature_shows_task_embeds(adapted) -> None:
    """A Trainer keeps only the columns that `forward` names."""
    base = adapted().get_base_model()
    names = list(inspect.signature(base.forward).parameters)
    assert names[0] == "input_ids" and "task_embeds" in names and "labels" in names


def test_the_model_traces_without_a_graph_break(adapted) -> None:
    model = adapted().double()
    expected = model(input_ids=IDS, task_embeds=TASK).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS, task_embeds=TASK).logits, expected)


# Generation


@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_equals_generation_without(name, router_inputs, adapted) -> None:
    model = adapted(name, router_inputs=router_inputs)
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(input_ids=IDS, task_embeds=TASK, use_cache=True, **options)
    plain = model.generate(input_ids=IDS, task_embeds=TASK, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4
    )


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


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_keep_the_task_of_their_prompt(name, options, adapted) -> None:
    """A batch gives what its rows give alone."""
    model = adapted(name)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    together = model.generate(input_ids=IDS, task_embeds=TASK, **options)
    alone = [
        model.generate(input_ids=IDS[i : i + 1], task_embeds=TASK[i : i + 1], **options)
        for i in range(2)
    ]
    assert torch.equal(together, torch.cat(alone))
    swapped = model.generate(input_ids=IDS, task_embeds=TASK.flip(0), **options)
    assert not torch.equal(together, swapped)


def test_a_second_generation_has_its_own_task(adapted) -> None:
    model = adapted()
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    for task in (TASK, TASK.flip(0)):
        found = model.generate(input_ids=IDS, task_embeds=task, **options).logits[0]
        torch.testing.assert_close(
            found, model(input_ids=IDS, task_embeds=task).logits[:, -1], rtol=1e-4, atol=1e-4
        )


# The load-balancing loss


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_balancing_loss_and_its_gradient(checkpointing, top_k, adapted) -> None:
    """The mean over layers of the reference's loss, padding left out, is added with its weight, and so are its gradients."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": mask, "task_embeds": TASK.double()}
    coef, accumulation = 0.3, 4

    def logits_of(layer: TaskMoELoraLayer, x: torch.Tensor) -> torch.Tensor:
        owners = [0] * 5 + [1] * 5
        router = layer.taskmoe_lora_router["default"].weight
        tasks = [reference.scaled_task(task, "matched", x.shape[-1]) for task in TASK.double()]
        rows = zip(x.reshape(-1, x.shape[-1]), owners, strict=True)
        return torch.stack([router @ torch.cat((x_t, tasks[owner])) for x_t, owner in rows])

    plain = adapted(top_k=top_k).double().train()
    seen = []
    for module in plain.modules():
        if isinstance(module, TaskMoELoraLayer):
            module.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0])))
    loss = plain(**batch).loss
    counted = mask.bool().flatten().tolist()
    aux = sum(
        reference.balancing_loss(logits_of(layer, x), top_k, counted) for layer, x in seen
    ) / len(seen)
    expected = loss + coef * aux
    (expected / accumulation).backward()

    model = adapted(top_k=top_k, router_aux_loss_coef=coef).double().train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        options = {"use_reentrant": checkpointing}
        enable = getattr(
            model.get_base_model(),
            "activation_checkpointing_enable",
            model.get_base_model().gradient_checkpointing_enable,
        )
        enable(options)
    found = model(**batch).loss
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-6, atol=0
    )  # transformers' own loss is float32
    logged = conditioner_of(model.get_base_model()).aux_log.take_mean()
    assert logged == pytest.approx(coef * aux.item())
    (found / accumulation).backward()
    for (name, parameter), (_, other) in zip(
        adapter_parameters(model).items(), adapter_parameters(plain).items(), strict=True
    ):
        torch.testing.assert_close(
            parameter.grad,
            other.grad,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def test_the_balancing_loss_is_for_training_only(adapted) -> None:
    batch = {"input_ids": IDS, "labels": IDS, "task_embeds": TASK}
    with_loss, without = adapted(router_aux_loss_coef=1.0), adapted()
    assert torch.equal(with_loss(**batch).loss, without(**batch).loss)
    assert with_loss.train()(**batch).loss > without.train()(**batch).loss + 0.9


# Several adapters, and none


def test_two_adapters_and_each_row_its_own(adapted) -> None:
    model = adapted()
    model.add_adapter(
        "second", TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=2, r=1, lora_dropout=0.0)
    )
    randomise(model, seed=2).eval()
    rows = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        rows[name] = model(input_ids=IDS, task_embeds=TASK).logits
    with model.disable_adapter():
        rows["__base__"] = model(input_ids=IDS).logits
    assert not torch.allclose(rows["default"], rows["second"], atol=1e-3)
    for names in (["second", "default"], ["__base__", "second"]):
        mixed = model(input_ids=IDS, task_embeds=TASK, adapter_names=names).logits
        expected = torch.stack([rows[name][i] for i, name in enumerate(names)])
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
        generated = model.generate(
            input_ids=IDS,
            task_embeds=TASK,
            adapter_names=names,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(generated.logits[0], expected[:, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError,
        match=r'non-existing adapter\(s\): third. This model has default, second, and "__base__" for none',
    ):
        model(input_ids=IDS, task_embeds=TASK, adapter_names=["third", "second"])
    with pytest.raises(
        ValueError,
        match=r"Cannot pass `adapter_names` when the model is in training mode. Call `model.eval\(\)` first",
    ):
        model.train()(input_ids=IDS, task_embeds=TASK, adapter_names=["default", "second"])


def test_only_base_rows_need_no_task(adapted) -> None:
    model = adapted()
    with model.disable_adapter():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(
        model(input_ids=IDS, adapter_names=["__base__"] * 2).logits, expected
    )


def test_a_deleted_adapter_is_gone(adapted) -> None:
    model = adapted()
    expected = model(input_ids=IDS, task_embeds=TASK).logits
    model.add_adapter("second", TaskMoELoraConfig(task_dim=9, num_experts=2))
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    for layer in conditioner_of(model.get_base_model()).layers:
        assert set(layer.configs) == set(layer.shapes) == {"default"}
    assert torch.equal(model(input_ids=IDS, task_embeds=TASK).logits, expected)


def test_unloading_restores_the_model(adapted, tiny_model) -> None:
    base = tiny_model().eval()
    before, attributes = base(input_ids=IDS).logits, set(base.__dict__)
    model = randomise(get_peft_model(base, TaskMoELoraConfig(task_dim=TASK_DIM))).eval()
    model(input_ids=IDS, task_embeds=TASK)
    unloaded = model.unload()
    assert unloaded is base and torch.equal(base(input_ids=IDS).logits, before)
    assert not any("taskmoe" in name for name in base.__dict__) and "forward" not in base.__dict__
    assert set(base.__dict__) - attributes <= {"peft_config"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_a_task_router_for_one_task(name, adapted) -> None:
    model = adapted(name, router_inputs="task").double()
    task = TASK[:1].double()
    expected = model(input_ids=IDS, task_embeds=task.repeat(2, 1)).logits
    with task_context(task):
        merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected)
    assert not any(isinstance(module, TaskMoELoraLayer) for module in merged.modules())


def test_merging_a_token_router_is_refused(adapted) -> None:
    model = adapted()
    with (
        task_context(TASK[:1]),
        pytest.raises(ValueError, match=r"its router reads the token .*`to_lora\(model"),
    ):
        model.merge_and_unload()


# Without a PeftModel


def test_a_bare_model_takes_the_task_too(tiny_model, adapted) -> None:
    expected = adapted()(input_ids=IDS, task_embeds=TASK)
    config = TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=3, r=2, lora_dropout=0.0)
    bare = randomise(inject_adapter_in_model(config, tiny_model())).eval()
    assert torch.equal(bare(input_ids=IDS, task_embeds=TASK).logits, expected.logits)
    with task_context(TASK):
        assert torch.equal(bare(input_ids=IDS).logits, expected.logits)
    with pytest.raises(ValueError, match="no task embedding"):
        bare(input_ids=IDS)


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
