"""What a machine lacks is said before a run starts, from what is really free on this one."""

import os
import resource
import shutil
import time

import pytest

from aimv2.cli import main
from aimv2.config.schema import Config
from aimv2.errors import UsageError
from aimv2.train import before
from runs import metrics, options, resume, train


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


@pytest.mark.skipif(not before.SHARED.is_dir(), reason="no /dev/shm")
def test_shared_memory():
    config = Config()
    free = shutil.disk_usage(before.SHARED).free
    pair = 3 * 32 * 32 + 8 * config.data.max_tokens
    config.train.batch_size = 8
    assert not [*before.shared_memory(config, 32, 1, 1)]
    config.train.batch_size = round(0.4 * free / pair)  # two batches fit, three do not
    (line,) = before.shared_memory(config, 32, 1, 1)
    assert "train.batch_size" in line and "data.workers 0" in line
    assert not [*before.shared_memory(config, 32, 8, 1)]  # of eight machines
    config.train.batch_size = round(free / pair)
    with pytest.raises(UsageError, match=r"^train\.batch_size .* GB are free there"):
        [*before.shared_memory(config, 32, 8, 8)]
    config.data.workers = 0
    assert not [*before.shared_memory(config, 32, 1, 1)]


def test_open_files():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = limits[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert not [*before.open_files(2)]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (384, hard)  # its own limit, raised
        (line,) = before.open_files(hard) if hard != resource.RLIM_INFINITY else ["data.workers ulimit -n"]
        assert "data.workers" in line and "ulimit -n" in line
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_disk(data, tmp_path, monkeypatch, capsys):
    free = shutil.disk_usage(tmp_path).free
    assert not [*before.disk(tmp_path / "run", 0.4 * free)]
    (line,) = before.disk(tmp_path / "run", 0.7 * free)
    assert "two must fit" in line
    monkeypatch.setattr(before, "checkpoint_bytes", lambda config, model: 2 * free)
    assert main(options(data, tmp_path / "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --run {tmp_path / 'run'}: a checkpoint takes about") and "make room" in error
    assert not (tmp_path / "run").exists()


def test_clock(data, tmp_path, capsys):
    run = tmp_path / "run"
    train(data, run, train__steps=4, train__stop_at=2)
    (folder,) = (run / "checkpoints").iterdir()
    later = time.time() + 7200
    os.utime(folder, (later, later))
    resume(run)
    assert "clock is 2.0 h before the time of the last checkpoint" in capsys.readouterr().err
    assert len([line for line in metrics(run) if "lr" in line]) == 4
