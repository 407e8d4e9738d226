"""Paths as users write them: ``~`` and ``~user`` at their start; and the user's folder for what can be made again."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError

LIBRARIES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}


def from_home(given: Any, option: str) -> Any:
    """A path, or what may be one, with ``~`` or ``~user`` at its start replaced by that home folder; of a list each.

    Args:
        given: as the user wrote it; what is no text stays.
        option: that took it, for the error.

    Raises:
        UsageError: a user without a home folder, and no file of that very name.
    """
    if isinstance(given, list | tuple):
        return type(given)(from_home(one, option) for one in given)
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    if not isinstance(given, str) or not given.startswith("~"):
        return given
    path = os.path.expanduser(given)
    if not path.startswith("~"):
        return path
    if os.path.lexists(given):
        return os.path.join(os.curdir, given)  # nobody further down takes it for a home
    user = given.partition("/")[0]
    why = "HOME is not set and the user has no entry" if user == "~" else f"no user {user[1:]}"
    raise UsageError(f"{option} {given}: {user} is no home folder here ({why}); give the whole path", option=option)


# ---- caches ----


def cache_folder(part: str) -> Path:
    """The user's folder for what can be made again; see :func:`settle_caches`."""
    settle_caches()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).absolute() / "aimv2" / part


def settle_caches() -> None:
    """Points this process, its children and their libraries to a temporary cache where the user has no home that can be written.

    A cache that ``XDG_CACHE_HOME`` names is the user's choice and stays, as does a library's own variable.
    """
    own = os.path.expanduser("~/.cache")
    if os.environ.get("XDG_CACHE_HOME") or (can_hold(own) and can_hold(os.path.join(own, "aimv2", "index"))):
        return
    try:
        scratch = private_folder()
    except OSError:  # no folder at all can be written: what needs a cache says it
        return
    os.environ["XDG_CACHE_HOME"] = scratch
    if os.path.isdir(kept := os.path.join(own, "huggingface")):  # models that are there are still found
        os.environ.setdefault("HF_HOME", kept)
    for name, part in LIBRARIES.items():
        os.environ.setdefault(name, os.path.join(scratch, part))


def can_hold(folder: str) -> bool:
    """Whether a folder of an absolute path can be written, or made."""
    if not os.path.isabs(folder):  # a home that nobody knows
        return False
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK) and not _read_only(folder)


def private_folder() -> str:
    """A temporary folder of this user that no other can write to; the same one at each start where it can be."""
    import tempfile  # slow to import, and seldom needed

    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = os.path.join(tempfile.gettempdir(), f"aimv2-{user}")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        about = os.lstat(folder)
        if stat.S_ISDIR(about.st_mode) and about.st_uid == user and not about.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="aimv2-")


def _read_only(folder: str) -> bool:
    """Whether the file system is: to root all else looks writable."""
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
