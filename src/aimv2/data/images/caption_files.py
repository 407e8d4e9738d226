"""Files next to images that may hold their captions, whether or not they can be read as captions."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from aimv2.data.images.splits import SPLITS
from aimv2.data.shards.format import IMAGE_EXTENSIONS
from aimv2.io import open_file, parse_json, read_file

# not text, so not looked into: tables, archives of one file, databases, documents, arrays
CLOSED = (
    ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".feather", ".sqlite", ".sqlite3", ".db", ".lmdb", ".mdb", ".gz", ".bz2",
    ".xz", ".zst", ".docx", ".doc", ".odt", ".rtf", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".mat",
)  # fmt: skip
SYSTEM = ("thumbs.db", "desktop.ini")
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")  # where a bare number may well be an image's name
STRUCTURE = ("image", "images", "img", "imgs", "jpegimages")  # folders that hold a data set's images: names of no class
READ = 1 << 18  # bytes of a file that are looked at
SHOWN = 3
_SAYS_SO = re.compile(r"caption|prompt|descri|annotation|metadata|sentence|(?:^|[^a-z])(?:alt|text)s?(?:[^a-z]|$)")
_IMAGE = re.compile(rf"\.(?:{'|'.join(IMAGE_EXTENSIONS)})(?![a-z0-9])")
_WORD = re.compile(r"[^\W\d_]{2,}|(?<!\w)[^\W\d_](?!\w)|[\U0001f000-\U0001faff]")  # not the x of 640x480
_PIECE = re.compile(r".{1,4000}(?:[,;\s}\]]|$)|.{1,4000}")  # of a line at once, cut between words: JSON may be one line
_CUT = re.compile(r"[^\w.\-]")
_FIELD = re.compile(r"[^,;|\t\"]+")  # between separators and quotes
_FIRST = re.compile(r"^\s*\S+")
_TAKEOUT = re.compile(r"(\.\w+)(?:\.(s[a-z-]*))?(\(\d+\))?\.json$")
TAKEOUT_CUT = 46  # characters of an image's name that the name of its JSON file keeps
_DIGEST = re.compile(r"\b[0-9a-f]{8,}\b")


class _Images:
    """Image names as others may write them: without folder, case-folded, with and without extension."""

    def __init__(self, images: Sequence[str]) -> None:
        self.names = {PurePosixPath(image).name.casefold() for image in images}
        self.stems = {_plain(PurePosixPath(name).stem) for name in self.names}
        parents = {str(PurePosixPath(image).parent).casefold() for image in images}
        self.words = {*SPLITS, *STRUCTURE, *_WORD.findall(" ".join(parents))}  # of a path


def may_hold_captions(root: Path, files: Sequence[str], images: Sequence[str]) -> list[str]:
    """The first few files that may be captions of the images.

    A file that is called so (captions, prompts, metadata, ...); one whose name begins with an image's (a sidecar); one that is no
    text; and a list that describes images: an image's file name in a list, or several names without their
    extensions, with words that are no checksum and no folder's name.

    Args:
        root: the folder.
        files: all files below it, images too; relative.
        images: the images among them.
    """
    own, known, found = _Images(images), set(images), list[str]()
    for file in files:
        path = PurePosixPath(file.casefold())
        if file in known or path.name in SYSTEM:
            continue
        called = _SAYS_SO.search(path.name) or path.suffix in CLOSED or _is_sidecar(path.name, own)
        if called or describes_images(root / file, own):
            found.append(file)
            if len(found) == SHOWN:
                break
    return found


def names_images(file: Path, images: Sequence[str]) -> bool:
    """Whether a text file describes the images."""
    return describes_images(file, _Images(images))


def _is_sidecar(name: str, own: _Images) -> bool:
    """``photo.caption``, ``photo.jpg.txt``, ``photo_caption.txt``: an image's name, and more."""
    ends = [found.start() for found in re.finditer(r"[._\-]", name)]
    return any(name[:at] in own.names or _plain(name[:at]) in own.stems for at in ends if at)


def describes_images(file: Path, own: _Images) -> bool:
    """See :func:`may_hold_captions`."""
    lists, named = file.suffix.lower() in LISTS, set[str]()
    few = min(3, (len(own.stems) + 1) // 2)
    for line in _lines(file):
        here, rest = _named(line, own, lists)
        if here and not own.words.issuperset(_WORD.findall(_DIGEST.sub(" ", _IMAGE.sub(" ", rest)))):
            named |= here
            if len(named) >= (1 if lists and here & own.names else few):
                return True
    return False


def _lines(file: Path) -> Iterator[str]:
    """A text file's beginning, folded in case, as it is and with its escapes undone; nothing where it is no text."""
    try:
        with open_file(file) as stream:
            head = stream.read(READ)
    except OSError:
        return
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        texts = [head.decode("utf-16", "replace")]  # as Excel writes it
    elif 4 * head.count(0) > len(head) > 1:
        texts = [head.decode("utf-16-le" if head[1] == 0 else "utf-16-be", "replace")]
    elif b"\0" in head:
        return
    else:
        texts = [head.decode("utf-8", "replace")]
        if "\ufffd" in texts[0]:
            texts.append(head.decode("cp1252", "replace"))
    for text in texts:
        for line in (part for whole in text.casefold().splitlines() for part in _PIECE.findall(whole)):
            yield line
            if "%" not in line and "\\" not in line:
                continue
            plain = re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), line).replace("\\/", "/")
            if (plain := unquote(plain).casefold()) != line:
                yield plain


def _named(line: str, own: _Images, numbers: bool) -> tuple[set[str], str]:
    """The images that a line names, by file name anywhere, or without extension as a whole field; and the rest of the line."""
    found, rest = set[str](), list(line)
    for end in _IMAGE.finditer(line):
        start = max(0, end.start() - 160)
        before = line[start : end.end()]
        for cut in (0, *(cut.end() for cut in _CUT.finditer(before))):
            if before[cut:] in own.names:
                found.add(before[cut:])
                rest[start + cut : end.end()] = " " * (len(before) - cut)
                break
    for field in (*_FIELD.finditer(line), *_FIRST.finditer(line)):
        stem = _plain(re.split(r"[/\\]", field[0].strip(" '\":[]{}"))[-1])
        if stem in own.stems and (numbers or not stem.isdigit()):
            found.add(stem)
            rest[field.start() : field.end()] = " " * len(field[0])
    return found, "".join(rest)


def _plain(stem: str) -> str:
    """A name without its extension; a number without its leading zeros."""
    return stem.lstrip("0") or "0" if stem.isdigit() else stem


def plain_record(file: str) -> str:
    """The name ``photo(1).jpg.json`` of a JSON file that Google Takeout calls ``photo.jpg.supplemental-metadata(1).json``, cut anywhere."""
    named = _TAKEOUT.search(file)
    if named is None or not "supplemental-metadata".startswith(named[2] or "") or not (named[2] or named[3]):
        return file
    return f"{file[: named.start()]}{named[3] or ''}{named[1]}.json"


def records_of(root: Path, files: Sequence[str], images: Sequence[str]) -> dict[str, str]:
    """{name of an image's JSON file in full: the file}; Takeout cuts long ones, and their ``title`` tells images apart."""
    began, found = defaultdict[str, list[str]](list), dict[str, str]()
    for image in images:
        if len(name := PurePosixPath(image).name) > TAKEOUT_CUT:
            began[image[: TAKEOUT_CUT - len(name)]].append(image)
    for file in files:
        if file.lower().endswith(".json"):
            full = plain_record(file)
            meant = began.get(full[: -len(".json")], [])
            if len(meant) > 1:
                title = _title(root / file)
                meant = [image for image in meant if PurePosixPath(image).name == title]
            found[f"{meant[0]}.json" if len(meant) == 1 else full] = file
    return found


def _title(file: Path) -> str:
    try:
        return str(parse_json(read_file(file))["title"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def are_classes(folders: Sequence[str]) -> bool:
    """Whether folders of images can be classes by their names: two or more, none that says "images"."""
    return len(folders) > 1 and not any(name.lower() in STRUCTURE for name in folders)


def are_splits(folders: Sequence[str]) -> bool:
    """Whether folders are parts of a data set by their names."""
    return all(name.lower() in SPLITS for name in folders)


def why_no_captions(others: list[str], refused: dict[str, str], folders: list[str]) -> str:
    """What was found instead of captions, why it was not taken, and the option that settles it."""
    shown = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
    settles = f"; --class-folders takes the names of the folders ({shown}) as captions" if are_classes(folders) else ""
    if others:
        more = f" (and {', '.join(others[1:])})" if others[1:] else ""
        return f"{others[0]}{more} may hold them and was not taken: {_why(others[0], refused)}{settles}"
    if folders:
        kind = "one folder is no class" if len(folders) == 1 else "their names are no classes"
        return (
            f"class folders without captions ({shown}): {kind}, and there is no captions file and no .txt, .caption or .json next to the "
            f"images; give --captions FILE, --class-folders to take the folders' names all the same, or --no-captions for images only"
        )
    return (
        "no captions file (CSV, TSV, JSONL, COCO JSON), no .txt, .caption or .json next to the images and no class folders; give "
        "--captions FILE, or --no-captions for images only (objective.targets=image trains on them)"
    )


def _why(file: str, refused: dict[str, str]) -> str:
    """Why a file was not taken for captions, and what to do about it."""
    path = PurePosixPath(file)
    if file in refused and path.suffix.lower() != ".txt":
        return f"{refused[file]}; or name another with --captions FILE"
    if path.suffix.lower() in LISTS and len(path.parts) > 1:
        return "it is in a folder below; name it with --captions FILE"
    if path.suffix.lower() == ".json":
        return "it is neither COCO captions nor a list of rows with an image and a caption; --captions FILE names one that is"
    return (
        "captions are read from NAME.txt, NAME.caption or NAME.json next to an image of that name, or from a CSV, TSV, JSONL or "
        "COCO JSON that --captions FILE names; rename or convert it"
    )
