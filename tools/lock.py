"""Writes and checks the full list of packages that was tested, with the hashes of their files.

    python tools/lock.py write [--report FILE]      constraints.lock from the installed packages and pip's report of a dry run
    python tools/lock.py check [--advisories FILE]

``check`` compares what is installed with ``constraints.lock`` and exits with 1 where it differs, or where an advisory of FILE (one OSV
record as JSON, a list of them, or a zip of records) matches an installed version. Without FILE nothing is said about advisories. Hashes
are those of the files that pip chose on one machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LOCK = Path(__file__).resolve().parents[1] / "constraints.lock"
HEAD = "# every package of the tested environment, with hashes; written by tools/lock.py\n"
OWN = ("aimv2", "pip", "setuptools", "wheel")  # not locked: the project itself, and what venv brings


def installed() -> dict[str, str]:
    """{name: version}, both in their normal form, without a local part (2.13.0+cpu)."""
    found = {}
    for one in metadata.distributions():
        name = canonicalize_name(one.metadata["Name"])
        if name not in OWN:
            found[name] = one.version.partition("+")[0]
    return dict(sorted(found.items()))


def read_lock(path: Path) -> dict[str, tuple[str, list[str]]]:
    """{name: (version, hashes)}."""
    found = {}
    for line in path.read_text("utf-8").replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            pin, *words = line.split()
            name, _, version = pin.partition("==")
            found[canonicalize_name(name)] = version, [word.partition("=")[2] for word in words]
    return found


def write(path: Path, report: Path | None) -> int:
    """Writes what is installed, with the hashes that pip reports; packages without one are said."""
    pins, hashes = installed(), hashes_of(json.loads(report.read_text("utf-8")) if report else ask(installed()))
    lines = [
        f"{name}=={pins[name]}" + "".join(f" \\\n    --hash=sha256:{one}" for one in hashes.get(name, []))
        for name in pins
    ]
    path.write_text(HEAD + "\n".join(lines) + "\n", "utf-8")
    without = [name for name in pins if name not in hashes]
    print(f"{path.name}: {len(lines)} packages" + (f"; no hash of {', '.join(without)}" if without else ""))
    return 0


def ask(pins: dict[str, str]) -> dict[str, Any]:
    """pip's report of a dry run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        words = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(out)]
        wanted = [f"{name}=={version}" for name, version in pins.items()]
        subprocess.run([sys.executable, "-m", "pip", *words, *wanted], check=True)
        found: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return found


def hashes_of(report: dict[str, Any]) -> dict[str, list[str]]:
    """{name: SHA-256}; not of local builds (2.13.0+cpu), which are others on other machines."""
    found = {}
    for row in report["install"]:
        digest = row["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest and "+" not in row["metadata"]["version"]:
            found[canonicalize_name(row["metadata"]["name"])] = [digest]
    return found


def differences(lock: dict[str, tuple[str, list[str]]], here: dict[str, str]) -> list[str]:
    """A line for each package that is not as it was tested."""
    lines = []
    for name in sorted(lock.keys() | here.keys()):
        wanted, found = lock.get(name, ("", []))[0].partition("+")[0], here.get(name, "")
        if wanted != found:
            lines.append(f"{name}: {found or 'not installed'}, tested with {wanted or 'none'}")
    return lines


def records(path: Path) -> list[dict[str, Any]]:
    """OSV records of a JSON file or a zip of such files, withdrawn ones too.

    Raises:
        SystemExit: a file that can't be read, or holds none: nothing can be said from it.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
        else:
            texts = [path.read_bytes()]
        every = [json.loads(text) for text in texts]
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise SystemExit(
            f"ADVISORIES {path}: {error}; an OSV export is expected, one record as JSON, a list or a zip"
        ) from None
    lists = [stored.get("vulns", [stored]) if isinstance(stored, dict) else stored for stored in every]
    found = [
        one
        for rows in lists
        for one in (rows if isinstance(rows, list) else ())
        if isinstance(one, dict) and one.get("id") and "affected" in one
    ]
    if not found:
        raise SystemExit(
            f"ADVISORIES {path}: no OSV record in it (id, affected); one record as JSON, a list or a zip is expected"
        )
    return found


def advisories(path: Path, here: dict[str, str]) -> list[str]:
    """A line for each advisory that matches an installed version."""
    lines = []
    for record in records(path):
        for affected in () if record.get("withdrawn") else record.get("affected") or ():
            package = affected.get("package") or {}
            name = canonicalize_name(str(package.get("name", "")))
            if package.get("ecosystem") == "PyPI" and name in here and matches(affected, here[name]):
                fixed = sorted({event["fixed"] for event in events(affected) if "fixed" in event})
                then = f"; fixed in {', '.join(fixed)}" if fixed else ""
                summary = " ".join(str(record.get("summary") or record.get("details") or "").split())[:120]
                lines.append(f"{record.get('id')}: {name} {here[name]}{then}: {summary}")
    return sorted(set(lines))


def events(affected: dict[str, Any]) -> list[dict[str, str]]:
    """Events of all ranges of versions; those of commits say nothing about releases."""
    ranges = [one for one in affected.get("ranges") or () if one.get("type") != "GIT"]
    return [event for one in ranges for event in one.get("events") or ()]


def matches(affected: dict[str, Any], version: str) -> bool:
    """Whether a version is among those affected: listed, or after an introduction and before the fix that follows it."""
    here = Version(version)
    if any(number(listed) == here for listed in affected.get("versions") or ()):
        return True
    for one in affected.get("ranges") or ():
        if one.get("type") == "GIT":
            continue
        inside = False
        points = [
            (number(at), kind != "introduced", kind) for event in one.get("events") or () for kind, at in event.items()
        ]
        for at, _, kind in sorted(point for point in points if point[0] is not None):
            if kind == "introduced" and at <= here:
                inside = True
            elif (kind == "fixed" and at <= here) or (kind == "last_affected" and at < here):
                inside = False
        if inside:
            return True
    return False


def number(text: str) -> Version | None:
    """A version; None for what is none."""
    try:
        return Version(str(text))
    except InvalidVersion:
        return None


def check(lock: Path, advisory_file: str | None) -> int:
    """Prints what differs and what is known about it; 1 where there is anything."""
    here = installed()
    wanted = read_lock(lock)
    lines = differences(wanted, here)
    same = len(wanted) - sum(line.split(":")[0] in wanted for line in lines)
    print(f"{same} of {len(wanted)} packages as in {lock.name}")
    if advisory_file:
        found = advisories(Path(advisory_file), here)
        print(f"{len(found)} of {len(records(Path(advisory_file)))} advisories in {Path(advisory_file).name} match")
        lines += found
    else:
        print("not checked against advisories: ADVISORIES=FILE, an OSV export")
    for line in lines:
        print(line)
    return 1 if lines else 0


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("--advisories", metavar="FILE")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="of `pip install --dry-run --report FILE`, made before"
    )
    parser.add_argument("--lock", type=Path, default=LOCK)
    given = parser.parse_args(words)
    return write(given.lock, given.report) if given.what == "write" else check(given.lock, given.advisories)


if __name__ == "__main__":
    raise SystemExit(main())
