"""``aimv2 report``: a report of one run or a comparison of several, written once or repeatedly while a run trains."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aimv2.distributed import usable_device
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.report import facts, views
from aimv2.report.blocks import Section
from aimv2.report.charts import panels_of
from aimv2.report.page import Page, write_page
from aimv2.report.runs import Run, read_run, without_places
from aimv2.report.samples import (
    HeldOutImage,
    held_out_images,
    open_model,
    tokenizer_of,
    training_samples,
    view_of,
)
from aimv2.train.log import say

PAGE = "report.html"
BATCH = 8  # training samples shown
IDLE = 600.0  # seconds without new metrics after which a watched run counts as stopped


@dataclass
class Reporter:
    """Writer of report pages of the same runs.

    Attributes:
        folders: the run folders.
        out: the page.
        images: images per section.
        device: the model's device.
        kept: cache of sections drawn from a checkpoint, by (run, step).
    """

    folders: Sequence[str]
    out: Path
    images: int
    device: torch.device
    kept: dict[tuple[Path, int], list[Section]] = field(default_factory=dict)

    def write(self, reload: float | None = None, waiting: bool = False) -> tuple[list[Run], dict[str, Any]]:
        """Write a page of the runs' current state; ``reload``: see :class:`Page`; ``waiting``: accept runs without metrics."""
        runs = [read_run(folder, waiting) for folder in self.folders]
        if all(run.finished for run in runs):
            reload = None
        page = self.single(runs[0]) if len(runs) == 1 else self.comparison(runs)
        page.reload = reload
        size = write_page(page, self.out)
        return runs, {
            "report": str(self.out),
            "pictures": str(self.out.parent / self.out.stem),
            "bytes": size,
            "sections": [section.name for section in page.sections if not section.missing],
            "left_out": {section.name: section.missing for section in page.sections if section.missing},
        }

    def single(self, run: Run) -> Page:
        """The page of one run."""
        panels = panels_of([run])
        parts = [facts.curve_section([run], panels), *self.pictures(run), facts.result_section(run)]
        parts += [facts.config_section(run), facts.machine_section(run)]
        return Page(run.name, facts.state_of(run), facts.headlines(run), parts, panels)

    def comparison(self, runs: Sequence[Run]) -> Page:
        """The page of several runs: shared curves, figures and differences."""
        panels = panels_of(runs)
        parts = [facts.curve_section(runs, panels), facts.figure_section(runs), facts.difference_section(runs)]
        parts.append(self.same_pictures(runs))
        for number, run in enumerate(runs):
            results = facts.result_section(run)
            results.name, results.title = f"results-{number + 1}", f"Results of {run.name}"
            results.lead = "" if number else results.lead
            parts.append(results)
        names = " | ".join(run.name for run in runs)
        return Page(names, f"{len(runs)} runs", [], parts, panels)

    def pictures(self, run: Run) -> list[Section]:
        """The sections that need a model, drawn once per checkpoint."""
        step = run.checkpoint[0] if run.checkpoint else -1
        if (run.folder, step) not in self.kept:
            self.kept.clear()
            self.kept[run.folder, step] = picture_sections(run, self.images, self.device)
        return self.kept[run.folder, step]

    def same_pictures(self, runs: Sequence[Run]) -> Section:
        """Outputs of several runs for the same held-out images."""
        title = "The same images"
        if any(run.checkpoint is None for run in runs):
            waiting = ", ".join(run.name for run in runs if run.checkpoint is None)
            return Section("beside", title, missing=f"no checkpoint yet: {waiting}")
        try:
            first = scene_of(runs[0], self.images, self.device)
            found = [views.compared(first)]
            found += [views.compared(scene_of(run, self.images, self.device)) for run in runs[1:]]
        except (UsageError, OSError) as error:
            return Section("beside", title, missing=f"not drawn: {without_places(str(error))}")
        return views.comparison_section([run.name for run in runs], first, found)


def write_report(
    folders: Sequence[str], out: str | None = None, images: int = 6, device: str | torch.device | None = None
) -> dict[str, Any]:
    """See :func:`aimv2.api.report`."""
    return reporter(folders, out, images, device).write()[1]


def watch(
    folders: Sequence[str], every: float, out: str | None = None, images: int = 6, device: str | None = None
) -> dict[str, Any]:
    """Rewrite the page periodically until every run has ended; see :func:`aimv2.api.report`.

    Raises:
        KeyboardInterrupt: after writing a last page that no longer reloads.
    """
    if every <= 0:
        raise UsageError(f"--watch {every:g}: seconds above 0 expected")
    made = reporter(folders, out, images, device)
    known, since = -1, time.monotonic()
    try:
        while True:
            runs, result = made.write(every, waiting=True)
            lines = sum(len(run.metrics) for run in runs)
            if lines != known:
                say(f"{made.out}: " + ", ".join(f"{run.name} at step {run.step}" for run in runs))
                known, since = lines, time.monotonic()
            if all(run.finished for run in runs):
                return result
            if time.monotonic() - since > IDLE:
                say(f"no new metrics for {IDLE / 60:g} minutes: the run counts as stopped")
                return made.write(waiting=True)[1]
            time.sleep(every)
    except KeyboardInterrupt:
        made.write(waiting=True)
        raise


def reporter(folders: Sequence[str], out: str | None, images: int, device: str | torch.device | None) -> Reporter:
    """Validate the options.

    Raises:
        UsageError: no run, a number of images below 1, an unknown device, a page that is not HTML.
    """
    if not folders:
        raise UsageError("RUN: at least one run folder is expected")
    if images < 1:
        raise UsageError(f"--images {images}: at least 1 expected")
    for folder in folders:
        read_run(folder, waiting=True)
    if out is None:
        page = Path(folders[0]).expanduser() / PAGE if len(folders) == 1 else Path(PAGE)
    else:
        page = Path(out).expanduser()
        page = page / PAGE if page.is_dir() or not page.suffix else page
    if page.suffix != ".html":
        raise UsageError(f"--out {out}: a folder or a name that ends in .html is expected")
    return Reporter(folders, page, images, usable_device(device))


def after_run(run: Path, device: torch.device, tell: Callable[[str], None]) -> str | None:
    """Write the report at the end of a run and return its path; an error is only a warning (None), as the run is done."""
    try:
        return str(write_report([str(run)], device=device)["report"])
    except Exception as error:  # the run has its summary already
        again = shlex.join(["aimv2", "report", str(run)])
        tell(f"no report: {' '.join(str(error).split()) or type(error).__name__} (try again: `{again}`)")
        return None


# ---- pictures ----


def picture_sections(run: Run, images: int, device: torch.device) -> list[Section]:
    """The sections that need a model; those that can't be drawn have a reason."""
    if run.checkpoint is None:
        return views.without_model("the run has no checkpoint yet")
    try:
        scene = scene_of(run, images, device)
    except (UsageError, OSError) as error:
        return views.without_model(f"not drawn: {without_places(str(error))}")
    return views.sections(scene)


def scene_of(run: Run, images: int, device: torch.device) -> views.ModelViews:
    """Model and images of a run's newest checkpoint.

    Raises:
        UsageError: no model to load, no data.
    """
    assert run.checkpoint is not None
    model = open_model(run.checkpoint[1] / "model", device)
    encoder = model.encoder if isinstance(model, AIMv2) else model
    assert isinstance(encoder, views.VisionEncoder)
    tokenizer, view = tokenizer_of(run), view_of(run.config, encoder.config)
    training = training_samples(run.config, view, tokenizer, BATCH)
    held_out = held_out_images(run.config, view, tokenizer, views.pool_size(encoder, view.patches, images))
    origin = "held-out"
    if not held_out:
        others = training_samples(run.config, view, tokenizer, views.pool_size(encoder, view.patches, images))
        held_out, origin = [HeldOutImage(one.key, one.image, one.caption, "") for one in others], "training"
    why = f"a run of objective.name={run.config.objective.name} has no decoder"
    whole = model if isinstance(model, AIMv2) else None
    return views.ModelViews(encoder, whole, why, training, held_out, tokenizer, images, origin)
