"""Adapters as plain LoRAs, experts from plain LoRAs, and the layout of the paper's authors."""
