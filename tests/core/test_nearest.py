"""Which training tasks a prompt resembles, and the file that says what those are like."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_taskmoe import attach_task_encoder, nearest_tasks, save_task_centroids
from peft_taskmoe.inspection import record_gates
from peft_taskmoe.nearest import CENTROIDS_FILE, TaskCentroids

TASKS = {"a": ["w4 w5 w6", "w4 w5 w7"], "b": ["w40 w41 w42 w43"], "c": ["w60 w61"]}


@pytest.fixture
def model(adapted, tiny_encoder, word_tokenizer):
    return attach_task_encoder(adapted(), tiny_encoder, word_tokenizer)


def test_a_prompt_of_a_task_is_nearest_to_that_task(model, tmp_path):
    model.train()
    path = save_task_centroids(model, TASKS, tmp_path)
    assert path.name == CENTROIDS_FILE and path.stat().st_size < 5000 and model.training
    for task, prompts in TASKS.items():
        found = nearest_tasks(model, prompts, tmp_path)
        assert found[0].task == task and len(found) == 3
        assert found[0].gates == pytest.approx(1.0) and found[0].embedding == pytest.approx(1.0)
        assert max(one.embedding for one in found[1:]) < 1.0
    near = nearest_tasks(model, "w40 w41 w42 w44", TaskCentroids.load(path))
    assert near[0].task == "b" and near[0].gates < 1.0


def test_centroids_are_means_of_embeddings_and_gates(model, tiny_encoder, word_tokenizer, tmp_path):
    save_task_centroids(model, TASKS, tmp_path)
    found = TaskCentroids.load(tmp_path)
    assert found.tasks == ("a", "b", "c")
    torch.testing.assert_close(found.embeds[0], tiny_encoder(TASKS["a"]).mean(0))
    with record_gates(model) as record, torch.no_grad():
        model(**word_tokenizer(TASKS["b"], return_tensors="pt"))
    assert list(found.layers) == record.layers()
    torch.testing.assert_close(found.gates[1], record.mean_gates("all").float())


def test_a_router_without_a_task_has_gates_alone(adapted, word_tokenizer, tmp_path):
    model = adapted(router_inputs="token")
    save_task_centroids(model, TASKS, tmp_path, tokenizer=word_tokenizer)
    found = nearest_tasks(model, TASKS["c"], tmp_path, tokenizer=word_tokenizer)
    assert found[0].task == "c" and found[0].embedding is None


def test_centroids_of_another_adapter_are_refused(model, adapted, word_tokenizer, tmp_path):
    save_task_centroids(adapted(router_inputs="token"), TASKS, tmp_path, tokenizer=word_tokenizer)
    with pytest.raises(ValueError, match=r"have \(layers, experts, task_dim\).*Write them again"):
        nearest_tasks(model, "w4", tmp_path)


def test_files_that_are_none_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="Write it with `save_task_centroids"):
        nearest_tasks(model, "w4", tmp_path)
    path = save_task_centroids(model, TASKS, tmp_path)
    tensors = load_file(path)
    names = {"tasks": json.dumps(["a", "b", "c"]), "layers": json.dumps(["x"] * 14)}
    broken = [
        (b"no tensors", None),
        (tensors, None),
        (tensors, names | {"tasks": "[1, 2, 3]"}),
        (tensors, names | {"tasks": '["a"]'}),
        (tensors | {"gates": tensors["gates"] * float("nan")}, names),
        ({"embeds": tensors["embeds"]}, names),
    ]
    for content, metadata in broken:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path, metadata=metadata)
        with pytest.raises(ValueError, match="holds no task centroids"):
            TaskCentroids.load(path)
    with pytest.raises(ValueError, match="Task 'empty' has no prompt"):
        save_task_centroids(model, {"empty": []}, tmp_path)
