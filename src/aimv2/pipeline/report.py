"""The report of a chain: a row a stage, and figures with their mean and interval over the seeds."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aimv2.evals.scores import over_seeds
from aimv2.io import write_aside
from aimv2.pipeline.read import Chain
from aimv2.pipeline.state import DONE, Status

FORMAT = "aimv2 chain report 1"
# the usual figures: of a run (those that its objective has), and of what measures a frozen encoder
OF_A_RUN = ("probe_top1", "val_top1", "val_text_loss", "val_pixel_loss", "caption_exact_match")
OF_A_RESULT = (
    "top1", "text_to_image.R@1", "image_to_text.R@1", "miou", "rmse", "cider", "bleu4", "exact_match",
)  # fmt: skip
SHOWN = 3  # figures in a stage's row


def make_report(chain: Chain, found: list[Status]) -> dict[str, Any]:
    """Rows of the stages and of the figures; ``missing``: figures that were asked for and that no stage has."""
    rows = []
    for one in found:
        job, done = one.job, one.state == DONE
        usual = dict(usual_figures(one.record["result"])) if done else {}
        asked = dict(asked_figures(chain, one)) if done else {}
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
                "figures": {**asked, **usual},
                "asked": asked if chain.report else usual,
            }
        )
    figures = list(figure_rows(chain, rows))
    wanted = {title for title in chain.report if not any(row["title"] == title for row in figures)}
    finished = all(one.state == DONE for one in found)
    for row in rows:
        del row["asked"]
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


def usual_figures(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The headline figures of a verb's result; none of one that measures nothing."""
    for name in OF_A_RESULT if "protocol" in result else OF_A_RUN:
        value = figure(result, name)
        if value is not None:
            yield name, value


def asked_figures(chain: Chain, one: Status) -> Iterator[tuple[str, float]]:
    """The figures that ``report`` names for a stage, by their titles."""
    for title, (stage, name) in chain.report.items():
        value = figure(one.record["result"], name) if stage in ("", one.job.stage.name) else None
        if value is not None:
            yield title, value


def figure_rows(chain: Chain, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row a stage and figure: the values by seed, their mean, and its 95% interval by Student's t."""
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        for title in dict.fromkeys(title for row in mine for title in row["asked"]):
            values = {row["seed"]: row["asked"][title] for row in mine if title in row["asked"]}
            by_seed = {"shared" if seed is None else str(seed): value for seed, value in values.items()}
            yield {"title": title, "stage": stage, "by_seed": by_seed, **over_seeds(list(values.values()))}


def write(told: dict[str, Any], out: Path) -> None:
    """report.json and report.md in the chain's folder."""
    write_aside(out / "report.json", json.dumps(told, indent=1) + "\n")
    write_aside(out / "report.md", as_markdown(told))


# ---- as text ----


def stage_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table of stages."""
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
    figures = [f"{name} {value:.4f}" for name, value in list(row["figures"].items())[:SHOWN]]
    name = row["stage"] + (f": {row['title']}" if row["title"] else "")
    seed = "" if row["seed"] is None else str(row["seed"])
    return [name, seed, row["verb"], row["state"], seconds, ", ".join(figures) or row["why"]]


def figure_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table of figures."""
    between = "" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
    return [row["stage"], row["title"], f"{row['mean']:.4f}", between, str(len(row["by_seed"]))]


STAGE_HEADS = ["stage", "seed", "verb", "state", "s", "figures"]
FIGURE_HEADS = ["stage", "figure", "mean", "95% interval", "seeds"]


def tables(told: dict[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Heads and rows; the figures where there are several seeds or some were asked for."""
    yield STAGE_HEADS, [stage_cells(row) for row in told["stages"]]
    if told["figures"] and (told["report"] or any(len(row["by_seed"]) > 1 for row in told["figures"])):
        yield FIGURE_HEADS, [figure_cells(row) for row in told["figures"]]


def closing(told: dict[str, Any]) -> list[str]:
    """What stands below the tables."""
    lines = [f"no stage has the figure '{title}'" for title in told["missing"]]
    if any(row["low"] is not None for row in told["figures"]):
        lines.append("intervals: 95% of the mean over the seeds, Student's t")
    return lines


def as_markdown(told: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    lines = [f"# {told['chain']}", ""]
    for heads, rows in tables(told):
        cells = [heads, ["---"] * len(heads), *([c.replace("|", "\\|") for c in row] for row in rows)]
        lines += [f"| {' | '.join(row)} |" for row in cells] + [""]
    return "\n".join(lines + closing(told)).rstrip() + "\n"


def as_text(told: dict[str, Any], width: int = 80) -> str:
    """The report as tables within ``width`` columns."""
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    for heads, rows in tables(told):
        table = Table(box=None, pad_edge=False)
        for head in heads:
            numbers = head in ("seed", "s", "mean", "seeds")
            table.add_column(head, justify="right" if numbers else "left", overflow="fold", no_wrap=head == "state")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for line in [*closing(told), *([f"written: {told['out']}/report.md, report.json"] if told["finished"] else [])]:
        console.print(line)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()
