"""Draw the figures of docs/concepts.md: the pictures that notebook 2 shows, in its order.

`python docs/figures.py` after `make quickstart`.
"""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[1]
NAMES = ("components", "heads", "picked-heads", "cosines", "pamr")


def main() -> None:
    """Execute the notebook and write its pictures into docs/images."""
    file = REPOSITORY / "notebooks" / "2_features_and_heads.ipynb"
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    pictures = [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    for name, picture in zip(NAMES, pictures, strict=True):
        path = REPOSITORY / "docs" / "images" / f"{name}.png"
        path.write_bytes(base64.b64decode(picture))
        print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
