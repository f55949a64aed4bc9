"""The model card of an adapter: base, encoder, how to load it, data and scores."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

_MARK = "<!-- Written by peft_taskmoe, and again at every save until somebody edits it: {} -->"
_PUSHED = (  # what transformers' `push_to_hub` says in the template that PEFT takes as well
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This "
    "model card has been automatically generated."
)
_OF_PEFT = re.compile(r"|### Framework versions|## Training procedure|The following `bits.*|- .*")
_LOADING = re.compile(r"## (Load it|Quick start)\s+```python\n.*?\n```", re.DOTALL)
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def write_card(
    folder: str | Path,
    config: Any,
    *,
    adapter: str | None = None,
    sections: str = "",
    scores: Mapping[str, float] | None = None,
) -> bool:
    """Write `README.md` of a saved adapter, unless a person wrote the one that is there.

    `save_pretrained` and `push_to_hub` of a `PeftModel` call it after PEFT and transformers have
    written theirs. Values in a card's header, such as `license`, are kept; of a card by TRL, the
    lines that load the model are replaced. It cannot cover this: `trainer.push_to_hub` writes TRL's
    card last (push the model instead); of several adapters in a folder only "default" has a card;
    another save leaves `sections` and `scores` out, for the weights may have changed.

    Args:
        folder: Where the adapter was saved.
        config: Its `TaskMoELoraConfig`.
        adapter: Hub id or folder that readers load; None: `folder`.
        sections: Markdown that goes in, such as sections on data and scores.
        scores: Strict micro F1 from 0 to 1 by data set, for the header's `model-index`.

    Returns:
        Whether the card is of this function now.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
    data: Any = card.data
    extracts = (Path(folder) / "uie_config.json").is_file()
    untouched = _is_untouched(card)
    if untouched:
        _fill_header(data, config, extracts, scores or {})
    ours = ModelCard.from_template(
        data,
        str(Path(__file__).with_suffix(".md")),
        config=config,
        base=config.base_model_name_or_path,
        adapter=str(folder) if adapter is None else adapter,
        auto_class=_AUTO_CLASSES.get(config.task_type, "AutoPeftModel"),
        extracts=extracts,
        sections=sections.strip(),
        peft=version("peft"),
    )
    if untouched:
        ours.text += f"\n\n{_MARK.format(_digest(ours))}\n"
        ours.save(path)
    elif "from transformers import pipeline" in card.text and "using [TRL]" in card.text:
        load = _LOADING.search(ours.text)
        card.text = _LOADING.sub(lambda _: load[0] if load else "", card.text, count=1)
        card.save(path)
    return untouched


def _is_untouched(card: ModelCard) -> bool:
    """Whether a program wrote a card, and nobody changed it since."""
    mark = re.search(_MARK.format(r"(\w+)"), card.text)
    if mark:
        return mark[1] == _digest(card)
    text = card.text.strip()
    for words in ("", _PUSHED):
        template = ModelCard.from_template(ModelCardData(), model_description=words)
        text = text.removeprefix(template.text.strip())
    return all(_OF_PEFT.fullmatch(line) for line in text.splitlines())


def _digest(card: ModelCard) -> str:
    """Of the text and the scores, but for the mark and the versions, which PEFT adds to."""
    lines = [line for line in card.text.splitlines() if not line.startswith(("<!--", "- PEFT"))]
    results = card.data.get("eval_results") or ()
    told = ["\n".join(lines).strip(), *([one.dataset_name, one.metric_value] for one in results)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _fill_header(data: Any, config: Any, extracts: bool, scores: Mapping[str, float]) -> None:
    base = config.base_model_name_or_path or ""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not Path(base).exists()
    data.base_model = base if on_hub else None  # the Hub refuses a card that names a folder
    tags = [tag for tag in data.tags or () if not tag.startswith("base_model:adapter:")]
    tags += ["peft_taskmoe", "mixture-of-experts", *(["information-extraction"] * extracts)]
    data.tags = sorted({*tags, *([f"base_model:adapter:{base}"] if on_hub else [])})
    data.library_name, data.license = "peft", data.license or "unknown"
    if config.task_type == "CAUSAL_LM":
        data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.model_name = "Task-Aware MoELoRA adapter" if scores else None
    data.eval_results = [
        EvalResult("text-generation", name, name, "f1", f1, metric_name="Strict micro F1")
        for name, f1 in scores.items()
    ] or None
