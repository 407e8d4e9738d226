"""Who waits sees how far it is: a bar on a terminal, lines elsewhere, nothing for what is quick."""

import io
import os
import pty
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from aimv2 import progress
from aimv2.config.schema import LogConfig
from aimv2.progress import heartbeat, progress_bar, tracked
from aimv2.train.log import Log
from runs import read_terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the start, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_quick_work_is_silent_and_long_work_is_not(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in tracked(range(1000), "images", 1000):
        clock[0] += 0.001
    assert capsys.readouterr().err == ""
    for _ in tracked(range(40), "images", 40):
        clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "images: 10/40, eta 00:00:30",
        "images: 20/40, eta 00:00:20",
        "images: 30/40, eta 00:00:10",
        "images: 40/40, took 00:00:40",
    ]


def test_what_was_done_before_does_not_count_for_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("images", 100, completed=90) as advance:
        clock[0] += 10
        advance(5)
    with progress_bar("items", None) as advance:
        clock[0] += 10
        advance(3)
    assert capsys.readouterr().err == "images: 95/100, eta 00:00:10\nitems: 3\n"


def test_other_ranks_are_silent(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    for _ in tracked(range(4), "images", 4):
        clock[0] += 60
    assert capsys.readouterr().err == ""


def test_work_that_can_not_say_how_far_it_is_has_a_heartbeat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    with heartbeat(lambda: "writing"):
        while len(said) < 2:
            time.sleep(0.001)
    assert re.fullmatch(r"writing, 00:00:\d\d", said[0])
    done = len(said)
    time.sleep(0.01)
    assert len(said) == done, "it ends with the work"


def test_a_terminal_of_80_columns_has_what_is_done_and_the_time_left_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main_end, own_end = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(own_end, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar(
            "features of a data set with a name that is far longer than the terminal is wide, test", 90
        ) as go:
            go(30)
        log = Log(tmp_path, LogConfig(tensorboard=False), 5000, 0, True)
        log.start()
        assert not log.wants(31) and log.wants(2)
        log.write(
            40, {"loss": 3.2, "lr": 1e-3, "text_loss": 2.9, "grad_norm": 1.2, "pairs_per_s": 12.0, "memory_gb": 1.5}
        )
        log.close()
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", read_terminal(main_end)).replace("\r", "\n").splitlines()
    shown = [line.strip() for line in lines if line.strip()]
    left = r"(\d+:\d\d:\d\d|-:--:--)"
    assert any(re.match(rf"30/90 +{left} .*features", line) for line in shown)
    assert re.match(rf"40/5000 +{left} .*loss 3\.2", shown[-1])
    assert max(map(len, shown)) <= 80


def test_one_bar_at_a_time_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True)
    with progress.open_bar(screen, 10), progress_bar("inner", 100) as advance:
        assert progress.taken()
        advance(50)
    assert not progress.taken() and capsys.readouterr().err == ""
