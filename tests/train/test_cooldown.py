"""Any checkpoint becomes a finished model: its rate goes down, its moments go on, and nobody's pickle runs."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aimv2 import api
from aimv2.cli import main
from aimv2.config.load import parse, read_recipe
from aimv2.config.schema import OptimConfig
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.train.checkpoint import load_checkpoint
from aimv2.train.cooldown import carry_on, cooldown_of
from aimv2.train.launch import build_trainer
from aimv2.train.moments import take_moments
from aimv2.train.schedule import learning_rate
from runs import exact, metrics, options, resume, scenes, torchrun, train

ALONE = World(0, 1, torch.device("cpu"))
STEPS, AT = 60, 40


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps with checkpoints at 40 and 60."""
    folder = tmp_path_factory.mktemp("origin")
    more: dict[str, Any] = {"train__save_every": 20, "train__keep": 2, "optim__schedule": "half-cosine"}
    train(scenes(folder / "scenes", 200), folder / "run", train__steps=STEPS, eval__every=20, **more)
    return folder / "run"


def cool(run: Path, init: Path | str, **more: Any) -> dict[str, Any]:
    given = {key.replace("__", "."): value for key, value in more.items()}
    return api.pretrain(None, str(run), {"init": str(init), "optim.schedule": "cooldown", **given})


def rate_at(step: int) -> float:
    return learning_rate(step, STEPS, OptimConfig(lr=2e-3, warmup=2, schedule="half-cosine"))


def test_values_are_the_runs_own_but_for_the_cooldown(origin: Path) -> None:
    name, values = cooldown_of(f"{origin}@{AT}", {})
    stored, config = parse(read_recipe(origin / "config.yaml")), parse(values)
    assert name == str(origin / "config.yaml")
    assert (config.train.steps, config.optim.warmup, config.optim.min_lr) == (8, 0, 1e-6)
    assert config.optim.lr == rate_at(AT) and config.optim.schedule == "cooldown"
    assert config.seed == stored.seed + 1
    assert (config.data.train, config.model, config.objective) == (stored.data.train, stored.model, stored.objective)
    # fully decoupled decay is a share of the peak: what a step takes away goes on from where it was
    took = stored.optim.weight_decay * rate_at(AT) / stored.optim.lr
    assert config.optim.weight_decay == pytest.approx(took)
    assert cooldown_of(str(origin), {})[1]["train.steps"] == 12, "the newest checkpoint"


def test_a_checkpoint_is_finished(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = cool(tmp_path / "run", f"{origin}@{AT}", eval__every=1)
    assert summary["step"] == 8
    assert f"moments go on from {origin} step {AT}" in capsys.readouterr().err
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    fall = [rate_at(AT) + (1e-6 - rate_at(AT)) * step / 8 for step in range(8)]
    assert [line["lr"] for line in lines] == pytest.approx(fall)
    before = next(line for line in metrics(origin) if line["step"] == AT and "val_text_loss" in line)
    for key in ("val_text_loss", "val_pixel_loss"):
        assert summary[key] <= before[key], key
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["init"] == f"{origin}@{AT}" and stored["optim"]["schedule"] == "cooldown"


def state_of(trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in trainer.optimizer.state.items()}


def built(origin: Path, folder: Path, **more: Any) -> Any:
    """The trainer of a cooldown, before its moments are sought."""
    init = f"{origin}@{AT}"
    given = {"init": init, "run": str(folder), **{key.replace("__", "."): value for key, value in more.items()}}
    return build_trainer(parse(cooldown_of(init, given)[1] | given), folder, ALONE)


def test_moments_are_those_of_the_source(origin: Path, tmp_path: Path) -> None:
    source = build_trainer(parse(read_recipe(origin / "config.yaml")), tmp_path, ALONE)
    checkpoint = origin / "checkpoints" / f"step-{AT:07d}"
    load_checkpoint(checkpoint, source.model, source.optimizer, ALONE)
    trainer = built(origin, tmp_path)
    carry_on(trainer.config, trainer.model, trainer.optimizer, ALONE, False)
    expected, found = state_of(source), state_of(trainer)
    assert found.keys() == expected.keys() == dict(trainer.model.named_parameters()).keys()
    for name, values in expected.items():
        assert values.keys() == found[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(found[name][key], value) for key, value in values.items()), name
        assert found[name]["step"] == AT and found[name]["exp_avg_sq"].any()
    assert trainer.config.optim.warmup == 0
    for mine, its in zip(trainer.model.parameters(), source.model.parameters(), strict=True):
        assert torch.equal(mine, its)
    source.close(), trainer.close()


class Planted:
    """A pickle that writes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def copied(origin: Path, folder: Path) -> Path:
    shutil.copytree(origin, folder / "copy")
    return folder / "copy"


@pytest.mark.parametrize("where", ["metadata", "inside", "bytes", "data", "rank"])
def test_no_planted_pickle_runs(where: str, origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, touched = copied(origin, tmp_path), tmp_path / "touched"
    state = run / "checkpoints" / f"step-{AT:07d}" / "state"
    bomb, real = pickle.dumps(Planted(touched)), pickle.loads((state / ".metadata").read_bytes())
    if where == "metadata":
        (state / ".metadata").write_bytes(bomb)
    elif where == "inside":  # in a field of real metadata
        real.planner_data = Planted(touched)
        (state / ".metadata").write_bytes(pickle.dumps(real))
    elif where == "bytes":  # every tensor told to be bytes, which DCP would unpickle
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        real.state_dict_metadata = dict.fromkeys(real.state_dict_metadata, BytesStorageMetadata())
        (state / ".metadata").write_bytes(pickle.dumps(real))
    if where in ("data", "bytes"):
        for file in state.glob("*.distcp"):
            file.write_bytes(bomb * 100)
    for file in state.glob("rank-*.pt"):
        file.write_bytes(bomb)
    summary = cool(tmp_path / "run", f"{run}@{AT}", train__steps=4)
    assert summary["step"] == 4 and not touched.exists()
    said = capsys.readouterr().err
    if where == "rank":
        assert "moments go on" in said, "the file of a rank is not read at all"
    else:
        (line,) = [line for line in said.splitlines() if "moments start anew" in line]
        assert line.endswith("optim.warmup 1")
    pickle.loads(bomb)
    assert touched.exists(), "the bomb is a real one"


def test_without_moments_there_is_a_warm_up(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(origin, tmp_path)
    shutil.rmtree(run / "checkpoints" / f"step-{AT:07d}" / "state")
    cool(tmp_path / "one", f"{run}@{AT}", train__steps=40, train__stop_at=3)
    said = capsys.readouterr().err
    assert "moments start anew (there is no state folder); optim.warmup 2" in said
    rates = [line["lr"] for line in metrics(tmp_path / "one") if "loss" in line]
    assert rates == pytest.approx([1e-6, (1e-6 + rate_at(AT)) / 2, rate_at(AT)])
    assert parse(read_recipe(tmp_path / "one" / "config.yaml")).optim.warmup == 2
    cool(tmp_path / "two", f"{run}@{AT}", train__steps=40, train__stop_at=1, optim__warmup=0)
    assert metrics(tmp_path / "two")[0]["lr"] == pytest.approx(rate_at(AT)), "the user's own warm-up"


def test_a_failed_reading_leaves_the_optimizer_as_new(origin: Path, tmp_path: Path) -> None:
    run = copied(origin, tmp_path)
    state = run / "checkpoints" / f"step-{AT:07d}" / "state"
    for file in state.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:2000])
    trainer = built(run, tmp_path / "new")
    assert take_moments(state, trainer.model, trainer.optimizer, ALONE) == "it can't be read"
    assert not trainer.optimizer.state
    trainer.close()
    other = built(origin, tmp_path / "other", model__image_size=48)
    why = take_moments(origin / "checkpoints" / f"step-{AT:07d}" / "state", other.model, other.optimizer, ALONE)
    assert why == "it has no exp_avg of encoder.patch_embed.position with shape [1, 36, 32]"
    other.close()


def test_resume_is_exact(origin: Path, tmp_path: Path) -> None:
    cool(tmp_path / "whole", f"{origin}@{AT}")
    cool(tmp_path / "parts", f"{origin}@{AT}", train__stop_at=3)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    shutil.rmtree(tmp_path / "parts" / "checkpoints")  # stopped before the first one: the moments are fetched again
    (tmp_path / "parts" / "summary.json").unlink()
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")


def test_what_has_no_moments_in_the_run_starts_with_new_ones(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new decoder may have the shape of the old one, whose moments are not its own."""
    trainer = built(origin, tmp_path, optim__fresh_decoder=True)
    carry_on(trainer.config, trainer.model, trainer.optimizer, ALONE, False)
    assert not trainer.optimizer.state and "optim.fresh_decoder makes a new decoder" in capsys.readouterr().err
    trainer.close()


def test_a_rate_of_nothing_can_not_fall(origin: Path, tmp_path: Path) -> None:
    run = copied(origin, tmp_path)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["optim"] |= {"schedule": "cosine", "min_lr": 0.0}
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(
        UsageError, match=r"the run's learning rate is 0 at step 60, .* earlier checkpoint, or give optim\.lr"
    ):
        cool(tmp_path / "run", run)
    assert cooldown_of(f"{run}@{AT}", {})[1]["optim.lr"] > 0
    assert cooldown_of(str(run), {"optim.lr": 1e-4})[1]["train.steps"] == 12


def test_two_ranks_take_the_moments_of_one(origin: Path, tmp_path: Path) -> None:
    cool(tmp_path / "one", f"{origin}@{AT}", data__workers=2)
    words = ["pretrain", "--run", str(tmp_path / "two"), "--init", f"{origin}@{AT}", "--optim.schedule", "cooldown"]
    ended = torchrun(2, *words, "--data.workers", "1")
    assert ended.returncode == 0 and "moments go on" in ended.stderr, ended.stderr
    for left, right in zip(exact(tmp_path / "one"), exact(tmp_path / "two"), strict=True):
        assert all(right[key] == pytest.approx(left[key], rel=1e-3) for key in left)


def test_options_of_the_command_line_win(origin: Path, tmp_path: Path) -> None:
    other = scenes(tmp_path / "other", 60)
    cool(tmp_path / "run", origin, train__steps=2, optim__lr=1e-4, seed=9, data__train=str(other))
    config = parse(read_recipe(tmp_path / "run" / "config.yaml"))
    assert (config.train.steps, config.optim.lr, config.seed, config.data.train) == (2, 1e-4, 9, str(other))


def test_wrong_use(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = origin / "checkpoints" / f"step-{AT:07d}" / "model"
    shutil.copytree(model, tmp_path / "model")
    for init, more, said in (
        (tmp_path / "model", [], "--init RUN or RUN@STEP expected"),
        (tmp_path / "none", [], "--init RUN or RUN@STEP expected"),
        (f"{origin}@7", [], f"no checkpoint of step 7 in {origin} (there: 40, 60)"),
        (origin, ["--objective.name", "probe"], "got objective.name=probe"),
    ):
        words = ["pretrain", "--run", str(tmp_path / "run"), "--init", str(init), "--optim.schedule", "cooldown", *more]
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="no such file, folder"):  # with data of one's own any model may be cooled
        data = str(parse(read_recipe(origin / "config.yaml")).data.train)
        main_words = options(Path(data), tmp_path / "run", init=tmp_path / "none", optim__schedule="cooldown")
        main([*main_words, "--debug"])


def test_an_option_that_earlier_versions_let_pass(origin: Path, tmp_path: Path) -> None:
    """Of a run that holds an option of another task, which no longer passes: it is left out."""
    run = copied(origin, tmp_path)
    text = (run / "config.yaml").read_text()
    assert "smoothing: 0.0" in text
    (run / "config.yaml").write_text(text.replace("smoothing: 0.0", "smoothing: 0.1"))
    _, values = cooldown_of(str(run), {})
    assert parse(values).objective.smoothing == 0.0
