"""Detections for ``aimv2 compare``: results of ``detect score``, and Tables 4, D1, D2 and section D.2 of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aimv2.evals.compare import Cell, paper

DETECTION, REFERRING = "detection", "referring expressions"  # protocols
PRINTED = {
    "coco2017": "COCO 2017 val", "lvis": "LVIS v1 val", "refcoco": "RefCOCO val", "refcoco+": "RefCOCO+ val", "refcocog": "RefCOCOg val",
}  # fmt: skip
NAMED = {"instances_val2017": "coco2017", "lvis_v1_val": "lvis", **{name: name for name in PRINTED}}
FIGURES = {
    "ap": "AP", "ap_small": "AP small", "ap_medium": "AP medium", "ap_large": "AP large", "ap_rare": "AP rare", "ap_common": "AP common",
    "ap_frequent": "AP frequent",
}  # fmt: skip


def column_of(key: str, kind: str = "box") -> tuple[str, str]:
    """(protocol, metric) of a figure of a result or of the paper."""
    return (REFERRING, "P@1, %") if key == "p_at_1" else (DETECTION, f"{kind} {FIGURES[key]}, %")


def title_of_detection(dataset: str) -> str | None:
    """The heading of a data set of these tables; None for any other."""
    return f"{dataset} ({PRINTED[dataset]})" if dataset in PRINTED else None


def cells_of_detection(result: dict[str, Any], path: str) -> Iterator[Cell]:
    """The figures of a result of ``detect score``."""
    data, figures, model = result["data"], result["figures"], str(result["model"]["name"])
    dataset = data.get("dataset") or NAMED.get(str(data["name"]).lower(), str(data["name"]))
    notes = tuple(_differences(data, dataset))
    for kind in ("box", "mask"):
        for key in FIGURES:
            if (value := figures.get(kind, {}).get(key)) is not None:
                yield Cell(dataset, model, "", *column_of(key, kind), 100 * value, None, "result", path, notes)
    if found := figures.get("phrases"):
        low, high = found["p_at_1_interval"]
        interval = (100 * low, 100 * high)
        yield Cell(dataset, model, "", *column_of("p_at_1"), 100 * found["p_at_1"], interval, "result", path, notes)


def _differences(data: dict[str, Any], dataset: str) -> Iterator[str]:
    if dataset not in PRINTED:
        return
    if not data.get("dataset"):
        yield f"taken for {PRINTED[dataset]} by the name of its data"
    what, number = paper()["detection"]["tests"][dataset]
    count = data["test_images"] if what == "images" else data["phrases"]
    if count != number:
        yield f"{count:,} {what}, {PRINTED[dataset]} has {number:,}"


def paper_cells_of_detection(dataset: str) -> list[Cell]:
    """What the paper reports on a data set."""
    cells = []
    for table in paper()["detection"]["tables"]:
        for row in table["rows"]:
            for column, value in zip(table["columns"], row[1:], strict=True):
                name, *kind, key = column.split()
                if name == dataset:
                    place = column_of(key, *kind)
                    cells.append(Cell(dataset, row[0], "", *place, value, None, "paper", table["source"]))
    return cells
