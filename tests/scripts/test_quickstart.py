"""The notebook in examples/ runs from its first cell to its last, with tiny models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_the_quickstart_ends_in_an_extraction_and_a_picture(models, tmp_path, monkeypatch) -> None:
    base, encoder = models
    stand_in = SimpleNamespace(language_model_folder=lambda: base, encoder_folder=lambda: encoder)
    monkeypatch.setitem(sys.modules, "offline_models", stand_in)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLES / "data", tmp_path / "data")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    assert code.count("STEPS = 40") == 1
    scope = {"__name__": "quickstart"}
    exec(code.replace("STEPS = 40", "STEPS = 1"), scope)

    first = scope["mine"][0]
    assert first.text.startswith("At Casa Verde the bean stew comes with smoked paprika.")
    assert [record.label for record in first.records] == ["restaurant", "dish", "ingredient"]
    assert scope["trainer"].state.global_step == 1
    page = scope["found"]._repr_html_()
    assert all(text in page for text in scope["texts"])
    assert scope["record"].tasks() == ["kitchen", "spaceflight"]
    shown = scope["picture"]._repr_png_()  # what a notebook asks for
    assert shown.startswith(b"\x89PNG") and len(shown) > 1000
