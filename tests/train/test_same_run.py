"""A run goes on as the run that it was: edits of config.yaml and changes of the data are noticed."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import yaml

from aimv2.data.shards.format import read_samples, write_shard
from aimv2.data.shards.index import build_index
from aimv2.data.stream import identity
from aimv2.data.stream.identity import counts, differences, identity_of
from aimv2.errors import UsageError
from aimv2.train import same_run
from runs import exact, resume, train


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    """Three shards of 40 samples."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    pairs = list(read_samples(world.scenes / "train-000000.tar"))
    for number in range(3):
        write_shard(folder / f"train-{number:06}.tar", pairs[number * 40 : number * 40 + 40])
    return folder


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run that was stopped at step 2 of 6."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(data, run, train__stop_at=2)
    return run


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def edit(run, **values):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in values.items():
        section, name = key.split("__")
        tree[section][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


def about(run, **changes):
    """The trainer's note of the checkpoint, and the list without it: as an earlier version left them."""
    folder = run / "checkpoints" / "step-0000002"
    note = json.loads((folder / "state" / "trainer.json").read_text())
    if changes:
        note = {key: value for key, value in {**note, **changes}.items() if value is not None}
        (folder / "state" / "trainer.json").write_text(json.dumps(note))
        (folder / "files.json").unlink()
    return note


# ---- config.yaml ----


def test_what_may_change_in_config_yaml_is_taken_and_said(run, capsys):
    edit(run, train__log_every=2, train__save_every=3)
    assert resume(run)["step"] == 6
    said = capsys.readouterr().err
    assert "config.yaml was edited, and is taken as it is: train.save_every 0 -> 3, train.log_every 1 -> 2\n" in said
    assert [line["step"] for line in exact(run) if "loss" in line] == [1, 2, 4, 6]


def test_all_else_in_config_yaml_is_refused(run, capsys):
    for old in (False, True):  # a checkpoint from before config.yaml was kept in it, too
        if old:
            about(run, stored=None)
        edit(run, optim__lr=0.5, optim__warmup=1, train__keep=2)
        with pytest.raises(UsageError, match=r"optim\.lr 0\.002 -> 0\.5, optim\.warmup 2 -> 1; this can't change"):
            resume(run)
        edit(run, optim__lr=0.002, optim__warmup=2, train__keep=1)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["seed"], tree["train"]["steps"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UsageError, match=r"train\.steps 6 -> \d+"):
        resume(run)
    tree["train"]["steps"] = 6  # the seed was the default
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    capsys.readouterr()
    assert resume(run, train__log_every=3)["step"] == 6
    assert "was edited" not in capsys.readouterr().err


def test_edited_workers_are_those_that_are_compared(run):
    edit(run, data__workers=4)
    with pytest.raises(UsageError, match=r"used 1 ranks x 0 data workers, got 1 ranks x 4 \(data\.workers\)"):
        resume(run)


def test_data_are_accepted_only_at_a_resume(data, tmp_path):
    with pytest.raises(UsageError, match="--accept-data goes with --resume"):
        train(data, tmp_path / "run", accept_data=True)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_refuses_is_a_line(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "config.yaml"))

    monkeypatch.setattr(same_run, "write_back", full)
    with pytest.raises(UsageError, match=r"config\.yaml can't be read or written: No space left"):
        resume(run)


def test_options_of_an_earlier_start_are_no_edits(run, capsys):
    resume(run, train__stop_at=3, train__log_every=3)
    capsys.readouterr()
    assert resume(run)["step"] == 6
    assert "edited" not in capsys.readouterr().err


# ---- data ----


def test_moved_data_are_the_same_data(data, run, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "moved")
    resume(run, train__stop_at=3, **{"data.train": str(tmp_path / "moved")})
    assert "has moved and is the same" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == str(tmp_path / "moved")
    shutil.move(tmp_path / "moved", tmp_path / "again")
    with pytest.raises(UsageError, match=r"does not exist.*given by --resume --data\.train NEW"):
        resume(run)
    edit(run, data__train=str(tmp_path / "again"))
    resume(run)
    assert "has moved" in capsys.readouterr().err
    train(data, tmp_path / "whole")
    assert exact(run) == exact(tmp_path / "whole")
    assert not [path for path in (tmp_path / "again").iterdir() if not path.name.startswith("train-")]


def changed(data, tmp_path, kind):
    """A copy of the data with one change."""
    folder = shutil.copytree(data, tmp_path / "changed")
    one, other = folder / "train-000000.tar", folder / "train-000001.tar"
    if kind == "removed":
        other.unlink()
    elif kind == "added":
        shutil.copy(one, folder / "train-000003.tar")
    elif kind == "swapped":
        one.rename(folder / "aside")
        other.rename(one)
        (folder / "aside").rename(other)
    elif kind == "cut":
        content = other.read_bytes()
        other.write_bytes(content[: len(content) // 2])
    else:
        pairs = list(read_samples(one))
        write_shard(other, [(key, {**parts, "txt": b"x" * len(parts["txt"])}) for key, parts in pairs])
    return folder


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("removed", "removed: train-000001.tar"),
        ("added", "added: train-000003.tar"),
        ("swapped", "replaced: train-000000.tar, train-000001.tar"),
        ("cut", "cut, or replaced by less: train-000001.tar"),
        ("replaced", "replaced: train-000001.tar"),
    ],
)
def test_changed_data_are_named_and_accepted_only_on_demand(kind, named, data, run, tmp_path, capsys):
    folder = str(changed(data, tmp_path, kind))
    with pytest.raises(UsageError, match=f"not what the run was trained on: {named}; .*--accept-data") as error:
        resume(run, **{"data.train": folder})
    assert error.value.option == "data.train"
    capsys.readouterr()
    assert resume(run, accept_data=True, train__stop_at=3, **{"data.train": folder})["step"] == 3
    said, kept = capsys.readouterr().err, kind in ("swapped", "replaced")
    assert f"--accept-data: {named}; " in said
    assert ("the position in the data stays" in said) == kept and ("is lost" in said) == (not kept)
    assert "accept_data" not in (run / "config.yaml").read_text()
    assert resume(run, train__stop_at=4)["step"] == 4, "accepted once, they are its data"


def test_a_checkpoint_that_does_not_know_its_data_goes_on_with_a_line(data, run, tmp_path, capsys):
    about(run, data=None)
    shutil.copytree(data, tmp_path / "moved")
    with pytest.raises(UsageError, match=r"another path.*--accept-data"):
        resume(run, **{"data.train": str(tmp_path / "moved")})
    assert resume(run, train__stop_at=3)["step"] == 3
    assert "from before the identity of data was kept" in capsys.readouterr().err
    assert about_at(run, 3)["data"]


def about_at(run, step):
    return json.loads((run / "checkpoints" / f"step-{step:07}" / "state" / "trainer.json").read_text())


def test_another_mixture_is_refused(data, run):
    with pytest.raises(UsageError, match="another mixture"):
        resume(run, **{"data.train": [{"path": str(data), "weight": 2.0}]})


def test_differences_by_name():
    def shard(name, size=10, samples=2, blocks="a"):
        return [name, size, samples, "h", blocks]

    old = [[shard("a"), shard("b"), shard("c")]]
    assert differences(old, [list(old[0])]) == []
    assert differences(old, [[shard("b"), shard("a"), shard("c")]]) == ["shards in another order"]
    alike = [shard("a"), shard("a", blocks="b")]  # of two folders
    assert differences([alike], [alike[::-1]]) == ["shards in another order"]
    assert differences(old, [[shard("a"), shard("c", 8, 1), shard("d")]]) == [
        "removed: b",
        "added: d",
        "cut, or replaced by less: c",
    ]
    assert differences(old, [old[0], old[0]]) == ["2 sources in the place of 1"]
    assert differences([old[0], old[0]], [old[0], [shard("a")]]) == ["removed: b, c (source 2)"]
    many = [[shard(f"s{number}") for number in range(9)]]
    assert differences(many, [many[0][:1]]) == ["removed: s1, s2, s3 and 5 more"]
    assert counts(old) == [[2, 2, 2]]
    # where there are many, the content of some is looked at: what only one side knows says nothing
    some = [[shard("a"), shard("b", blocks=""), shard("c")]]
    assert differences(old, some) == differences(some, old) == []
    assert differences(some, [[shard("a", blocks="z"), shard("b"), shard("c")]]) == ["replaced: a"]


def test_the_content_of_some_of_many_shards_is_looked_at(data, tmp_path, monkeypatch):
    tars = [Path(shutil.copy(data / "train-000000.tar", tmp_path / f"{number}.tar")) for number in range(20)]
    whole = identity_of([tars], [build_index(tars)])
    assert all(shard[4] for shard in whole[0])
    monkeypatch.setattr(identity, "LOOKED", 10)
    some = identity_of([tars], [build_index(tars)])
    assert [shard[:4] for shard in some[0]] == [shard[:4] for shard in whole[0]]
    assert 0 < sum(bool(shard[4]) for shard in some[0]) < len(tars)
