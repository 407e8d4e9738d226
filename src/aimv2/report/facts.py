"""The sections of a report that need no model: headlines, curves, results with intervals, configuration, machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aimv2.evals.compare import METRICS
from aimv2.evals.scores import wilson
from aimv2.report.blocks import Section, Table
from aimv2.report.charts import Panel, draw, title_of
from aimv2.report.runs import Run, about, config_rows, date_of, differences, without_places
from aimv2.tables import figure, percent

# keys of the summary and their labels, in display order
HEADLINES = {
    "caption_exact_match": "captions exactly right",
    "probe_top1": "attentive probe, top-1",
    "val_top1": "top-1, held out",
    "val_image_to_text": "captions found by images",
    "val_text_to_image": "images found by captions",
    "val_text_loss": "text loss, held out, nats per token",
    "val_pixel_loss": "pixel loss, held out, mean squared error",
    "val_feature_loss": "feature loss, held out",
    "val_contrastive_loss": "contrastive loss, held out, nats per pair",
}


def number(key: str, value: float) -> str:
    """Format a figure: a fraction in percent, seconds in words, a loss with three digits, a count with thousands separators."""
    if key.endswith("seconds"):
        return duration(value)
    if isinstance(value, int) or abs(value) >= 1e3:
        return f"{value:,.0f}"
    return figure(key, value, ".3f" if abs(value) >= 1e-3 else ".3g")


def newest(run: Run) -> dict[str, float]:
    """The last value of every figure; the summary's takes precedence."""
    last = {key: value for line in run.metrics for key, value in line.items()} | run.summary
    return {key: value for key, value in last.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def headlines(run: Run) -> list[tuple[str, str]]:
    """(label, figure) pairs for the top of the page."""
    last = newest(run)
    rows = [("step", f"{run.step:,} of {run.config.train.steps:,}")]
    rows += [(name, number(key, last[key])) for key, name in HEADLINES.items() if key in last]
    if "parameters" in last:
        rows.append(("parameters", f"{last['parameters'] / 1e6:,.1f}M"))
    if last.get("train_seconds"):
        rows.append(("training took", duration(last["train_seconds"])))
    if len(rows) < 4 and "loss" in last:
        rows.append(("loss", number("loss", last["loss"])))
    if "pairs_per_s" in last:
        rows.append(("pairs per second", f"{last['pairs_per_s']:,.0f}"))
    return rows


def duration(seconds: float) -> str:
    """Format seconds: 2 d 3 h, 1 h 02 min, 3 min 20 s, 45 s."""
    whole = round(seconds)
    if whole >= 2 * 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def state_of(run: Run) -> str:
    """Progress of the run, in words."""
    if run.finished:
        return f"finished {date_of(run.summary.get('finished', ''))}".strip()
    return f"at step {run.step:,} of {run.config.train.steps:,}, as of {date_of()}"


def curve_section(runs: Sequence[Run], panels: Sequence[Panel]) -> Section:
    """All curves."""
    if not panels:
        return Section("curves", "Curves", missing="no line of metrics yet")
    lead = "Means over the steps between two log lines; dots are held-out figures."
    if len(runs) > 1:
        lead = "One colour per run. " + lead
    last = max(run.step for run in runs)
    return Section("curves", "Curves", lead, [draw(panel, last) for panel in panels])


def result_section(run: Run) -> Section:
    """Evaluation results: the run's own figures, and result files within its folder."""
    rows = [row for row in own_results(run)]
    for place, result in run.results:
        rows += result_rows(place, result)
    if not rows:
        why = "no results: the run is not finished, and its folder has no result.json of an evaluation command"
        return Section("results", "Results", missing=why)
    lead = (
        "Figures with their 95% interval: sampling error of the test images, or the spread over seeds where a result states it. "
        "Baselines are in the last column."
    )
    return Section("results", "Results", lead, [Table(("metric", "figure", "95% interval", "compared with"), rows)])


def own_results(run: Run) -> list[Sequence[str]]:
    """Rows of the run's own summary."""
    summary, rows = run.summary, list[Sequence[str]]()
    images = summary.get("probe_test_images")
    if (top1 := summary.get("probe_top1")) is not None:
        compared = baseline("untrained encoder", summary.get("probe_top1_random"), images)
        name = "attentive probe on the frozen encoder, top-1"
        rows.append((name, percent(top1), interval(top1, images), compared))
    if (exact := summary.get("caption_exact_match")) is not None:
        rows.append(
            ("held-out captions, exact match", percent(exact), interval(exact, summary.get("caption_images")), "")
        )
    ngrams = [
        f"{name} {summary[key]:.3f}"
        for key, name in (("val_text_loss_unigram", "word frequencies"), ("val_text_loss_bigram", "bigrams"))
        if isinstance(summary.get(key), int | float)
    ]
    for key in [key for key in summary if key.startswith("val_") and isinstance(summary[key], int | float)]:
        if not key.endswith(("_unigram", "_bigram")):
            compared = "; ".join(ngrams) if key == "val_text_loss" else ""
            rows.append((title_of(key), number(key, summary[key]), "", compared))
    return rows


def interval(fraction: float, images: int | None) -> str:
    """Wilson's 95% interval in percent; "" if the number of images is unknown."""
    if not images:
        return ""
    low, high = wilson(round(fraction * images), images)
    return f"{percent(low)} to {percent(high)}"


def baseline(name: str, fraction: float | None, images: int | None) -> str:
    if fraction is None:
        return ""
    between = interval(fraction, images)
    return f"{name} {percent(fraction)}" + (f" ({between})" if between else "")


def result_rows(place: str, result: dict[str, Any]) -> list[Sequence[str]]:
    """Rows of one result file, with its baselines."""
    figures, data = result["figures"], result.get("data", {})
    name = f"{result.get('verb', place)} on {without_places(str(data.get('dataset') or data.get('name') or place))}"
    rows: list[Sequence[str]] = []
    for inner in ("", "image_to_text", "text_to_image"):
        part = figures.get(inner, {}) if inner else figures
        for key, value in part.items():
            if not isinstance(value, float):
                continue
            path = (inner, key) if inner else (key,)
            low, high = part.get(f"{key}_interval") or (None, None)
            between = "" if low is None or high is None else f"{number(key, low)} to {number(key, high)}"
            others = [
                f"{other} {number(key, found[key])}"
                for other, found in (figures.get("baselines") or {}).items()
                if not inner and isinstance(found, dict) and isinstance(found.get(key), float)
            ]
            label = (
                METRICS[path][0].removesuffix(", %") if path in METRICS else f"{inner.replace('_', ' ')} {key}".strip()
            )
            rows.append((f"{name}: {label}", number(key, value), between, "; ".join(others)))
    return rows


def config_section(run: Run) -> Section:
    """Non-default values, then all values, collapsed."""
    rows = config_rows(run.config)
    changed = [(key, value) for key, value, other in rows if other]
    lead = f"{len(changed)} of {len(rows)} values differ from the default; config.yaml in the run folder lists all."
    full = Table(
        ("key", "value"),
        [(key, value) for key, value, _ in rows],
        frozenset(at for at, (_, _, other) in enumerate(rows) if other),
        folded="all values (changed ones marked)",
    )
    return Section("configuration", "Configuration", lead, [Table(("changed", "value"), changed), full])


def machine_section(run: Run) -> Section:
    """Machine, versions and command."""
    return Section("machine", "Machine and code", "", [Table((), about(run))])


def difference_section(runs: Sequence[Run]) -> Section:
    """Configuration keys whose values differ."""
    rows = [(key, *values) for key, values in differences(list(runs))]
    if not rows:
        return Section("differences", "Differences in configuration", missing="the configurations are the same")
    lead = "Every key whose value differs between the runs (except their folders)."
    head = ("key", *(run.name for run in runs))
    return Section("differences", "Differences in configuration", lead, [Table(head, rows)])


def figure_section(runs: Sequence[Run]) -> Section:
    """The newest value of each figure, one column per run."""
    last = [newest(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in last for key in one) if key not in ("step", "seed", "seconds")]
    rows = [("step", *(f"{run.step:,} of {run.config.train.steps:,}" for run in runs))]
    rows += [(title_of(key), *(number(key, one[key]) if key in one else "–" for one in last)) for key in keys]
    return Section("figures", "Figures", "The newest value of each.", [Table(("", *(run.name for run in runs)), rows)])
