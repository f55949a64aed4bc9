"""Load a saved adapter in a new process and extract from one sentence.

python examples/extract.py --adapter outputs/demo --text "Ariane 5 lifted off from Kourou."
python examples/extract.py --adapter user/my-adapter --text "..." --schema schema.json
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import peft_taskmoe  # noqa: F401  # registers the method with PEFT
from peft_taskmoe import attach_task_encoder
from peft_taskmoe.uie import Extractor, Schema, load_format

SCHEMA = {
    "person": "names of people",
    "spacecraft": "vehicles, probes and stations in space",
    "space-agency": "organisations that run space flights",
    "launcher": "rockets that carry spacecraft",
}


@dataclass
class Arguments:
    """What to load and what to read."""

    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    text: str = field(metadata={"help": "The sentence to extract from."})
    schema: str | None = field(
        default=None,
        metadata={"help": "JSON file {label: description}; None: people and spaceflight."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "The longest answer."})


def main() -> None:
    """Load, extract, print."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    base = PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), args.adapter
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    attach_task_encoder(model, tokenizer=tokenizer)  # the encoder that the adapter's config names
    extractor = Extractor(
        model, tokenizer, format=load_format(args.adapter), max_new_tokens=args.max_new_tokens
    )
    schema = Schema.from_json(args.schema) if args.schema else Schema.from_dict("NER", SCHEMA)
    (found,) = extractor([args.text], schema, progress=False)
    console = Console()
    console.print(f"Text: {args.text}", markup=False)
    console.print(f"Asked for: {', '.join(label.name for label in schema.labels)}", markup=False)
    console.print(f"The model wrote:{found.answers[0].parsed.raw}", markup=False)
    for record in found.records:
        console.print(record.to_dict())
    for problem in found.problems:
        console.print(f"{problem.kind}: {problem.message}", markup=False)
    if not found.records:
        console.print("It found nothing of these kinds.")


if __name__ == "__main__":
    main()
