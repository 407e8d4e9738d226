"""Boxes that people bring to `data import --boxes`: JSON of COCO, LVIS, Objects365, of referring expressions, scene graphs, ODVG.

As in :mod:`aimv2.data.images.sources` a source is listed without opening an image; :mod:`aimv2.data.images.box_folders` has the forms
that are folders. What is wrong with a whole file is refused; what is wrong with a picture or a box of it is counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aimv2.data.images.boxes import BOX_FAULTS, boxes_in, crowd_of, doubt_of_form, regions_of, scale_between
from aimv2.data.images.decode import ImageError, image_size
from aimv2.data.images.entries import Captions, Loaded, PlannedSource, Reader, Reject, RowError, SourceEntry
from aimv2.data.images.names import locate_inside
from aimv2.data.images.sources import SourceOptions
from aimv2.data.images.splits import StatedSplits
from aimv2.data.images.text_tables import read_json_lines
from aimv2.data.passed import PassedOver
from aimv2.data.shards.format import safe_key
from aimv2.data.text.encoding import open_text
from aimv2.errors import UsageError, first_line
from aimv2.io import parse_json, read_file

EXPECTED = (
    "COCO's JSON of instances (also LVIS, Objects365, MDETR's), JSON lines of ODVG, GQA's scene graphs, refs(...).p of RefCOCO next to "
    "instances.json, Flickr30k Entities (Annotations and Sentences), or YOLO's data.yaml"
)
FIRST = 1000  # pictures of which one has to be there
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError)  # what a record of another form raises
SCALED = "pictures of another size than annotated, their boxes scaled"
SAME_ID = "images left out with their annotations: two files have one id"
LISTED_TWICE = "images that are listed twice under one id"
SEVERAL_IDS = "images under a second id, whose boxes are put to those of the first"
FEDERATED = {"neg_category_ids": "negative", "not_exhaustive_category_ids": "not_exhaustive"}


@dataclass
class BoxedPicture:
    """A picture and what is known of it, as KEY.json has it (see :mod:`aimv2.data.images.boxes`).

    Attributes:
        names: what its file may be called, below the folder of the annotations or of ``--image-root``.
        about: ``objects``, ``phrases``, ``size`` (width, height) where it is stated, ...
        split: as the source states it; "" where it does not.
    """

    names: tuple[str, ...]
    about: dict[str, Any]
    split: str = ""
    captions: Captions = field(default_factory=dict)


@dataclass(frozen=True)
class BoxReader(Reader):
    """Reads a picture and holds its boxes against its size; ``where`` is (path, label file of YOLO or "", split)."""

    classes: tuple[str, ...] = ()  # of YOLO's labels
    images_only: bool = True  # captions are not needed

    def read(self, entry: SourceEntry) -> Loaded:
        path, labels, _ = entry.where
        try:
            data = read_file(Path(path))
        except OSError as error:
            raise RowError("image-missing", f"cannot be read: {error.strerror or error}") from None
        try:
            size = image_size(data)
        except ImageError as error:
            raise RowError("image-unreadable", str(error)) from None
        about = dict(entry.about)
        if labels:
            from aimv2.data.images.box_folders import yolo_objects

            about |= {"objects": yolo_objects(Path(labels), self.classes, size)}
        about.setdefault("size", list(size))
        scale = scale_between(about["size"], size)
        if scale is None:
            stated = " x ".join(f"{side:g}" for side in about["size"])
            raise RowError("other-size", f"annotated as {stated} pixels, the image has {size[0]} x {size[1]}")
        # boxes are held against the picture that they were drawn on
        _, faults = regions_of({**about, "size": None}, (int(about["size"][0]), int(about["size"][1])))
        found = [(BOX_FAULTS[code], entry.image) for code in faults]
        found += [(SCALED, entry.image)] * (list(about["size"]) != list(size))
        return Loaded(data, entry.captions, None, about, noted=tuple(found))


def open_boxes(source: str, options: SourceOptions) -> PlannedSource:
    """Find out which form the boxes of a source have, and plan its pictures.

    Raises:
        UsageError: no such source, no form of :data:`EXPECTED`, or one that can't be imported.
    """
    from aimv2.data.images import box_folders

    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError(f"SOURCE: {source} does not exist; {EXPECTED} expected", code="not-found")
    if path.is_dir():
        if (path / "Annotations").is_dir() and (path / "Sentences").is_dir():
            return box_folders.open_flickr(path, options)
        if options.captions is None and (tables := sorted(path.glob("**/*.parquet"))):
            return box_folders.open_ref_tables(tables, options)
        path = _file_in(path, options.captions)
    kind = path.suffix.lower()
    if kind == ".parquet":
        return box_folders.open_ref_tables([path], options)
    if kind in (".p", ".pkl", ".pickle"):
        return box_folders.open_refs(path, options)
    if kind in (".yaml", ".yml"):
        return box_folders.open_yolo(path, options)
    if kind in (".jsonl", ".ndjson"):
        return _open_odvg(path, options)
    if kind == ".json":
        return _open_json(path, options)
    raise UsageError(f"SOURCE: {source} holds no boxes that are known; {EXPECTED} expected", code="mismatch")


def _file_in(folder: Path, chosen: str | None) -> Path:
    """The annotations of a folder.

    Raises:
        UsageError: none, or several to choose from.
    """
    if chosen is not None:
        if not (file := folder / chosen).is_file():
            raise UsageError(f"--captions {chosen}: no such file in {folder}", code="not-found")
        return file
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = [name for name in names if name == "data.yaml"]
    found = found or [name for name in names if name.startswith("refs(") and name.endswith(".p")]
    found = found or [name for name in names if name.endswith((".json", ".jsonl", ".yaml"))]
    if len(found) != 1:
        several = (
            f"several files of annotations: {', '.join(found)}" if found else f"no annotations; {EXPECTED} expected"
        )
        raise UsageError(
            f"SOURCE: {folder} has {several}; give the file itself", code="conflict" if found else "missing"
        )
    return folder / found[0]


# ---- planning ----


def plan_boxes(
    kind: str,
    pictures: Iterable[BoxedPicture],
    home: Path,
    options: SourceOptions,
    manifest: dict[str, Any],
    reader: BoxReader | None = None,
) -> PlannedSource:
    """The pictures of a source as entries; those that are not there are rejected.

    Args:
        kind: of the source, for messages.
        pictures: all of them.
        home: folder of the annotations, where paths start unless ``--image-root`` is given.
        options: how the source is read.
        manifest: what aimv2.json gets, such as ``classes``.
        reader: of the pictures; then ``about`` has its label file under "labels".

    Raises:
        UsageError: boxes of another form, none of the first pictures there, a split that the source does not state.
    """
    pictures, reader = list(pictures), reader or BoxReader()
    _check_form(pictures)
    splits = StatedSplits(kind, {one.split for one in pictures}, options.split)
    items: list[SourceEntry | Reject] = []
    found, missed, taken = 0, "", dict[Path, str]()
    for one in pictures:
        if not splits.is_read(one.split):
            continue
        name, key = one.names[0], safe_key(one.names[0])
        path = next((path for name in one.names if (path := _located(name, home, options.image_root))), None)
        found, missed = found + (path is not None), missed or (name if path is None else "")
        if not found and len(items) == FIRST:
            break
        if path is None:
            items.append(Reject(key, name, "no such image", "image-missing"))
        elif taken.setdefault(path, name) != name:
            items.append(Reject(key, name, f"no such image; {path.name} is {taken[path]}", "image-missing"))
        elif why := splits.refusal(one.split):
            items.append(Reject(key, name, why, "split"))
        else:
            labels = one.about.pop("labels", "")
            items.append(SourceEntry(key, name, (str(path), labels, one.split), one.captions, None, one.about, reader))
    if not found:
        where = " or ".join(str(folder) for folder in (home, options.image_root) if folder)
        first = f" (the first: {missed})" if missed else ""
        raise UsageError(
            f"--image-root: none of the images that the annotations name is in {where}{first}; give --image-root DIR, the folder where"
            " their paths start",
            option="--image-root",
            code="not-found" if pictures else "missing",
        )
    has_val = any(splits.is_val(one.split) for one in pictures)
    is_val = (lambda entry: splits.is_val(entry.where[2])) if has_val else None
    return PlannedSource(kind, items, len(items), is_val=is_val, manifest=manifest)


def _located(name: str, home: Path, image_root: Path | None) -> Path | None:
    """The file of a name, None where there is none or several."""
    try:
        path = locate_inside(home, name, image_root)
    except ImageError:
        return None
    return path if os.path.isfile(path) else None


def _check_form(pictures: list[BoxedPicture]) -> None:
    """Refuse boxes that are xyxy or fractions; only sources that state the size of their pictures can be held to it.

    Raises:
        UsageError: see :func:`aimv2.data.images.boxes.doubt_of_form`.
    """
    boxes, sizes = list[Any](), list[Any]()
    for one in pictures:
        size = one.about.get("size")
        own = boxes_in(one.about) if size else []
        boxes += own
        sizes += [size] * len(own)
    if doubt := doubt_of_form(boxes, sizes):
        raise UsageError(
            f"SOURCE: {doubt}; COCO's boxes are [x, y, width, height] in pixels", option="SOURCE", code="mismatch"
        )


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: it can't be read.
    """
    try:
        with open_text(path) as file:
            return parse_json(file.read())
    except (OSError, ValueError) as error:
        raise UsageError(f"SOURCE: {path} can't be read as JSON: {first_line(error)}", code="unreadable") from None


# ---- JSON ----


def _open_json(path: Path, options: SourceOptions) -> PlannedSource:
    record = load_json(path)
    try:
        if isinstance(record, dict) and all(isinstance(record.get(key), list) for key in ("images", "annotations")):
            return _open_coco(path, record, options)
        first = next(iter(record.values()), None) if isinstance(record, dict) else None
        if isinstance(first, dict) and {"width", "height", "objects"} <= first.keys():
            return plan_boxes("scene graphs", list(_scene_graphs(record)), path.parent, options, {})
    except UsageError:
        raise
    except MALFORMED as error:
        raise malformed(path, error) from None
    raise UsageError(f"SOURCE: {path} holds no boxes that are known; {EXPECTED} expected", code="mismatch")


def malformed(path: Path, error: Exception) -> UsageError:
    """That a record has another form than its kind; ``error`` is one of :data:`MALFORMED`."""
    return UsageError(f"SOURCE: {path}: a record lacks or misnames {first_line(error)}", code="mismatch")


def _open_coco(path: Path, record: dict[str, Any], options: SourceOptions) -> PlannedSource:
    """COCO, LVIS, Objects365; with `tokens_positive` MDETR's, whose annotations are phrases of the image's `caption`."""
    grounded = any("tokens_positive" in one for one in record["annotations"][:FIRST])
    names = {} if grounded else category_names(record.get("categories"), path)
    pictures: dict[str, BoxedPicture] = {}
    of_image: dict[Any, tuple[BoxedPicture, dict[str, Any]]] = {}
    phrase_at: dict[tuple[Any, str], dict[str, Any]] = {}
    if record["annotations"] and not any("bbox" in one for one in record["annotations"]):
        first = record["annotations"][0].get("id")
        raise UsageError(f"SOURCE: {path}: no annotation has a `bbox` (the first: id {first})", code="mismatch")
    passed, names_of_id = PassedOver(), dict[Any, set[str]]()
    for image in record["images"]:
        names_of_id.setdefault(image["id"], set()).add(_names_of(image)[0])
    unclear = {
        number for number, called in names_of_id.items() if len(called) > 1
    }  # whose annotations are of either file
    if unclear and len(unclear) == len(names_of_id):
        first = next(iter(unclear))
        both = " and ".join(sorted(names_of_id[first])[:2])
        raise UsageError(f"SOURCE: {path}: {both} have one id, {first}; ids of their own expected", code="conflict")
    for image in record["images"]:
        called = _names_of(image)
        if image["id"] in unclear:
            passed.add(SAME_ID, called[0])
            continue
        if image["id"] in of_image:
            passed.add(LISTED_TWICE, called[0])
            continue
        if called[0] in pictures and not grounded:  # of phrases an image is a caption
            passed.add(SEVERAL_IDS, called[0])
        about: dict[str, Any] = {"phrases": []} if grounded else {"objects": [], "image_id": image["id"]}
        about |= stated_size(image)
        for key, ours in FEDERATED.items():
            if key in image:
                about[ours] = [names[number] for number in image[key]]
        of_image[image["id"]] = pictures.setdefault(called[0], BoxedPicture(called, about)), image
    for one in record["annotations"]:
        if one["image_id"] in unclear:
            continue
        if one["image_id"] not in of_image:
            raise UsageError(
                f"SOURCE: {path}: an annotation of the image {one['image_id']}, which is not listed", code="mismatch"
            )
        picture, image = of_image[one["image_id"]]
        if grounded:
            words = " ".join(image["caption"][start:end] for start, end in one["tokens_positive"])
            if str(image.get("dataset_name", "")).startswith("refcoco"):
                words = image["caption"]  # all of it refers; `tokens_positive` is its head noun only
            place = image["id"], str(one["tokens_positive"])
            if place not in phrase_at:  # one place of one caption is one phrase, whatever the number of its boxes
                phrase_at[place] = {"phrase": words or image["caption"], "boxes": []}
                picture.about["phrases"].append(phrase_at[place])
            phrase_at[place]["boxes"].append(one.get("bbox"))
            continue
        if one["category_id"] not in names:
            raise UsageError(
                f"SOURCE: {path}: an annotation of the class {one['category_id']}, which has no name", code="missing"
            )
        thing = {
            "box": one.get("bbox"),
            "class": names[one["category_id"]],
        }  # without a box it is counted, as a bad box is
        crowd = crowd_of(one.get("iscrowd"))
        thing |= {"crowd": one["iscrowd"] if crowd is None else True} if crowd is not False else {}
        picture.about["objects"].append(thing | {key: one[key] for key in ("segmentation", "area") if one.get(key)})
    frequency = [one.get("frequency") for one in record.get("categories") or () if one["id"] in names]
    manifest: dict[str, Any] = {"classes": list(names.values()), "class_ids": list(names)} if names else {}
    manifest |= {"frequency": frequency} if frequency and all(frequency) else {}
    kind = "phrases of MDETR" if grounded else "COCO boxes"
    planned = plan_boxes(kind, pictures.values(), path.parent, options, manifest)
    planned.passed.update(passed)
    return planned


def stated_size(record: dict[str, Any]) -> dict[str, Any]:
    """{"size": [width, height]} of a record that states both as numbers, else {}."""
    size = [record.get("width"), record.get("height")]
    return {"size": size} if all(isinstance(side, int | float) and side > 0 for side in size) else {}


def category_names(categories: Any, path: Path) -> dict[Any, str]:
    """{id: name} of COCO's categories, in the order of ids.

    Raises:
        UsageError: none, one without a name, two of one id or of one name.
    """
    rows = categories if isinstance(categories, list) else []
    if not rows or any(not isinstance(one, dict) or not str(one.get("name") or "").strip() for one in rows):
        raise UsageError(f"SOURCE: {path}: class names missing: `categories` of id and name expected", code="missing")
    rows.sort(key=lambda one: one["id"])
    names = {one["id"]: str(one["name"]).strip() for one in rows}
    if len(names) < len(rows):
        ids = [one["id"] for one in rows]
        twice = next(number for number in ids if ids.count(number) > 1)
        both = " and ".join(f"'{one['name']}'" for one in rows if one["id"] == twice)
        raise UsageError(
            f"SOURCE: {path}: the classes {both} have one id, {twice}; ids of their own expected", code="conflict"
        )
    if len(set(names.values())) < len(rows):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise UsageError(
            f"SOURCE: {path}: two classes are called '{twice}'; names of their own expected", code="conflict"
        )
    return names


def _names_of(image: dict[str, Any]) -> tuple[str, ...]:
    """What the file of COCO's image record may be called: LVIS has the address only, with the folder before the name."""
    if isinstance(image.get("file_name"), str):
        name = image["file_name"].replace("\\", "/")
        last = name.rpartition("/")[2]
        coco = last.removeprefix("COCO_train2014_").removeprefix("COCO_val2014_")  # 2017 renamed them
        return tuple(dict.fromkeys((name, last, coco)))
    parts = str(image["coco_url"]).split("/")
    return "/".join(parts[-2:]), parts[-1]


def _scene_graphs(record: dict[str, Any]) -> Iterator[BoxedPicture]:
    """GQA's: {image: {"width", "height", "objects": {id: {"name", "x", "y", "w", "h"}}}}."""
    for name, graph in record.items():
        things = graph["objects"].values() if isinstance(graph.get("objects"), dict) else ()
        objects = [{"box": [one.get(side) for side in "xywh"], "class": one.get("name")} for one in things]
        yield BoxedPicture((f"{name}.jpg", name), {**stated_size(graph), "objects": objects, "image_id": name})


# ---- ODVG ----


def _open_odvg(path: Path, options: SourceOptions) -> PlannedSource:
    """JSON lines of `detection`, `grounding` and `referring`, whose boxes are [left, top, right, bottom]."""
    pictures: dict[str, BoxedPicture] = {}
    for number, row in read_json_lines(path):
        try:
            _add_odvg(pictures, row)
        except MALFORMED as error:
            raise malformed(Path(f"{path} line {number}"), error) from None
    return plan_boxes("ODVG", pictures.values(), path.parent, options, {})


def _add_odvg(pictures: dict[str, BoxedPicture], row: Any) -> None:
    name = str(row["filename"] if "filename" in row else row["file_name"])
    about = pictures.setdefault(name, BoxedPicture((name, name.rpartition("/")[2]), stated_size(row))).about
    if "grounding" in row:
        phrases = about.setdefault("phrases", [])
        for one in row["grounding"].get("regions") or ():
            several = one["bbox"] if isinstance(one["bbox"][0], list) else [one["bbox"]]
            phrases.append({"phrase": one["phrase"], "boxes": [from_corners(box) for box in several]})
    elif "referring" in row:
        for one in row["referring"]:
            several = [one["phrase"]] if isinstance(one["phrase"], str) else one["phrase"]
            box = from_corners(one["bbox"])
            about.setdefault("phrases", []).extend({"phrase": phrase, "box": box} for phrase in several)
    else:
        objects = about.setdefault("objects", [])
        for one in row["detection"].get("instances") or ():
            objects.append({"box": from_corners(one["bbox"]), "class": one["category"]})


def from_corners(box: Any) -> Any:
    """[left, top, right, bottom] as [x, y, width, height]; what is no box stays, and is counted later."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        return box
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]
