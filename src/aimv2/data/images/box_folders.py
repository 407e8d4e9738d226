"""Boxes that come as a folder: RefCOCO's refs with their instances, Flickr30k Entities, YOLO's labels."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml

from aimv2.data.images.box_rows import (
    MALFORMED,
    BoxedPicture,
    BoxReader,
    load_json,
    malformed,
    plan_boxes,
    stated_size,
)
from aimv2.data.images.catalogue import is_image
from aimv2.data.images.entries import PlannedSource, RowError
from aimv2.data.images.sources import SourceOptions
from aimv2.data.images.tables import table_cells, table_shape
from aimv2.data.text.encoding import NotText, text_lines
from aimv2.errors import UsageError, first_line, nearest
from aimv2.io import open_file, parse_json, parse_yaml, read_file

# ---- RefCOCO ----

REFS = ("image_id", "ann_id", "sentences", "split")


class RefsUnpickler(pickle.Unpickler):
    """Builds numbers, texts, lists and dictionaries, of which refs(...).p is made, and refuses every name."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}; only numbers, texts, lists and dictionaries are read")


def open_refs(path: Path, options: SourceOptions) -> PlannedSource:
    """RefCOCO, RefCOCO+ or RefCOCOg: refs(unc).p, refs(google).p or refs(umd).p, and instances.json next to it.

    A picture has a phrase for every sentence. Splits are train, val and test; testA and testB only with ``--split``.

    Raises:
        UsageError: an unsafe or broken pickle, no instances.json, a reference to what is not there.
    """
    try:
        with open_file(path) as file:
            refs = RefsUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises anything
        raise UsageError(f"SOURCE: {path} is not read: {first_line(error)}", code="unreadable") from None
    if not isinstance(refs, list) or not all(isinstance(one, dict) and set(REFS) <= one.keys() for one in refs):
        raise UsageError(f"SOURCE: {path}: a list of references with {', '.join(REFS)} expected", code="mismatch")
    if not (file_of := path.parent / "instances.json").is_file():
        raise UsageError(f"SOURCE: no instances.json next to {path.name}, which has the boxes", code="missing")
    record = load_json(file_of)
    try:
        images, boxes = ({one["id"]: one for one in record[key]} for key in ("images", "annotations"))
        rows = [Reference(images[one["image_id"]], boxes[one["ann_id"]].get("bbox"), one) for one in refs]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"SOURCE: {path.name} refers to {first_line(error)}, which instances.json lacks", code="mismatch"
        ) from None
    return _plan_references(rows, path, options)


def open_ref_tables(files: list[Path], options: SourceOptions) -> PlannedSource:
    """References as Parquet of the hub: a row has `sentences`, `split`, and `raw_image_info` and `raw_anns` as JSON.

    Raises:
        UsageError: other columns, a broken file.
    """
    columns, rows = ["sentences", "split", "raw_image_info", "raw_anns"], []
    for file in files:
        if missing := [name for name in columns if name not in table_shape(file, "SOURCE: ")[0].names]:
            raise UsageError(
                f"SOURCE: {file} has no column {', '.join(missing)}; tables of references have {', '.join(columns)}",
                code="missing",
            )
        for row in table_cells(file, columns):
            try:
                # their `bbox` is corners, that of `raw_anns` is COCO's
                rows.append(Reference(parse_json(row["raw_image_info"]), parse_json(row["raw_anns"])["bbox"], row))
            except MALFORMED as error:
                raise malformed(file, error) from None
    return _plan_references(rows, files[0], options)


class Reference(NamedTuple):
    """COCO's record of the image, the box, and `split` and `sentences` of a reference."""

    image: dict[str, Any]
    box: Any
    about: dict[str, Any]


def _plan_references(rows: list[Reference], path: Path, options: SourceOptions) -> PlannedSource:
    """A sample for each picture and split: RefCOCOg has pictures whose objects are in several."""
    words = {str(row.about["split"]) for row in rows}
    chosen = options.split
    if chosen is not None and chosen not in words:
        has = ", ".join(sorted(words))
        raise UsageError(f"--split {chosen}: {path.name} has the splits {has}{nearest(chosen, words)}", code="unknown")
    kept = {"train", "val", "validation"} if chosen is None else {chosen}
    pictures: dict[Any, BoxedPicture] = {}
    try:
        for image, box, about in rows:
            if about["split"] in kept:
                place = str(image["file_name"]), str(about["split"])
                own = {**stated_size(image), "image_id": image.get("id", place[0]), "phrases": []}
                names = place[0], f"train2014/{place[0]}"
                picture = pictures.setdefault(place, BoxedPicture(names, own, "" if chosen else place[1]))
                for sentence in about["sentences"]:
                    phrase = sentence if isinstance(sentence, str) else sentence.get("sent") or sentence.get("raw")
                    picture.about["phrases"].append({"phrase": phrase, "box": box})
    except MALFORMED as error:
        raise malformed(path, error) from None
    planned = plan_boxes("references", pictures.values(), path.parent, replace(options, split=None), {})
    if passed := sorted(words - kept):
        planned.passed.add("references of other splits; see --split", *passed)
    return planned


# ---- Flickr30k Entities ----

MARKED = re.compile(r"\[/EN#(\d+)((?:/\w+)*) ([^\]]*)\]")


def open_flickr(folder: Path, options: SourceOptions) -> PlannedSource:
    """Flickr30k Entities: Annotations/ID.xml, Sentences/ID.txt, images ID.jpg, and train.txt, val.txt, test.txt where they are there.

    Raises:
        UsageError: no sentence, a split that is not stated.
    """
    splits = {
        name.strip(): split
        for split in ("train", "val", "test")
        if (folder / f"{split}.txt").is_file()
        for name in text_lines(folder / f"{split}.txt")
    }
    files = sorted((folder / "Sentences").glob("*.txt"))
    if not files:
        raise UsageError(f"SOURCE: no Sentences/*.txt in {folder}", code="missing")
    pictures = [_flickr_picture(folder, file, splits.get(file.stem, "")) for file in files]
    return plan_boxes("Flickr30k Entities", pictures, folder, options, {})


def _flickr_picture(folder: Path, file: Path, split: str) -> BoxedPicture:
    """A picture; a phrase without a box (of a scene, or of what is not drawn) is left out."""
    file_of = folder / "Annotations" / f"{file.stem}.xml"
    try:
        tree = ElementTree.fromstring(read_file(file_of))
        size = [int(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
        boxes = defaultdict[str, list[list[int]]](list)
        for thing in tree.iter("object"):
            if (drawn := thing.find("bndbox")) is None:
                continue
            # counted from 1
            left, top, right, bottom = (int(drawn.findtext(key, "")) - 1 for key in ("xmin", "ymin", "xmax", "ymax"))
            for name in thing.iter("name"):
                boxes[str(name.text)].append([left, top, right - left, bottom - top])
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise UsageError(f"SOURCE: {file_of} can't be read: {first_line(error)}", code="unreadable") from None
    phrases, captions = [], []
    for number, line in enumerate(text_lines(file)):
        captions.append(MARKED.sub(lambda found: found[3], line).strip())
        for found in MARKED.finditer(line):
            if found[1] in boxes:
                phrases.append({"phrase": found[3], "boxes": boxes[found[1]], "sentence": number})
    about = {"size": size, "phrases": phrases}
    names = (f"{file.stem}.jpg", f"flickr30k-images/{file.stem}.jpg", f"flickr30k_images/{file.stem}.jpg")
    return BoxedPicture(names, about, split, {"caption": [text for text in captions if text]})


# ---- YOLO ----


def open_yolo(path: Path, options: SourceOptions) -> PlannedSource:
    """YOLO: data.yaml with `names` and folders or lists of images as `train`, `val`, `test`; labels in .../labels/... .txt.

    A picture without a label file has no objects; that is counted, as are folders that are not there.

    Raises:
        UsageError: no class names, no images, none with a label file, labels of pixels.
    """
    try:
        record = parse_yaml(read_file(path).decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"SOURCE: {path} can't be read as YAML: {first_line(error)}", code="unreadable") from None
    names = record.get("names") if isinstance(record, dict) else None
    if isinstance(names, dict):
        names = [names[number] for number in sorted(names)] if set(names) == set(range(len(names))) else None
    if not isinstance(names, list) or not names:
        raise UsageError(
            f"SOURCE: {path}: class names missing: `names`, a list in order of the classes, expected", code="missing"
        )
    pictures, absent = [], []
    for split in ("train", "val", "test"):
        given = record.get(split)
        for part in given if isinstance(given, list) else [given] if given else ():
            place = _yolo_place(path.parent, str(record.get("path") or ""), str(part))
            pictures += list(_yolo_pictures(path.parent, place, split)) if place else []
            absent += [] if place else [f"{split}: {part}"]
    if not pictures:
        away = f"; not there: {', '.join(absent)}" if absent else ""
        raise UsageError(f"SOURCE: {path}: no image in the folders of train, val and test{away}", code="not-found")
    bare = [one.names[0] for one in pictures if not one.about["labels"]]
    if len(bare) == len(pictures):
        raise UsageError(
            f"SOURCE: {path}: {len(bare):,} of {len(pictures):,} images have no label file; labels/NAME.txt expected where"
            " images/NAME.jpg is, with labels in the place of the last folder of that name",
            code="missing",
        )
    _check_labels([Path(one.about["labels"]) for one in pictures if one.about["labels"]])
    reader = BoxReader(tuple(map(str, names)))
    manifest = {"classes": list(map(str, names)), "class_ids": list(range(len(names)))}
    planned = plan_boxes("YOLO labels", pictures, path.parent, options, manifest, reader)
    planned.passed.add(f"images without a label file, of {len(pictures):,}, taken as pictures without objects", *bare)
    planned.passed.add(f"folders of {path.name} that are not there", *absent)
    return planned


def _yolo_place(home: Path, root: str, part: str) -> Path | None:
    """The folder or list of images that data.yaml in ``home`` names; None where it is not there."""
    place = next((place for base in (home / root, home) if (place := base / part).exists()), None)
    # exports name their folders as seen from elsewhere: ../train/images
    return place or next(
        (place for place in [home / part.replace("../", "").removeprefix("./")] if place.exists()), None
    )


def _yolo_pictures(home: Path, place: Path, split: str) -> Iterator[BoxedPicture]:
    """The images of a folder or of a list, below ``home``, the folder of data.yaml."""
    if place.is_file():
        files = [
            path if path.is_absolute() else place.parent / path
            for line in text_lines(place)
            if (path := Path(line.strip())).name
        ]
    else:
        files = sorted(path for path in place.rglob("*") if is_image(path.name))
    for file in files:
        folders = list(file.parts)
        at = max((number for number, folder in enumerate(folders) if folder == "images"), default=None)
        if at is not None:
            folders[at] = "labels"
        labels = Path(*folders).with_suffix(".txt")
        try:
            name = file.resolve().relative_to(home.resolve()).as_posix()
        except ValueError:
            raise UsageError(
                f"SOURCE: {file} is outside {home}, the folder of data.yaml; move data.yaml above its images",
                code="mismatch",
            ) from None
        yield BoxedPicture((name,), {"objects": [], "labels": str(labels) if labels.is_file() else ""}, split)


def _check_labels(files: list[Path], most: int = 200) -> None:
    """Refuse labels that are no fractions of the picture's sides.

    Raises:
        UsageError: more than a tenth of the numbers are above 1.
    """
    sides: list[float] = []
    for file in files[:most]:
        with contextlib.suppress(NotText, OSError):  # counted when its picture is read
            sides += (side for line in text_lines(file) for side in _numbers(line)[1:])
    if sides and sum(side > 1.5 for side in sides) > 0.1 * len(sides):
        raise UsageError(
            f"SOURCE: labels such as {files[0].name} are not fractions: YOLO's are class, x and y of the centre, width, height, all"
            " of the picture's sides, 0 to 1",
            code="mismatch",
        )


def _numbers(line: str) -> list[float]:
    try:
        return [float(word) for word in line.split()]
    except ValueError:
        return []


def yolo_objects(file: Path, classes: tuple[str, ...], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The objects of a label file, in pixels of a picture of ``size`` (width, height); a polygon's box is the one around it.

    Raises:
        RowError: a file that can't be read, a line of another form, a class without a name.
    """
    objects = []
    try:
        lines = list(text_lines(file))
    except (NotText, OSError) as error:
        raise RowError("no-labels", str(error)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _numbers(line)
        polygon = len(row) >= 7 and len(row) % 2 == 1
        if not (len(row) == 5 or polygon) or not all(map(math.isfinite, row)) or row[0] != int(row[0]):
            raise RowError("not-a-box", f"{file.name} line {number}: class and four fractions, or a polygon, expected")
        if not 0 <= row[0] < len(classes):
            raise RowError("no-class", f"{file.name} line {number}: class {row[0]:g}, of {len(classes)} names")
        thing: dict[str, Any] = {"class": classes[int(row[0])]}
        if polygon:
            points = [value * size[at % 2] for at, value in enumerate(row[1:])]
            left, top = min(points[::2]), min(points[1::2])
            thing |= {"box": [left, top, max(points[::2]) - left, max(points[1::2]) - top], "segmentation": [points]}
        else:
            x, y, width, height = (value * size[at % 2] for at, value in enumerate(row[1:]))
            thing |= {"box": [x - width / 2, y - height / 2, width, height]}
        objects.append(thing)
    return objects
