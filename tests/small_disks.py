"""A child process with a small disk of its own: a tmpfs in a mount namespace, which goes with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

START = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2"'


def in_small_disk(folder: Path, size: str, *words: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Runs Python where ``folder`` is a disk of ``size`` (``24m``); skipped where mounting is not permitted."""
    try:
        tried = subprocess.run([*START, MOUNT, "sh", size, str(folder)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if tried.returncode:
        pytest.skip(f"mounting in a namespace of one's own is not permitted: {tried.stderr.strip()}")
    script = f'{MOUNT} && shift 2 && exec "$@"'
    return subprocess.run(
        [*START, script, "sh", size, str(folder), sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
