"""What `record_gates` and `RoutingCallback` report, against gates computed by plain loops."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn

from peft_taskmoe import RoutingCallback, TaskMoELoraConfig, task_context
from peft_taskmoe.inspection import GateRecord, counted_tokens, record_gates
from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.task_scope import TaskState, current_state, entered
from reference import all_gates
from tiny import TASK_DIM, VOCAB


def batch(rows=2, length=5):
    return {
        "input_ids": torch.randint(3, VOCAB, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }


def recorded(model, inputs, embeds, names) -> GateRecord:
    """The gates of one forward."""
    with record_gates(model) as record, torch.no_grad(), record.task(names):
        model(**inputs, task_embeds=embeds)
    return record


def expected_gates(model, inputs, task_embeds):
    """Gates of every layer and token, by the plain loops, from the inputs that a hook sees."""
    seen = {}
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, TaskMoELoraLayer)
    }
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].detach()))
        for layer in layers.values()
    ]
    with torch.no_grad():
        model(**inputs, task_embeds=task_embeds)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in layers.items():
        config, x = layer.configs["default"], seen[layer].double()
        rows, length = x.shape[:2]
        found[name] = all_gates(
            x.flatten(0, 1),
            layer.taskmoe_lora_router["default"].weight.detach().double(),
            task_embeds.double() if "task" in config.router_inputs else None,
            [row for row in range(rows) for _ in range(length)],
            reads_token="token" in config.router_inputs,
            top_k=config.top_k,
            task_norm=config.task_norm,
        ).view(rows, length, config.num_experts)
    return found


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"router_inputs": "task"}])
def test_stats_are_those_of_the_gates(adapted, settings):
    model = adapted(**settings)
    inputs, embeds = batch(), torch.randn(2, TASK_DIM)
    expected = expected_gates(model, inputs, embeds)
    record = recorded(model, inputs, embeds, ["a", "b"])
    assert record.tasks() == ["a", "b"] and set(record.layers()) == set(expected)
    slots = settings.get("top_k", 1)
    for stats in record.stats():
        gates = expected[stats.layer]["ab".index(stats.task)]  # (tokens, e)
        best = gates.argsort(dim=-1, descending=True)[:, :slots]
        load = [(best == i).sum().item() / (slots * len(gates)) for i in range(gates.shape[1])]
        entropy = np.mean([-sum(g * math.log(g) for g in row if g > 0) for row in gates.tolist()])
        assert stats.tokens == len(gates)
        np.testing.assert_allclose(stats.mean, gates.mean(0), atol=1e-5)
        np.testing.assert_allclose(stats.load, load, atol=1e-6)
        assert stats.entropy == pytest.approx(entropy, abs=1e-5)
        assert stats.normalized_entropy == pytest.approx(entropy / math.log(3), abs=1e-5)
        variance = gates.var(0, correction=0).sum().item()
        assert stats.token_variance == pytest.approx(variance, abs=1e-5)
        assert (stats.token_variance > 1e-6) == (settings.get("router_inputs") != "task")
    for found in record.variances():
        gates = expected[found.layer].flatten(0, 1)  # of equal numbers of tokens
        total = gates.var(0, correction=0).sum().item()
        assert found.within_tasks + found.between_tasks == pytest.approx(total, rel=1e-4)
        assert found.task_share == pytest.approx(found.between_tasks / total, rel=1e-4)


def test_batches_add_up_and_padding_does_not_count(adapted):
    model = adapted()
    embeds = torch.randn(1, TASK_DIM)
    short, long = batch(1, 3), batch(1, 5)
    padded = {
        "input_ids": torch.cat((nn.functional.pad(short["input_ids"], (0, 2)), long["input_ids"])),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }
    with torch.no_grad(), record_gates(model) as apart:
        model(**short, task_embeds=embeds)
        model(**long, task_embeds=embeds)
    with torch.no_grad(), record_gates(model) as together:
        model(**padded, task_embeds=embeds.expand(2, -1))
    assert apart.tasks() == ["all"] and {s.tokens for s in together.stats()} == {8}
    gates = (each.mean_gates("all") for each in (apart, together))
    torch.testing.assert_close(*gates, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_outputs_and_scope_stay_as_they_were(adapted, grad):
    model = adapted().double()
    inputs, embeds = batch(), torch.randn(2, TASK_DIM).double()
    with torch.set_grad_enabled(grad):
        plain = model(**inputs, task_embeds=embeds).logits
        with record_gates(model):
            watched = model(**inputs, task_embeds=embeds).logits
            assert current_state().recorder is not None
    torch.testing.assert_close(plain, watched, atol=1e-10, rtol=1e-10)
    assert current_state() is None


def test_scope_is_restored_after_an_error_and_inside_another(adapted):
    model = adapted()
    outer = TaskState(task_embeds=torch.randn(2, TASK_DIM))
    with entered(outer):
        with pytest.raises(RuntimeError, match="stop"), record_gates(model):
            raise RuntimeError("stop")
        assert current_state() is outer and outer.recorder is None
        with record_gates(model) as record:
            model(**batch())  # the outer scope's task
        assert record.stats()


def test_task_context_inside_keeps_recording(adapted):
    model = adapted()
    inputs, embeds = batch(), torch.randn(2, TASK_DIM)
    with record_gates(model) as record, torch.no_grad():
        with record.task("as argument"):
            model(**inputs, task_embeds=embeds)
        with record.task("in scope"), task_context(embeds):
            model(**inputs)
    torch.testing.assert_close(record.mean_gates("as argument"), record.mean_gates("in scope"))


def test_generation_counts_prompt_and_new_tokens_without_padding(adapted):
    model = adapted()
    embeds = torch.randn(2, TASK_DIM)
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = model.generate(**inputs, task_embeds=embeds, **settings)
    with record_gates(model) as record, record.task(["a", "b"]):
        watched = model.generate(**inputs, task_embeds=embeds, **settings)
    assert torch.equal(plain, watched)
    # the last new token is never read; every other one is, by every layer
    assert {s.task: s.tokens for s in record.stats()} == {"a": 2 + 2, "b": 4 + 2}
    with record_gates(model) as beams, beams.task(["a", "b"]):
        model.generate(**inputs, task_embeds=embeds, num_beams=2, **settings)
    assert {s.task: s.tokens for s in beams.stats()} == {"a": 2 * 4, "b": 2 * 6}
    with record_gates(model) as static, static.task(["a", "b"]):
        model.generate(**inputs, task_embeds=embeds, cache_implementation="static", **settings)
    assert {s.task: s.tokens for s in static.stats()} == {"a": 2 + 2, "b": 4 + 2}


def test_padding_of_an_encoders_row_does_not_hide_the_decoders_tokens(adapted):
    model, embeds = adapted("t5"), torch.randn(2, TASK_DIM)
    inputs = {
        "input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
    }
    with record_gates(model) as record, record.task(["a", "b"]):
        model.generate(**inputs, task_embeds=embeds, max_new_tokens=3, min_new_tokens=3)
    tokens = {
        (s.layer.split(".")[0], s.task): s.tokens for s in record.stats() if "Self" in s.layer
    }
    assert tokens["encoder", "a"] == 2 and tokens["encoder", "b"] == 4
    assert tokens["decoder", "a"] == tokens["decoder", "b"] == 3


def test_packed_rows_are_told_apart_by_document(adapted):
    model = adapted(model_changes={"attn_implementation": "eager"})
    embeds = torch.randn(2, TASK_DIM)
    packed = {
        "input_ids": torch.randint(3, VOCAB, (1, 7)),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    record = recorded(model, packed, embeds, ["a", "b"])
    assert {s.task: s.tokens for s in record.stats()} == {"a": 3, "b": 4}


def test_rows_of_different_adapters(adapted):
    model, inputs = adapted(), batch(3, 4)
    other = TaskMoELoraConfig(num_experts=2, r=2, task_dim=TASK_DIM, init_weights=False)
    model.add_adapter("other", other)
    inputs["attention_mask"][1, 2:] = 0
    inputs["adapter_names"] = ["default", "other", "default"]
    record = recorded(model.eval(), inputs, torch.randn(3, TASK_DIM), ["a", "b", "c"])
    assert sorted(record.adapters) == ["default", "other"]
    assert record.tasks("default") == ["a", "c"] and record.tasks("other") == ["b"]
    assert {(s.task, s.tokens) for s in record.stats()} == {("a", 4), ("b", 2), ("c", 4)}
    message = r"one of those recorded, \['default', 'other'\], got None"
    with pytest.raises(ValueError, match=message):
        record.layers()


def cosine(p: np.ndarray, q: np.ndarray) -> float:
    return float(p.ravel() @ q.ravel() / np.sqrt((p**2).sum() * (q**2).sum()))


def shared_bits(p: np.ndarray, q: np.ndarray) -> float:
    divergences = [jensenshannon(u, v, base=2) ** 2 for u, v in zip(p, q, strict=True)]
    return 1 - float(np.mean(divergences))


@pytest.mark.parametrize("measure, by_numpy", [("cosine", cosine), ("js", shared_bits)])
def test_similarity_and_nearest(adapted, measure, by_numpy):
    embeds = torch.randn(3, TASK_DIM)
    embeds[2] = embeds[0] + 0.05 * torch.randn(TASK_DIM)  # an unseen task that resembles "a"
    record = recorded(adapted(router_inputs="task"), batch(3), embeds, ["a", "b", "new"])
    gates = {task: record.mean_gates(task).numpy() for task in record.tasks()}
    similarity = record.similarity(measure)
    for one, other in itertools.product(gates, gates):
        expected = by_numpy(gates[one], gates[other])
        assert similarity[one][other] == pytest.approx(expected, abs=1e-6)
    (best, value), (second, _) = record.nearest("new", measure=measure)
    assert (best, second) == ("a", "b") and value == similarity["new"]["a"]
    only = record.nearest("new", among=["b"], measure=measure)
    assert only == [("b", similarity["new"]["b"])]


def test_tables(adapted, monkeypatch):
    record = recorded(adapted(), batch(), torch.randn(2, TASK_DIM), "all")
    frame = record.to_frame()
    assert len(frame) == len(record.layers()) == len(record.to_dicts())
    assert list(frame["layer"]) == [row["layer"] for row in record.to_dicts()] == record.layers()
    assert frame["mean"].map(sum).to_numpy() == pytest.approx(1.0, abs=1e-6)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs `pandas`.*pip install 'peft_taskmoe\[uie\]'"):
        record.to_frame()


def test_errors_say_what_to_do(adapted, tiny_model):
    no_adapter = r"`LlamaForCausalLM` has no Task-Aware MoELoRA adapter.*get_peft_model"
    with pytest.raises(ValueError, match=no_adapter), record_gates(tiny_model()):
        pass
    model, other, embeds = adapted(), adapted(), torch.randn(2, TASK_DIM)
    with record_gates(model) as record, torch.no_grad():
        other(**batch(), task_embeds=embeds)  # only the model named is recorded
    with pytest.raises(ValueError, match=r"No gates were recorded. Run the model.*record_gates"):
        record.layers()
    with pytest.raises(ValueError, match=r"3 task names were given for 2 rows.*one name per row"):
        recorded(model, batch(), embeds, ["a", "b", "c"])
    record = recorded(model, batch(), embeds, "a")
    for call, message in (
        (lambda: record.mean_gates("b"), r'No token of task "b" was recorded at layer "model.lay'),
        (lambda: record.similarity("euclid"), "`measure` is 'euclid', which is unknown"),
        (lambda: record.nearest("c"), r'Task "c" was not recorded; these were: \[\'a\'\]'),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def logged(model, *micro_batches, gates=True) -> dict[str, float]:
    """What a `RoutingCallback` adds to the entry of one step."""
    args = SimpleNamespace(logging_first_step=False, logging_strategy="steps")
    state = SimpleNamespace(global_step=1, logging_steps=2, log_history=[{}])
    callback, logs = RoutingCallback(gates), {"loss": 1.0}
    callback.on_step_begin(args, state, None, model=model.train())
    for inputs, embeds in micro_batches:
        model(**inputs, task_embeds=embeds)
        callback.on_substep_end(args, state, None, model=model)
    callback.on_log(args, state, None, model=model, logs=logs)
    return state.log_history[0]


def test_the_callback_logs_the_gates_of_one_micro_batch(adapted):
    model, inputs, embeds = adapted(), batch(), torch.randn(2, TASK_DIM)
    record = recorded(model, inputs, embeds, ["a", "b"])
    found = logged(model, (inputs, embeds), (batch(), -embeds))
    loads = np.mean([stats.mean for stats in record.stats()], axis=0)
    expected = {f"expert_load_{i}": load for i, load in enumerate(loads)}
    expected["gate_entropy"] = np.mean([stats.normalized_entropy for stats in record.stats()])
    expected["task_share"] = np.mean([found.task_share for found in record.variances()])
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_callback_warns_of_dead_experts_and_of_a_task_that_is_ignored(adapted):
    model = adapted(router_inputs="task")
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data[:] = torch.tensor([[9.0], [-9.0], [-9.0]])
    with pytest.warns(UserWarning) as caught:
        logged(model, (batch(), torch.ones(2, TASK_DIM)))
    messages = [str(warning.message) for warning in caught]
    assert any("hardly used: expert_load_1, expert_load_2 below 1%" in text for text in messages)
    assert any("The task explains 0.0000% of the gates' variance" in text for text in messages)


def test_the_callback_logs_no_figure_that_it_has_no_tokens_for(adapted):
    """Of one row no share of the task, of padding alone nothing, of no gates the loss alone."""
    model, one, embeds = adapted(router_aux_loss_coef=0.5), batch(1), torch.randn(1, TASK_DIM)
    loads = {f"expert_load_{i}" for i in range(3)}
    usual = loads | {"gate_entropy"}
    assert set(logged(model, (one, embeds))) == usual
    assert set(logged(model, ({"input_ids": one["input_ids"]}, embeds))) == usual
    padding = {**one, "attention_mask": torch.zeros(1, 5, dtype=torch.long)}
    assert logged(model, (padding, embeds)) == {}
    assert set(logged(adapted(router_inputs="token"), (batch(), None))) == usual
    two = batch() | {"labels": torch.randint(3, VOCAB, (2, 5))}
    tasks = torch.randn(2, TASK_DIM)
    assert set(logged(model.train(), (two, tasks), gates=False)) == {"router_aux_loss"}
    assert set(logged(model, (two, tasks))) == usual | {"task_share", "router_aux_loss"}


def test_the_callback_adds_to_the_entry_where_a_trainer_keeps_none(adapted):
    model, callback, logs = adapted(), RoutingCallback(), {"loss": 1.0}
    args = SimpleNamespace(logging_first_step=True, logging_strategy="steps")
    state = SimpleNamespace(global_step=0, logging_steps=5, log_history=[])
    callback.on_step_begin(args, state, None, model=model.train())
    model(**batch(), task_embeds=torch.randn(2, TASK_DIM))
    callback.on_step_end(args, state, None, model=model)
    callback.on_log(args, state, None, model=model, logs=logs)
    assert "gate_entropy" in logs and state.log_history == []


def test_a_training_that_ends_in_a_logged_step_leaves_nothing_recorded(adapted):
    model, callback = adapted(), RoutingCallback()
    args = SimpleNamespace(logging_first_step=True, logging_strategy="steps")
    state = SimpleNamespace(global_step=0, logging_steps=5, log_history=[])
    callback.on_step_begin(args, state, None, model=model.train())  # and an exception ends the step
    model.eval()(**batch(), task_embeds=torch.randn(2, TASK_DIM))
    model.generate(**batch(), task_embeds=torch.randn(2, TASK_DIM), max_new_tokens=2)
    logs = {"loss": 1.0}
    callback.on_log(args, state, None, model=model, logs=logs)
    assert set(logs) == {"loss"}


def test_tokens_of_unknown_rows_are_padding_where_the_mask_has_as_many():
    mask = torch.tensor([[True, False], [True, True]])
    with entered(TaskState(token_mask=mask)):
        assert counted_tokens(None, 4).tolist() == [True, False, True, True]
        assert counted_tokens(None, 3) is counted_tokens(torch.tensor([0, 1]), 2) is None
