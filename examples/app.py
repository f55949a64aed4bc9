"""The demonstration page by itself: on this machine, or as a Space.

    pip install 'peft_taskmoe[app]'
    python examples/app.py --adapter outputs/demo

In a Space, copy this file, name the adapter in the variable `TASKMOE_ADAPTER`, put
`peft_taskmoe[app]` into requirements.txt, and begin README.md with:

    ---
    title: Information extraction
    sdk: gradio
    app_file: app.py
    ---
"""

from __future__ import annotations

import argparse
import os

from peft_taskmoe.page import page
from peft_taskmoe.uie import Extractor
from peft_taskmoe.uie.extraction.loading import load_centroids


def main() -> None:
    """Load an adapter and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", default=os.environ.get("TASKMOE_ADAPTER"))
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--port", type=int, default=None, help="default: the first free from 7860")
    args = parser.parse_args()
    if args.adapter is None:
        parser.error("name an adapter with --adapter or in TASKMOE_ADAPTER")
    extractor = Extractor.from_pretrained(args.adapter, max_new_tokens=args.max_new_tokens)
    page(extractor, load_centroids(args.adapter)).launch(server_port=args.port)


if __name__ == "__main__":
    main()
