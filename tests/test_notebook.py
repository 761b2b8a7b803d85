"""The example notebook runs from a fresh kernel and shows what it promises; in git it has no outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own making; the kernel is another process
def test_the_example_notebook_runs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    result, table, maps = (cell.outputs for cell in cells)  # an error would have ended it
    assert "chelsea.jpg: patches 1.00 → " in result[-1].data["text/html"]
    assert result[-1].data["text/html"].count("data:image/png;base64,") == 2
    lines = "".join(output.text for output in table).splitlines()  # a slow kernel sends it in pieces
    assert len(lines) == 4
    assert lines[0].startswith("thresholds × 0: 1.00 of the patches kept")
    assert "image/png" in maps[-1].data
