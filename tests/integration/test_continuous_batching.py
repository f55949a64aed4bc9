"""Routed LoRA under transformers' continuous batching."""

from __future__ import annotations

import pytest
from peft import get_peft_model

import tiny
from peft_taskmoe import TaskMoELoraConfig
from scripted import tiny_llama


def test_continuous_batching_refuses_routers_that_read_the_task():
    config = TaskMoELoraConfig(task_type="CAUSAL_LM", task_dim=tiny.TASK_DIM)
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="Continuous batching"):
        model.generate_batch([[5, 6, 7]], progress_bar=False)
    with pytest.raises(ValueError, match="Continuous batching"):
        model.init_continuous_batching()
