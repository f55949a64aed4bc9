"""The wrapped methods of a model, looked at, copied, pickled and called."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from peft_taskmoe.conditioning import conditioner_of
from tiny import TASK_DIM

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
    assert list(inspect.signature(unbound).parameters) == ["self", *names]
    expected = base(input_ids=IDS, task_embeds=tasks()).logits
    assert torch.equal(unbound(base, input_ids=IDS, task_embeds=tasks()).logits, expected)


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
