"""How well answers match gold records, and how far their confidences can be trusted."""
