"""The notebook: valid, without outputs, and its cells run on a tiny model."""

from __future__ import annotations

import json
from typing import Any

import matplotlib
import nbformat
from snippets import ROOT
from transformers import AutoModelForCausalLM


PATH = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def test_it_is_valid_and_without_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert not cell.outputs
            assert before.cell_type == "markdown"  # which says what the cell does


def test_its_cells_run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    namespace: dict[str, Any] = {"__name__": "notebook"}
    cells = [cell for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        if number == 0:  # the parameters
            namespace |= {"MODEL": str(tiny_model_dir), "STEPS": 2}
    AutoModelForCausalLM.from_pretrained("runs/notebook/forget-model")
    assert (tmp_path / "runs" / "notebook" / "adapter" / "adapter_model.safetensors").is_file()
    assert namespace["choice"].alpha in [evaluation.alpha for evaluation in namespace["evaluations"]]
