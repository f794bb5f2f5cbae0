"""examples/positive_reviews.ipynb runs from top to bottom, with a few samples."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "positive_reviews.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]


def test_it_is_stored_without_outputs_and_explained_in_both_languages():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    prose = ["".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "markdown"]
    assert len(prose) >= 8 and all(any("一" <= char <= "鿿" for char in text) for text in prose)
    assert "http" not in "".join(prose)  # addresses of repository and mirrors are the reader's


@pytest.mark.timeout(300)  # a kernel is a process of its own that loads torch
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel"), pytest.importorskip("matplotlib")
    monkeypatch.setenv("MINIRLHF_ITERATIONS", "2")
    monkeypatch.setenv("MINIRLHF_BATCH", "16")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") for output in outputs)
    assert "mean reward: 0." in said and said.count("酒店") >= 8
    assert any("image/png" in output.get("data", {}) for output in outputs)  # the curves
    assert (tmp_path / "positive_policy" / "model.safetensors").is_file()
