"""Task-Aware MoELoRA for Hugging Face PEFT. Importing the package registers the method with PEFT."""

from .collator import TaskCollator
from .conditioning import task_context
from .config import TaskMoELoraConfig
from .encoder import TaskEncoder, TaskEncoderConfig
from .model import TaskMoELoraModel, attach_task_encoder
from .registration import register

__version__ = "0.1.0"

__all__ = [
    "TaskCollator",
    "TaskEncoder",
    "TaskEncoderConfig",
    "TaskMoELoraConfig",
    "TaskMoELoraModel",
    "attach_task_encoder",
    "task_context",
]

register()
