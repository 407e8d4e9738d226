"""Training curves, as SVG in the page's colours and as one PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from aimv2.report.blocks import Chart
from aimv2.report.runs import Run
from aimv2.tables import FRACTIONS

WIDTH, HEIGHT = 520, 250  # SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 26, 10, 42  # LEFT: at least, more for long labels
LETTER = 9.6  # width of a digit of a tick label where it is largest, on a phone
POINTS = 400  # points per curve; longer ones are averaged
WIDE = 20.0  # ratio of values above which the axis is logarithmic
COLOURS = 8  # line colours in the page's style; then they repeat


@dataclass
class Line:
    """A curve: ``style`` is train (a line), held-out (a line with dots) or level (one value, dashed)."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    style: str = "train"


@dataclass
class Panel:
    """Curves on one pair of axes.

    Attributes:
        title: what is drawn, with its unit.
        lines: the curves.
        log: logarithmic axis if the values span more than WIDE.
        note: a line below.
    """

    title: str
    lines: list[Line] = field(default_factory=list)
    log: bool = False
    note: str = ""


# ---- which curves ----


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """Panels of runs: each loss with its validation, other held-out figures, learning rate, gradient norm, throughput."""
    keys = list(dict.fromkeys(key for run in runs for key in run.figures()))
    losses = [key for key in keys if key.endswith("loss") and not key.startswith("val_")]
    taken = set(losses)
    panels = []
    for key in losses:
        if key == "loss" and len(losses) == 2 and same_shape(runs, *losses):
            continue  # of one term only: that term's curve is drawn
        held = [name for name in keys if name == f"val_{key}" or (len(runs) == 1 and name.startswith(f"val_{key}_"))]
        taken |= {name for name in keys if name.startswith(f"val_{key}")}
        panels.append(_panel(runs, [key, *held], title_of(key), log=True))
        panels[-1].lines += _levels(runs, f"val_{key}", panels[-1])
    for key in (key for key in keys if key.startswith("val_") and key not in taken):
        panels.append(_panel(runs, [key], title_of(key)))
    for key in ("lr", "grad_norm", "pairs_per_s", "tokens_per_s", "mfu", "data_wait", "memory_gb"):
        if key in SPEEDS[1:] and same_shape(runs, SPEEDS[0], key):
            continue
        if key in keys:
            panels.append(_panel(runs, [key], title_of(key), log=key == "grad_norm"))
        if key == SPEEDS[0] and key in keys:
            panels[-1].note = other_speeds(runs)
    if len(runs) == 1 and runs[0].config.optim.clip:
        clip = runs[0].config.optim.clip
        for panel in panels:
            if panel.title == title_of("grad_norm"):
                panel.lines.append(_level(f"clipped above {clip:g}", clip, panel, 3))
    return [panel for panel in panels if any(line.values for line in panel.lines)]


SPEEDS = ("pairs_per_s", "tokens_per_s", "mfu")
PROPORTIONAL = 0.03  # curves whose ratio varies by less look the same


def same_shape(runs: Sequence[Run], one: str, other: str) -> bool:
    """Whether two figures give the same curve, up to their units: one ratio over all steps of all runs."""
    ratios = []
    for run in runs:
        (steps, values), (others, compared) = run.series(one), run.series(other)
        if steps != others or not all(values) or not all(map(math.isfinite, [*values, *compared])):
            return False
        ratios += [b / a for a, b in zip(values, compared)]
    return bool(ratios) and max(ratios) - min(ratios) <= PROPORTIONAL * abs(max(ratios))


def other_speeds(runs: Sequence[Run]) -> str:
    """The newest throughput in the units whose curves are not drawn, as they are the same."""
    said = []
    for run in runs:
        parts = [
            f"{run.series(key)[1][-1]:{form}} {unit}"
            for key, form, unit in (
                ("tokens_per_s", ",.0f", "image and text positions per second"),
                ("mfu", ".1%", "MFU"),
            )
            if same_shape(runs, SPEEDS[0], key)
        ]
        if parts:
            said.append(
                (f"{run.name}: " if len(runs) > 1 else "The same curve in other units, newest: ") + ", ".join(parts)
            )
    return "; ".join(said)


TITLES = {
    "loss": "Loss (weighted sum)",
    "text_loss": "Text loss, nats per token",
    "pixel_loss": "Pixel loss, mean squared error of normalised patches",
    "class_loss": "Class loss, nats per image",
    "feature_loss": "Feature loss, to the teacher",
    "contrastive_loss": "Contrastive loss, nats per pair",
    "val_perplexity": "Perplexity of held-out captions",
    "val_top1": "Top-1 of held-out images",
    "val_knn_top1": "kNN top-1 of held-out images",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "pairs_per_s": "Throughput, pairs per second",
    "tokens_per_s": "Throughput, image and text positions per second",
    "mfu": "Model FLOP utilisation, MFU",
    "data_wait": "Waiting for data, fraction of the time",
    "memory_gb": "Memory, GB",
}


def title_of(key: str) -> str:
    """Display title of a metric."""
    if match := re.fullmatch(r"(val_\w+_loss)_(\d+)", key):
        return f"{title_of(match[1])}, prefix {match[2]}%"
    if (trained := key.removeprefix("val_")) in TITLES and key not in TITLES:
        return f"{TITLES[trained]}, held out"
    return TITLES.get(key) or key.removeprefix("val_").replace("_", " ").capitalize() + (
        " (held out)" if key.startswith("val_") else ""
    )


def _panel(runs: Sequence[Run], keys: Sequence[str], title: str, log: bool = False) -> Panel:
    panel = Panel(f"{title}, %" if FRACTIONS.search(keys[0]) else title, log=log)
    for number, run in enumerate(runs):
        for place, key in enumerate(keys):
            steps, values = run.series(key)
            held = key.startswith("val_")
            label = ("held out" if held else "training") if len(keys) > 1 else ""
            if held and place > 1:
                label = f"held out, prefix {key.rpartition('_')[2]}%"
            if len(runs) > 1:
                label = f"{run.name}{', held out' if held and len(keys) > 1 else ''}"
            if FRACTIONS.search(key):
                values = [100 * value for value in values]
            if values:
                colour = place if len(runs) == 1 else number
                panel.lines.append(Line(label, steps, values, colour % COLOURS, "held-out" if held else "train"))
    return panel


def _levels(runs: Sequence[Run], key: str, panel: Panel) -> list[Line]:
    """Losses of unigram and bigram baselines of the training captions, where the run has them."""
    summary = runs[0].summary if len(runs) == 1 else {}
    names = {f"{key}_unigram": "word frequencies", f"{key}_bigram": "bigrams"}
    return [
        _level(label, summary[name], panel, 3 + place)
        for place, (name, label) in enumerate(names.items())
        if isinstance(summary.get(name), int | float)
    ]


def _level(label: str, value: float, panel: Panel, colour: int) -> Line:
    last = max((step for line in panel.lines for step in line.steps), default=1)
    return Line(label, [0, last], [value, value], colour, "level")


# ---- as SVG ----


def draw(panel: Panel, last: int) -> Chart:
    """Draw a panel as SVG, steps 0 to ``last``; colours are CSS classes, so that it follows light and dark mode."""
    lines = [_thin(line) for line in panel.lines]
    values = [v for line in lines for v in line.values if math.isfinite(v)]
    log = panel.log and bool(values) and min(values) > 0 and max(values) > WIDE * min(values)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if not log:
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low < 0.4 * high else low - room), high + room
    last = max(last, 1)
    ticks = [(tick, _short(tick)) for tick in (_log_ticks(low, high) if log else _ticks(low, high, 5))]
    left = max([LEFT, *(6 + LETTER * len(label) for _, label in ticks)])

    def x_of(step: float) -> float:
        return left + (WIDTH - left - RIGHT) * step / last

    def y_of(value: float) -> float:
        scaled = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * scaled

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}">']
    for tick, label in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{left:g}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(0, last, min(6, last)):
        parts.append(
            f'<text class="tick" x="{x_of(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    if log:
        parts.append(f'<text class="tick" x="4" y="{HEIGHT - 4}">logarithmic</text>')
    for line in lines:
        parts.append(_path(line, x_of, y_of))
    parts.append("</svg>")
    named = [line for line in lines if line.label]
    keys = "".join(
        f'<span><i class="key c{line.colour} {line.style}"></i>{escape(line.label)}</span>' for line in named
    )
    below = f'<p class="legend">{keys}</p>' if keys else ""
    below += f'<p class="legend">{escape(panel.note)}</p>' if panel.note else ""
    return Chart(panel.title, "".join(parts) + below)


def _path(line: Line, x_of: object, y_of: object) -> str:
    assert callable(x_of) and callable(y_of)
    points = [(x_of(s), y_of(v)) for s, v in zip(line.steps, line.values) if math.isfinite(v)]
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    tip = f"<title>{escape(line.label)}</title>" if line.label else ""
    out = f'<polyline class="curve c{line.colour} {line.style}" points="{text}">{tip}</polyline>'
    if line.style == "held-out" or len(points) == 1:
        dots = points if len(points) <= 60 else []
        for (x, y), step, value in zip(dots, line.steps, line.values):
            out += f'<circle class="dot c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
            out += f"<title>step {step:g}: {value:.4g}</title></circle>"
    return out


def _thin(line: Line) -> Line:
    """Average to at most POINTS points."""
    count = len(line.values)
    if count <= POINTS:
        return line
    edges = [round(at * count / POINTS) for at in range(POINTS + 1)]
    parts = list(pairwise(edges))
    steps = [sum(line.steps[a:b]) / (b - a) for a, b in parts]
    return Line(line.label, steps, [sum(line.values[a:b]) / (b - a) for a, b in parts], line.colour, line.style)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """About ``wanted`` round values within the range."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    begin = math.ceil(low / step - 1e-9)
    return [round(at * step, 12) for at in range(begin, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return ticks if len(ticks) <= 7 else [t for t in ticks if str(f"{t:e}")[0] == "1"]


def _short(value: float) -> str:
    """Tick label: 1500000 is 1.5M."""
    if value and abs(value) < 1e-3:
        digits, power = f"{value:e}".split("e")
        return f"{float(digits):.6g}e{int(power)}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):g}{letter}"
    return f"{value:.10g}"


# ---- as PNG ----


def draw_png(panels: Sequence[Panel], file: Path) -> None:
    """Draw all panels as one PNG, for documents."""
    from matplotlib.figure import Figure

    from aimv2.plots import own_style

    with own_style():
        columns = 2 if len(panels) > 1 else 1
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(5 * columns, 2.6 * rows), layout="constrained")
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            for line in panel.lines:
                form = {"train": "-", "held-out": "o-", "level": "--"}[line.style]
                label = line.label or None
                axes.plot(
                    line.steps, line.values, form, color=f"C{line.colour}", label=label, linewidth=1.3, markersize=3
                )
            values = [v for line in panel.lines for v in line.values if math.isfinite(v)]
            if panel.log and values and min(values) > 0 and max(values) > WIDE * min(values):
                axes.set_yscale("log")
            axes.set_title(panel.title, fontsize=9)
            axes.set_xlabel("step", fontsize=7)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            if any(line.label for line in panel.lines):
                axes.legend(fontsize=7)
        figure.savefig(file, dpi=110)
