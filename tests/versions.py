"""What some versions of transformers and TRL lack: marks for the tests that need it."""

from __future__ import annotations

import peft
import pytest
import transformers
import trl
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

needs_new_checkpointing = pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"),
    reason="transformers before 5.23 has no `activation_checkpointing_enable`",
)
needs_labels_in_dpo = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"),
    reason="TRL before 1.15 keeps the labels of DPO and DFT from the model",
)
needs_one_batch_in_dpo = pytest.mark.skipif(
    Version(trl.__version__) < Version("0.29"),
    reason="DPO of TRL 0.26 keeps prompts and answers apart, and joins them itself",
)
needs_transformers_5 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="examples and experiments use options of transformers 5",
)
needs_own_integration = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"adapters of transformers' own ask for PEFT {MIN_PEFT_VERSION} here",
)
