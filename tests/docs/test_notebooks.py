"""The notebooks run from top to bottom, and what they print is what they promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def executed(name: str, folder: Path) -> list[Any]:
    """The code cells of a notebook that ran in ``folder``; an error in a cell fails the test with its traceback."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cells: list[Any]) -> str:
    """All that cells wrote on standard output."""
    return "".join(
        out.text for cell in cells for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"
    )


def drawn(cells: list[Any]) -> int:
    """Figures."""
    return sum("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


def test_features_of_a_released_folder(tmp_path: Path) -> None:
    cells = executed("features.ipynb", tmp_path)
    text = said(cells)
    assert "patches (3, 64, 128) pooled (3, 128)" in text
    assert int(re.search(r"colours (\d+)", text)[1]) > 5, "the PCA map shows something"
    itself, mean = (float(found) for found in re.search(r"itself (\S+), mean of its image (\S+)", text).groups())
    assert itself == 1 and -1 <= mean < 0.999
    assert "layers ['0', '1', '2', '3', '4', 'last']" in text
    assert drawn(cells) == 3
    assert (tmp_path / "released-tiny" / "model.safetensors").is_file()


def test_pretraining_on_own_pictures_learns(tmp_path: Path) -> None:
    cells = executed("own_pictures.ipynb", tmp_path)
    text = said(cells)
    train, val = (int(found) for found in re.search(r"train (\d+) val (\d+) rejected 0", text).groups())
    assert train + val == 500 and val > 20
    first, last = (float(found) for found in re.search(r"text loss (\S+) -> (\S+)", text).groups())
    assert last < 0.5 * first, "the loss fell"
    assert float(re.search(r"held-out pictures (\S+)", text)[1]) < 0.6 * first, "on held-out pictures too"
    assert re.search(r"nearest to picture 0: \[0, ", text)
    assert re.search(r"caption: a (small|large) ", text)
    assert drawn(cells) == 1


def test_a_vision_language_model_from_nothing(tmp_path: Path) -> None:
    text = said(executed("vlm.ipynb", tmp_path))
    assert "LlavaForConditionalGeneration pre-norm 16 tokens an image" in text
    first, last = (float(found) for found in re.search(r"held-out answers (\S+) -> (\S+)", text).groups())
    assert last < first < 6, "the loss falls"
    assert len(re.findall(r"text only +\S+ +chance", text)) == 7, "a line a kind of question"
    assert re.search(r"answer: \w+", text)
