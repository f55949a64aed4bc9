"""The wrapped methods of a model, looked at, copied, pickled and called."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForMultipleChoice

from peft_taskmoe import TaskMoELoraConfig
from peft_taskmoe.call_arguments import note_shape
from peft_taskmoe.conditioning import conditioner_of, remove_conditioning
from peft_taskmoe.task_scope import TaskState
from tiny import TASK_DIM, VOCAB, randomise

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


def test_a_plain_model_has_no_conditioning_to_remove(tiny_model) -> None:
    model = tiny_model()
    before = dict(model.__dict__)
    remove_conditioning(model)
    assert model.__dict__ == before


@pytest.mark.parametrize("method", ["forward", "generate", "init_continuous_batching"])
def test_what_others_wrapped_around_a_method_goes_on_after_unloading(adapted, method) -> None:
    """Theirs stays on the model, with ours inside, which does nothing any more."""
    model = adapted(router_inputs="task")
    base = model.get_base_model()
    if not hasattr(base, method):
        pytest.skip("this version of transformers has no continuous batching")
    ours, calls = getattr(base, method), []

    def theirs(*args, **kwargs):
        calls.append(ours)
        return ours(*args, **kwargs)

    setattr(base, method, theirs)
    plain = model.unload()
    arguments = {"forward": {"input_ids": IDS}, "generate": {"input_ids": IDS, "max_new_tokens": 2}}
    found = getattr(plain, method)(**arguments.get(method, {}))
    assert calls == [ours] and plain is base and conditioner_of(plain) is None
    del plain.__dict__[method]
    expected = getattr(plain, method)(**arguments.get(method, {}))
    if method == "forward":
        assert torch.equal(found.logits, expected.logits)
    elif method == "generate":
        assert torch.equal(found, expected)
    else:
        assert type(found) is type(expected)


def test_a_forward_without_arguments_is_wrapped_as_well() -> None:
    """Its function of the model takes the model alone, and what the wrapper adds."""

    class Still(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    settings = {"target_modules": ["linear"], "task_dim": TASK_DIM, "num_experts": 2, "r": 2}
    settings["lora_dropout"] = 0.0
    base = get_peft_model(Still(), TaskMoELoraConfig(**settings)).get_base_model()
    unbound, x = base.forward.__func__, torch.randn(2, 3)
    assert list(inspect.signature(unbound).parameters) == ["self", "x", "task_embeds"]
    assert torch.equal(unbound(base, x=x, task_embeds=tasks()), base(x=x, task_embeds=tasks()))


def test_all_choices_of_a_question_have_one_task() -> None:
    """`(rows, choices, length)`: a task a row, or one a choice."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"vocab_size": VOCAB, "num_attention_heads": 2, "initializer_range": 0.3}
    config = BertConfig(**sizes)
    torch.manual_seed(0)
    settings = {"target_modules": ["query", "value"], "task_dim": TASK_DIM, "num_experts": 2}
    model = get_peft_model(BertForMultipleChoice(config), TaskMoELoraConfig(r=2, **settings))
    randomise(model).eval()
    ids, own = torch.randint(4, VOCAB, (2, 3, 5)), tasks(2)
    found = model(input_ids=ids, task_embeds=own).logits
    assert found.shape == (2, 3)
    of_choices = model(input_ids=ids, task_embeds=own.repeat_interleave(3, 0)).logits
    torch.testing.assert_close(found, of_choices)
    for row in range(2):
        alone = model(input_ids=ids[row : row + 1], task_embeds=own[row : row + 1]).logits
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, model(input_ids=ids, task_embeds=own.flip(0)).logits)


def test_a_call_without_tensors_says_nothing_of_rows() -> None:
    state = TaskState()
    note_shape(state, {"return_dict": True})
    assert (state.rows, state.lengths) == (None, ())
