"""Runs notebooks from top to bottom and writes what they show into them.

    uv run --group dev python experiments/notebooks/execute.py experiments/notebooks/*.ipynb

Runs go to a temporary folder. A cell that raises ends it with exit code 1, and the notebook stays as it was.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path, *, timeout: int = 900) -> nbformat.NotebookNode:
    """The notebook at `path`, run in an empty folder; `timeout` is that of a cell, in seconds.

    Raises: nbclient.exceptions.CellExecutionError if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:  # when it ran is no result
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": notebook.metadata.get("kernelspec", {}), "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(execute(Path(name)), name)
