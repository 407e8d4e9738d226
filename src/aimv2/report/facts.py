"""What a report says of runs without a model: head figures, curves, results with intervals, configuration, machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aimv2.evals.scores import wilson
from aimv2.report.blocks import Section, Table
from aimv2.report.charts import Panel, draw, title_of
from aimv2.report.runs import Run, about, config_rows, differences

SHARES = ("top1", "exact_match", "mfu", "image_to_text", "text_to_image")  # shown in percent
# of the summary, in this order, under these names
HEADLINES = {
    "caption_exact_match": "captions exactly right",
    "probe_top1": "attentive probe, top-1",
    "val_top1": "top-1, held out",
    "val_image_to_text": "captions found by images",
    "val_text_to_image": "images found by captions",
    "val_text_loss": "text loss, held out",
    "val_pixel_loss": "pixel loss, held out",
    "val_feature_loss": "feature loss, held out",
    "val_contrastive_loss": "contrastive loss, held out",
}


def number(key: str, value: float) -> str:
    """A figure as text: a share in percent, a loss with three digits, a count with its thousands."""
    if isinstance(value, int) or abs(value) >= 1e3:
        return f"{value:,.0f}"
    if any(part in key for part in SHARES) and 0 <= value <= 1:
        return f"{value:.1%}"
    return f"{value:.3f}" if abs(value) >= 1e-3 else f"{value:.3g}"


def newest(run: Run) -> dict[str, float]:
    """The last value of every figure, the summary's first."""
    told = {key: value for line in run.metrics for key, value in line.items()}
    told |= run.summary
    return {key: value for key, value in told.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def headlines(run: Run) -> list[tuple[str, str]]:
    """(what, figure) for the head of the page."""
    told = newest(run)
    rows = [("step", f"{run.step:,} of {run.config.train.steps:,}")]
    rows += [(name, number(key, told[key])) for key, name in HEADLINES.items() if key in told]
    if "parameters" in told:
        rows.append(("parameters", f"{told['parameters'] / 1e6:,.1f}M"))
    if told.get("train_seconds"):
        rows.append(("training took", duration(told["train_seconds"])))
    if len(rows) < 4 and "loss" in told:
        rows.append(("loss", number("loss", told["loss"])))
    if "pairs_per_s" in told:
        rows.append(("pairs a second", f"{told['pairs_per_s']:,.0f}"))
    return rows


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 45 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def state_of(run: Run) -> str:
    """How far the run is, in words."""
    if run.finished:
        return f"finished {run.summary.get('finished', '')}".strip()
    return f"at step {run.step:,} of {run.config.train.steps:,}, seen {time.strftime('%Y-%m-%d %H:%M:%S')}"


def curve_section(runs: Sequence[Run], panels: Sequence[Panel]) -> Section:
    """All curves."""
    if not panels:
        return Section("curves", "Curves", missing="no line of metrics yet")
    lead = (
        "Means over the steps between two lines of metrics; dots are held-out figures, which no training step has seen."
    )
    if len(runs) > 1:
        lead = "One colour a run. " + lead
    last = max(run.step for run in runs)
    return Section("curves", "Curves", lead, [draw(panel, last) for panel in panels])


def result_section(run: Run) -> Section:
    """What was measured: the run's own figures, and results of measuring verbs within its folder."""
    rows = [row for row in own_results(run)]
    for place, result in run.results:
        rows += result_rows(place, result)
    if not rows:
        why = "nothing was measured: the run is not finished, and its folder holds no result.json of a measuring verb"
        return Section("results", "Results", missing=why)
    lead = (
        "Shares with their 95% interval: what the number of test images leaves open, or the spread over seeds where a result "
        "says so. Baselines stand beside what they are to be compared with."
    )
    return Section("results", "Results", lead, [Table(("what", "figure", "95% interval", "beside it"), rows)])


def own_results(run: Run) -> list[Sequence[str]]:
    """Rows of the run's own summary."""
    told, rows = run.summary, list[Sequence[str]]()
    images = told.get("probe_test_images")
    if "probe_top1" in told:
        rows.append(
            (
                "attentive probe on the frozen encoder, top-1",
                f"{told['probe_top1']:.1%}",
                spread(told["probe_top1"], images),
                beside("untrained encoder", told.get("probe_top1_random"), images),
            )
        )
    if "caption_exact_match" in told:
        rows.append(
            (
                "held-out captions word for word",
                f"{told['caption_exact_match']:.1%}",
                spread(told["caption_exact_match"], told.get("caption_images")),
                "",
            )
        )
    yardsticks = [
        f"{name} {told[key]:.3f}"
        for key, name in (("val_text_loss_unigram", "word frequencies"), ("val_text_loss_bigram", "bigrams"))
        if isinstance(told.get(key), int | float)
    ]
    for key in [key for key in told if key.startswith("val_") and isinstance(told[key], int | float)]:
        if not key.endswith(("_unigram", "_bigram")):
            more = "; ".join(yardsticks) if key == "val_text_loss" else ""
            rows.append((title_of(key), number(key, told[key]), "", more))
    return rows


def spread(share: float, images: int | None) -> str:
    """Wilson's interval in percent; nothing where the number of images is not told."""
    if not images:
        return ""
    low, high = wilson(round(share * images), images)
    return f"{low:.1%} to {high:.1%}"


def beside(name: str, share: float | None, images: int | None) -> str:
    if share is None:
        return ""
    between = spread(share, images)
    return f"{name} {share:.1%}" + (f" ({between})" if between else "")


def result_rows(place: str, result: dict[str, Any]) -> list[Sequence[str]]:
    """Rows of one result file: its figures, with those of its baselines."""
    figures, data = result["figures"], result.get("data", {})
    name = f"{result.get('verb', place)} on {data.get('dataset') or data.get('name') or place}"
    rows: list[Sequence[str]] = []
    for inner in ("", "image_to_text", "text_to_image"):
        part = figures.get(inner, {}) if inner else figures
        for key, value in part.items():
            if not isinstance(value, float):
                continue
            low, high = part.get(f"{key}_interval") or (None, None)
            between = "" if low is None or high is None else f"{number(key, low)} to {number(key, high)}"
            others = [
                f"{other} {number(key, found[key])}"
                for other, found in (figures.get("baselines") or {}).items()
                if not inner and isinstance(found, dict) and isinstance(found.get(key), float)
            ]
            label = f"{inner.replace('_', ' ')} {key}".strip()
            rows.append((f"{name}: {label}", number(key, value), between, "; ".join(others)))
    return rows


def config_section(run: Run) -> Section:
    """Every value; those that are not the default first, the rest folded."""
    rows = config_rows(run.config)
    changed = [(key, value) for key, value, other in rows if other]
    lead = f"{len(changed)} of {len(rows)} values are not the default; config.yaml in the run folder holds them all."
    whole = Table(
        ("key", "value"),
        [(key, value) for key, value, _ in rows],
        frozenset(at for at, (_, _, other) in enumerate(rows) if other),
        folded="all values (changed ones marked)",
    )
    return Section("configuration", "Configuration", lead, [Table(("changed", "value"), changed), whole])


def machine_section(run: Run) -> Section:
    """Where and with what."""
    return Section("machine", "Machine and code", "", [Table((), about(run))])


def difference_section(runs: Sequence[Run]) -> Section:
    """Keys whose values differ."""
    rows = [(key, *values) for key, values in differences(list(runs))]
    if not rows:
        return Section("differences", "Differences in configuration", missing="the configurations are the same")
    lead = "Every key whose value is not the same in all runs (their folders aside)."
    head = ("key", *(run.name for run in runs))
    return Section("differences", "Differences in configuration", lead, [Table(head, rows)])


def figure_section(runs: Sequence[Run]) -> Section:
    """The newest value of each figure, run beside run."""
    told = [newest(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in told for key in one) if key not in ("step", "seed", "seconds")]
    rows = [("step", *(f"{run.step:,} of {run.config.train.steps:,}" for run in runs))]
    rows += [(key, *(number(key, one[key]) if key in one else "–" for one in told)) for key in keys]
    return Section("figures", "Figures", "The newest value of each.", [Table(("", *(run.name for run in runs)), rows)])
