"""What tests lean on: processes that are forked, and a world that nobody changes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from forked import call_on_ranks, forked
from runs import call
from world import TinyWorld, hashes


def test_a_forked_command_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (("nonsense",), ("--version",)):
        fresh, again = call(*words), forked(*words)
        assert (again.returncode, again.stdout, again.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    monkeypatch.chdir(tmp_path)
    assert forked("data", "shapes", "drawn", "--count", "3").returncode == 0
    assert (tmp_path / "drawn").is_dir()


def one_fails() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("of rank 1")
    time.sleep(600)


def test_ranks_end_with_the_first_that_fails() -> None:
    with pytest.raises(AssertionError, match="ValueError: of rank 1"):
        call_on_ranks(2, one_fails)
    with pytest.raises(subprocess.TimeoutExpired):
        call_on_ranks(1, time.sleep, 600, timeout=0.5)


def test_a_changed_world_is_noticed(tmp_path: Path) -> None:
    world = TinyWorld(tmp_path / "world")
    (world.folder / "run").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (world.run / name).write_text("before")
    world.record.write_text(json.dumps(hashes(world.folder)))
    world.check("a test")
    (world.run / "metrics.jsonl").write_text("behind")
    (world.run / "new").touch()
    with pytest.raises(AssertionError, match=r"^a test .* changed the shared run/metrics\.jsonl, run/new"):
        world.check("a test")
