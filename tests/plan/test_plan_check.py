"""A run against its plan, and the planner's memory against torch's tracker over the sharded program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aimv2 import api
from aimv2.cli.dispatch import main
from aimv2.config.schema import Config
from aimv2.data.scenes import write_scenes
from aimv2.errors import UsageError
from aimv2.models.sizes import model_config
from aimv2.plan.fake import tracked_step
from aimv2.plan.memory import Program, RankLayout, Sizes, step_peak
from aimv2.train.defaults import unfilled

TOKENS, PAIRS, RANKS = 32, 8, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("planned")
    write_scenes(str(folder / "scenes"), 64, size=32)
    options = {
        "data.train": str(folder / "scenes"), "model.name": "aimv2-tiny-patch8-32", "model.depth": 2, "model.decoder_depth": 1,
        "train.steps": 4, "train.batch_size": 16, "train.precision": "fp32", "train.compile": "off", "train.log_every": 1,
        "data.workers": 0, "data.vocab_size": 300, "optim.warmup": 1, "eval.captions": 0, "eval.samples": 4, "log.report": False,
        "log.tensorboard": False,
    }  # fmt: skip
    api.pretrain(run=str(folder / "run"), options=options)
    return folder / "run"


def test_a_finished_run_is_compared_with_its_plan(run: Path) -> None:
    found = api.plan(check=str(run), mfu=0.2)
    assert found["planned"]["parameters"] == found["measured"]["parameters"] and found["near"]["parameters"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "pairs_per_s" in line]
    assert found["measured"]["memory_gb"] == max(line["memory_gb"] for line in trained)
    assert found["measured"]["pairs_per_s"] == sorted(line["pairs_per_s"] for line in trained[1:])[1]
    assert found["ratios"]["pairs_per_s"] == pytest.approx(0.2 / found["mfu"])
    assert 0 < found["tokens_a_pair"] < 77 and found["step"] == 4 and found["ranks"] == 1
    assert 0 < found["process_gb"] < found["planned"]["memory_gb"]


def test_a_run_that_can_not_be_compared_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, half := tmp_path / "half")
    (half / "summary.json").unlink()
    for given, told in ((str(tmp_path), "no run there"), (str(half), "not finished")):
        capsys.readouterr()
        assert main(["plan", "--check", given]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(UsageError, match="leave it out"):
        api.plan(check=str(run), config="aimv2-large-224")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_memory_is_that_of_the_sharded_program(accumulate: int) -> None:
    """torch's FSDPMemTracker over the real step of one of four ranks, on tensors without values."""
    config = Config()
    config.train.batch_size, config.train.accumulate, config.train.precision = PAIRS * RANKS, accumulate, "bf16"
    name = "aimv2-tiny-patch14-112"
    shape = {"width": 128, "depth": 2, "heads": 2, "hidden": 384}
    encoder, decoder = model_config(name, {"vocab_size": 2000, "depth": 1}, **shape)
    found = tracked_step(config, encoder, decoder, RANKS, TOKENS, fused=True)
    sizes = Sizes(PAIRS / accumulate, encoder.patches, TOKENS, TOKENS, encoder.patches - encoder.patches // 2)
    layout = RankLayout(1, RANKS, accumulate)
    planned = step_peak(unfilled(encoder, decoder), sizes, layout, Program(True, fused_norm=False))
    assert planned.total == pytest.approx(found["total"], rel=0.15)
