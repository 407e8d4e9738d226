"""Small files that are either whole or absent; lines for the user; this machine's memory."""

import contextlib
import errno
import glob
import json
import os
import stat
import sys
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from aimv2.errors import visible

POINTER = "a Git LFS pointer in place of the file; run `git lfs pull` where it was cloned"


def is_pointer(data: bytes | Path) -> bool:
    """Whether a file, or the start of one, is a pointer of Git LFS."""
    if isinstance(data, Path):
        try:
            with open_file(data) as file:
                data = file.read(64)
        except OSError:
            return False
    return data.startswith(b"version https://git-lfs.github.com/spec/")


LARGEST = 2**31  # bytes of a file of others that is read whole
SETTINGS = 2**28  # bytes of one of settings or of a tokenizer; the largest of known tokenizers has 34 MB


def open_file(path: Path) -> BufferedReader:
    """A regular file, open. A pipe, a device or a socket under its name is not read, nor waited for.

    Raises:
        OSError: it can't be read, or is no regular file.
        ValueError: a name that no file can have.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "no regular file, but a pipe, a device or a socket", str(path))


def regular(path: Path, most: int = 1 << 62) -> Path:
    """The path itself, of a regular file; for libraries that open a file by its name. Raises as :func:`read_file`."""
    with open_file(path) as file:
        _check_size(file, path, most)
    return path


def read_file(path: Path, most: int = LARGEST) -> bytes:
    """The content of a regular file. Raises as :func:`open_file`, and OSError where it is larger than ``most`` bytes."""
    with open_file(path) as file:
        _check_size(file, path, most)
        return file.read()


def _check_size(file: BufferedReader, path: Path, most: int) -> None:
    if (size := os.fstat(file.fileno()).st_size) > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes, of {most:,} at most", str(path))


def write_aside(path: Path, text: str) -> None:
    """Writes ``text`` next to ``path`` and renames it: a reader never sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")  # another process may write the same file
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """JSON that somebody else may have written.

    Raises:
        UnicodeDecodeError: bytes that are no text.
        json.JSONDecodeError: everything else, nested too deep and numbers of thousands of digits included.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", "", 0) from None
    except (json.JSONDecodeError, UnicodeError):
        raise
    except ValueError:
        raise json.JSONDecodeError("a number of too many digits", "", 0) from None


def parse_yaml(text: str, look: Callable[[Any], object] = lambda node: None) -> Any:
    """YAML that somebody else may have written: plain values, at most 10 MB, 100 deep, 1 million values with aliases followed.

    Args:
        text: one document.
        look: called with its root node, once its limits are known to hold; may raise YAMLError.

    Raises:
        yaml.YAMLError: anything else.
    """
    import yaml

    if len(text) > 10_000_000:
        raise yaml.YAMLError("more than 10 MB")
    sizes = dict[yaml.Node, int]()

    def size(node: yaml.Node, depth: int) -> int:
        if depth > 100:
            raise yaml.YAMLError("nested more than 100 deep, or an alias of itself")
        if node not in sizes:
            inner = node.value if isinstance(node.value, list) else []
            pairs = [one for each in inner for one in (each if isinstance(each, tuple) else (each,))]
            sizes[node] = 1 + sum(size(one, depth + 1) for one in pairs)
        if sizes[node] > 1_000_000:
            raise yaml.YAMLError("aliases that stand for more than a million values")
        return sizes[node]

    loader = yaml.SafeLoader(text)
    try:
        if (node := loader.get_single_node()) is None:
            return None
        size(node, 0)
        look(node)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # 2020-13-45, a number of thousands of digits
        raise yaml.YAMLError(f"a value that can't be read: {error}") from None
    finally:
        loader.dispose()


def is_first() -> bool:
    """Whether this process is the first rank, or one without others: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Prints a line for the user on standard error, from the first rank; a full disk there ends no command."""
    if is_first():
        with contextlib.suppress(OSError):
            print(visible(line), file=sys.stderr, flush=True)


def machine_memory() -> tuple[float, float | None]:
    """Total memory in GB, within the container's limit, and free memory if known."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return total / 1e9, None if free is None else min(free, total) / 1e9


def matching(pattern: str) -> list[tuple[str, bool, list[Path]]]:
    """(path or glob, whether it is a glob, what matches it, sorted) for each alternative in the braces of a pattern.

    A folder that is there is no pattern, whatever marks its name has.
    """
    path = Path(pattern).expanduser()
    base = next((folder for folder in path.parents if folder.is_dir()), Path())
    rest = str(path.relative_to(base))
    parts = [rest]
    if "{" in rest:
        import braceexpand

        parts = list(braceexpand.braceexpand(rest))
    found = ([*glob.iglob(os.path.join(glob.escape(str(base)), part), recursive=True)] for part in parts)
    return [(str(base / part), glob.has_magic(part), sorted(map(Path, names))) for part, names in zip(parts, found)]
