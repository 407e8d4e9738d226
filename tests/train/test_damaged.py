"""A damaged checkpoint is named and kept aside, and the one before it is used exactly; a state folder from elsewhere runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aimv2 import api
from aimv2.cli import main
from aimv2.errors import UsageError
from aimv2.train.checkpoint import RANK
from aimv2.train.plain_reader import PlainUnpickler
from aimv2.train.plain_state import read_state, table, write_state
from aimv2.train.sealing import faults, step_folders
from runs import exact, resume, train


@pytest.fixture(scope="module")
def stopped(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run of six steps, and one that stopped at step 4 with checkpoints of 2 and 4."""
    root = tmp_path_factory.mktemp("damaged")
    train(world.scenes, root / "whole", train__save_every=2)
    train(world.scenes, root / "parts", train__save_every=2, train__stop_at=4)
    return root / "whole", root / "parts"


def newest(run: Path) -> Path:
    return step_folders(run)[-1][1]


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def gone(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("state/__0_0.distcp", flip_bit), ("state/__0_0.distcp", cut), ("state/.metadata", emptied), ("state/.metadata", gone),
    ("state/rank-00000.json", cut), ("state/rank-00000.safetensors", flip_bit), ("state/trainer.json", gone),
    ("state/trainer.json", flip_bit), ("model/model.safetensors", gone), ("model", gone), ("model/config.json", emptied),
    ("files.json", cut), ("state", gone),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil"), DAMAGE)
def test_each_damage_is_found(
    name: str, spoil: Callable[[Path], None], stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(newest(stopped[1]), tmp_path / "step-0000004")
    assert faults(tmp_path / "step-0000004") == []
    spoil(tmp_path / "step-0000004" / name)
    found = faults(tmp_path / "step-0000004")
    assert found and found[0].startswith(name)


@pytest.mark.parametrize("kept_list", [True, False])
def test_the_one_before_is_used_exactly(
    kept_list: bool, stopped: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, parts = stopped
    run = tmp_path / "run"
    shutil.copytree(parts, run)
    flip_bit(newest(run) / "state" / "__0_0.distcp")
    if not kept_list:  # a checkpoint of an earlier version, of which a file is missing
        (newest(run) / "files.json").unlink()
        (newest(run) / "state" / ".metadata").unlink()
    resume(run)
    assert exact(run) == exact(whole)
    said = capfd.readouterr().err
    assert "the checkpoint of step 4 is damaged" in said and "going on from step 2" in said
    assert (run / "checkpoints" / "damaged-step-0000004").is_dir()


def test_a_finished_run_is_verified_too(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    kept = (newest(run) / "model" / "model.safetensors").read_bytes()
    flip_bit(newest(run) / "model" / "model.safetensors")
    assert resume(run)["step"] == 6
    assert (newest(run) / "model" / "model.safetensors").read_bytes() == kept  # trained again from step 4
    assert (run / "checkpoints" / "damaged-step-0000006").is_dir() and exact(run) == exact(stopped[0])


def assert_no_resume(run: Path, code: str) -> None:
    with pytest.raises(UsageError) as refused:
        resume(run)
    assert (refused.value.option, refused.value.code) == ("--resume", code)


def test_none_is_good(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    """Never a silent start at step 0; what is there stays."""
    run = tmp_path / "run"
    shutil.copytree(stopped[1], run)
    for _, folder in step_folders(run):
        shutil.rmtree(folder / "model")
    for _ in range(2):
        assert_no_resume(run, "unreadable")
    assert len(list((run / "checkpoints").glob("damaged-step-*"))) == 2


def test_figures_that_can_t_be_read(
    stopped: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A summary, a record of the best and lines of figures that are cut, of another form or no text: said, and written again."""
    whole, parts = stopped
    run = tmp_path / "run"
    shutil.copytree(parts, run)
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe[1]\n" + lines + b'[2]\n{"step": "x"}\n{"step": 4, "lo')
    (run / "checkpoints" / "best.json").write_text("[]")
    assert resume(run)["step"] == 6 and exact(run) == exact(whole)
    said = capfd.readouterr().err
    assert "3 lines of metrics.jsonl can't be read" in said and (run / "damaged-metrics.jsonl").is_file()
    for content in (b"\xff{", b'{"step": 6', b"[" * 100_000):
        (run / "summary.json").write_bytes(content)
        assert resume(run)["step"] == 6
        assert "summary.json can't be read" in capfd.readouterr().err
    assert exact(run) == exact(whole) and json.loads((run / "summary.json").read_text())["step"] == 6
    before = (run / "metrics.jsonl").stat().st_ino
    assert resume(run)["step"] == 6 and (run / "metrics.jsonl").stat().st_ino == before  # not written without need
    with (run / "metrics.jsonl").open("ab") as file:  # of a run that is finished
        file.write(b"\xff\xfe\n")
    assert resume(run)["step"] == 6 and exact(run) == exact(whole)
    said = capfd.readouterr().err
    assert "1 lines of metrics.jsonl can't be read" in said and "is finished" in said


def test_checkpoints_that_are_gone_are_no_start_at_step_0(
    stopped: tuple[Path, Path], world: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped[1], run)
    shutil.rmtree(run / "checkpoints")
    kept = (run / "metrics.jsonl").read_bytes()
    assert_no_resume(run, "missing")
    assert (run / "metrics.jsonl").read_bytes() == kept
    never = (
        tmp_path / "never"
    )  # one that had not saved yet starts again, also where it is to save more often from now on
    train(world.scenes, never, train__stop_at=4)
    shutil.rmtree(never / "checkpoints")
    assert resume(never, train__save_every=2)["step"] == 6 and exact(never) == exact(stopped[0])


def test_a_checkpoint_without_a_list_goes_on_with_a_line(
    stopped: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As earlier versions wrote it, with a pickle for each rank."""
    whole, parts = stopped
    run = tmp_path / "run"
    shutil.copytree(parts, run)
    (newest(run) / "files.json").unlink()
    stem = newest(run) / "state" / RANK.format(0)
    torch.save(read_state(stem), stem.with_suffix(".pt"))
    for end in (".json", ".safetensors"):
        stem.with_suffix(end).unlink()
    resume(run)
    assert exact(run) == exact(whole)
    assert "it can't be verified" in capfd.readouterr().err


class Planted:
    """Runs when a pickle that holds it is loaded without care."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_planted_pickles_run_nothing(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for name in (".metadata", "rank-00000.pt", "byte item"):
        run = tmp_path / name.strip(".")
        shutil.copytree(stopped[1], run)
        folder = newest(run)
        (folder / "files.json").unlink()
        if name == ".metadata":
            (folder / "state" / name).write_bytes(pickle.dumps(Planted(trap)))
        elif name == "rank-00000.pt":
            torch.save({"data": Planted(trap)}, folder / "state" / name)
            (folder / "state" / "rank-00000.json").unlink()
        else:
            spoil_byte_item(folder / "state", trap)
        with pytest.raises(UsageError) as refused:
            resume(run)
        assert refused.value.code == "unreadable" and not trap.exists()
    torch.save({"data": Planted(trap)}, tmp_path / "proof.pt")
    torch.load(tmp_path / "proof.pt", weights_only=False)
    assert trap.exists()  # it would have


def spoil_byte_item(state: Path, trap: Path) -> None:
    """Another pickle in the place of a value that is no tensor."""
    import dataclasses

    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    with (state / ".metadata").open("rb") as file:
        about = PlainUnpickler(file).load()
    kinds = about.state_dict_metadata
    index, place = next((i, p) for i, p in about.storage_data.items() if isinstance(kinds[i.fqn], BytesStorageMetadata))
    torch.save(Planted(trap), state / "planted.pt")
    content = (state / "planted.pt").read_bytes()
    (state / "planted.distcp").write_bytes(content)
    moved = dataclasses.replace(place, relative_path="planted.distcp", offset=0, length=len(content))
    about.storage_data[index] = moved
    (state / ".metadata").write_bytes(pickle.dumps(about))


def test_state_without_a_pickle(tmp_path: Path) -> None:
    from megatron.energon.flavors.webdataset.sample_loader import SliceState
    from megatron.energon.state import FlexState

    value = {
        "data": FlexState(a=(1, "x", None, 2.5), b=[b"\x00\xff", SliceState(index=3, current=2**40)], c={4: True}),
        "rng": torch.arange(5, dtype=torch.uint8), "scale": torch.tensor([1.0, float("nan")]),
    }  # fmt: skip
    write_state(tmp_path / "rank-00000", value)
    found = read_state(tmp_path / "rank-00000")
    assert type(found["data"]) is FlexState and found["data"] == value["data"]
    assert torch.equal(found["rng"], value["rng"]) and found["scale"].isnan().tolist() == [False, True]
    with pytest.raises(TypeError, match="has no place"):
        write_state(tmp_path / "other", {"x": Path("a")})
    text = (tmp_path / "rank-00000.json").read_text()
    for wrong in (
        text.replace("SliceState", "Popen"),
        text[:-20],
        json.dumps([1]),
        "[" * 100_000,
        text.replace('"index"', '"other"'),
    ):
        (tmp_path / "rank-00000.json").write_text(wrong)
        with pytest.raises(ValueError):
            read_state(tmp_path / "rank-00000")
    assert "SliceState" in table()["megatron.energon.flavors.webdataset.sample_loader"]


def test_doctor_verifies_a_run(stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped[1], run)
    assert main(["doctor", str(run), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["status"]) for one in about["checks"]] == [("step 2", "ok"), ("step 4", "ok")]
    foreign = newest(run) / "state" / "rank-7.pt"
    foreign.write_bytes(b"a pickle")
    assert main(["doctor", str(run), "--json"]) == 0
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert last["status"] == "warn" and last["found"].endswith("others: state/rank-7.pt")
    foreign.unlink()
    flip_bit(newest(run) / "model" / "model.safetensors")
    assert main(["doctor", str(run), "--json"]) == 1
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert last["status"] == "fail" and last["found"].startswith("model/model.safetensors was changed")
    assert newest(run).name == "step-0000004"  # nothing is changed
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError) as refused:
            api.doctor(runs=[str(wrong)])
        assert (refused.value.option, refused.value.code) == ("RUNS", "not-found")
