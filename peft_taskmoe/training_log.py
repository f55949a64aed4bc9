"""What a Trainer logs about the routing while it trains.

It knows the trainer's `log` and the load-balancing loss that the adapted model collects; it computes nothing.
"""

from __future__ import annotations

from typing import Any

from .model import base_model_of, conditioner_of


def log_routing(trainer: Any) -> Any:
    """Let a trainer log `router_aux_loss` with its training loss.

    That is the load-balancing loss with its coefficient, as added to the model's loss, averaged over the batches since the last
    entry. It goes into the entry itself, so that `trainer.state.log_history` and every `report_to` see it.

        trainer = log_routing(SFTTrainer(model, ..., peft_config=TaskMoELoraConfig(top_k=2, router_aux_loss_coef=0.01)))

    Args:
        trainer: A transformers `Trainer` or one that builds on it. Doing it again changes nothing.

    Returns:
        The same trainer.

    Raises:
        ValueError: If its model has no Task-Aware MoELoRA adapter.
    """
    base_model_of(trainer.model)
    inner = trainer.log
    if getattr(inner, "logs_routing", False):
        return trainer

    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        conditioner = conditioner_of(base_model_of(trainer.model))
        if (
            "loss" in logs and conditioner is not None
        ):  # an entry about training, not about an evaluation
            value = conditioner.take_aux_loss()
            if value is not None:
                logs["router_aux_loss"] = value
        inner(logs, *args, **kwargs)

    log.logs_routing = True  # type: ignore[attr-defined]
    trainer.log = log
    return trainer
