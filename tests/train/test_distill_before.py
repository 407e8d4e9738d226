"""A distillation that an earlier version began, and a teacher that does not say how images are normalised."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from distillation import dino_model, distil, exact

from aimv2.cli import main
from aimv2.features.fingerprint import weights_hash
from aimv2.features.frozen import open_frozen
from runs import assert_refused, options, resume


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return dino_model(tmp_path_factory.mktemp("dino"))


def as_of_before(run: Path, model: Path) -> None:
    """Makes a stopped run one that a version before 0.2 began: the teacher's hash is of its weights alone."""
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["objective"]["teacher_sha256"] = weights_hash(open_frozen(str(model)).module)
    for key in ("teacher_image_mean", "teacher_image_std"):
        del stored["objective"][key]
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    for folder in (run / "checkpoints").iterdir():
        (folder / "files.json").unlink(missing_ok=True)
        note = json.loads((folder / "state" / "trainer.json").read_text())
        note["config"]["objective"] |= stored["objective"]
        kept = {key: value for key, value in note.items() if key not in ("stored", "data")}
        (folder / "state" / "trainer.json").write_text(json.dumps(kept))


def test_a_run_of_before_goes_on_with_the_same_features_or_not_at_all(data, dino, tmp_path, capsys):
    """Earlier versions read mean and std of the processor's file, over 255, and nothing else of it."""
    moved = shutil.copytree(dino, tmp_path / "dino")
    distil(data, tmp_path / "whole", moved)
    distil(data, tmp_path / "run", moved, train__stop_at=2)
    as_of_before(tmp_path / "run", moved)
    resume(tmp_path / "run")
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")

    distil(data, tmp_path / "other", moved, train__stop_at=2)
    processor = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps({**processor, "do_normalize": False}))
    as_of_before(tmp_path / "other", moved)
    words = ["pretrain", "--run", tmp_path / "other", "--resume"]
    said = assert_refused(
        capsys, words, "an earlier version showed it pixels", "--objective.teacher_image_mean [0.2,0.3,0.4]"
    )
    given = said.partition("give ")[2].partition(", else")[0].split()
    assert main([str(word) for word in [*words, *given]]) in (None, 0)
    assert exact(tmp_path / "other") == exact(tmp_path / "whole")


def test_a_teacher_without_a_processor_names_its_own_options(data, dino, tmp_path, capsys):
    moved = shutil.copytree(dino, tmp_path / "dino")
    (moved / "preprocessor_config.json").unlink()
    more = {"objective__name": "distill", "objective__teacher": moved, "train__steps": 1}
    assert_refused(
        capsys, options(data, tmp_path / "a", **more), "objective.teacher_image_mean and objective.teacher_image_std"
    )
    stats = {"objective__teacher_image_mean": "[0.2,0.3,0.4]", "objective__teacher_image_std": "[0.5,0.6,0.7]"}
    assert main(options(data, tmp_path / "b", **more, **stats)) in (None, 0)
    assert open_frozen(str(dino)).sha256 in (tmp_path / "b" / "config.yaml").read_text()
    assert_refused(
        capsys, options(data, tmp_path / "c", **{**more, "objective__name": "pretrain"}), "objective.name=distill"
    )
    alone = {"objective__teacher_image_mean": "[0.2,0.3,0.4]"}
    assert_refused(capsys, options(data, tmp_path / "d", **more, **alone), "without objective.teacher_image_std")
