"""Task-Aware MoELoRA for Hugging Face PEFT. Importing it registers the method with PEFT."""

from .help_only import is_help_only

__version__ = "0.1.0"

if not is_help_only():  # `peft-taskmoe --help` answers at once: torch and PEFT take seconds
    from .registration import register

    register()  # first: its error explains what another version of PEFT lacks

    from .attach import attach_task_encoder
    from .callback import RoutingCallback, log_routing
    from .checkpoints import ChecksumCallback, checkpoint_fault, newest_whole_checkpoint
    from .collator import TaskCollator
    from .config import TaskMoELoraConfig
    from .encoder import TaskEncoder, TaskEncoderConfig
    from .export.from_loras import experts_from_loras
    from .export.reference_checkpoint import from_reference_checkpoint
    from .export.to_lora import to_lora
    from .inspection import record_gates
    from .model import TaskMoELoraModel
    from .nearest import nearest_tasks, save_task_centroids
    from .plots import heat_map, load_plot, similarity_map, token_gates
    from .task_scope import task_context

__all__ = [
    "ChecksumCallback",
    "RoutingCallback",
    "TaskCollator",
    "TaskEncoder",
    "TaskEncoderConfig",
    "TaskMoELoraConfig",
    "TaskMoELoraModel",
    "attach_task_encoder",
    "checkpoint_fault",
    "experts_from_loras",
    "from_reference_checkpoint",
    "heat_map",
    "load_plot",
    "log_routing",
    "nearest_tasks",
    "newest_whole_checkpoint",
    "record_gates",
    "save_task_centroids",
    "similarity_map",
    "task_context",
    "to_lora",
    "token_gates",
]
