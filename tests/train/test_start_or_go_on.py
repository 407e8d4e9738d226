"""``--resume auto``: one command that starts a run or goes on with it, as schedulers and launchers that restart need it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from aimv2 import api
from aimv2.errors import UsageError
from aimv2.interop.model_folder import checkpoints
from runs import TINY, call, exact, need_ranks, options, scenes, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def test_the_same_command_starts_and_goes_on(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "whole")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "data.train": str(data), "train.epochs": 0.4}))
    given = {"resume": "auto", "train.stop_at": 2}
    run = tmp_path / "run"
    first = api.pretrain(
        str(recipe), str(run), {**given, "accept_data": True}
    )  # of a new run there is nothing to accept
    assert first["stopped_at"] == 2
    recipe.write_text(yaml.safe_dump({**TINY, "optim.lr": 1.0}))  # a recipe that has changed since counts no more
    assert api.pretrain(str(recipe), str(run), {"resume": "auto"})["step"] == 6
    assert exact(run) == exact(tmp_path / "whole")
    before = (run / "metrics.jsonl").read_bytes()
    assert api.pretrain(str(recipe), str(run), {"resume": "auto"})["step"] == 6  # finished: nothing is done
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_may_not_change_is_refused_as_by_resume(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", train__stop_at=2)
    with pytest.raises(UsageError, match=r"optim.lr is 0.002 there, got 0.5"):
        train(data, tmp_path / "run", resume="auto", optim__lr=0.5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--resume", "auto"], "--resume auto needs --run"),
        (["--resume", "auto", "--run", "RUN", "--overwrite"], "give one of them"),
        (["--resume", "later", "--run", "RUN"], "auto"),
    ],
)
def test_wrong_use(words: list[str], line: str, tmp_path: Path) -> None:
    done = call("pretrain", *(str(tmp_path) if word == "RUN" else word for word in words))
    assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(number) for number in children]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_that_restarts_goes_on_from_the_newest_checkpoint(data: Path, tmp_path: Path) -> None:
    need_ranks(2)
    how = {"data__workers": 1, "train__steps": 40, "train__save_every": 4, "train__keep": 0}
    run = tmp_path / "run"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = [*start, "-m", "aimv2", "--", *options(data, run, **how), "--resume", "auto"]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            until = time.monotonic() + 200
            while not checkpoints(run) and launcher.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            os.kill(ranks_of(launcher.pid)[1], signal.SIGKILL)
            assert launcher.wait(250) == 0, (tmp_path / "log").read_text()
        finally:
            launcher.kill()
    text = (tmp_path / "log").read_text()
    assert "going on from step" in text and "Traceback (most recent call last)" not in text
    train(data, tmp_path / "whole", **{**how, "data__workers": 2})
    assert [line["step"] for line in exact(run)] == [line["step"] for line in exact(tmp_path / "whole")]
    for ours, whole in zip(exact(run), exact(tmp_path / "whole")):
        assert ours == pytest.approx(whole, rel=2e-4)
