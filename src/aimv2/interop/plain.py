"""Classes of transformers, opened from a folder or a repository without running any code of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from aimv2.io import SETTINGS, parse_json, read_file, regular

SIDE = 1 << 14  # pixels a side that an image processor may make
PIXELS = 1 << 28  # where a size is a number of pixels


def check_files(folder: Path) -> None:
    """Files that transformers opens by name and reads whole: plain files, of a size that settings and vocabularies have.

    Raises:
        OSError: others.
        ValueError: an image processor that makes pictures of any size.
    """
    from aimv2.interop.shapes import PROCESSORS

    for file in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".py", ".vocab", ".spm") and not file.is_dir():
            regular(file, SETTINGS)
    for name in PROCESSORS:
        if (folder / name).is_file():
            _check_sides(parse_json(read_file(folder / name)), name, 0)


def _check_sides(value: Any, where: str, most: int, depth: int = 0) -> None:
    """Numbers below keys of sizes; ``most``: of the numbers here, 0: any."""
    if isinstance(value, dict):
        for key, inner in value.items():
            edge = str(key) in ("shortest_edge", "longest_edge") and "longest_edge" in value
            named = re.fullmatch(r"(?:crop_|pad_)?size|image_grid_pinpoints", str(key)) is not None
            _check_sides(inner, f"{where}: {key}", PIXELS if edge and most else SIDE if named or most else 0, depth + 1)
    elif isinstance(value, list) and depth < 100:
        for inner in value:
            _check_sides(inner, where, most, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value > most > 0:
        raise ValueError(f"{where} {value}, {most:,} pixels at most expected")


def open_plain(name: str, source: str | Path, **options: Any) -> Any:
    """``from_pretrained`` of a class of transformers; every call of ours goes through here.

    Code of the folder (``auto_map``, ``custom_generate``) is never run, and never offered at a prompt; weights are safetensors, never
    a pickle; a folder is opened without the hub.

    Args:
        name: of the class.
        source: a folder, or a name on the hub.
        options: of ``from_pretrained``.
    """
    import transformers

    if Path(source).is_dir():
        check_files(Path(source))
    kind = getattr(transformers, name)
    options.setdefault("local_files_only", Path(source).is_dir())
    if name != "GenerationConfig":  # has no code
        options["trust_remote_code"] = False
    if name.startswith("AutoModel") or issubclass(kind, transformers.PreTrainedModel):
        options["use_safetensors"] = True
    return kind.from_pretrained(source, **options)
