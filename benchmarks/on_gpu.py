"""What only a GPU can show, in one call: the most telling first, each part in a process of its own, within a limit of time.

    python benchmarks/on_gpu.py [--seconds 270] [--parts device,step,...] [--out on_gpu] [--smoke]

A part is not started where its estimate no longer fits, and is ended at its limit. OUT.json and OUT.md are written after each part:
figures, the reason why a part has none, and what was left out. ``--smoke`` tries the whole program on tiny shapes, on a CPU too: its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, Part

MARGIN = 5.0  # seconds kept for writing


def run_part(name: str, part: Part, smoke: bool, seconds: float) -> dict[str, Any]:
    """The figures of a part, or ``{"failed": why}``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        words = [sys.executable, __file__, "--part", name, "--into", str(out), *["--smoke"] * smoke]
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                return {"failed": f"not done after {seconds:.0f} s"}
            except KeyboardInterrupt:
                return {"failed": "interrupted"}
            finally:
                end(process)
        if out.is_file() and process.returncode == 0:
            found: dict[str, Any] = json.loads(out.read_text("utf-8"))
            return found
        lines = log.read_text("utf-8", "replace").strip().splitlines()
        return {"failed": lines[-1][:300] if lines else f"exit code {process.returncode}"}


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows(figures: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Figures within figures as lines of a table."""
    found = []
    for name, value in figures.items():
        if isinstance(value, dict):
            found += rows(value, f"{before}{name}, ")
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
            found.append((before + name.replace("_", " "), shown))
    return found


def markdown(result: dict[str, Any]) -> str:
    """A table for each part."""
    text = "# Figures of a GPU\n\n" + ("Tiny shapes: these figures mean nothing.\n\n" if result["smoke"] else "")
    text += f"`{result['command']}`\n"
    for name, figures in result["parts"].items():
        text += f"\n## {name}\n\n{PARTS[name].about}. {figures.get('expected', '')}".rstrip() + "\n\n"
        kept = {key: value for key, value in figures.items() if key != "expected"}
        text += "| figure | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows(kept))
    if left := result["left_out"]:
        text += "\n## Not run\n\n" + "".join(f"- {name}: {why}\n" for name, why in left.items())
    return text


def write(result: dict[str, Any], out: Path) -> None:
    """Both files, each whole at any time."""
    for file, text in (
        (out.with_suffix(".json"), json.dumps(result, indent=1) + "\n"),
        (out.with_suffix(".md"), markdown(result)),
    ):
        aside = file.with_name(f".{file.name}")
        aside.write_text(text, "utf-8")
        aside.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=270.0, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas, in this order")
    parser.add_argument("--out", type=Path, default=Path("on_gpu"), help="of OUT.json and OUT.md")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        figures = PARTS[options.part].run(options.smoke)
        options.into.write_text(json.dumps(figures), "utf-8")
        return 0
    wanted = options.parts.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--parts {unknown[0]}: one of {', '.join(PARTS)} expected")
    import torch

    if not options.smoke and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --smoke tries the program on a CPU")
    began = time.monotonic()
    command = "python benchmarks/on_gpu.py " + " ".join(sys.argv[1:])
    result: dict[str, Any] = {"command": command.strip(), "smoke": options.smoke, "parts": {}, "left_out": {}}
    for name in wanted:
        part, left = PARTS[name], options.seconds - (time.monotonic() - began) - MARGIN
        if left < part.estimate and not options.smoke:
            result["left_out"][name] = f"{part.estimate} s expected, {max(left, 0):.0f} s were left"
            print(f"{name}: not started, {result['left_out'][name]}", file=sys.stderr, flush=True)
        else:
            print(f"{name}: {part.about}", file=sys.stderr, flush=True)
            start = time.monotonic()
            figures = run_part(name, part, options.smoke, left if options.smoke else min(left, part.limit))
            result["parts"][name] = figures | {"seconds": round(time.monotonic() - start, 1)}
            if why := figures.get("failed"):
                print(f"{name}: {why}", file=sys.stderr, flush=True)
        write(result, options.out)
    print(json.dumps(result, indent=1))
    return 1 if any(name.endswith("failed") for name, _ in rows(result["parts"])) else 0


if __name__ == "__main__":
    raise SystemExit(main())
