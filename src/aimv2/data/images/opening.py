"""Labelled images of any form, opened by split and checked; the fourteen data sets of the paper by name.

A source is a class-folder tree, WebDataset shards, CSV lists, a hub data set or the own form of a known set. Opening
it lists names, places and labels; an image is decoded when it is needed, in any number of threads.

Legend: N images, C classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from aimv2.data.datasets.registry import Registered, known_form, registered
from aimv2.data.images import forms
from aimv2.data.images.catalogue import kind_of
from aimv2.data.images.forms import Form, Listed, wrong
from aimv2.data.images.labelled import Labelled, Split
from aimv2.data.images.names import found_or_written, image_root_of, inside
from aimv2.data.images.readers import ImageFiles, TableImages
from aimv2.errors import UsageError

log = logging.getLogger(__name__)

MOST_CLASSES = 100_000  # fewer are believed whatever the number of images
EXPECTED = (
    "class folders (ROOT/train/CLASS/*, ROOT/test/CLASS/*), WebDataset shards with KEY.cls, "
    "train.csv and test.csv (path,label), CIFAR's pickles, or a hub data set OWNER/NAME"
)


def open_labelled(
    source: str, split: Split, dataset: str | None = None, image_root: str | None = None
) -> Labelled | None:
    """A split of labelled images, listed and checked.

    With ``train`` and ``val`` and no ``test``, ``val`` is the test split (ImageNet, iNaturalist) and there is no
    validation split. Data without splits is ``train``.

    Args:
        source: a folder, a tar or pattern of tars, a list, or a hub data set ``OWNER/NAME``.
        split: which.
        dataset: one of :data:`aimv2.data.datasets.registry.DATASETS`: then the numbers of images and classes must be those of
            AIMV2, Table B1. None: any data set; where the form tells which of them it is, other numbers give a warning.
        image_root: folder that the paths of a list or table may lead to, besides its own; see
            :func:`aimv2.data.images.names.inside`.

    Returns:
        None if the data set has no such split.

    Raises:
        UsageError: nothing there, no labels, one class, a class without an image, a label out of range, wrong numbers.
    """
    about = None if dataset is None else registered(dataset)
    form = find_form(source)
    if about is not None and form.dataset not in (None, about.name):
        raise UsageError(f"--dataset {dataset}: {source} is {form.dataset} by its form ({form.kind})")
    strict = about is not None
    if about is None and form.dataset is not None:
        about = registered(form.dataset)
    splits = _roles(form, about)
    if split not in splits:
        return None
    try:
        listed = _with_classes(splits[split](), splits, split, about if strict else None, source)
    except OverflowError:
        raise wrong(source, "a label of more than 64 bits; labels count from 0 without a gap") from None
    if image_root is not None and form.kind in ("class folders", "WebDataset shards"):
        raise UsageError(
            f"--image-root {image_root}: {source} holds {form.kind}, which name no files elsewhere; leave it out",
            option="--image-root",
            code="conflict",
        )
    listed = _paths_checked(listed, form.kind == "lists", source, image_root)
    _check(listed, split, source)
    if about is not None:
        _compare(about, listed, splits, split, source, strict)
    assert listed.classes is not None
    name = about.name if about is not None else _name(source)
    return Labelled(name, source, split, listed.classes, listed.keys, listed.labels, listed.image)


def require_labelled(source: str, split: Split, dataset: str | None = None, image_root: str | None = None) -> Labelled:
    """As :func:`open_labelled`, where the caller can't do without the split.

    Raises:
        UsageError: as there, or it has no such split: the message explains how to give one.
    """
    data = open_labelled(source, split, dataset, image_root)
    if data is not None:
        return data
    form = find_form(source)
    has = ", ".join(form.splits)
    how = {
        "class folders": f"ROOT/train/CLASS/* and ROOT/{split}/CLASS/* give both",
        "lists": f"{split}.csv next to train.csv gives one",
        "WebDataset shards": f"{split}-*.tar next to train-*.tar give one",
    }.get(form.kind, f"a split named {split} expected")
    raise wrong(source, f"no {split} split ({form.kind}, {has} only); {how}")


FOLDER_FORMS: tuple[Callable[[Path, str], Form | None], ...] = (  # in the order in which they are tried
    *(forms.shard_folder, known_form, forms.split_folders),
    *(forms.list_folder, forms.saved_form, forms.plain_folders),
)
OTHER_FORMS: dict[str, Callable[[Path, str], Form | None]] = {
    **{"tars": forms.shard_pattern, "file": forms.list_file, "hub": forms.hub_form},
}


def find_form(source: str) -> Form:
    """What a source holds.

    Raises:
        UsageError: nothing there, or nothing with labels.
    """
    kind, path = kind_of(source)
    tried = FOLDER_FORMS if kind == "folder" else [OTHER_FORMS[kind]] if kind in OTHER_FORMS else []
    try:
        if form := next((form for find in tried if (form := find(path, source))), None):
            return form
    except OSError as error:
        raise wrong(source, f"cannot be read: {error.strerror or error}") from None
    what = {"folder": "no labels there", "missing": "does not exist"}.get(kind, "not a data set")
    raise wrong(source, f"{what}; expected {EXPECTED}")


def _name(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.is_file() or "*" in source or "{" in source else source


def _roles(form: Form, about: Registered | None) -> dict[str, Callable[[], Listed]]:
    """The splits by what they serve for."""
    splits = dict(form.splits)
    if "val" in splits and ("test" not in splits or (about is not None and about.test_split == "val")):
        splits["test"] = splits.pop("val")
    return splits


def _with_classes(
    listed: Listed, splits: dict[str, Callable[[], Listed]], split: str, about: Registered | None, source: str
) -> Listed:
    """Where no file names the classes: their numbers, as many as the training split (or the registered set) has."""
    if not len(listed.labels):
        raise wrong(source, f"no image in its {split} split")
    if listed.classes is not None:
        return listed
    if split != "train" and about is not None:
        return replace(listed, classes=tuple(map(str, range(about.classes))))
    train = splits["train"]() if split != "train" and "train" in splits else listed
    count = int(train.labels.max(initial=-1)) + 1
    if count > max(len(train.labels), MOST_CLASSES):  # identifiers: names for all of them would fill the memory
        key = train.keys[int(train.labels.argmax())]
        raise wrong(source, f"label {count - 1} of {key}: {len(train.labels):,} images have no {count:,} classes")
    return replace(listed, classes=tuple(map(str, range(count))))


def _paths_checked(listed: Listed, is_list: bool, source: str, image_root: str | None) -> Listed:
    """Paths of images lead into their own folder or ``--image-root``; the first one of a list is there."""
    top, image = image_root_of(image_root), listed.image
    if isinstance(image, TableImages):
        for name in image.cells.paths():
            inside(image.root, name, top)
        return replace(listed, image=replace(image, image_root=top))
    if not isinstance(image, ImageFiles):
        return listed
    names = [inside(image.root, key, top) for key in image.names]
    if top is not None:
        names = [name if os.path.exists(found_or_written(image.root, name)) else str(top / name) for name in names]
    image = ImageFiles(image.root, names)
    if is_list and not os.path.isfile(found_or_written(image.root, image.names[0])):
        raise wrong(source, f"names {listed.keys[0]}, which is not there; paths start at {image.root}")
    return replace(listed, image=image)


def _check(listed: Listed, split: str, source: str) -> None:
    """Labels are there, in range, of several classes, and in training every class has an image."""
    assert listed.classes is not None
    labels, count = listed.labels, len(listed.classes)
    missing = np.flatnonzero(labels < 0)
    if len(missing) == len(labels):
        raise wrong(
            source, f"no labels in its {split} split (KEY.cls with a number from 0, a label column, class folders)"
        )
    if len(missing):
        key = listed.keys[missing[0]]
        found = f"{len(missing):,} of {len(labels):,} images of {split} have no label, {key} first"
        raise wrong(source, f"{found} (empty, -1, nan, null and None count as none)")
    beyond = np.flatnonzero(labels >= count)
    if len(beyond):
        row = beyond[0]
        raise wrong(
            source, f"label {labels[row]} of {listed.keys[row]} in {split}: 0 to {count - 1} expected ({count} classes)"
        )
    if count < 2:
        raise wrong(source, f"one class ('{listed.classes[0]}'); two or more expected")
    empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
    if split == "train" and len(empty):
        names = ", ".join(f"{number} ({listed.classes[number]})" for number in empty[:3])
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise wrong(source, f"no image in train of class {names}{more}; labels count from 0 without a gap")


def _compare(
    about: Registered, listed: Listed, splits: dict[str, Callable[[], Listed]], split: str, source: str, strict: bool
) -> None:
    """The numbers against AIMV2, Table B1; a validation split may be part of the training images that it counts.

    Raises:
        UsageError: they differ, and the user named the data set.
    """
    found, wanted = len(listed.labels), {"train": about.train, "test": about.test}.get(split)
    differ = []
    if listed.classes is not None and len(listed.classes) != about.classes:
        differ.append(f"{about.classes:,} classes expected, {len(listed.classes):,} found")
    if wanted is not None and found != wanted:
        more = len(splits["val"]().labels) if split == "train" and "val" in splits else 0
        if found + more != wanted:
            with_val = f" ({found + more:,} with val)" if more else ""
            differ.append(f"{wanted:,} {split} images expected, {found:,} found{with_val}")
    words = "; ".join(differ)
    if differ and strict:
        raise UsageError(
            f"--dataset {about.name}: {words} in {source}; without --dataset it is read as it is", code="mismatch"
        )
    if differ:
        log.warning("%s: %s in AIMV2's %s", source, words, about.column)
