"""The notebook runs from top to bottom, on the real photograph and where that is absent."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tiling.ipynb"


@pytest.mark.parametrize("place", ["examples", "elsewhere"])
def test_the_notebook_runs_and_shows_pictures(tmp_path: Path, place: str) -> None:
    folder = NOTEBOOK.parent if place == "examples" else tmp_path / "a" / "b"
    if place == "elsewhere":  # without the real data beside it
        folder.mkdir(parents=True)
        shutil.copy(NOTEBOOK, folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    text = "".join(output.get("text", "") for output in outputs)
    assert float(re.findall(r"largest difference from the whole image: (\S+)", text)[0]) < 1e-6
    assert "the same pixels: True" in text and "0 bytes" in text


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
