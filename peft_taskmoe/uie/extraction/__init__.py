"""From texts and a schema to records: prompts, windows, generation, reading, files."""
