"""Prints what an installation takes: packages, megabytes, the largest ten.

    python tools/install_size.py [EXTRA,EXTRA] [--into FOLDER]

Makes a fresh virtual environment, installs the tested torch (constraints.txt), then this checkout with the extras named. The
environment is deleted afterwards, unless ``--into`` names a folder for it; one that is there already is measured as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LARGEST = 10


def install(folder: Path, extras: str) -> None:
    """A virtual environment with torch and this checkout, built without a trace in it; nothing is compiled ahead."""
    venv.create(folder, with_pip=True)
    places = folder / "places.cfg"
    places.write_text(f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n")
    env = {**os.environ, "DIST_EXTRA_CONFIG": str(places)}
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    for words in (torch, f"{ROOT}[{extras}]" if extras else str(ROOT)):
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", "-c", CONSTRAINTS, words]
        subprocess.run(pip, check=True, env=env)


def size_of(package: Distribution) -> int:
    """Bytes of the files that a package installed."""
    paths = (Path(str(package.locate_file(file))) for file in package.files or [] if file.suffix != ".pyc")
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="?", default="", help="with commas between them")
    parser.add_argument("--into", type=Path, help="folder of the environment")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.into or Path(temporary) / "venv"
        if not (folder / "pyvenv.cfg").is_file():
            install(folder, given.extras)
        site = next(folder.glob("lib/python3*/site-packages"))
        sizes = {one.metadata["Name"]: size_of(one) for one in distributions(path=[str(site)])}
    sizes.pop("pip", None)
    print(f"{len(sizes)} packages, {sum(sizes.values()) / 1e6:,.0f} MB")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:LARGEST]:
        print(f"{name:24} {size / 1e6:7,.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
