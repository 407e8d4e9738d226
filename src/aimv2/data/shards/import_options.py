"""Options of `data import` that can be wrong before a source is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aimv2.data.images.sources import EXPECTED, TEMPLATE
from aimv2.errors import UsageError


def check_options(source: str, val_list: str | None, options: dict[str, Any]) -> None:
    """Refuse options of an import that are out of range or exclude each other.

    Raises:
        UsageError: the option that is wrong.
    """
    if not source:
        raise UsageError(f"SOURCE is empty; expected {EXPECTED}", option="SOURCE")
    val_fraction, max_side, template = (options[name] for name in ("val_fraction", "max_side", "template"))
    others = {"--captions": options["captions"], "--class-folders": options.get("class_folders")}
    unread = {"caption_column": None, "class_folders": None, "no_captions": None, "template": TEMPLATE}
    unread |= {"image_column": None, "conversations": None} if options.get("boxes") else {}
    what = "boxes" if options.get("boxes") else "conversations" if options.get("conversations") else ""
    if useless := [key for key, no in unread.items() if what and options.get(key, no) != no]:
        name = f"--{useless[0].replace('_', '-')}"
        raise UsageError(f"{name}: {what} have no use for it; leave it out", option=name, code="conflict")
    if options.get("no_captions") and (given := next((name for name, value in others.items() if value), None)):
        raise UsageError(f"--no-captions: got {given} too; one of them expected", code="conflict")
    if "{}" not in template:
        raise UsageError(f"--template {template!r}: expected {{}} where the class goes")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction}: expected 0 or more and below 1")
    if val_fraction and val_list:
        raise UsageError("--val-fraction and --val-list exclude each other; give one", code="conflict")
    if val_list is not None and not Path(val_list).expanduser().is_file():
        raise UsageError(
            f"--val-list {val_list}: no such file; expected one key or image name a line", code="not-found"
        )
    if max_side is not None and max_side < 16:
        raise UsageError(f"--max-side {max_side}: expected 16 pixels or more")
    if options["shard_size"] < 1:
        raise UsageError(f"--shard-size {options['shard_size']}: expected 1 sample or more")
    if not 1 <= options["quality"] <= 100:
        raise UsageError(f"--quality {options['quality']}: expected 1 to 100")
