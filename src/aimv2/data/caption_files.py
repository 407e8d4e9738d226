"""Files beside images that may hold their captions, whether or not they can be read as such."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

TABLES = (".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".feather", ".sqlite", ".sqlite3")  # binary: not looked into
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")  # where a bare number may well be an image's name
STRUCTURE = ("image", "images", "img", "imgs", "jpegimages")  # folders that hold a data set's images: names of no class
READ = 1 << 20  # bytes of a file that are looked at
SHOWN = 3


def may_hold_captions(root: Path, files: Sequence[str], images: Sequence[str]) -> list[str]:
    """The first few files that may be captions of the images.

    A file whose name is an image's with another ending (a sidecar), a table, and one that names images: an image's file
    name, or three images (all, where there are fewer) without their endings.

    Args:
        root: the folder.
        files: all files below it, images too; relative.
        images: the images among them.
    """
    names = {PurePosixPath(image).name for image in images}
    stems = {PurePosixPath(name).stem for name in names}
    known, found = set(images), list[str]()
    for file in files:
        if file in known:
            continue
        path = PurePosixPath(file)
        sidecar = path.stem in names or path.stem in stems
        if sidecar or path.suffix.lower() in TABLES or _names_images(root / file, names, stems):
            found.append(file)
            if len(found) == SHOWN:
                break
    return found


def _names_images(file: Path, names: set[str], stems: set[str]) -> bool:
    try:
        with open(file, "rb") as stream:
            head = stream.read(READ)
    except OSError:
        return False
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))  # UTF-16, as Excel writes it
    if b"\0" in head and not wide:
        return False
    text = head.decode(
        "utf-16" if wide else "latin-1", "replace"
    )  # file names are ASCII for the most part, in any of them
    words = set(re.split(r"""[\s,;|"'#\\/:<>\[\](){}=]+""", text))
    if words & names:
        return True
    if file.suffix.lower() not in LISTS:
        words = {word for word in words if not word.isdigit()}
    return len(words & stems) >= min(3, len(stems))


def are_classes(folders: Sequence[str]) -> bool:
    """Whether folders of images can be classes by their names: two or more, none that says "images"."""
    return len(folders) > 1 and not any(name.lower() in STRUCTURE for name in folders)


def why_no_captions(others: list[str], refused: dict[str, str], folders: list[str]) -> str:
    """What was found instead of captions, why it was not taken, and the option that settles it."""
    shown = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
    settles = f"; --class-folders takes the names of the folders ({shown}) as captions" if folders else ""
    if others:
        why = (
            refused.get(others[0])
            or "it is no .txt or .json beside an image of the same name and no CSV, TSV, JSONL or COCO JSON"
        )
        more = f" (and {', '.join(others[1:])})" if others[1:] else ""
        return f"{others[0]}{more} may hold them and was not taken: {why}; name it with --captions FILE, or convert it{settles}"
    if folders:
        kind = "one folder is no class" if len(folders) == 1 else "their names are no classes"
        return (
            f"class folders without captions ({shown}): {kind}, and there is no captions file and no .txt or .json beside the "
            f"images; give --captions FILE{settles}"
        )
    return (
        "no captions file (CSV, TSV, JSONL, COCO JSON), no .txt or .json beside the images and no class folders; give "
        "--captions FILE"
    )
