"""Collects the wheels that a machine without network needs, and this project's own.

    python tools/wheels.py OUT [--python 3.12] [--extras NAMES] [--there NAMES]

Versions are those of constraints.lock; which packages are needed is read from what is installed here. There:

    pip install --no-index --no-deps OUT/*.whl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from lock import LOCK, OWN, canonicalize_name, read_lock
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
THERE = "torch,torchvision,triton,transformers,timm"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_5_x86_64",
    "linux_x86_64",
    "any",
)


def needed(extras: list[str], there: set[str], python: str) -> list[str]:
    """Names of all packages that ``aimv2[extras]`` needs, but for those that are there and what only they need."""
    found, waiting = set[str](), [("aimv2", extra) for extra in ("", *extras)]
    done = set[tuple[str, str]]()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{name}: not installed here, so what it needs is unknown; install it first") from None
        for line in lines:
            wanted = Requirement(line)
            about = {"extra": extra, "python_version": python, "python_full_version": f"{python}.0"}
            other = canonicalize_name(wanted.name)
            if other in there or (wanted.marker and not wanted.marker.evaluate(about)):
                continue
            found.add(other)
            waiting += [(other, more) for more in ("", *wanted.extras)]
    return sorted(found - set(OWN))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--extras", default="", help="of aimv2, with commas")
    parser.add_argument("--there", default=THERE, help=f"packages that the other machine has ({THERE})")
    parser.add_argument("--list", action="store_true", help="only print what would be collected")
    given = parser.parse_args(words)
    there = {canonicalize_name(name) for name in given.there.split(",") if name}
    names, pins = needed([one for one in given.extras.split(",") if one], there, given.python), read_lock(LOCK)
    if unknown := [name for name in names if name not in pins]:
        raise SystemExit(f"{unknown[0]}: not in {LOCK.name}; write it anew (tools/lock.py write)")
    wanted = [f"{name}=={pins[name][0]}" for name in names]
    if given.list:
        print("\n".join(wanted))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    places = [word for one in PLATFORMS for word in ("--platform", one)]
    words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", given.python, *places]
    subprocess.run([*pip, *words, "--dest", str(given.out), *wanted], check=True)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(given.out), str(ROOT)], check=True)
    size = sum(file.stat().st_size for file in given.out.glob("*.whl"))
    print(f"{given.out}: {len(list(given.out.glob('*.whl')))} wheels, {size / 1e6:,.0f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
