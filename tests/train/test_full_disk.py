"""A disk that fills while a run logs: on a real file system without room, mounted in a namespace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2 import api
from aimv2.errors import UsageError
from aimv2.train.lines import Lines
from forked import call_on_ranks
from runs import TINY, exact, options, train
from small_disks import in_small_disk
from world import TinyWorld

STEPS, SAVED, FULL, ROOM = 40, 20, 21, 32  # lines of metrics reach their second block after step FULL
SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
from aimv2.cli import main
from aimv2.train.events import Events
from aimv2.train.loop import Trainer

disk, out, full, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
words, filler = json.loads(sys.argv[5]), Path(sys.argv[1]) / "filler"

def fill():
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass

def train_step(self, batch, own=Trainer.train_step):
    own(self, batch)
    if self.step == full:
        fill()
    if self.step == room:
        filler.unlink(missing_ok=True)

Trainer.train_step = train_step
for name, room in (("lives", room), ("ends", 10**9)):
    print("start", name, file=sys.stderr)
    code = main([*words, "--run", str(disk / name)])
    text = (disk / name / "metrics.jsonl").read_text()
    (out / f"{name}.json").write_text(json.dumps({"code": code, "whole": text.endswith("\\n"), "lines": text.count("\\n")}))
filler.unlink()
full = 10**9
assert main(["pretrain", "--run", str(disk / "ends"), "--resume"]) == 0
for name in ("lives", "ends"):
    shutil.copytree(disk / name, out / name)
print("start summary", file=sys.stderr)

def train(self, own=Trainer.train):
    own(self)
    fill()

own, Trainer.train = Trainer.train, train
code = main([*words, "--train.steps", "3", "--run", str(disk / "end")])
filler.unlink()
Trainer.train = own
(out / "end.json").write_text(json.dumps([code, main(["pretrain", "--run", str(disk / "end"), "--resume"])]))
shutil.copy(disk / "end/summary.json", out / "summary.json")
print("start events", file=sys.stderr)
lines = []
events = Events(disk / "events", 0, lines.append)
fill()
for step in range(20_000):
    events.write(step, {"loss": 1.0})
events.close()
(out / "events.json").write_text(json.dumps(lines))
"""


def test_a_disk_that_fills_between_two_checkpoints(world: TinyWorld, tmp_path: Path) -> None:
    more = {"train__steps": STEPS, "train__save_every": SAVED, "train__keep": 1, "eval__captions": 0}
    train(world.scenes, tmp_path / "whole", **more)
    words = options(world.scenes, tmp_path, **more, log__tensorboard=True)
    at = words.index("--run")
    place = [str(tmp_path / "disk"), str(tmp_path), str(FULL), str(ROOM), json.dumps(words[:at] + words[at + 2 :])]
    (tmp_path / "disk").mkdir()
    done = in_small_disk(tmp_path / "disk", "24m", "-c", SCRIPT, *place)
    assert done.returncode == 0, done.stderr
    lives, ends = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("lives", "ends"))
    said = dict(zip(("", "lives", "ends", "summary", "events"), done.stderr.split("start ")))
    waits = (
        "metrics.jsonl can't be written (No space left on device): its lines wait until the next checkpoint; make room"
    )
    assert lives["code"] == 0 and lives["whole"]
    assert said["lives"].count(waits) == 1 and "metrics.jsonl is written again" in said["lives"]
    assert ends["code"] == 2 and ends["whole"] and SAVED <= ends["lines"] < STEPS
    (error,) = [line for line in said["ends"].splitlines() if line.startswith("error: ")]
    assert f"checkpoint of step {STEPS}" in error and "No space left" in error and f"step {SAVED} stays" in error
    assert waits in said["ends"] and "--resume" in error
    assert exact(tmp_path / "lives") == exact(tmp_path / "ends") == exact(tmp_path / "whole")
    assert json.loads((tmp_path / "end.json").read_text()) == [2, 0]
    (error,) = [line for line in said["summary"].splitlines() if line.startswith("error: ")]
    assert "/end/summary.json: No space left on device; training is done" in error and error.endswith("--resume")
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 3
    (line,) = json.loads((tmp_path / "events.json").read_text())
    assert "events can't be written (No space left on device): the run goes on without" in line
    assert "Traceback" not in done.stderr


def test_standard_error_on_a_full_disk(world: TinyWorld, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    words = [sys.executable, "-m", "aimv2", *options(world.scenes, tmp_path / "run", train__steps=3, eval__captions=0)]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*words, "--json"], stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["step"] == 3


def test_lines_are_whole_or_wait(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    told: list[str] = []
    lines = Lines(tmp_path / "lines", told.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines.write("one")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # room for two of them and a half
        lines.write("two")
        lines.write("three")
        assert (tmp_path / "lines").read_text() == "one\ntwo\n" and len(told) == 1
        with pytest.raises(OSError, match="File too large") as error:
            lines.settle()
        assert error.value.filename == str(tmp_path / "lines")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.write("four")
    lines.settle()
    lines.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\nthree\nfour\n" and len(told) == 2


# ---- several ranks ----


def refuse_all(run: str, data: str, blocked: str) -> None:
    """On each of two ranks: the first one can't write, and both end with the same line."""
    with pytest.raises(UsageError, match=blocked) as error:
        api.pretrain(None, run, {**TINY, "data.train": data})
    assert error.value.option in ("", "--run")
    Path(run, f"ended-{os.environ['RANK']}").write_text(str(error.value))


@pytest.mark.parametrize("blocked", [".lock", "tokenizer", "metrics.jsonl"])
def test_what_the_first_rank_can_t_write_ends_all(blocked: str, world: TinyWorld, tmp_path: Path) -> None:
    if blocked == "tokenizer":
        (tmp_path / blocked).write_text("no folder")
    else:
        (tmp_path / blocked).mkdir()
    call_on_ranks(2, refuse_all, str(tmp_path), str(world.scenes), blocked.replace("tokenizer", "--run"))
    first, second = (tmp_path / f"ended-{rank}" for rank in (0, 1))
    assert first.read_text() == second.read_text()


def fail_on_first(folder: str) -> None:
    """In a rank: what it hears of an error that nobody foresaw."""
    from aimv2.distributed import join_world
    from aimv2.train.together import on_first

    def work() -> None:
        raise RuntimeError("of a library")

    try:
        on_first(join_world(), work, Path(folder))
    except (RuntimeError, UsageError) as error:
        (Path(folder) / os.environ["RANK"]).write_text(f"{type(error).__name__}: {error}")


def test_what_nobody_foresaw_on_the_first_rank_ends_all(tmp_path: Path) -> None:
    call_on_ranks(2, fail_on_first, str(tmp_path))
    assert (tmp_path / "0").read_text() == "RuntimeError: of a library"
    assert (tmp_path / "1").read_text() == "UsageError: the first rank ended: RuntimeError: of a library"
