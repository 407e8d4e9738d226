"""One tiny world for all tests of a session: built once, whichever worker comes first, and read by all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from aimv2 import api
from aimv2.models.create import create_model
from runs import scenes, train

SHAPE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}


@dataclass(frozen=True)
class TinyWorld:
    """What no test may change: who wants to write copies it first (``shutil.copytree``).

    Attributes:
        scenes: shards of 120 captioned training and 24 validation scenes of 32 px.
        run: a finished run of six steps on them (``runs.TINY``), its tokenizer in ``checkpoints/step-0000006/model``.
        encoder: a saved model with random weights (seed 5) and its decoder, of the run's shape.
    """

    folder: Path

    @property
    def scenes(self) -> Path:
        return self.folder / "scenes"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder"

    def check(self, who: str) -> None:
        """Fails where a file is no longer what it was when the world was built."""
        found, built = hashes(self.folder), json.loads(self.record.read_text())
        changed = sorted(name for name in {*found, *built} if found.get(name) != built.get(name))
        assert not changed, f"{who} (or a file that ran at the same time) changed the shared {', '.join(changed)}"

    @property
    def record(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def build(folder: Path) -> None:
    scenes(folder / "scenes")
    train(folder / "scenes", folder / "run")
    model = create_model("aimv2-tiny-patch8-32", True, 5, decoder_vocab_size=20, **SHAPE)
    api.save_pretrained(model, folder / "encoder")


def of_session(base: Path) -> TinyWorld:
    """The world of this session, built under a lock where no worker has built it; ``base``: of this worker's folders."""
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    world = TinyWorld(shared / "world")
    with (shared / "world.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not world.record.exists():
            build(world.folder)
            world.record.write_text(json.dumps(hashes(world.folder)))
    return world
