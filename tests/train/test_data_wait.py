"""A loader that starves the step is named, with the part of the time that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aimv2.data.stream.samples import TrainStream
from aimv2.train import loop
from aimv2.train.step import TrainStep
from runs import metrics, scenes, train


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def timed(monkeypatch: pytest.MonkeyPatch, data: Path, run: Path, wait: float, step: float) -> None:
    """A run of which each batch takes ``wait`` seconds and each step ``step``."""
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    get, do = TrainStream.__next__, TrainStep.__call__

    def later(stream: TrainStream) -> object:
        clock.now += wait
        return get(stream)

    def slowly(update: TrainStep, *given: object) -> object:
        clock.now += step
        return do(update, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainStream, "__next__", later)
    monkeypatch.setattr(TrainStep, "__call__", slowly)
    train(data, run, train__steps=35, train__log_every=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def test_a_step_that_starves_is_one_line(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch, data, tmp_path / "run", 3.0, 1.0)
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert [line["data_wait"] for line in lines] == [0.75] * 7
    said = [line for line in capsys.readouterr().err.splitlines() if "waits for data" in line]
    assert len(said) == 1 and "75% of the time" in said[0] and "data.workers (0)" in said[0]


def test_a_step_that_does_not_starve_is_no_line(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch, data, tmp_path / "run", 1.0, 7.0)
    assert metrics(tmp_path / "run")[0]["data_wait"] == 0.125
    assert "waits for data" not in capsys.readouterr().err
