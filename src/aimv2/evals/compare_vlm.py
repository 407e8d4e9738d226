"""Scores of vision-language models for ``aimv2 compare``: those of ``vlm score``, and Tables 7, 8 and C3 of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aimv2.evals.compare import Cell, paper
from aimv2.evals.vlm.benchmarks import BENCHMARKS, PREFIX

VLM = "vision-language"  # begins the protocols of these columns
MEAN = "mean over eight"
UNIT = "mean score"
CONTROLS = {"text_only": "text only", "shuffled_images": "shuffled images"}


def protocol_of_shots(shots: str | int) -> str:
    return f"{VLM}, {shots} shots"


def title_of_benchmark(dataset: str) -> str | None:
    """The heading of a benchmark of Tables 7 and 8; None for any other data set."""
    if dataset == MEAN:
        return f"{MEAN} benchmarks (Table 8)"
    return BENCHMARKS[dataset].printed if dataset in BENCHMARKS else None


def cells_of_vlm(result: dict[str, Any], path: str) -> Iterator[Cell]:
    """The figures of a result of ``vlm score``: of benchmarks, or of questions in shards."""
    model, figures = str(result["model"]["name"]), result["figures"]
    if "tasks" not in figures:
        yield from _of_questions(model, result, path)
        return
    for task, row in figures["tasks"].items():
        name = task.removeprefix(PREFIX) if task.startswith(PREFIX) else task
        metric = row["unit"] or str(row["metric"])
        notes = tuple(_notes(result, row))
        for shots, value in row["by_shots"].items():
            if value is not None:
                yield Cell(name, model, "", protocol_of_shots(shots), metric, value, None, "result", path, notes)
        first = protocol_of_shots(next(iter(row["by_shots"]), 0))
        for key, words in CONTROLS.items():
            if row.get(key) is not None:
                yield Cell(name, words, model, first, metric, row[key], None, "baseline", path)
    for shots, value in figures.get("mean_over_eight", {}).items():
        yield Cell(MEAN, model, "", protocol_of_shots(shots), UNIT, value, None, "result", path)


def _notes(result: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    yield f"lmms-eval {result['protocol']['lmms_eval']}, task version {row['version']}, {row['split']} split"
    if row["note"]:
        yield row["note"]
    if row.get("scored", row["documents"]) != row["documents"]:
        yield f"{row['scored']:,} of {row['documents']:,} documents"


def _of_questions(model: str, result: dict[str, Any], path: str) -> Iterator[Cell]:
    from aimv2.evals.vlm.questions import COLUMNS  # with torch, which tables of other results do not need

    figures, name = result["figures"], result["data"]["name"]
    for dataset, found in figures.get("sets", {name: figures}).items():
        for key, words in COLUMNS.items():
            if key in found:
                low, high = found.get(f"{key}_interval") or (None, None)
                interval = None if low is None or high is None else (100 * low, 100 * high)
                main = key == "accuracy"
                owner = (model, "", "result") if main else (words, model, "baseline")
                protocol = str(result["protocol"]["name"])
                yield Cell(dataset, *owner[:2], protocol, "accuracy, %", 100 * found[key], interval, owner[2], path)


def paper_cells_of_vlm(dataset: str) -> list[Cell]:
    """What Tables 7, 8 and C3 report on a benchmark."""
    numbers = paper()
    if dataset == MEAN:
        part = numbers["incontext"]
        return [
            Cell(MEAN, row[0], "", protocol_of_shots(shots), UNIT, value, None, "paper", part["source"])
            for row in part["rows"]
            for shots, value in zip(part["columns"], row[1:])
        ]
    part, cells = numbers["vlm"], []
    if dataset in part["columns"]:
        at, metric = part["columns"].index(dataset) + 1, BENCHMARKS[dataset].unit
        for table in part["tables"]:
            for row in table["rows"]:
                if row[at] is not None:
                    source = table["source"]
                    cells.append(
                        Cell(dataset, row[0], "", protocol_of_shots(0), metric, row[at], None, "paper", source)
                    )
    return cells
