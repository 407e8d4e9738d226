"""Files of the repository as pages of the site: what a page links to outside docs/, and the notebooks."""

from __future__ import annotations

import json
from pathlib import Path

LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".ipynb": "json", ".md": ""}


def page(root: Path, path: str) -> tuple[str, str | None]:
    """(page of a file or folder of the repository, its content; None where the page is written elsewhere).

    Raises:
        FileNotFoundError: a page links to what is not there.
    """
    file = root / path.rstrip("/")
    if not file.exists():
        raise FileNotFoundError(f"a page of the documentation links to {path}, which is not there")
    if file.is_dir():
        return "recipes/index.md" if path.startswith("recipes") else "reference.md", None
    if path.startswith("recipes/"):
        return f"recipes/{file.stem}.md", None
    if file.suffix == ".ipynb":
        return notebook_page(file), None
    if file.suffix == ".md":
        return f"source/{file.stem.lower()}.md", file.read_text().replace("](docs/", "](../")
    language = LANGUAGES.get(file.suffix, "text")
    return f"source/{path}.md", f"# {path}\n\n```{language}\n{file.read_text().rstrip()}\n```\n"


def notebooks(root: Path) -> list[Path]:
    """The notebooks, by name."""
    return sorted((root / "notebooks").glob("*.ipynb"))


def notebook_page(path: Path) -> str:
    return f"notebooks/{path.stem}.md"


def notebook_pages(root: Path) -> dict[str, str]:
    """Text and code of each notebook; outputs are not kept in the repository."""
    return {notebook_page(path): notebook_text(path) for path in notebooks(root)}


def notebook_text(path: Path) -> str:
    """Cells one after the other, with the command that runs them."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    note = f"Open it with Jupyter: `notebooks/{path.name}`. `tests/docs/test_notebooks.py` executes it."
    return "\n\n".join([parts[0], note, *parts[1:]]) + "\n"
