"""Files that are spoiled at random, under every reader: each must be read, or refused in one line.

    python tests/long/fuzz.py [--minutes 10] [--seed 0] [--targets NAMES] [--keep DIR]

Hypothesis draws what is done to one file of each reader's good ones (tests/fuzz_targets.py): bits, cuts, repeated and foreign pieces,
and in JSON, YAML and tars also values, keys and members. A process for each reader takes its turn; it has a limit of memory, and one
that does not answer is killed. What ends in anything but a reading or a line is kept with its traceback: put the file into
tests/fuzz_corpus/READER once it is mended. Prints a line for each reader and the totals; exits with 1 where anything was kept.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz_targets import TARGETS, try_spoiled

LONGEST = 30  # seconds that one input may take
MEMORY = 6 << 30  # bytes that reading one input may take, over what the process holds
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 10**400, -(2**70), 0.5, -1e308, 1e400, float("nan"), "", " ", "\x00", "\x1b[31m",
    "../../etc/passwd", "/dev/zero", "²", "9" * 5000, "a" * 100_000, "\ud800", "<image>", [], {}, [[]], [None], {"": None}, [1e400],
]  # fmt: skip
PIECES = [
    b"",
    b"\x00",
    b"\xff" * 8,
    b"\xff\xfe",
    b"\x00" * 512,
    b"[" * 3000,
    b'{"a":' * 20_000,
    b"9" * 5000,
    b"\n",
    b",",
    b'"',
    b"\\",
    b"&a [*a]",
]


class Hangs(BaseException):
    """An input took longer than LONGEST."""


# ---- what is done to a file ----


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """``content``, changed at one to four places."""
    for _ in range(draw(st.integers(1, 4))):
        kinds = (
            ["bits", "cut", "piece", "repeat", "swap", "number"] + ["member"] * (3 * is_tar(content)) + ["value"] * 6
        )
        kind = draw(st.sampled_from(kinds))
        changed = None
        if kind == "value":
            changed = draw(other_value(content))
        elif kind == "member":
            changed = draw(other_member(content))
        content = draw(other_bytes(content, kind)) if changed is None else changed
    return content


@st.composite
def other_bytes(draw: st.DrawFn, content: bytes, kind: str) -> bytes:
    """Changed as bytes, whatever they mean; near the head as often as elsewhere, since that is where sizes stand."""
    length = len(content)
    limit = draw(st.sampled_from([min(64, length), min(1024, length), length]))
    start = draw(st.integers(0, limit))
    if kind == "cut":
        return content[:start]
    if kind in ("piece", "value", "member"):
        drop = draw(st.sampled_from([0, 1, 4, 100]))
        return content[:start] + draw(st.sampled_from(PIECES)) + content[start + drop :]
    if kind == "repeat":
        size = draw(st.integers(0, 200))
        return content[: start + size] + content[start:]
    if kind == "swap":
        other, size = draw(st.integers(0, length)), draw(st.integers(1, 64))
        return content[:start] + content[other : other + size] + content[start + size :]
    if kind == "number":
        size, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["big", "little"]))
        value = draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
        return content[:start] + (value % 256**size).to_bytes(size, order) + content[start + size :]
    bits = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        if bits:
            bits[draw(st.integers(0, len(bits) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(bits)


@st.composite
def other_value(draw: st.DrawFn, content: bytes) -> bytes | None:
    """JSON, JSON lines or the head of safetensors with another value, key or length somewhere; None: it is none."""
    head, text, tail = b"", content, b""
    size = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and 8 + size <= len(content):
        text, tail = content[8 : 8 + size], content[8 + size :]
    lines = text.splitlines(keepends=True)
    if len(lines) > 1 and lines[0][:1] == b"{" and lines[0].rstrip()[-1:] == b"}":
        at = draw(st.integers(0, len(lines) - 1))
        head, text, tail = b"".join(lines[:at]), lines[at], b"".join(lines[at + 1 :])
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    places = list(walk(whole))
    if not places:
        return json.dumps(draw(st.sampled_from(VALUES))).encode()
    holder, key = draw(st.sampled_from(places))
    act = draw(st.sampled_from(["value", "value", "value", "gone", "name", "twice", "deep", "nudge"]))
    if act == "gone":
        del holder[key]
    elif act == "name" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["", "a", "__class__", "../x", "x" * 300]))] = holder.pop(key)
    elif act == "twice" and isinstance(holder, list):
        holder.append(holder[key])
    elif act == "deep":
        for _ in range(draw(st.sampled_from([1, 5, 400]))):
            holder[key] = [holder[key]]
    elif act == "nudge" and type(holder[key]) in (int, float):
        holder[key] = draw(st.sampled_from([holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1000]))
    else:
        holder[key] = draw(st.sampled_from(VALUES))
    done = json.dumps(whole).encode()
    if content[8:9] == b"{" and not head:
        return len(done).to_bytes(8, "little") + done + tail
    return head + done + (b"\n" if text.endswith(b"\n") else b"") + tail


def walk(value: Any) -> Any:
    """Every (holder, key) below a JSON value."""
    for key, inner in list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from walk(inner)


def is_tar(content: bytes) -> bool:
    return content[257:262] == b"ustar"


@st.composite
def other_member(draw: st.DrawFn, content: bytes) -> bytes | None:
    """A tar with a member of another content, name or kind; None: it can't be read."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = [(member, tar.extractfile(member).read() if member.isfile() else b"") for member in tar]  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return None
    if not members:
        return None
    at = draw(st.integers(0, len(members) - 1))
    member, inner = members[at]
    act = draw(st.sampled_from(["content", "content", "value", "name", "kind", "twice", "gone"]))
    stem = member.name.split(".")[0]
    if act == "content":
        inner = draw(other_bytes(inner, draw(st.sampled_from(["bits", "cut", "piece", "repeat", "swap", "number"]))))
    elif act == "value":
        inner = draw(other_value(inner)) or json.dumps(draw(st.sampled_from(VALUES))).encode()
    elif act == "name":
        names = [
            f"{stem}.__key__",
            f"{stem}.",
            ".jpg",
            f"{stem}.png",
            f"{stem}.cls",
            f"{stem}.json",
            f"{stem}.pyd",
            f"../{stem}.jpg",
            "x" * 90,
            "\x1b[2J.jpg",
        ]
        member.name = draw(st.sampled_from(names))
    elif act == "kind":
        member.type = draw(
            st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
        )
        member.linkname, inner = "/etc/passwd", b""
    members[at] = (member, inner)
    if act == "twice":
        members.append(members[at])
    elif act == "gone":
        del members[at]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for one, data in members:
            one.size = len(data)
            tar.addfile(one, io.BytesIO(data))
    return stream.getvalue()


# ---- one reader, in a process of its own ----


def child(target: str, home: Path, minutes: float, first: int) -> None:
    """Spoils and reads until its time is over; ``now`` holds the input that is being read, ``done.json`` the counts."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, on_alarm)
    good, end, counts = home / "good", time.monotonic() + 60 * minutes, Counter[str]()
    if not good.exists():
        good.mkdir(parents=True)
        TARGETS[target].make(good)
    files = [path.relative_to(good).as_posix() for path in TARGETS[target].files(good)]
    limit_memory()
    number = first

    def one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(files))
        content = data.draw(spoiled((good / name).read_bytes()))
        if time.monotonic() > end:
            return
        (home / "now").write_bytes(content)
        (home / "now.name").write_text(name)
        signal.alarm(LONGEST)
        try:
            counts["read" if try_spoiled(target, good, home / "work", name, content) else "refused"] += 1
        except (Exception, Hangs, SystemExit) as error:
            signal.alarm(0)
            counts["failed"] += 1
            keep(home, name, content, error)
        finally:
            signal.alarm(0)
        (home / "done.json").write_text(json.dumps(counts))

    how = settings(
        max_examples=50, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    while time.monotonic() < end:
        seed(number)(how(given(st.data())(one)))()
        number += 1


def limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, -1))


def on_alarm(*_: object) -> None:
    raise Hangs(f"no answer within {LONGEST} s")


def keep(home: Path, name: str, content: bytes, error: BaseException | str) -> None:
    """One file for each place in the code that failed."""
    if isinstance(error, str):
        found = re.findall(r'File "[^"]*aimv2/[^"]*", line \d+ in \w+', error)  # of faulthandler
        text, place = error, f"{error.splitlines()[0]} {found[0] if found else ''}"
    else:
        text = "".join(traceback.format_exception(error))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fuzz" not in frame.filename]
        place = f"{type(error).__name__} {frames[-1].filename}:{frames[-1].name}" if frames else text[-200:]
        ours = [frame for frame in frames if "aimv2" in frame.filename]
        place += f" {ours[-1].name}" if ours else ""
    where = home / "kept" / hashlib.sha256(place.encode()).hexdigest()[:10]
    if not where.exists():
        where.mkdir(parents=True)
        (where / Path(name).name).write_bytes(content)
        (where / "why.txt").write_text(f"{name}\n{text}")


# ---- all readers, one after the other ----


def watch(target: str, home: Path, minutes: float, first: int) -> Counter[str]:
    """A reader's turn; a process that dies or does not answer is noted, and another one goes on."""
    total, end = Counter[str](), time.monotonic() + 60 * minutes
    while (left := end - time.monotonic()) > 0:
        (home / "done.json").unlink(missing_ok=True)
        words = [
            sys.executable,
            __file__,
            "--child",
            target,
            "--keep",
            str(home),
            "--minutes",
            str(left / 60),
            "--seed",
            str(first),
        ]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                words, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        code = answered(process, home)
        total += Counter(json.loads(text) if (text := text_of(home / "done.json")) else {})
        if code == 0:
            break
        total["failed"] += 1
        why = "no answer" if code is None else f"exit code {code}"
        if not (home / "now").exists():
            raise SystemExit(f"{target}: {why} before the first input: {text_of(home / 'log')[-2000:]}")
        keep(
            home,
            text_of(home / "now.name"),
            (home / "now").read_bytes(),
            f"{why} of the process\n{text_of(home / 'log')[-3000:]}",
        )
        first += 1000
    return total


def answered(process: subprocess.Popen[bytes], home: Path) -> int | None:
    """The exit code; None: nothing was read for three times LONGEST, and it was killed."""
    while True:
        try:
            return process.wait(3 * LONGEST)
        except subprocess.TimeoutExpired:
            newest = max(
                (path.stat().st_mtime for path in (home / "now", home / "done.json") if path.exists()), default=0.0
            )
            if time.time() - newest > 3 * LONGEST:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None


def text_of(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--keep", type=Path, help="a folder for what failed; a new one without it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.keep, given.minutes, given.seed)
        return 0
    home, names, total = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-")), given.targets.split(","), Counter[str]()
    began = time.monotonic()
    for name in names:
        place = home / name
        place.mkdir(parents=True, exist_ok=True)
        counts = watch(name, place, given.minutes / len(names), 1_000_000 * given.seed)
        total += counts
        kept = sorted((place / "kept").glob("*")) if (place / "kept").exists() else []
        print(
            f"{name}: {counts['read']} read, {counts['refused']} refused, {counts['failed']} failed in {len(kept)} places",
            flush=True,
        )
        for one in kept:
            print(f"  {one}: {text_of(one / 'why.txt').strip().splitlines()[-1][:160]}")
    counts = f"{total['read']} read, {total['refused']} refused, {total['failed']} failed"
    inputs = total.total()
    print(f"{inputs} inputs, {60 * inputs / (time.monotonic() - began):.0f} a minute: {counts}")
    if given.keep is None and not total["failed"]:
        shutil.rmtree(home)
    return int(total["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
