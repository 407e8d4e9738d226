"""What people bring to `data import`: tars, tables, captions files, sidecars, class folders; each becomes a list of entries.

A source is listed without opening an image, in a stable order. :data:`FILE_FORMS` and :data:`FOLDER_FORMS` are the forms.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from aimv2.data.images.caption_files import (
    are_classes,
    are_splits,
    may_hold_captions,
    names_images,
    plain_record,
    records_of,
    why_no_captions,
)
from aimv2.data.images.catalogue import Columns, is_image, kind_of, list_files, stem, walk
from aimv2.data.images.class_names import NAMES_FILES, class_folders, names_beside, same_class, subfolders
from aimv2.data.images.entries import (
    UNREAD,
    Captions,
    FileReader,
    PlannedSource,
    Reject,
    SourceEntry,
    tar_entries,
)
from aimv2.data.images.names import ImageFinder, NameFinder, shared, taken, tie
from aimv2.data.images.splits import StatedSplits, stated_split
from aimv2.data.images.tables import LayoutOf, is_download_note, open_hub, open_tables, tables_in
from aimv2.data.images.text_tables import FIRST, caption_rows
from aimv2.data.passed import PassedOver, passed_lines
from aimv2.data.shards.format import find_shards, safe_key, split_shards
from aimv2.data.shards.tars import tars_in, why_unreadable
from aimv2.data.text.encoding import NOT_TEXT, open_text
from aimv2.errors import UsageError
from aimv2.io import parse_json, read_file

log = logging.getLogger(__name__)

EXPECTED = (
    "a folder (images with a captions file, .txt/.json sidecars or class folders; Parquet, Arrow or tars), "
    "one such file, or a hub data set id"
)

_CAPTIONS_JSON = re.compile(
    r'"(annotations|images|captions?|file_name)"\s*:|^\s*\[.*"(prompt"\s*:|(from|role)"\s*:\s*"(gpt|assistant)")',
    re.DOTALL,
)
TEMPLATE = "a photo of a {}."
# what a kind of source has no use for is refused; by the beginning of its name
READS = {
    "captions file": ("--captions", "--image-column", "--caption-column", "--split", "--image-root"),
    "sidecar captions": ("--caption-column",),
    "class folders": ("--class-folders", "--template"),
    "table": ("--image-column", "--caption-column", "--split", "--image-root"),
    "hub data set": ("--image-column", "--caption-column", "--split", "--image-root"),
    "WebDataset tars": ("--caption-column",),
    "images without captions": ("--no-captions",),
}


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    Attributes:
        captions: the captions file, relative to the folder or to the working folder; None finds it.
        columns: of tables and captions files.
        template: caption of a class-folder tree, ``{}`` standing for the class.
        split: of a hub data set, a folder of tables, or a captions file whose rows state one.
        skip: a folder inside the source that is not part of it (the output).
        class_folders: the user states that the folders are classes, whatever else lies there.
        image_root: a folder outside the source, below which tables and captions files may name images.
        no_captions: a folder's images are taken without captions, whatever else lies there.
        held_out: of a captions file whose rows state splits, take test, else val, else train.
        layout_of: what rows of tables become; see :func:`aimv2.data.images.tables.open_tables`.
    """

    captions: str | None = None
    columns: Columns = field(default_factory=Columns)
    template: str = TEMPLATE
    split: str | None = None
    skip: Path | None = None
    class_folders: bool = False
    image_root: Path | None = None
    no_captions: bool = False
    held_out: bool = False
    layout_of: LayoutOf | None = None


class ImageFolder:
    """A folder, and the files below it: listed once, when they are needed."""

    def __init__(self, root: Path, options: SourceOptions) -> None:
        self.root, self.options, self.passed = root, options, PassedOver()

    @cached_property
    def files(self) -> list[str]:
        """All files as relative POSIX paths, sorted; folders that can't be read are passed over."""
        return list_files(self.root, self.passed, self.options.skip)

    @cached_property
    def images(self) -> list[str]:
        """The images among the files."""
        return [name for name in self.files if is_image(name)]

    def no_image(self, words: str = f"; expected {EXPECTED}") -> UsageError:
        """That there is none, and what was passed over."""
        self.passed.add_files(self.files)
        passed = "; ".join(("", *passed_lines(self.passed.result())))
        return UsageError(f"SOURCE: no image in {self.root}{words}{passed}", code="not-found")

    def download_notes(self, count: bool) -> set[str]:
        """What img2dataset notes about its downloads; those that failed are passed over if they are to be counted."""
        notes = {name for name in self.files if re.fullmatch(r"(.*/)?\d+_stats\.json", name)}
        for name in sorted(notes) if count else ():
            try:
                counts = parse_json(read_file(self.root / name))
                failed = sum(counts.get(f"failed_to_{what}", 0) for what in ("download", "resize"))
            except (OSError, ValueError, AttributeError, TypeError):
                continue
            if failed:
                self.passed.add("images that img2dataset could not download", name, number=failed)
        return notes

    @cached_property
    def sidecars(self) -> dict[str, tuple[list[str], list[str]]]:
        """{image: the text files, the JSON files that are named after it}; several where it is not clear which."""
        texts = NameFinder(name for name in self.files if name.lower().endswith((".txt", ".caption")))
        records = records_of(self.root, self.files, self.images)
        finder, folders = NameFinder(records), {name.rpartition("/")[0] for name in (*texts.names, *records)}
        return {
            name: (texts.find(name), [records[found] for found in finder.find(name)])
            for name in self.images
            if name.rpartition("/")[0] in folders  # of a million images in class folders, none
        }

    @cached_property
    def captions_files(self) -> tuple[list[str], dict[str, str]]:
        """Files that read like captions of images, and why others that were tried do not."""
        sidecars = {*map(stem, self.images), *self.images}  # a.txt and a.jpg.txt
        sidecars.update(stem(name) for found in self.sidecars.values() for names in found for name in names)
        found, refused = [], dict[str, str]()
        for name in self.files:
            kind, here, path = name.rpartition(".")[2].lower(), "/" not in name, self.root / name
            if stem(name) in sidecars:
                continue
            if kind in ("csv", "tsv", "txt", "jsonl", "ndjson") and here:
                try:
                    rows = islice(caption_rows(path, self.options.columns), FIRST)
                    row = next((row for row in rows if not isinstance(row, Reject)), None)
                except UsageError as error:
                    refused[name] = str(error).removeprefix(f"{path}").lstrip(": ").removeprefix("captions missing: ")
                    continue
                if row is not None:
                    found.append(name)
            elif kind == "json" and (here or (name.startswith("annotations/") and "caption" in name.lower())):
                try:
                    with open_text(path) as file:
                        head = file.read(65536)
                except UnicodeError as error:
                    refused[name] = str(error).removeprefix(f"{path.name} ")
                    continue
                if _CAPTIONS_JSON.search(head):
                    found.append(name)
        return found, refused


# ---- forms of folders: each plans a folder, or returns None where the folder does not have the form ----


def _stated_classes(folder: ImageFolder) -> PlannedSource | None:
    return _class_source(folder) if folder.options.class_folders else None


def _images_only(folder: ImageFolder) -> PlannedSource | None:
    if not folder.options.no_captions:
        return None
    if not folder.images:
        raise folder.no_image()
    reader, none = FileReader(images_only=True), Captions()
    planned = [
        SourceEntry(safe_key(name), name, (str(folder.root / name),), none, None, {}, reader) for name in folder.images
    ]
    return PlannedSource("images without captions", planned, len(planned))


def _stated_captions(folder: ImageFolder) -> PlannedSource | None:
    captions = folder.options.captions
    if captions is None:
        return None
    file = next((path for path in (folder.root / captions, Path(captions).expanduser()) if path.is_file()), None)
    if file is None:
        raise UsageError(f"--captions {captions}: no such file, neither in {folder.root} nor here", code="not-found")
    return _captions_source(file, folder)


def _tar_folder(folder: ImageFolder) -> PlannedSource | None:
    """A folder of tars, all of one split.

    Raises:
        UsageError: tars of several splits, which would end up mixed.
    """
    if not tars_in(folder.root):
        return None
    groups = {split: tars for split, tars in split_shards(folder.root, option="SOURCE").items() if tars}
    if len(groups) > 1:
        raise UsageError(
            f"SOURCE: {folder.root} holds the splits {', '.join(groups)}; import one at a time, such as"
            f" '{folder.root}/{next(iter(groups))}-*.tar'"
        )
    planned = _tar_source(next(iter(groups.values())), folder.options)
    planned.used = {path.name for path in next(iter(groups.values()))}
    planned.own_images = True
    return planned


def _table_folder(folder: ImageFolder) -> PlannedSource | None:
    tables = tables_in(folder.root, folder.options.split)
    if not tables:
        return None
    options = folder.options
    planned = open_tables(tables, folder.root, options.columns, options.image_root, options.split, options.layout_of)
    if (split := options.split) is not None and not planned.split and not tables[0].name.startswith(split):
        raise UsageError(
            f"--split {split}: {folder.root} states no split; leave it out", option="--split", code="conflict"
        )
    planned.used = {path.relative_to(folder.root).as_posix() for path in tables}
    return planned


def _captions_folder(folder: ImageFolder) -> PlannedSource | None:
    """Images and one captions file.

    Raises:
        UsageError: several captions files to choose from.
    """
    candidates, refused = folder.captions_files
    several = f"{folder.root} has several captions files: "
    if len(candidates) > 1:
        raise UsageError(f"{several}{', '.join(candidates)}; choose one with --captions FILE", code="conflict")
    if not candidates:
        return None
    for name, why in refused.items():
        if why.startswith(NOT_TEXT) and names_images(folder.root / name, folder.images):
            raise UsageError(
                f"{several}{candidates[0]}, and {name}, which {why}; choose one with --captions FILE",
                code="conflict",
            )
    return _captions_source(folder.root / candidates[0], folder)


def _sidecar_folder(folder: ImageFolder) -> PlannedSource | None:
    """Captions in a text or JSON file next to each image."""
    planned, reader = list[SourceEntry | Reject](), FileReader(folder.options.columns.captions)
    if not (sides := [side for found in folder.sidecars.values() for side in chain(*found)]):
        return None
    several = shared(sides)
    for name in folder.images:
        found = folder.sidecars.get(name, ([], []))
        paths = [str(folder.root / side[0]) if len(side) == 1 else "" for side in found]
        if tied := next((side for side in found if len(side) > 1), None):
            planned.append(Reject(safe_key(name), name, tie(tied)))
        elif other := [s for s in chain(*found) if s in several and stem(plain_record(s)) not in (name, stem(name))]:
            planned.append(Reject(safe_key(name), name, taken(other[0])))
        elif any(paths):
            where = (str(folder.root / name), *paths)
            planned.append(SourceEntry(safe_key(name), name, where, UNREAD, None, UNREAD, reader))
        else:
            planned.append(Reject(safe_key(name), name, "no caption"))
    total = sum(isinstance(item, SourceEntry) for item in planned)
    return PlannedSource("sidecar captions", planned, total, used=set(sides))


def _class_folder(folder: ImageFolder) -> PlannedSource:
    """Class folders, where nothing else may hold captions.

    Raises:
        UsageError: files that may hold captions and are not understood, or no captions at all.
    """
    root, images = folder.root, folder.images
    if not images:
        raise folder.no_image()
    folders = sorted({name.partition("/")[0] for name in images if "/" in name})
    in_folders = all("/" in name for name in images)
    others = may_hold_captions(root, folder.files, images)
    if in_folders and not others and (are_classes(folders) or are_splits(folders)):
        return _class_source(folder)
    why = why_no_captions(others, folder.captions_files[1], folders if in_folders else [])
    raise UsageError(f"{root}: captions missing: {why}", code="missing")


FolderForm = Callable[[ImageFolder], PlannedSource | None]
FOLDER_FORMS: tuple[FolderForm, ...] = (
    _images_only,
    _stated_classes,
    _stated_captions,
    _tar_folder,
    _table_folder,
    _captions_folder,
    _sidecar_folder,
    _class_folder,
)
IMAGE_FORMS = tuple(form for form in FOLDER_FORMS if form not in (_tar_folder, _table_folder))


def open_folder(root: Path, options: SourceOptions, forms: tuple[FolderForm, ...] = FOLDER_FORMS) -> PlannedSource:
    """Plan a folder by the first of the forms that it has.

    Raises:
        UsageError: no image, no captions, several captions files to choose from, or files that may hold captions and are
            not understood.
    """
    folder = ImageFolder(root, options)
    planned = next(planned for form in forms if (planned := form(folder)))
    used = planned.used | folder.download_notes(count=planned.kind != "table")
    for name in folder.files:
        if name not in used and not is_image(name) and not is_download_note(root / name):
            folder.passed.add_files([name])
        elif planned.own_images and is_image(name):
            folder.passed.add("images next to tars", name)
    planned.passed.update(folder.passed)
    return planned


def _captions_source(file: Path, folder: ImageFolder) -> PlannedSource:
    """The images that a captions file names, looked up in the folder."""
    images, reader = folder.images, FileReader()
    named, torn = dict[str, tuple[Captions, dict[str, Any]]](), dict[str, str]()
    planned: list[SourceEntry | Reject] = []
    for row in caption_rows(file, folder.options.columns, folder.passed):
        if isinstance(row, Reject):
            planned.append(row)
            continue
        name, found, about = row
        captions, first = named.setdefault(name, ({}, about))
        if split := stated_split(about.get("split"), str(file)):
            before = stated_split(first.get("split"), str(file))
            first["split"] = first["split"] if before else about["split"]
            torn |= {name: f"stated as {before} and as {split}"} if before not in ("", split) else {}
        for column, texts in found.items():
            captions.setdefault(column, []).extend(texts)
    used = set[str]()
    cells = {name: about.get("split") for name, (_, about) in named.items()}
    splits = StatedSplits(str(file), cells.values(), folder.options.split, folder.options.held_out)
    paths = ImageFinder(folder.root, file, images, folder.options.image_root).find_all(named)
    for name, (captions, about) in named.items():
        path, reason = paths[name]
        used.add(path)
        if not splits.is_read(cells[name]) and name not in torn:
            continue
        reason = torn.get(name) or splits.refusal(cells[name]) or reason
        if reason or not captions:
            planned.append(Reject(safe_key(name), name, reason or "no caption"))
        else:
            planned.append(SourceEntry(safe_key(name), name, (path,), captions, None, about, reader))
    total = sum(isinstance(item, SourceEntry) for item in planned)
    if not images and not total:
        raise folder.no_image(f", and none where {file.name} points; expected its images there")
    planned += [Reject(safe_key(name), name, "no caption") for name in images if str(folder.root / name) not in used]
    used = {file.relative_to(folder.root).as_posix()} if file.is_relative_to(folder.root) else set[str]()
    val = {name for name, cell in cells.items() if splits.is_val(cell)}
    is_val = (lambda entry: entry.image in val) if val else None
    return PlannedSource(f"captions file {file.name}", planned, total, used=used, split=splits.wanted, is_val=is_val)


def _class_source(folder: ImageFolder) -> PlannedSource:
    root, images, reader = folder.root, folder.images, FileReader()
    if loose := [name for name in images if "/" not in name]:
        raise UsageError(
            f"--class-folders: {root / loose[0]} is in no class folder; move it, or leave the option out",
            code="conflict",
        )
    classes = sorted({name.split("/", 1)[0] for name in images})
    if not images:
        raise folder.no_image()
    if are_splits(classes):
        raise UsageError(f"SOURCE: {root} holds splits ({', '.join(classes)}), not classes; import each by itself")
    ordered, there = _ordered_classes(root, classes)
    labels = {there.get(folder, ""): (str(number), name) for number, (folder, name) in enumerate(ordered)}
    planned: list[SourceEntry | Reject] = []
    for name in images:
        kind = name.split("/", 1)[0]
        label, called = labels[kind]
        captions = {"caption": [folder.options.template.replace("{}", called.replace("_", " "))]}
        where = (str(root / name),)
        planned.append(SourceEntry(safe_key(name), name, where, captions, label, {"class": called}, reader))
    return PlannedSource("class folders", planned, len(planned), [name for _, name in ordered], used={*NAMES_FILES})


def _ordered_classes(root: Path, folders: list[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Classes in the order of their labels, and the folders of the source by those of its training images.

    ``ROOT/val`` has the labels of ``ROOT/train``; a folder without an image is a class only where a names file has it.
    """
    split, source = are_splits([root.resolve().name]), f"SOURCE: {root}"
    names = names_beside(root, *([root.resolve().parent] if split else []))
    train = next((path for path in (root.resolve().with_name("train"),) if split and path.is_dir()), root)
    train_folders = subfolders(train)
    if empty := [folder for folder in train_folders if next(walk(train, f"{folder}/"), None) is None]:
        log.warning("%s: the class folder %s has no image; give it images or remove it", source, train / empty[0])
        if names is None or len(names) != len(train_folders):
            train_folders = [folder for folder in train_folders if folder not in empty]
    return class_folders(train_folders, names, source), same_class(train_folders, folders, source)


# ---- forms of files ----


def _tar_source(tars: list[Path], options: SourceOptions) -> PlannedSource:
    """The samples of WebDataset tars, to shard them again."""

    passed = PassedOver()

    def items() -> Iterator[SourceEntry | Reject]:
        for tar in tars:
            try:
                scan, entries = tar_entries(tar, options.columns.captions)
            except OSError as error:
                yield Reject("", tar.name, why_unreadable(tar, error))
                continue
            passed.update(scan.passed)
            for entry in entries:
                yield entry._replace(image=f"{tar.name}/{entry.image}")
            if scan.cut:
                yield Reject("", tar.name, scan.cut)

    return PlannedSource("WebDataset tars", items(), passed=passed)


def _table_file(file: Path, options: SourceOptions) -> PlannedSource:
    return open_tables([file], file.parent, options.columns, options.image_root, options.split, options.layout_of)


def _captions_file(file: Path, options: SourceOptions) -> PlannedSource:
    folder = ImageFolder(file.parent, options)
    planned = _captions_source(file, folder)
    planned.passed.update(folder.passed)
    return planned


FILE_FORMS: dict[str, Callable[[Path, SourceOptions], PlannedSource]] = {
    **dict.fromkeys((".parquet", ".arrow"), _table_file),
    **dict.fromkeys((".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json"), _captions_file),
}


def open_source(source: str, options: SourceOptions) -> PlannedSource:
    """Find out what a source is and plan it.

    Raises:
        UsageError: it is nothing that can be imported.
    """
    planned = _planned(source, options)
    reads = next(words for kind, words in READS.items() if planned.kind.startswith(kind))
    in_folder = Path(source).expanduser().is_dir()
    given = {
        **{"--captions": options.captions, "--image-column": options.columns.image, "--split": options.split},
        **{"--caption-column": options.columns.captions, "--image-root": options.image_root},
        **{"--no-captions": options.no_captions or None},
        **{"--template": None if options.template == TEMPLATE else options.template},
    }
    for option, value in given.items():
        of_folder = option == "--captions" or (option == "--split" and planned.kind == "table" and not planned.split)
        if value is not None and (option not in reads or (of_folder and not in_folder)):
            shown = ",".join(value) if isinstance(value, tuple) else value
            raise UsageError(
                f"{option} {shown}: {source} is read as {planned.kind}, which has no use for it; leave it out",
                option=option,
                code="conflict",
            )
    return planned


def _planned(source: str, options: SourceOptions) -> PlannedSource:
    kind, path = kind_of(source)
    if options.class_folders and (options.captions is not None or kind != "folder"):
        other = f"--captions {options.captions}" if options.captions is not None else f"{source}, which is no folder"
        raise UsageError(f"--class-folders: got {other} too; a folder of class folders, and no captions file, expected")
    if kind == "folder":
        return open_folder(path, options)
    if kind == "tars":
        return _tar_source(find_shards(source, "train", option="SOURCE"), options)
    if kind == "hub":
        return open_hub(source, options.split, options.columns, options.image_root, options.layout_of)
    if kind == "missing":
        raise UsageError(f"SOURCE: {source} does not exist; expected {EXPECTED}", code="not-found")
    if form := FILE_FORMS.get(path.suffix.lower()):
        return form(path, options)
    raise UsageError(f"SOURCE: {source} is a {path.suffix.lower() or 'nameless'} file; expected {EXPECTED}")
