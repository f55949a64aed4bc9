"""Adapters as plain LoRAs, experts from plain LoRAs, and the layout of the paper's authors."""

from .from_loras import experts_from_loras
from .reference_checkpoint import from_reference_checkpoint
from .to_lora import ExportReport, LoraExport, to_lora

__all__ = [
    "ExportReport",
    "LoraExport",
    "experts_from_loras",
    "from_reference_checkpoint",
    "to_lora",
]
