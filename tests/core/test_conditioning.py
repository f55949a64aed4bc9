"""The wrapped methods of a model: what looks at them, what a copy and a pickle keep, and what they leave behind."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from peft import inject_adapter_in_model

from peft_taskmoe import TaskMoELoraConfig
from peft_taskmoe.conditioning import conditioner_of
from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.task_scope import current_state
from tiny import TASK_DIM, randomise

IDS = torch.arange(4, 16).view(2, 6)


def tasks(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, TASK_DIM, generator=torch.Generator().manual_seed(seed))


def test_a_wrapped_method_looks_like_a_bound_method(adapted) -> None:
    """A Trainer keeps the columns that the signature names; TRL before 1.16 reads `__func__`."""
    base = adapted().get_base_model()
    names = list(inspect.signature(base.forward).parameters)
    assert names[0] == "input_ids" and "task_embeds" in names and "labels" in names
    assert base.forward.__self__ is base
    unbound = base.forward.__func__
    assert list(inspect.signature(unbound).parameters)[0] == "self"
    assert list(inspect.signature(unbound).parameters)[1:] == names
    expected = base(input_ids=IDS, task_embeds=tasks()).logits
    assert torch.equal(unbound(base, input_ids=IDS, task_embeds=tasks()).logits, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_gradient_checkpointing_changes_no_gradient(name, when, use_reentrant, tiny_model) -> None:
    """Switched on before or after the adapter is there; two forwards with different tasks before one backward."""
    labels = torch.tensor([0, 1]) if name == "bert" else IDS

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        base, runs = tiny_model(name), []
        options = {"use_reentrant": use_reentrant}
        if checkpointing and when == "before":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        base = inject_adapter_in_model(
            TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=3, r=2, lora_dropout=0.0), base
        )
        if checkpointing and when == "after":  # by its newer name, where there is one
            enable = getattr(
                base, "activation_checkpointing_enable", base.gradient_checkpointing_enable
            )
            enable(options)
        base.enable_input_require_grads()
        first = next(
            m for m in randomise(base).double().train().modules() if isinstance(m, TaskMoELoraLayer)
        )
        first.register_forward_pre_hook(
            lambda module, args: runs.append(current_state().task_embeds)
        )
        loss = base(input_ids=IDS, labels=labels, task_embeds=tasks(seed=1)).loss
        loss = loss - 2 * base(input_ids=IDS, labels=labels, task_embeds=tasks(seed=2)).loss
        loss.backward()
        assert len(runs) == (4 if checkpointing else 2)  # it did recompute
        return {n: p.grad for n, p in base.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert expected and all(grad is not None for grad in expected.values())
    torch.testing.assert_close(found, expected)


def test_a_copied_model_uses_its_own_layers(adapted) -> None:
    model = adapted()
    expected = model(input_ids=IDS, task_embeds=tasks()).logits
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(input_ids=IDS, task_embeds=tasks()).logits, expected)
    copied.disable_adapter_layers()  # its own flags, too: the original still asks for a task
    copied(input_ids=IDS)
    with pytest.raises(ValueError, match="no task embedding"):
        model(input_ids=IDS)


def test_a_pickled_model_still_takes_the_task(adapted) -> None:
    """As `torch.save(model)` and processes that are sent one do."""
    model = adapted(router_aux_loss_coef=0.5)
    expected = model(input_ids=IDS, task_embeds=tasks()).logits
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(input_ids=IDS, task_embeds=tasks()).logits, expected)
    batch = {"input_ids": IDS, "labels": IDS, "task_embeds": tasks()}
    torch.testing.assert_close(loaded.train()(**batch).loss, model.train()(**batch).loss)
    logs = [conditioner_of(m.get_base_model()).aux_log.take_mean() for m in (loaded, model)]
    assert logs[0] == pytest.approx(logs[1]) and logs[0] > 0


def test_a_state_dict_holds_the_weights_only(adapted, tmp_path) -> None:
    model = adapted()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(loaded) == {name for name, _ in model.named_parameters()}
    other = adapted()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(loaded)
    x = {"input_ids": IDS, "task_embeds": tasks()}
    assert torch.equal(other(**x).logits, model(**x).logits)


def test_nothing_is_left_on_a_module(adapted) -> None:
    """A forward leaves no tensor behind that the module had not before."""
    model = adapted()

    def attributes() -> dict[str, list[str]]:
        return {name: sorted(module.__dict__) for name, module in model.named_modules()}

    before = attributes()
    model(input_ids=IDS, task_embeds=tasks())
    model.generate(input_ids=IDS, task_embeds=tasks(), max_new_tokens=2)
    assert attributes() == before
