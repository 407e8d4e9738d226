"""The fourteen data sets of the paper's frozen evaluation, and the forms on disk that are their own.

Sizes are those of AIMV2, Table B1. Where a set has its own form (pickles, lists in ``meta/``), a row or a function of the other
files here finds it in a folder and lists its splits; :mod:`aimv2.data.images.forms` has those of any data set.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aimv2.data.datasets.archives import eurosat, imagenet, pcam
from aimv2.data.datasets.cifar import cifar
from aimv2.data.datasets.lists import LINE_LISTED, cars, inat18
from aimv2.data.datasets.wilds import WILDS
from aimv2.data.images.forms import Form
from aimv2.errors import UsageError, nearest

METRIC = "top-1 accuracy"  # of all fourteen


@dataclass(frozen=True)
class Registered:
    """A data set of the paper.

    Attributes:
        name: for ``--dataset``.
        column: its name in the paper's tables.
        classes: how many.
        train: images that the paper trains its probes on; a validation split may be part of them.
        test: images that the paper tests on.
        metric: what the paper reports.
        test_split: which split, of a set that comes with both, has the paper's number of test images.
    """

    name: str
    column: str
    classes: int
    train: int
    test: int
    metric: str = METRIC
    test_split: str = "test"


# AIMV2, Table B1. The WILDS sets (Camelyon17, RxRx1, fMoW) have 85,054, 34,432 and 22,108 images in ``test``: the
# paper's numbers are those of their out-of-distribution ``val``.
_TABLE = (
    Registered("imagenet1k", "IN-1k", 1000, 1_281_167, 50_000),
    Registered("inat18", "iNat-18", 8142, 437_513, 24_426),
    Registered("cifar10", "CIFAR-10", 10, 50_000, 10_000),
    Registered("cifar100", "CIFAR-100", 100, 50_000, 10_000),
    Registered("food101", "Food101", 101, 75_750, 25_250),
    Registered("dtd", "DTD", 47, 3_760, 1_880),
    Registered("pets", "Pets", 37, 3_680, 3_669),
    Registered("cars", "Cars", 196, 8_144, 8_041),
    Registered("camelyon17", "Camelyon17", 2, 302_436, 34_904, test_split="val"),
    Registered("pcam", "PCAM", 2, 262_144, 32_768),
    Registered("rxrx1", "RxRx1", 1139, 40_612, 9_854, test_split="val"),
    Registered("eurosat", "EuroSAT", 10, 16_200, 5_400),
    Registered("fmow", "fMoW", 62, 76_863, 19_915, test_split="val"),
    Registered("infograph", "Infograph", 345, 36_023, 15_582),
)
DATASETS: dict[str, Registered] = {one.name: one for one in _TABLE}


def registered(name: str) -> Registered:
    """A data set by its name or the paper's, whatever the case and the hyphens.

    Raises:
        UsageError: it is not one of the fourteen.
    """
    known = {_plain(word): one for one in _TABLE for word in (one.name, one.column)}
    if found := known.get(_plain(name)):
        return found
    raise UsageError(
        f"--dataset {name}: not registered{nearest(_plain(name), DATASETS)} (there: {', '.join(DATASETS)}); "
        "any other data set is read without --dataset"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


KNOWN_FORMS: tuple[Callable[[Path, str], Form | None], ...] = (
    *(cifar, *(one.form for one in LINE_LISTED), cars, inat18),
    *(eurosat, imagenet, pcam, *(one.form for one in WILDS)),
)


def known_form(root: Path, source: str) -> Form | None:
    """What a folder holds, if it has a form that only one of the sets has.

    Raises:
        UsageError: it has that form, but a file of it is missing or broken.
    """
    return next((form for find in KNOWN_FORMS if (form := find(root, source))), None)
