"""A machine whose ``/dev/shm`` is really small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aimv2.train.before import SHARED
from runs import options
from small_disks import in_small_disk
from world import TinyWorld

SCRIPT = """
import json, os, shutil, sys
from aimv2.cli import main
from aimv2.train.loop import Trainer

def open_log(self, own=Trainer.open_log):  # after the check: somebody else takes what was free
    with open("/dev/shm/filler", "wb", buffering=0) as file:
        while shutil.disk_usage("/dev/shm").free > left:
            file.write(bytes(1 << 12))
    return own(self)

words = json.loads(sys.argv[1])
print(main([*words, "--train.batch_size", "112"]))
Trainer.open_log = open_log
for left in (1 << 16, 0):  # room for the workers' locks, but not for a batch; none
    print(main([*words, "--train.batch_size", "40", "--overwrite"]))
    os.unlink("/dev/shm/filler")
"""


@pytest.mark.skipif(not SHARED.is_dir(), reason="no /dev/shm")
def test_a_small_shared_memory_is_said_before_and_at_a_batch_without_room(world: TinyWorld, tmp_path: Path) -> None:
    words = options(world.scenes, tmp_path / "run", data__workers=1, eval__captions=0)
    done = in_small_disk(SHARED, "512k", "-c", SCRIPT, json.dumps(words))
    assert done.stdout.split() == ["2", "75", "75"], done.stderr
    before, at_a_batch, at_start = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "train.batch_size 112: data workers pass batches through /dev/shm" in before and "are free there" in before
    assert "has no room in /dev/shm for a batch" in at_a_batch and at_a_batch.endswith(
        f"--run {tmp_path / 'run'} --resume"
    )
    assert "data workers have no room in /dev/shm to start" in at_start and at_start.endswith("--resume")
    assert "Traceback" not in done.stderr
