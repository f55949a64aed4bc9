"""Makes an untrained encoder whose vectors tell prompts apart as well as a trained one's.

    python experiments/centred_encoder.py models/minilm-untrained models/minilm-untrained-centred \
        data/uie/*/train.jsonl

The mean vector of 50 training prompts of each data set is taken from the bias of the last layer's
norm, which is a constant of every vector that is the mean over tokens.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModel, AutoTokenizer

from peft_taskmoe import TaskEncoder
from peft_taskmoe.uie import PromptFormat, build_example, read_datasets


def main() -> None:
    """Read prompts, centre the encoder, save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="Folder of the encoder.")
    parser.add_argument("target", help="Folder to write.")
    parser.add_argument("data", nargs="+", help="JSONL files of training documents.")
    args = parser.parse_args()
    encoder, form = TaskEncoder(args.source), PromptFormat(style="compact", occurrences=False)
    sets = read_datasets(args.data, split="train", limit=50).values()
    prompts = [[build_example(one, format=form).prompt for one in documents] for documents in sets]
    mean = torch.stack([encoder(texts).mean(0) for texts in prompts]).mean(0)
    model = AutoModel.from_pretrained(args.source)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.bias -= mean
    model.save_pretrained(args.target)
    AutoTokenizer.from_pretrained(args.source).save_pretrained(args.target)


if __name__ == "__main__":
    main()
