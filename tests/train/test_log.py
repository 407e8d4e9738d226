"""What a user sees of a run while it trains: the first line soon, and the step and the time left at any width."""

import re
from pathlib import Path

import pytest

from aimv2.config.schema import LogConfig
from aimv2.train.log import Log, duration
from runs import metrics, train
from world import TinyWorld

FIGURES = {
    "loss": 3.2, "text_loss": 2.9, "pixel_loss": 0.8, "grad_norm": 1.2, "lr": 1e-3, "pairs_per_s": 12.0, "tokens_per_s": 900.0,
    "mfu": 0.3, "memory_gb": 1.5,
}  # fmt: skip


def test_the_first_steps_are_shown_and_metrics_keep_their_lines(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(world.scenes, tmp_path / "run", train__log_every=4)
    shown = re.findall(r"^step (\d+)/6 loss [\d.]+.* eta [\d:]+$", capsys.readouterr().err, re.M)
    assert shown == ["1", "2", "4", "5", "6"]
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [4, 6]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_has_step_and_time_first_at_any_width(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    log = Log(tmp_path, LogConfig(tensorboard=False), 150_000, 0, True)
    log.write(149_980, FIGURES)
    log.close()
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    last = [line for line in lines if line.strip()][-1]
    assert re.match(r" *149980/150000 +(\d+:\d\d:\d\d|-:--:--)", last) and "loss 3.2" in last
    assert max(map(len, lines)) <= columns


def test_a_duration_of_days_is_no_time_of_day() -> None:
    assert [duration(s) for s in (0, 59.6, 3725, 35 * 3600)] == ["00:00:00", "00:01:00", "01:02:05", "1 d 11:00:00"]
