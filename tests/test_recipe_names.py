"""Recipes and chains go by name: listed, printed, taken where a file is taken; a file of that path wins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aimv2 import api
from aimv2.cli import main
from aimv2.config import recipes
from aimv2.config.load import read_recipe
from aimv2.errors import UsageError
from aimv2.pipeline.read import read_chain

ROOT = Path(__file__).parents[1] / "recipes"
FILES = {path.stem: path for pattern in ("*.yaml", "chains/*.yaml") for path in sorted(ROOT.glob(pattern))}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_file_is_listed_with_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert [row["name"] for row in rows] == list(FILES)
    for row in rows:
        assert all(row[key] for key in ("what", *recipes.HEADER)) and "text" not in row
        assert row["chain"] == (FILES[row["name"]].parent.name == "chains") and Path(row["path"]).is_file()
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, hours in (("flickr8k-tiny", "0.04"), ("aimv2-3B-224", "~610"), ("finetune-classes", "-")):
        assert any(line.split()[:2] == [name, hours] for line in lines)


def test_one_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("flickr8k-tiny", "stages-cifar10"):
        assert main(["recipes", name]) == 0
        assert capsys.readouterr().out == FILES[name].read_text()
    (row,) = api.recipes("flickr8k-tiny")["recipes"]
    assert row["text"] == FILES["flickr8k-tiny"].read_text() and row["hours"] == "0.04 (158 seconds)"


def test_a_name_is_taken_where_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = read_recipe(FILES["flickr8k-tiny"])
    (tmp_path / "flickr8k-tiny").mkdir()  # a run folder of that name
    assert read_recipe("flickr8k-tiny") == wanted
    assert main(["pretrain", "--config", "flickr8k-tiny", "--print-config"]) == 0
    assert "# recipe: flickr8k-tiny\n" in capsys.readouterr().out
    assert [job.name for job in read_chain("chain-tiny").jobs] == [
        job.name for job in read_chain(FILES["chain-tiny"]).jobs
    ]
    (tmp_path / "cifar10-small").write_text("seed: 7\n")
    assert read_recipe("cifar10-small") == {"seed": 7}
    (tmp_path / "mine.yaml").write_text(
        "out: chain\nstages: {one: {verb: pretrain, config: flickr8k-tiny, options: {data.train: x}}}"
    )
    (job,) = read_chain("mine.yaml").jobs
    assert job.recipe == wanted


@pytest.mark.parametrize(
    ("command", "option", "code", "told"),
    [
        ("pretrain --config flickr8k-tinny", "--config", "not-found", "did you mean 'flickr8k-tiny'?"),
        ("pretrain --config recipes/flickr8k-tiny.yaml", "--config", "not-found", "did you mean 'flickr8k-tiny'?"),
        ("data browse --config cifar10-smal", "--config", "not-found", "did you mean 'cifar10-small'?"),
        ("pretrain --config chain-tiny", "--config", "mismatch", "aimv2 run chain-tiny"),
        ("pretrain --config run", "--config", "invalid", "did you mean run/config.yaml?"),
        ("run chain-tin", "CHAIN", "not-found", "did you mean 'chain-tiny'?"),
        ("run flickr8k-tiny", "CHAIN", "mismatch", "aimv2 pretrain --config flickr8k-tiny"),
        ("recipes flickr8k", "NAMES", "unknown", "did you mean 'flickr8k-tiny'?"),
    ],
)
def test_another_name_is_one_line(
    command: str, option: str, code: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UsageError) as caught:
        main([*command.split(), "--debug"])
    assert (caught.value.option, caught.value.code) == (option, code)
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err


def test_a_wheels_files_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "chains", tmp_path / "site" / "aimv2" / "recipes" / "chains")
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "site" / "aimv2")
    assert set(recipes.shipped()) == {path.stem for path in (ROOT / "chains").glob("*.yaml")}
