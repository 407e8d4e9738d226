"""WebDataset shards: find them, read them, write them; `index` makes what energon needs to open them.

A shard is a tar of samples, a sample is consecutive members with one base name. Its members are the files of the tar and the links
to them; nothing outside the tar is ever read for it.
"""

import io
import json
import logging
import os
import re
import secrets
import shlex
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from aimv2.data.passed import BESIDE, HEIF, HEIF_READ, KINDS, LINKS, PassedOver, kind_of_file
from aimv2.data.shards.tars import body, is_tar, open_tar, read_body, tars_in, why_unreadable
from aimv2.errors import UsageError
from aimv2.io import POINTER, is_pointer, matching, parse_json

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp"),
    *("bmp", "gif", "tif", "tiff", "jpe", "jfif", "avif", "jp2", "ppm", "pgm"),
    *(HEIF if HEIF_READ else ()),
)
TEXTS = ("txt", "caption")
CAPTION_KEYS = ("caption", "text", "description", "prompt")  # of KEY.json, where it has no ``captions``
# as programs write that there is no value
NO_VALUE = frozenset(("", "nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "#N/A", "N/A", "n/a", "-1"))
MANIFEST = "aimv2.json"
MANIFEST_FORMAT = "aimv2 shards 1"

Split = Literal["train", "val", "test", "probe-test"]
Parts = dict[str, bytes]  # extension without dot, lower case -> content

# As in energon (flavors/webdataset/config.py): the two must group members into the same samples.
_SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
NUMBERED = re.compile(r"\d+\.\w+$")  # KEY.1.jpg: a further image of a conversation
_META_NAME = re.compile(r"__[^/]*__($|/)")
_SPLIT_TAR = re.compile(r"^(train|val|test)-")

# ---- find ----


def find_shards(source: str | Path, split: Split, *, option: str = "data.train") -> list[Path]:
    """The tars of a split of a source, sorted by path.

    Where a folder has ``train-*``, ``val-*`` or ``test-*``, ``train`` is the first, ``val`` the second
    else the third, ``test`` and ``probe-test`` the third else the second. In a folder without such names
    every tar is training data. A glob, a brace pattern or one tar is exactly those tars, whatever the split.

    Args:
        option: the option that an error names.

    Raises:
        UsageError: nothing there, or no tar among what is there.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return _matching_tars(source, option)
    groups = split_shards(folder, option=option)
    if split == "train":
        return groups["train"]
    first, second = ("val", "test") if split == "val" else ("test", "val")
    return groups[first] or groups[second]


def split_shards(folder: Path, *, option: str = "data.train") -> dict[str, list[Path]]:
    """All tars of a folder by the split that their name states: keys train, val, test.

    Raises:
        UsageError: the folder holds no tar.
    """
    tars = tars_in(folder)
    if not tars:
        raise _no_tar(folder, option)
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for path in tars:
        if match := _SPLIT_TAR.match(path.name):
            groups[match[1]].append(path)
    if not any(groups.values()):
        groups["train"] = tars
    return groups


def _matching_tars(source: str | Path, option: str) -> list[Path]:
    pattern = os.path.expanduser(str(source))
    if Path(pattern).is_file():
        if is_pointer(Path(pattern)):
            raise UsageError(f"{option}: {source} is {POINTER}", code="unreadable")
        if not tarfile.is_tarfile(pattern):
            raise UsageError(f"{option}: {source} is not a tar of samples; {_how_to_import(source)}")
        return [Path(pattern)]
    found: set[Path] = set()
    for part, is_glob, paths in matching(pattern):
        found.update(path for path in paths if is_tar(path.name) or not is_glob)
        if not paths and not is_glob:
            raise UsageError(
                f"{option}: {part} does not exist; expected a folder, a glob, a brace pattern or one tar of"
                " WebDataset samples",
                code="not-found",
            )
    if not found:
        raise UsageError(f"{option}: no .tar matches {source}")
    return sorted(found)


def _no_tar(folder: Path, option: str) -> UsageError:
    names = [path for path in sorted(folder.iterdir())[:10_000] if not path.name.startswith(".")]
    inner = [path for sub in names[:100] if sub.is_dir() for path in sorted(sub.iterdir())[:1000]]
    if any(is_tar(path.name) for path in inner):
        return UsageError(f"{option}: no .tar in {folder} itself; for those in its folders give '{folder}/**/*.tar'")
    kinds = {path.suffix.lower().lstrip(".") for path in [*names, *inner]}
    importable = {*IMAGE_EXTENSIONS, "csv", "tsv", "jsonl", "parquet", "arrow"}
    if kinds & importable:
        return UsageError(f"{option}: {folder} is not WebDataset shards yet; {_how_to_import(folder)}")
    return UsageError(f"{option}: no .tar in {folder}")


def _how_to_import(source: str | Path) -> str:
    return f"make shards of it with `aimv2 data import {shlex.quote(str(source))} OUT` and give OUT"


# ---- read ----


@dataclass
class ShardScan:
    """What the headers of a tar hold.

    Attributes:
        keys: Base name of each whole sample.
        offsets: Byte offset of each sample's first header (or its extended header), and the end of the last.
        cut: Why reading stopped before the end of the archive, or "".
        cut_key: Base name of the member where it stopped, if known: earlier samples are whole.
        passed: Members that belong to no sample, or that nothing reads.
    """

    keys: list[str] = field(default_factory=list)
    offsets: array = field(default_factory=lambda: array("Q"))
    cut: str = ""
    cut_key: str | None = None
    passed: PassedOver = field(default_factory=PassedOver)

    def cuts(self, key: str | None) -> bool:
        """Whether the last sample read, of this key, may lack members."""
        return bool(self.cut) and self.cut_key in (None, key)


def scan_shard(path: Path, keep_keys: bool = True, met: Callable[[tarfile.TarInfo], None] | None = None) -> ShardScan:
    """Read a tar's headers, skipping over the bodies; ``met`` is called with each. A sample that the file's end cuts is left out.

    An unsorted tar, where images and captions of a sample lie apart, has no whole sample; ``cut`` says so.
    """
    scan, last_name, end = ShardScan(), None, 0
    pictured, apart, extensions = dict[int, bool](), 0, dict[str, str]()

    def lies_apart() -> bool:
        """Whether the sample that ends here has its image, or the rest, elsewhere."""
        key, here = hash(last_name), any(map(_is_image, extensions))
        before = pictured.setdefault(key, here)
        return before != here

    for member, name, extension in _members(path, scan):
        if met is not None:
            met(member)
        if name != last_name:
            apart += last_name is not None and lies_apart()
            scan.offsets.append(member.offset)
            if keep_keys:
                scan.keys.append(name)
            _count_beside(scan.passed, extensions)
            last_name, extensions = name, {}
        _count_unread(scan.passed, member.name, extension.lower(), extensions)
        end = member.offset_data + (0 if member.islnk() or member.issym() else (member.size + 511) // 512 * 512)
    _count_beside(scan.passed, extensions)
    if last_name is not None and apart + lies_apart():
        why = f"unsorted (the members of {apart + lies_apart():,} samples lie apart)"
        sort = f"mkdir t && tar -xf {path.name} -C t && tar --sort=name -cf sorted.tar -C t ."
        return ShardScan(cut=f"{why}; sort it: {sort}", passed=scan.passed)
    if len(scan.offsets) and scan.cuts(last_name):
        end = scan.offsets.pop()  # where the cut sample starts, the whole ones end
        del scan.keys[len(scan.offsets) :]
    if len(scan.offsets):
        scan.offsets.append(end)
    return scan


def _count_beside(passed: PassedOver, members: dict[str, str]) -> None:
    """Notes members of a sample ({extension: name}) that give way to another of their kind."""
    if len(members) < 2:
        return
    for kinds in (IMAGE_EXTENSIONS, TEXTS, ("json",), ("cls",)):
        found = [name for name in members if name.rpartition(".")[2] in kinds and not NUMBERED.match(name)]
        if len(found) > 1:
            read = texts_of_sample(members) if kinds == TEXTS else parts_of_kind(members, *kinds)
            undecided = kinds == TEXTS or (
                kinds == IMAGE_EXTENSIONS and read[0] not in kinds
            )  # all are, or the sample none
            passed.add(BESIDE, *(members[name] for name in found if name not in (read if undecided else read[:1])))


def _count_unread(passed: PassedOver, member: str, extension: str, extensions: dict[str, str]) -> None:
    """Notes a member of a sample that nothing reads; ``extensions`` are those of the sample so far."""
    last = extension.rpartition(".")[2]
    if extension in extensions:
        passed.add("members that come twice in a sample: the last counts", member)
    elif last in KINDS:
        passed.add(KINDS[last], member)
    elif last not in (*TEXTS, "json", "cls") and not _is_image(extension):
        passed.add("members of other kinds", member)
    extensions[extension] = member


def read_samples(tar: Path) -> Iterator[tuple[str, Parts]]:
    """All whole samples of a tar, in order, as (key, {extension: content}); extensions in lower case.

    A tar that is cut at its end gives what is whole, and a logged warning; one that can't be opened gives the warning only.
    """
    scan, key, parts = ShardScan(), None, dict[str, bytes]()
    try:
        opened = open_tar(tar)
    except OSError as error:
        log.warning("%s: %s", tar, why_unreadable(tar, error))
        return
    with opened as file:
        for member, name, extension in _members(tar, scan):
            if name != key:
                if key is not None:
                    yield key, parts
                key, parts = name, {}
            parts[extension.lower()] = read_body(file, tar, member)
    if scan.cut:
        log.warning("%s: %s; its whole samples are used", tar, scan.cut)
    if key is not None and not scan.cuts(key):
        yield key, parts


def read_sample(tar: Path, start: int, end: int) -> Parts:
    """The members of one sample by its offsets from `scan_shard`."""
    parts = dict[str, bytes]()
    with open_tar(tar) as file:
        file.seek(start)
        with tarfile.open(fileobj=io.BytesIO(file.read(end - start)), mode="r:") as archive:
            for member in archive:
                member.offset_data += start
                if (named := _sample_name(member)) and body(tar, member) is not None:
                    parts[named[1].lower()] = read_body(file, tar, member)
    return parts


# ---- the parts of a sample ----


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def parts_of_kind(parts: Mapping[str, object], *kinds: str) -> list[str]:
    """The extensions of a sample that are of a kind: ``jpg`` itself, else those that end so, such as ``input.jpg``."""
    return [kind for kind in kinds if kind in parts] or [name for name in parts if name.rpartition(".")[2] in kinds]


def texts_of_sample(parts: Mapping[str, object]) -> list[str]:
    """The extensions of a sample's captions: ``txt`` or those that end so, else ``caption`` likewise."""
    return parts_of_kind(parts, TEXTS[0]) or parts_of_kind(parts, TEXTS[1])


def image_of(parts: Parts) -> tuple[str, bytes] | None:
    """(extension, content) of a sample's image, or None: there is none, or there are several and none is plainly it."""
    found = parts_of_kind(parts, *IMAGE_EXTENSIONS)
    if len(found) > 1 and found[0] not in IMAGE_EXTENSIONS:
        return None
    return (found[0].rpartition(".")[2], parts[found[0]]) if found else None


def why_no_image(parts: Parts) -> str:
    """Why :func:`image_of` finds none, in words."""
    if several := parts_of_kind(parts, *IMAGE_EXTENSIONS):
        return f"several images in its sample ({', '.join(several[:3])}); one of them is expected, named KEY.jpg"
    unread = next((KINDS[last] for name in parts if (last := name.rpartition(".")[2]) in KINDS), None)
    return "no image in its sample" + (f", but one of the {unread}" if unread else "")


def label_of(sample: dict[str, bytes]) -> int:
    """The class of a sample (KEY.cls), -1 where it has none."""
    text = class_number(text_of(sample, "cls"))
    return int(text) if text else -1


def class_number(value: Any) -> str | None:
    """The number of a class as digits: of a whole number from 0, or its text; "1.0" too, as pandas writes it; None of all else."""
    if isinstance(value, bool):
        value = int(value)
    found = re.fullmatch(r"([0-9]{1,18})(\.0+)?", str(value)) if isinstance(value, int | float | str) else None
    return found[1] if found else None


def _decoded(raw: bytes, member: str) -> str:
    from aimv2.data.text.encoding import decode_text

    return decode_text(raw, member, "texts in shards")


def text_of(parts: Parts, kind: str) -> str:
    """The text of a sample's first member of a kind, stripped; "" where it has none, or none that is text."""
    found = parts_of_kind(parts, kind)
    try:
        return _decoded(parts[found[0]], f"KEY.{kind}").strip() if found else ""
    except UnicodeError:
        return ""


def captions_of(parts: Parts, keys: tuple[str, ...] | None = None) -> dict[str, list[str]]:
    """Captions of a sample by field; {} where it has none, or none that is text.

    ``captions`` of KEY.json (ours: {field: [...]}, or one list), else KEY.txt, else KEY.caption, each of which is one caption
    however many lines it has, else a known key of KEY.json (img2dataset's ``caption``, Takeout's ``description``). What has no
    field of its own is field ``caption``; of several texts (KEY.short.txt, KEY.long.txt) each is a field of its own.

    Args:
        parts: members of the sample.
        keys: of KEY.json, that hold captions, or ``txt``; several are fields. None: as above.
    """
    about = json_of(parts)
    try:
        texts = {name: _decoded(parts[name], "KEY.txt") for name in texts_of_sample(parts)}
    except UnicodeError:
        from aimv2.data.text.encoding import NOT_TEXT, say_once

        say_once(f"a text in shards {NOT_TEXT}; such captions are left out")
        return {}
    if keys is not None:
        known = texts | {name.lower(): value for name, value in about.items()}
        return captions_by_field(known, {key.lower(): key if len(keys) > 1 else "caption" for key in keys})
    several = len(texts) > 1
    captions = clean_captions(about.get("captions"))
    captions = captions or clean_captions(
        {name.rpartition(".")[0] if several else "caption": text for name, text in texts.items()}
    )
    return captions or clean_captions(next((about[key] for key in CAPTION_KEYS if about.get(key)), None))


def json_of(parts: Parts) -> dict[str, Any]:
    """KEY.json of a sample; {} where it is absent, broken or no object."""
    try:
        raw = next((parts[name] for name in parts_of_kind(parts, "json")), b"{}")
        about = parse_json(_decoded(raw, "KEY.json"))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def captions_by_field(row: dict[str, Any], fields: dict[str, str]) -> dict[str, list[str]]:
    """Captions of a row by {column: field}; a cell may be one caption, a list, or {field: captions}."""
    found: dict[str, list[str]] = {}
    for column, name in fields.items():
        value = row.get(column)
        value = (answers(value) or [None])[0] if _is_dialogue(value) else value
        fresh = clean_captions(value if isinstance(value, dict) else {name: value})
        found |= {f"{name}_{key}" if key in found else key: texts for key, texts in fresh.items()}
    return found


def _is_dialogue(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not {"from", "role"}.isdisjoint(value[0])
    )


def answers(turns: Any) -> list[Any]:
    """What the model says in a dialogue: LLaVA's {from: gpt, value}, or {role: assistant, content}, text or pieces of it."""
    said = []
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and {turn.get("from"), turn.get("role")} & {"gpt", "assistant"}:
            text = turn.get("value", turn.get("content"))
            pieces = (
                [piece.get("text") for piece in text if isinstance(piece, dict)] if isinstance(text, list) else [text]
            )
            said.append(" ".join(piece for piece in pieces if isinstance(piece, str)) or None)
    return said


def clean_captions(value: Any) -> dict[str, list[str]]:
    """A caption, a list of them, or {field: either} as {field: [caption, ...]}; stripped, none of :data:`NO_VALUE`."""
    fields = value if isinstance(value, dict) else {"caption": value}
    clean = dict[str, list[str]]()
    for name, texts in fields.items():
        listed = [texts] if isinstance(texts, str) else texts if isinstance(texts, list | tuple) else []
        if kept := [text.strip() for text in listed if isinstance(text, str) and text.strip() not in NO_VALUE]:
            clean[str(name)] = kept
    return clean


def _members(path: Path, scan: ShardScan) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Whole members of samples with base name and extension; ``scan.cut`` is what stopped it early."""
    try:
        with open_tar(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = os.fstat(file.fileno()).st_size
            while (member := archive.next()) is not None:
                # tarfile keeps every header, which for a million is a gigabyte
                archive.members = []  # type: ignore[attr-defined]
                named, is_link = _sample_name(member), member.islnk() or member.issym()
                if not is_link and member.offset_data + member.size > size:
                    scan.cut = f"cut inside {member.name}"
                    scan.cut_key = named[0] if named else None
                    return
                if named and (not is_link or body(path, member) is not None):
                    yield member, *named
                elif not member.isdir():
                    scan.passed.add(_why_passed(member), member.name)
            # tarfile takes a broken header for the end of the archive
            file.seek(archive.offset)
            if file.read(512).strip(b"\0"):
                scan.cut = f"broken header at byte {archive.offset:,}"
    except (tarfile.TarError, EOFError) as error:
        scan.cut = f"broken or not a plain tar ({error})"


def _sample_name(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Base name and extension of a member that may belong to a sample: a file, or a link."""
    if member.isdir() or member.isdev() or _META_NAME.match(member.name):
        return None
    match = _SAMPLE_NAME.match(member.name)
    return (match[1], match[2]) if match else None


def _why_passed(member: tarfile.TarInfo) -> str:
    """What to call a member of no sample."""
    if member.isdev():
        return "devices and pipes"
    if member.islnk() or member.issym():
        return f"{LINKS}, or links out of the tar"
    if _META_NAME.match(member.name):
        return "metadata (__NAME__)"
    last = member.name.rpartition("/")[2]
    return kind_of_file(last) if last.startswith(".") else "members without an extension"


# ---- write ----


def safe_key(name: str) -> str:
    """A WebDataset key from an image's name: no extension, dot, slash or leading underscores; short."""
    path = PurePosixPath(name.replace("\\", "/"))
    known = path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
    stem = str(path.with_suffix("")) if known else str(path)
    key = re.sub(r"[^\w\-]+", "_", stem).lstrip("_") or "image"
    if len(key.encode()) > 80:
        # Longer names need extended tar headers; the digest keeps cut keys apart.
        key = (
            key.encode()[:64].decode("utf-8", "ignore")
            + "-"
            + sha1(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        )
    return key


def write_shard(path: Path, samples: Iterable[tuple[str, Parts]]) -> int:
    """Write a tar of (key, {extension: content}) samples, whole or not at all; returns how many.

    The same samples give the same bytes.
    """
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    count = 0
    try:
        with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as tar:
            for key, parts in samples:
                count += 1
                for extension, content in parts.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")  # uid, gid and time 0, mode 0644
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count


def write_manifest(out: Path, counts: dict[str, int], **about: Any) -> None:
    """Mark a folder as finished shards of ours: ``aimv2.json`` with samples per split and where they are from."""
    aside = out / f".{MANIFEST}.tmp-{os.getpid()}"
    text = json.dumps({"format": MANIFEST_FORMAT, "counts": counts, **about}, indent=2, ensure_ascii=False)
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, out / MANIFEST)
