"""Whether the checkpoints of a run are what was written."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aimv2.doctor.check import Check
from aimv2.errors import UsageError
from aimv2.train.sealing import DAMAGED, faults, step_folders, unlisted


def checkpoints_of(given: str) -> Callable[[], list[Check]]:
    """The checks of a run's checkpoints, to be called later.

    Raises:
        UsageError: no such folder, or no checkpoint in it.
    """
    run = Path(given).expanduser()
    if not run.is_dir():
        raise UsageError(f"RUNS {given}: no such folder; a run folder is expected", option="RUNS", code="not-found")
    folders = step_folders(run)
    if not folders and not any((run / "checkpoints").glob(f"{DAMAGED}step-*")):
        raise UsageError(
            f"RUNS {given}: no checkpoint there; a run folder is expected", option="RUNS", code="not-found"
        )
    return partial(verified, given, run)


def verified(given: str, run: Path) -> list[Check]:
    """A check for each checkpoint, the newest last, and for each that was kept aside."""
    found = []
    for step, folder in step_folders(run):
        began, name = time.perf_counter(), f"step {step}"
        wrong = faults(folder)
        seconds = time.perf_counter() - began
        if wrong:
            more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            advice = "--resume keeps it aside and goes on from the one before it"
            found.append(Check(given, name, "fail", f"{wrong[0]}{more}", advice, seconds))
        elif wrong is None:
            advice = "a checkpoint of an earlier version; those that are saved from now on have lists"
            found.append(Check(given, name, "warn", "no list of files, it can't be verified", advice, seconds))
        elif more_files := unlisted(folder):
            named = ", ".join(more_files[:3]) + (f" and {len(more_files) - 3} more" if len(more_files) > 3 else "")
            words = f"every file is as it was written, but there are others: {named}"
            found.append(
                Check(given, name, "warn", words, "nothing reads them; look at them, then remove them", seconds)
            )
        else:
            found.append(Check(given, name, "ok", "every file is as it was written", seconds=seconds))
    for folder in sorted((run / "checkpoints").glob(f"{DAMAGED}step-*")):
        found.append(Check(given, folder.name, "warn", "kept aside, damaged", f"look at it, then remove {folder}"))
    return found
