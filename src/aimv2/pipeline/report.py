"""The report of a chain: a row per stage, and figures with their mean and interval over the seeds."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aimv2.evals.scores import over_seeds
from aimv2.io import write_aside
from aimv2.pipeline.read import Chain
from aimv2.pipeline.state import DONE, Status
from aimv2.tables import TextTable
from aimv2.tables import figure as shown

FORMAT = "aimv2 chain report 1"
# the default figures: of a run (those that its objective has), and of an evaluation
OF_A_RUN = ("probe_top1", "val_top1", "val_text_loss", "val_pixel_loss", "caption_exact_match")
OF_A_RESULT = (
    "top1", "text_to_image.R@1", "image_to_text.R@1", "miou", "rmse", "cider", "bleu4", "exact_match",
)  # fmt: skip
SHOWN = 3  # figures in a stage's row


def make_report(chain: Chain, found: list[Status]) -> dict[str, Any]:
    """Rows of the stages and of the figures; ``missing``: figures of the chain's report that no stage has."""
    rows = []
    for one in found:
        job, done = one.job, one.state == DONE
        default = dict(default_figures(one.record["result"])) if done else {}
        named = dict(named_figures(chain, one)) if done else {}
        rows.append(
            {
                "stage": job.stage.name,
                "title": job.stage.title,
                "seed": job.seed,
                "verb": job.stage.verb,
                "state": one.state,
                "why": one.why,
                "seconds": one.record.get("seconds"),
                "folder": str(job.folder),
                "command": ["aimv2", *job.command],
                "figures": {**named, **default},
                "named": named if chain.report else default,
            }
        )
    figures = list(figure_rows(chain, rows))
    wanted = {title for title in chain.report if not any(row["title"] == title for row in figures)}
    finished = all(one.state == DONE for one in found)
    for row in rows:
        del row["named"]
    return {
        "format": FORMAT,
        "chain": chain.path,
        "out": str(chain.out),
        "seeds": list(chain.seeds),
        "report": list(chain.report),
        "finished": finished,
        "stages": rows,
        "figures": figures,
        "missing": [title for title in chain.report if title in wanted] if finished else [],
        "names": {title: name for title, (_, name) in chain.report.items()},
    }


def figure(result: dict[str, Any], name: str) -> float | None:
    """A number of a result by its dotted name, from its ``figures`` or from the result itself."""
    for part in (result.get("figures"), result):
        value: Any = part
        for step in name.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def default_figures(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The headline figures of a command's result; none of one that measures nothing."""
    for name in OF_A_RESULT if "protocol" in result else OF_A_RUN:
        value = figure(result, name)
        if value is not None:
            yield name, value


def named_figures(chain: Chain, one: Status) -> Iterator[tuple[str, float]]:
    """The figures that ``report`` names for a stage, by their titles."""
    for title, (stage, name) in chain.report.items():
        value = figure(one.record["result"], name) if stage in ("", one.job.stage.name) else None
        if value is not None:
            yield title, value


def figure_rows(chain: Chain, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row per stage and figure: the values by seed, their mean, and its 95% interval by Student's t."""
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        for title in dict.fromkeys(title for row in mine for title in row["named"]):
            values = {row["seed"]: row["named"][title] for row in mine if title in row["named"]}
            by_seed = {"shared" if seed is None else str(seed): value for seed, value in values.items()}
            yield {"title": title, "stage": stage, "by_seed": by_seed, **over_seeds(list(values.values()))}


def write(report: dict[str, Any], out: Path) -> None:
    """report.json and report.md in the chain's folder."""
    write_aside(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_aside(out / "report.md", as_markdown(report))


# ---- as text ----


def stage_cells(row: dict[str, Any], names: dict[str, str]) -> list[str]:
    """A row of the table of stages."""
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
    figures = [f"{name} {shown(names.get(name, name), value)}" for name, value in list(row["figures"].items())[:SHOWN]]
    name = row["stage"] + (f": {row['title']}" if row["title"] else "")
    seed = "" if row["seed"] is None else str(row["seed"])
    return [name, seed, row["verb"], row["state"], seconds, ", ".join(figures) or row["why"]]


def figure_cells(row: dict[str, Any], names: dict[str, str]) -> list[str]:
    """A row of the table of figures."""
    name = names.get(row["title"], row["title"])
    between = "" if row["low"] is None else f"{shown(name, row['low'])} to {shown(name, row['high'])}"
    return [row["stage"], row["title"], shown(name, row["mean"]), between, str(len(row["by_seed"]))]


def tables(report: dict[str, Any]) -> Iterator[TextTable]:
    """Stages; figures if there are several seeds or the chain names some."""
    right, rows = ("seed", "s", "mean", "seeds"), [stage_cells(row, report["names"]) for row in report["stages"]]
    yield TextTable(["stage", "seed", "verb", "state", "s", "figures"], rows, right, whole=("state",))
    if report["figures"] and (report["report"] or any(len(row["by_seed"]) > 1 for row in report["figures"])):
        rows = [figure_cells(row, report["names"]) for row in report["figures"]]
        yield TextTable(["stage", "figure", "mean", "95% interval", "seeds"], rows, right)


def closing(report: dict[str, Any]) -> list[str]:
    """The lines below the tables."""
    lines = [f"no stage has the figure '{title}'" for title in report["missing"]]
    if any(row["low"] is not None for row in report["figures"]):
        lines.append("intervals: 95% of the mean over the seeds, Student's t")
    return lines


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    parts = [f"# {report['chain']}", *(table.to_markdown() for table in tables(report)), "\n".join(closing(report))]
    return "\n\n".join(parts).rstrip() + "\n"


def as_text(report: dict[str, Any], width: int = 80) -> str:
    """The report as tables within ``width`` columns."""
    written = [f"written: {report['out']}/report.md, report.json"] if report["finished"] else []
    lines = [textwrap.fill(line, width) for line in [*closing(report), *written]]
    parts = [*(table.to_text(width) for table in tables(report)), "\n".join(lines)]
    return "\n\n".join(parts).rstrip()
