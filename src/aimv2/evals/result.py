"""The file that a measurement leaves: what was measured, how, the figures, and the command that made it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

import aimv2
from aimv2.errors import UsageError
from aimv2.features.frozen import Frozen
from aimv2.features.pixels import about
from aimv2.io import parse_json, read_file, write_aside

FORMAT = "aimv2 result 1"
FILE = "result.json"


def make_result(
    command: str,
    protocol: dict[str, Any],
    model: dict[str, Any],
    data: dict[str, Any],
    figures: dict[str, Any],
    seconds: float,
    seed: int | list[int] | None = 0,
) -> dict[str, Any]:
    """A result, ready to be written.

    Args:
        command: knn, probe, ...
        protocol: everything that decides the figures besides model and data.
        model: see :func:`about_model`.
        data: ``name``, ``source``, ``split``, counts.
        figures: what was measured; fractions are 0..1.
        seconds: of the whole command.
        seed: or all of them.
    """
    return {
        "format": FORMAT,
        "verb": command,
        "model": model,
        "data": data,
        "protocol": protocol,
        "seed": seed,
        "figures": figures,
        "seconds": seconds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores" + (", CUDA" if torch.cuda.is_available() else ""),
        "version": aimv2.__version__,
        "torch": torch.__version__,
        "command": shlex.join(["aimv2", *sys.argv[1:]]),
    }


def about_model(frozen: Frozen) -> dict[str, Any]:
    """What a result says of an encoder; with the proof that measuring left it as it was.

    Raises:
        RuntimeError: the weights have changed: a mistake of ours.
        UsageError: their file has: somebody else's.
    """
    if not frozen.unchanged():
        if frozen.file is not None:
            raise UsageError(f"MODEL {frozen.name}: its file {frozen.file.name} changed meanwhile; measure it again")
        raise RuntimeError(f"{frozen.name}: the frozen weights changed while they were measured")
    return {
        "name": frozen.name,
        "kind": frozen.kind,
        "weights_sha256": frozen.sha256,
        "unchanged": True,
        "image_size": frozen.image_size,
        "precision": frozen.precision,
        "width": frozen.width,
        **about(frozen.pixels),
    }


def check_out(out: str | None, command: str) -> Path | None:
    """The folder of ``--out``, made; None without one.

    Raises:
        UsageError: it holds something else than an evaluation by this command.
    """
    if out is None:
        return None
    folder = Path(out).expanduser()
    ours = {FILE, "features", "answers", "submissions", "run", "probe.json", "layers.png", "result.png"}
    if folder.exists() and (not folder.is_dir() or any(path.name not in ours for path in folder.iterdir())):
        raise UsageError(f"--out {out}: holds something else than an evaluation; give a new folder", code="exists")
    if (folder / FILE).is_file() and (other := read_result(folder)["verb"]) != command:
        raise UsageError(
            f"--out {out}: holds a result of `aimv2 {other}`; give each command a folder of its own", code="exists"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_result(out: Path | None, result: dict[str, Any]) -> dict[str, Any]:
    """Writes ``result.json`` into ``out``, where there is one; returns the result."""
    if out is not None:
        write_aside(out / FILE, json.dumps(result, indent=1) + "\n")
    return result


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file, or the one in a folder.

    Raises:
        UsageError: not a result, or one of another version.
    """
    file = Path(path).expanduser()
    if file.is_dir() and not (file / FILE).exists():
        run = "; this is a run: `aimv2 report` compares runs" if (file / "checkpoints").is_dir() else ""
        raise UsageError(f"RESULT {path}: no {FILE} in this folder{run}", code="missing")
    file = file / FILE if file.is_dir() else file
    try:
        stored = parse_json(read_file(file))
    except (OSError, ValueError) as error:
        raise UsageError(f"RESULT {path}: can't be read as a result file: {error}", code="unreadable") from None
    made_by = stored.get("format") if isinstance(stored, dict) else None
    if made_by != FORMAT:
        what = f"is '{made_by}'" if made_by else "names no format"
        raise UsageError(f"RESULT {path}: {what}, '{FORMAT}' expected; measure it again with this version")
    return stored
