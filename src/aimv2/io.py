"""Small files that are either whole or absent."""

import os
from pathlib import Path


def write_aside(path: Path, text: str) -> None:
    """Writes ``text`` beside ``path`` and renames it there: a reader never meets half of it."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
