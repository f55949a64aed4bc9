"""What `record_gates` reports, against the plain loops of `reference.py`, and leaves alone."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn

from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.conditioning import TaskState, current_state, entered
from peft_taskmoe.inspection import record_gates
from peft_taskmoe.layer import TaskMoELoraLayer
from reference import all_gates
from tiny import TASK_DIM, VOCAB


def batch(rows=2, length=5):
    return {
        "input_ids": torch.randint(3, VOCAB, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }


def layers_of(model):
    base = model.get_base_model()
    return {name: m for name, m in base.named_modules() if isinstance(m, TaskMoELoraLayer)}


def expected_gates(model, inputs, task_embeds, adapter="default"):
    """Gates of every layer and token, by the plain loops, from the inputs that a hook sees."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name, layer in layers_of(model).items()
    ]
    with torch.no_grad():
        model(**inputs, task_embeds=task_embeds)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in layers_of(model).items():
        config, x = layer.configs[adapter], seen[name]
        rows = x.shape[0]
        flat = x.reshape(-1, x.shape[-1]).double()
        owner = [i // (len(flat) // rows) for i in range(len(flat))]
        found[name] = all_gates(
            flat,
            layer.taskmoe_lora_router[adapter].weight.detach().double(),
            task_embeds.double() if "task" in config.router_inputs else None,
            owner,
            reads_token="token" in config.router_inputs,
            top_k=config.top_k,
            task_norm=config.task_norm,
        ).view(rows, -1, config.num_experts)
    return found


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"router_inputs": "task"}])
def test_stats_are_those_of_the_gates(adapted, settings):
    model = adapted(**settings)
    inputs, embeds = batch(), torch.randn(2, TASK_DIM)
    expected = expected_gates(model, inputs, embeds)
    with record_gates(model) as record, torch.no_grad(), record.task(["a", "b"]):
        model(**inputs, task_embeds=embeds)
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
        assert stats.token_variance == pytest.approx(
            gates.var(0, correction=0).sum().item(), abs=1e-5
        )
        if settings.get("router_inputs") == "task":
            assert stats.token_variance == pytest.approx(0.0, abs=1e-6)


def test_variance_splits_into_tokens_and_tasks(adapted):
    model = adapted()
    inputs, embeds = batch(), torch.randn(2, TASK_DIM)
    expected = expected_gates(model, inputs, embeds)
    with record_gates(model) as record, torch.no_grad(), record.task(["a", "b"]):
        model(**inputs, task_embeds=embeds)
    for found in record.variances():
        gates = expected[found.layer].flatten(
            0, 1
        )  # equal numbers of tokens: the total is that of all tokens
        total = gates.var(0, correction=0).sum().item()
        assert found.within_tasks + found.between_tasks == pytest.approx(total, rel=1e-4)
        assert found.task_share == pytest.approx(found.between_tasks / total, rel=1e-4)
        assert 0 < found.task_share < 1


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
    assert apart.tasks() == ["all"] and [s.tokens for s in together.stats()] == [8] * len(
        together.layers()
    )
    torch.testing.assert_close(
        apart.mean_gates("all"), together.mean_gates("all"), atol=1e-5, rtol=0
    )


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


def test_packed_rows_are_told_apart_by_document(adapted):
    model = adapted(model_changes={"attn_implementation": "eager"})
    embeds = torch.randn(2, TASK_DIM)
    packed = {
        "input_ids": torch.randint(3, VOCAB, (1, 7)),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    with record_gates(model) as record, torch.no_grad(), record.task(["a", "b"]):
        model(**packed, task_embeds=embeds)
    assert {s.task: s.tokens for s in record.stats()} == {"a": 3, "b": 4}


def test_rows_of_different_adapters(adapted):
    model = adapted()
    model.add_adapter(
        "other", TaskMoELoraConfig(num_experts=2, r=2, task_dim=TASK_DIM, init_weights=False)
    )
    model.eval()
    embeds = torch.randn(3, TASK_DIM)
    inputs = batch(3, 4)
    inputs["attention_mask"][1, 2:] = 0
    with record_gates(model) as record, torch.no_grad(), record.task(["a", "b", "c"]):
        model(**inputs, task_embeds=embeds, adapter_names=["default", "other", "default"])
    assert sorted(record.adapters) == ["default", "other"]
    assert record.tasks("default") == ["a", "c"] and record.tasks("other") == ["b"]
    assert {(s.task, s.tokens) for s in record.stats()} == {("a", 4), ("b", 2), ("c", 4)}
    with pytest.raises(
        ValueError, match=r"one of those recorded, \['default', 'other'\], got None"
    ):
        record.layers()


def test_similarity_and_nearest(adapted):
    model = adapted(router_inputs="task")
    embeds = torch.randn(3, TASK_DIM)
    embeds[2] = embeds[0] + 0.05 * torch.randn(TASK_DIM)  # an unseen task that resembles "a"
    with record_gates(model) as record, torch.no_grad(), record.task(["a", "b", "new"]):
        model(**batch(3), task_embeds=embeds)
    gates = {task: record.mean_gates(task).numpy() for task in record.tasks()}
    for measure in ("cosine", "js"):
        similarity = record.similarity(measure)
        for one in gates:
            for other in gates:
                if measure == "cosine":
                    u, v = gates[one].ravel(), gates[other].ravel()
                    expected = u @ v / np.sqrt(u @ u * (v @ v))
                else:
                    pairs = zip(gates[one], gates[other], strict=True)
                    expected = 1 - np.mean([jensenshannon(p, q, base=2) ** 2 for p, q in pairs])
                assert similarity[one][other] == pytest.approx(expected, abs=1e-6)
        (best, value), (second, _) = record.nearest("new", measure=measure)
        assert (best, second) == ("a", "b") and value == similarity["new"]["a"]
        assert record.nearest("new", among=["b"]) == [("b", record.similarity()["new"]["b"])]
    with pytest.raises(ValueError, match="`measure` is 'euclid', which is unknown"):
        record.similarity("euclid")
    with pytest.raises(
        ValueError, match=r'Task "c" was not recorded; these were: \[\'a\', \'b\', \'new\'\]'
    ):
        record.nearest("c")


def test_tables(adapted):
    model = adapted()
    with record_gates(model) as record, torch.no_grad():
        model(**batch(), task_embeds=torch.randn(2, TASK_DIM))
    frame = record.to_frame()
    assert len(frame) == len(record.layers()) == len(record.to_dicts())
    assert list(frame["layer"]) == [row["layer"] for row in record.to_dicts()] == record.layers()
    assert frame["mean"].map(sum).to_numpy() == pytest.approx(1.0, abs=1e-6)


def test_pandas_is_named_where_missing(adapted, monkeypatch):
    model = adapted()
    with record_gates(model) as record, torch.no_grad():
        model(**batch(), task_embeds=torch.randn(2, TASK_DIM))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"`to_frame` needs pandas.*`pip install pandas`"):
        record.to_frame()


def test_errors_say_what_to_do(adapted, tiny_model):
    no_adapter = r"`LlamaForCausalLM` has no Task-Aware MoELoRA adapter.*get_peft_model"
    with pytest.raises(ValueError, match=no_adapter), record_gates(tiny_model()):
        raise AssertionError("not reached")
    model = adapted()
    with record_gates(model) as record:
        with pytest.raises(
            ValueError, match=r"No gates were recorded. Run the model.*record_gates"
        ):
            record.layers()
        with (
            pytest.raises(
                ValueError, match=r"3 task names were given for 2 rows.*one name per row"
            ),
            record.task(["a", "b", "c"]),
        ):
            model(**batch(), task_embeds=torch.randn(2, TASK_DIM))
        with record.task("a"):
            model(**batch(), task_embeds=torch.randn(2, TASK_DIM))
    with pytest.raises(
        ValueError,
        match=r'No token of task "b" was recorded at layer "model.layers.0.self_attn.q_proj"',
    ):
        record.mean_gates("b")


def test_only_the_model_named_is_recorded(adapted):
    model, other = adapted(), adapted()
    with record_gates(model) as record, torch.no_grad():
        other(**batch(), task_embeds=torch.randn(2, TASK_DIM))
    with pytest.raises(ValueError, match="No gates were recorded"):
        record.tasks()
