"""Ctrl-C under the real launcher: all ranks save and leave, and the run goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import exact, metrics, need_ranks, options, torchrun, train
from world import TinyWorld

LONG = {"train__steps": 100_000, "eval__captions": 0}  # by its schedule; nobody waits for its end


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_ctrl_c_to_the_launcher_saves_and_the_run_goes_on(world: TinyWorld, tmp_path: Path) -> None:
    need_ranks(2)
    run, said = tmp_path / "run", tmp_path / "said.txt"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "aimv2", "--"]
    with said.open("w") as file:
        launcher = subprocess.Popen(
            [*start, *options(world.scenes, run, data__workers=1, **LONG)],
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + 150
            while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 2:
                assert launcher.poll() is None and time.monotonic() < end, said.read_text()
                time.sleep(0.1)
            os.killpg(launcher.pid, signal.SIGINT)  # what a terminal does
            assert launcher.wait(150) == 1  # torchrun's own, whatever its ranks ended with
        finally:
            launcher.kill()
    (step,) = re.findall(r"^stopped at step (\d+), saved; go on with: aimv2 pretrain --run ", said.read_text(), re.M)
    assert len(metrics(run)) == int(step) and (run / f"checkpoints/step-{int(step):07d}/files.json").is_file()
    last = int(step) + 2
    ended = torchrun(2, "pretrain", "--run", str(run), "--resume", "--train.stop_at", str(last))
    assert ended.returncode == 0, ended.stderr
    train(world.scenes, tmp_path / "whole", data__workers=2, train__stop_at=last, **LONG)
    found, whole = exact(run), exact(tmp_path / "whole")
    assert [line["step"] for line in found] == [*range(1, last + 1)]
    for line, other in zip(found, whole):
        assert line == pytest.approx(other, rel=2e-4)
