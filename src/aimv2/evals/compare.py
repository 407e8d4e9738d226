"""Results and the paper's tables: one table per data set, one column per protocol.

Figures of an attentive probe, of nearest neighbours, of a linear classifier and of zero-shot classification are not
figures of the same thing, so each protocol has a column of its own; other differences are notes.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from aimv2.errors import UsageError, first_line, nearest
from aimv2.evals.result import FILE, read_result
from aimv2.io import parse_json, read_file
from aimv2.tables import TextTable

CLIP_BENCHMARK = "CLIP_benchmark"
PAPER_NOTE = "the paper's attentive probes: 100 epochs, augmented, the best of 14 heads is reported (Table A2)"
PLOTS = (".png", ".pdf", ".svg")
# where a figure lies in a result -> its name, and what it is multiplied by; the first of a table is what is plotted
METRICS: dict[tuple[str, ...], tuple[str, float]] = {
    ("top1",): ("top-1, %", 100),
    ("text_to_image", "R@1"): ("text to image R@1, %", 100),
    ("image_to_text", "R@1"): ("image to text R@1, %", 100),
    ("miou",): ("mIoU, %", 100),
    ("rmse",): ("RMSE, m", 1),
    ("cider",): ("CIDEr", 100),
    ("bleu4",): ("BLEU-4", 100),
    ("exact_match",): ("exact match, %", 100),
}
BASELINES = {"random": "random encoder", "pixels": "raw pixels"}
# of CLIP_benchmark's result files: task -> protocol, {its metric: where ours lies}
CLIP_FIGURES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "zeroshot_classification": ("zero-shot, contrastive", {"acc1": ("top1",)}),
    "linear_probe": (f"linear probe of {CLIP_BENCHMARK}", {"lp_acc1": ("top1",)}),
    "zeroshot_retrieval": (
        "retrieval, contrastive",
        {
            "image_retrieval_recall@1": ("text_to_image", "R@1"),
            "text_retrieval_recall@1": ("image_to_text", "R@1"),
        },
    ),
}


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        dataset: registered name where it has one.
        model: or the baseline.
        of: the model that a baseline belongs to, else "".
        protocol: how it was measured.
        metric: its name with the unit.
        value: in that unit.
        interval: (low, high) in that unit, 95%; None where it has none.
        kind: result, baseline, or paper.
        source: table of the paper, the leaderboard, or the file.
        notes: what limits a comparison.
    """

    dataset: str
    model: str
    of: str
    protocol: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    kind: str
    source: str
    notes: tuple[str, ...] = ()


@cache
def paper() -> dict[str, Any]:
    """The numbers of paper.yaml: ``datasets``, ``recognition``, ``zeroshot``, ``resolution``, ``leaderboard``."""
    return yaml.safe_load(files("aimv2.evals").joinpath("paper.yaml").read_text("utf-8"))


@cache
def _by_name() -> dict[str, dict[str, Any]]:
    """Data sets of Table B1 by their names without case and marks."""
    table = paper()["datasets"]
    rows = [dict(zip(table["columns"], row)) for row in table["rows"]]
    return {_plain(word): row for row in rows for word in (row["name"], row["printed"])}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(wds[/_])?(vtab[/_])?", "", name.lower()))


def known_dataset(name: str) -> dict[str, Any] | None:
    """``name, printed, train, test, classes`` of a data set of Table B1; None for any other."""
    return _by_name().get(_plain(name))


def paper_cells(dataset: str) -> list[Cell]:
    """Everything that the paper and the leaderboard report on a registered data set, in the order of their tables."""
    top1, numbers = METRICS[("top1",)][0], paper()
    names = [row[0] for row in numbers["datasets"]["rows"]]
    cells = []
    if dataset in names:
        column = names.index(dataset) + 1
        part = numbers["recognition"]
        for table in part["tables"]:
            for row in table["rows"]:
                value, source = row[column], table["source"]
                cells.append(Cell(dataset, row[0], "", part["protocol"], top1, value, None, "paper", source))
    part = numbers["resolution"]
    for row in part["rows"] if part["dataset"] == dataset else ():
        for size, value in zip(part["columns"], row[1:]):
            if value is not None:
                model = f"{row[0]}, tested at {size}"
                cells.append(Cell(dataset, model, "", part["protocol"], top1, value, None, "paper", part["source"]))
    part = numbers["zeroshot"]
    for name, value in part["rows"] if part["dataset"] == dataset else ():
        cells.append(Cell(dataset, name, "", part["protocol"], top1, value, None, "paper", part["source"]))
    part = numbers["leaderboard"]
    for row in part["rows"] if part["dataset"] == dataset else ():
        for protocol, value in zip(part["columns"], row[1:]):
            cells.append(Cell(dataset, row[0], "", protocol, top1, value, None, "paper", part["source"]))
    return cells


# ---- results ----


def read_cells(path: str) -> list[Cell]:
    """The figures of a result file (or of the one in a folder), ours or CLIP_benchmark's.

    Raises:
        UsageError: not a result, one of another version, one without a figure that is known here.
    """
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    try:
        stored = parse_json(read_file(file))
    except (OSError, ValueError):
        stored = None
    if isinstance(stored, dict) and {"dataset", "model", "task", "metrics"} <= stored.keys():
        cells = list(_of_clip_benchmark(stored, path))
    else:
        result = read_result(path)
        try:
            cells = list(_of_ours(result, path))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"RESULT {path}: can't be read as a result file ({why})", code="unreadable") from None
    if not cells:
        wanted = ", ".join(".".join(place) for place in METRICS)
        raise UsageError(f"RESULT {path}: no figure that is compared ({wanted})")
    return cells


def _of_clip_benchmark(stored: dict[str, Any], path: str) -> Iterator[Cell]:
    task = str(stored["task"])
    if task not in CLIP_FIGURES:
        raise UsageError(
            f"RESULT {path}: task '{task}' of {CLIP_BENCHMARK}; one of {', '.join(CLIP_FIGURES)} expected",
            code="unknown",
        )
    protocol, places = CLIP_FIGURES[task]
    known = known_dataset(str(stored["dataset"]))
    name = known["name"] if known else str(stored["dataset"])
    model = " ".join(str(stored[key]) for key in ("model", "pretrained") if stored.get(key))
    for key, place in places.items():
        value = stored["metrics"].get(key)
        if isinstance(value, int | float):
            metric, scale = METRICS[place]
            notes = (f"measured by {CLIP_BENCHMARK}, with its templates and images",)
            yield Cell(name, model, "", protocol, metric, scale * value, None, "result", path, notes)


def _of_ours(result: dict[str, Any], path: str) -> Iterator[Cell]:
    try:
        if result["verb"] == "vlm score":
            from aimv2.evals.compare_vlm import cells_of_vlm

            yield from cells_of_vlm(result, path)
            return
        if result["verb"] == "detect score":
            from aimv2.evals.compare_detection import cells_of_detection

            yield from cells_of_detection(result, path)
            return
        data, figures, model = result["data"], result["figures"], str(result["model"]["name"])
        given = data.get("dataset") or data["name"]
        known = known_dataset(str(given))
        head = Cell(known["name"] if known else str(given), model, "", "", "", 0.0, None, "result", path)
        notes = tuple(_differences(result, known))
        yield from _figures(replace(head, protocol=protocol_of(result), notes=notes), figures, result)
        for name, found in figures.get("baselines", {}).items():
            other = replace(head, model=BASELINES.get(name, name), of=model, kind="baseline")
            yield from _figures(replace(other, protocol=protocol_of(result), notes=notes), found, result)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"RESULT {path}: a part of the result is missing or of another form ({error})", code="missing"
        ) from None


def _figures(cell: Cell, figures: dict[str, Any], result: dict[str, Any]) -> Iterator[Cell]:
    """A cell for every figure that is there; of few-shot results for every number of shots."""
    if result["verb"] == "fewshot":
        layer = figures["chosen"][0]["layer"]
        for row in figures["table"]:
            if row["layer"] == layer:
                yield from _figures(replace(cell, protocol=f"{row['shots']}-shot"), row, {"verb": "a row"})
        return
    for place, (metric, scale) in METRICS.items():
        *outer, key = place
        part = figures
        for step in outer:
            part = part.get(step, {})
        if isinstance(part.get(key), int | float):
            low, high = part.get(f"{key}_interval") or (None, None)
            interval = None if low is None or high is None else (scale * float(low), scale * float(high))
            yield replace(cell, metric=metric, value=scale * part[key], interval=interval)
        if cell.kind == "result" and isinstance(part.get(f"{key}_chance"), int | float):
            value = scale * part[f"{key}_chance"]
            yield replace(cell, model="chance", of=cell.model, kind="baseline", metric=metric, value=value, notes=())


def protocol_of(result: dict[str, Any]) -> str:
    """The protocol of a result in words: results with equal words are in one column."""
    protocol = result["protocol"]
    name = str(protocol.get("name", result["verb"]))
    more = {"linear": protocol.get("solver"), "retrieve": protocol.get("candidates")}.get(result["verb"])
    if more is None:
        return name
    return f"{name}, {more} candidates" if result["verb"] == "retrieve" else f"{name}, {more}"


def _differences(result: dict[str, Any], known: dict[str, Any] | None) -> Iterator[str]:
    """What limits the comparison of a result with others of its column."""
    data, protocol = result["data"], result["protocol"]
    if known and not data.get("dataset"):
        yield f"taken for {known['printed']} by the name of its data"
    for word, key in (("trained", "train"), ("tested", "test")) if known else ():
        count = data.get(f"{key}_images")
        if count is not None and known and count != known[key] and not (key == "train" and result["verb"] == "fewshot"):
            yield f"{word} on {count:,} images, the paper on {known[key]:,} (Table B1)"
    if protocol.get("features") == "cached":
        yield "cached features: no augmentation"
    if result["verb"] == "probe" and protocol.get("epochs") not in (None, 100):
        yield f"{protocol['epochs']} epochs"
    if found := protocol.get("automatic"):
        yield f"{', '.join(found['options'])} by the number of images"
    chosen = str(result["figures"].get("selected_on", ""))
    if chosen.startswith("test"):
        yield "chosen on the test labels, as the paper does"
    if result["verb"] == "caption":
        yield f"words by {protocol.get('tokenizer')}"


# ---- tables ----


@dataclass
class Grid:
    """A data set's table: columns are (protocol, metric), a row has at most one cell of each."""

    dataset: str
    columns: list[tuple[str, str]]
    rows: list[dict[tuple[str, str], Cell]]


def make_grid(dataset: str, cells: Sequence[Cell]) -> Grid:
    """Figures of one model in one row; a second figure of the same column starts a row of its own."""
    columns = list(dict.fromkeys((cell.protocol, cell.metric) for cell in cells))
    rows: list[dict[tuple[str, str], Cell]] = []
    for cell in cells:
        column = cell.protocol, cell.metric
        same = (row for row in rows if column not in row and _owner(next(iter(row.values()))) == _owner(cell))
        row = next(same, None)
        if row is None:
            rows.append(row := {})
        row[column] = cell
    order = {"result": 0, "baseline": 1, "paper": 2}
    rows.sort(key=lambda row: order[next(iter(row.values())).kind])
    return Grid(dataset, columns, rows)


def _owner(cell: Cell) -> tuple[str, str, str, str]:
    return cell.model, cell.of, cell.kind, cell.source if cell.kind == "paper" else ""


def title_of(dataset: str) -> str:
    """A data set's heading: its sizes, or that the paper does not have it."""
    known = known_dataset(dataset)
    if known is None:
        from aimv2.evals.compare_detection import title_of_detection
        from aimv2.evals.compare_vlm import title_of_benchmark

        return title_of_detection(dataset) or title_of_benchmark(dataset) or f"{dataset} (not one of the paper's)"
    name = "" if known["printed"].lower().replace("-", "") == known["name"] else f" ({known['printed']})"
    return f"{dataset}{name}: {known['test']:,} test images, {known['classes']:,} classes"


class Notes:
    """Notes in the order of their first use, and the marks that point to them."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, notes: Sequence[str]) -> str:
        self.texts += [note for note in notes if note not in self.texts]
        return "".join(f" [{self.texts.index(note) + 1}]" for note in notes)


def words_of(cell: Cell | None, notes: Notes, between: str) -> str:
    """A cell's text: figure, interval, marks."""
    if cell is None:
        return ""
    digits = 3 if cell.metric.startswith("RMSE") else 1
    text = f"{cell.value:.{digits}f}"
    if cell.interval:
        text += between.format(f"{cell.interval[0]:.{digits}f}-{cell.interval[1]:.{digits}f}")
    return text + notes.mark(cell.notes)


def _name_and_source(row: dict[tuple[str, str], Cell], several: bool) -> tuple[str, str]:
    """``several``: baselines of more than one model, which are then named."""
    first = next(iter(row.values()))
    baseline = f"baseline of {first.of}" if several else "baseline"
    return first.model, {"result": "measured", "baseline": baseline}.get(
        first.kind, first.source.removeprefix("AIMV2, ")
    )


def tables_of(grid: Grid, notes: Notes, between: str, most: int) -> Iterator[TextTable]:
    """The table of a data set, with at most ``most`` columns of figures each; ``between``: how an interval follows a figure."""
    several = len({cell.of for row in grid.rows for cell in row.values() if cell.kind == "baseline"}) > 1
    for start in range(0, len(grid.columns), most):
        columns = grid.columns[start : start + most]
        heads = {column: "\n".join(column) if between.startswith("\n") else ": ".join(column) for column in columns}
        right, widest = list(heads.values()), {"model": 28, "from": 12, **dict.fromkeys(heads.values(), 14)}
        table = TextTable(["model", *right, "from"], right=right, widest=widest)
        for row in grid.rows:
            if any(column in row for column in columns):
                name, source = _name_and_source(row, several)
                table.rows.append([name, *(words_of(row.get(c), notes, between) for c in columns), source])
        yield table


def as_text(grids: Sequence[Grid], width: int = 80) -> str:
    """Tables within ``width`` columns; of many protocols several tables, one below the other."""
    notes, lines = Notes(), list[str]()
    for grid in grids:
        lines += textwrap.wrap(title_of(grid.dataset), width)
        lines += [table.to_text(width) for table in tables_of(grid, notes, "\n{}", 3)] + [""]
    for text in _closing(grids, notes):
        lines += textwrap.wrap(text, width, subsequent_indent="  ")
    return "\n".join(lines)


def _closing(grids: Sequence[Grid], notes: Notes) -> list[str]:
    """The lines below all tables."""
    lines = [f"[{number}] {text}" for number, text in enumerate(notes.texts, 1)]
    cells = [cell for grid in grids for row in grid.rows for cell in row.values()]
    if any(len(grid.columns) > 1 for grid in grids):
        lines.append("Each column is a protocol of its own: figures compare within a column, not across.")
    if any(cell.interval for cell in cells):
        lines.append("Below or after a figure: its 95% interval.")
    papers = [cell for cell in cells if cell.kind == "paper" and cell.source.startswith("AIMV2")]
    notes_of = {"vision-language": paper()["vlm"]["note"], "detection": paper()["detection"]["note"]}
    notes_of["referring expressions"] = notes_of["detection"]
    used = (next((n for word, n in notes_of.items() if c.protocol.startswith(word)), PAPER_NOTE) for c in papers)
    lines += [f"Table N: of the AIMV2 paper (arXiv 2411.14402); {note}." for note in dict.fromkeys(used)]
    board = paper()["leaderboard"]
    if any(cell.source == board["source"] for cell in cells):
        lines.append(f"{board['source']}: the public table of that repository (arXiv 2506.10178); {board['note']}.")
    return lines


def as_markdown(grids: Sequence[Grid]) -> str:
    """The same tables for a document."""
    notes, lines = Notes(), list[str]()
    for grid in grids:
        (table,) = tables_of(grid, notes, " ({})", len(grid.columns))
        lines += [f"### {title_of(grid.dataset)}", "", table.to_markdown(), ""]
    lines += [f"- {text}" for text in _closing(grids, notes)]
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Sequence[Grid]], str]] = {"text": as_text, "markdown": as_markdown}


def compare_results(
    paths: Sequence[str], dataset: str | None = None, format: str = "text", picture: str | None = None
) -> dict[str, Any]:
    """Reads results, adds the paper's figures of the same data sets, renders.

    Args:
        paths: result files or folders with one.
        dataset: only results on this data set; None: all.
        format: text, markdown or json.
        picture: file of a plot, PNG, PDF or SVG.

    Returns:
        ``table``: a dict a figure (see :class:`Cell`), ``text``: in ``format``, ``datasets``, ``plot``.

    Raises:
        UsageError: nothing given, not a result, a result of another version, a data set that none of them is on.
    """
    formats = (*FORMATS, "json")
    if format not in formats:
        raise UsageError(
            f"--format {format}: one of {', '.join(formats)} expected{nearest(format, formats)}", code="unknown"
        )
    if not paths:
        raise UsageError("RESULTS: at least one result file, or folder with a result.json, is expected")
    file = Path(picture).expanduser() if picture else None
    if file and (file.suffix.lower() not in PLOTS or not file.parent.is_dir()):
        raise UsageError(f"--plot {picture}: a file that ends in {', '.join(PLOTS)}, in a folder that exists, expected")
    cells = [cell for path in paths for cell in read_cells(path)]
    found = list(dict.fromkeys(cell.dataset for cell in cells))
    if dataset is not None:
        known = known_dataset(dataset)
        wanted = known["name"] if known else dataset
        if wanted not in found:
            raise UsageError(f"--dataset {dataset}: none of the results is on it (they are on {', '.join(found)})")
        found = [wanted]
    grids = []
    for name in found:
        mine = [cell for cell in cells if cell.dataset == name]
        top1 = any(cell.metric == METRICS[("top1",)][0] for cell in mine)
        printed = paper_cells(name) if top1 else []
        if any(cell.protocol.startswith("vision-language") for cell in mine):
            from aimv2.evals.compare_vlm import paper_cells_of_vlm

            printed = paper_cells_of_vlm(name)
        if any(cell.protocol in ("detection", "referring expressions") for cell in mine):
            from aimv2.evals.compare_detection import paper_cells_of_detection

            printed = [*printed, *paper_cells_of_detection(name)]
        grids.append(make_grid(name, [*mine, *printed]))
    table = [asdict(cell) for grid in grids for row in grid.rows for cell in row.values()]
    text = json.dumps(table, indent=1, ensure_ascii=False) if format == "json" else FORMATS[format](grids)
    if file:
        from aimv2.evals.compare_plot import plot

        plot(grids, file)
    return {"datasets": found, "table": table, "text": text, "plot": str(file) if file else None}
