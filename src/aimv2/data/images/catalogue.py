"""What a source of pictures is, decided by one rule for every command that reads pictures.

Each command has a table of the forms that it reads, by kind and by extension: a new form is one row there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Kind = Literal["folder", "tars", "file", "hub", "missing"]


def kind_of(source: str) -> tuple[Kind, Path]:
    """What a source is, and its path.

    ``tars`` is one tar, or a pattern (glob, braces) of them that is no path itself; ``hub`` may be a data set OWNER/NAME.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return "folder", path
    if path.suffix.lower() == ".tar" or (any(mark in source for mark in "*?[{") and not path.exists()):
        return "tars", path
    if path.is_file():
        return "file", path
    is_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not path.exists() and not path.parent.exists()
    return "hub" if is_hub else "missing", path
