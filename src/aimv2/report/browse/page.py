"""Render drawn samples as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2.config.schema import Config, Source
from aimv2.errors import UsageError
from aimv2.io import write_aside
from aimv2.report.browse.drawn import Drawn, DrawnSample
from aimv2.report.charts import Line, Panel, draw
from aimv2.report.page import render_template
from aimv2.report.predictions import token_texts, visible
from aimv2.report.runs import date_of
from aimv2.report.samples import class_name
from aimv2.train.launch import rate_curve

BINS = 16  # bins of the histogram at most
POINTS = 200  # points of the learning-rate curve
QUALITIES = ((256, 90), (224, 75), (160, 65), (112, 50))  # pixels per side and JPEG quality, tried in turn
COLOURS = 8  # colours of sources; then they repeat
END = "end"  # display of end of text


@dataclass(frozen=True)
class Chip:
    """A token of a caption: text, id, whether it continues the previous word, whether it is a special token."""

    text: str
    number: int
    joined: bool = False
    special: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: label of its range, number of captions, relative height (0..1)."""

    label: str
    count: int
    share: float


@dataclass(frozen=True)
class MixtureRow:
    """A source of the mixture; ``wanted`` and ``share`` are its fractions of the weights and of the drawn samples."""

    name: str
    path: str
    weight: float
    wanted: float
    drawn: int
    share: float


def write_page(drawn: Drawn, out: Path) -> dict[str, Any]:
    """Write the page and return its figures.

    Raises:
        UsageError: it can't be written.
    """
    html = render(drawn)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, html)
    except OSError as error:
        raise UsageError(f"--out {out} can't be written: {error.strerror}") from None
    lengths = text_lengths(drawn)
    return {
        "page": str(out),
        "bytes": len(html.encode()),
        "samples": len(drawn.samples),
        "samples_in_data": drawn.total,
        "model": drawn.encoder.name,
        "sources": [vars(row) for row in mixture(drawn)],
        "prefix_patches": spread([one.prefix for one in drawn.samples]),
        **({"caption_tokens": spread(lengths), "captions_cut": cut(drawn)} if lengths else {}),
        "unreadable": drawn.bad,
        "learning_rate": rate_curve(drawn.config),
    }


def render(drawn: Drawn) -> str:
    """Render the page as HTML; with many samples the images are smaller."""
    context = {
        "title": title_of(drawn.sources),
        "tiles": tiles(drawn),
        "samples": [card(one, drawn) for one in drawn.samples],
        "mixture": mixture(drawn),
        "bars": histogram(text_lengths(drawn)),
        "cut": cut(drawn),
        "most": drawn.config.data.max_tokens,
        "curve": curve(drawn.config),
        "bad": drawn.bad,
        "lead": lead(drawn),
        "made": date_of(),
    }
    return render_template("aimv2.report.browse/templates", "browse.html", context, QUALITIES)


def title_of(sources: list[Source]) -> str:
    """Names of the sources as a title."""
    names = [source.name or Path(source.path).name for source in sources]
    return " + ".join(names) if len(names) <= 4 else f"a mixture of {len(names)} sources"


def tiles(drawn: Drawn) -> list[tuple[str, str]]:
    """(label, figure) pairs for the top of the page."""
    config, shape = drawn.config, drawn.encoder
    if drawn.view.native is None:
        size = f"{shape.image_size} px, {shape.patches} patches"
        step, passes = f"{config.train.batch_size:,} pairs", config.train.steps * config.train.batch_size / drawn.total
    else:
        least, most = (2**power for power in config.data.areas)
        size, step, passes = f"{least} to {most} patches", f"{config.train.patch_budget:,} patches", None
    rows = [("model", shape.name), ("image", size), ("patch", f"{shape.patch_size} px"), ("per step", step)]
    rows += [("steps", f"{config.train.steps:,}"), ("training samples", f"{drawn.total:,}")]
    rows += [("epochs", f"{passes:,.3g}")] if passes is not None else []
    if drawn.tokenizer is not None:
        rows.append(("vocabulary", f"{drawn.tokenizer.vocab_size:,}"))
    return rows


def lead(drawn: Drawn) -> str:
    """How to read the samples."""
    data = drawn.config.data
    text = (
        f"The first {len(drawn.samples)} samples of a run with seed {drawn.config.seed}, in training order and as the model "
        f"receives them: after crop (data.crop_scale {data.crop_scale:g}) and flip (data.flip {data.flip:g}). Clear patches are "
        "the prefix, with bidirectional attention; dimmed ones have causal attention and are predicted, each from those before it."
    )
    if drawn.view.keep < 1:
        text += f" The decoder reads {drawn.view.keep:.0%} of the positions, those with a dot."
    if drawn.tokenizer is not None:
        text += " Below, the drawn caption split into tokens."
    return text


# ---- a sample ----


def card(sample: DrawnSample, drawn: Drawn) -> dict[str, Any]:
    """Template variables of a sample."""
    rows, columns = sample.grid
    source = drawn.sources[sample.source]
    return {
        "key": sample.key,
        "image": sample.image,
        "pixels": max(sample.image.shape[:2]) <= 96,
        "rows": rows,
        "columns": columns,
        "prefix": sample.prefix,
        "patches": rows * columns,
        "rest": rest_path(sample.prefix, rows, columns),
        "edge": edge_path(sample.prefix, rows, columns),
        "dots": []
        if sample.kept is None
        else [(at % columns + 0.5, at // columns + 0.5) for at in sample.kept.tolist()],
        "source": source.name or Path(source.path).name,
        "weight": source.weight,
        "colour": sample.source % COLOURS,
        "label": class_name(sample.label, drawn.classes[sample.source] if drawn.classes else ()),
        "tokens": chips(sample, drawn),
    }


def rest_path(prefix: int, rows: int, columns: int) -> str:
    """SVG path around the patches after a prefix, one unit per patch."""
    row, column = divmod(prefix, columns)
    path = f"M{column} {row}H{columns}V{row + 1}H{column}Z" if column else ""
    first = row + bool(column)
    return path + (f"M0 {first}H{columns}V{rows}H0Z" if first < rows else "")


def edge_path(prefix: int, rows: int, columns: int) -> str:
    """SVG path of the line between a prefix and the patches after it."""
    row, column = divmod(prefix, columns)
    if not column:
        return f"M0 {row}H{columns}" if row < rows else ""
    return f"M0 {row + 1}H{column}V{row}H{columns}"


def chips(sample: DrawnSample, drawn: Drawn) -> list[Chip]:
    """The tokens of a sample's caption."""
    tokenizer = drawn.tokenizer
    if tokenizer is None:
        return []
    out = []
    for place, (number, text) in enumerate(zip(sample.tokens, token_texts(sample.tokens, tokenizer))):
        if number == tokenizer.eos_id:
            out.append(Chip(END, number, special=True))
        elif not text.strip():  # the start of a text, or the first bytes of a character
            out.append(Chip("start" if place == 0 else "…", number, special=True))
        else:
            joined = place > 0 and not text.startswith(" ") and not out[-1].special
            out.append(Chip(visible(text).strip(), number, joined))
    return out


# ---- all samples ----


def text_lengths(drawn: Drawn) -> list[int]:
    """Number of tokens of each drawn caption, end of text included."""
    return [len(one.tokens) for one in drawn.samples if one.tokens]


def cut(drawn: Drawn) -> int:
    """Number of captions with ``data.max_tokens`` tokens, which may have been truncated."""
    return sum(length == drawn.config.data.max_tokens for length in text_lengths(drawn))


def mixture(drawn: Drawn) -> list[MixtureRow]:
    """Weight and drawn samples of each source."""
    counts, total = Counter(one.source for one in drawn.samples), sum(source.weight for source in drawn.sources)
    return [
        MixtureRow(
            source.name or Path(source.path).name,
            source.path,
            source.weight,
            source.weight / total,
            counts[place],
            counts[place] / max(len(drawn.samples), 1),
        )
        for place, source in enumerate(drawn.sources)
    ]


def histogram(lengths: list[int]) -> list[Bar]:
    """Histogram of lengths with at most BINS bins of equal width; [] if there are none."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // BINS)
    counts = Counter((length - low) // width for length in lengths)
    most = max(counts.values())
    bars = []
    for place in range((high - low) // width + 1):
        first = low + place * width
        label = f"{first}" if width == 1 else f"{first}–{first + width - 1}"
        bars.append(Bar(label, counts[place], counts[place] / most))
    return bars


def spread(values: list[int]) -> dict[str, float]:
    """Minimum, mean and maximum; {} if there are none."""
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)} if values else {}


def curve(config: Config) -> str:
    """The learning rate over the run, as SVG."""
    points = rate_curve(config, POINTS)
    line = Line("", [point["step"] for point in points], [point["lr"] for point in points])
    return draw(Panel("Learning rate", [line]), config.train.steps).svg
