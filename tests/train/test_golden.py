"""A stored loss curve: whoever changes what a step computes must do it knowingly."""

import json
import os
from pathlib import Path

import pytest
import torch

from runs import metrics, scenes, train

GOLDEN = Path(__file__).with_name("golden.json")
RENEW = "AIMV2_RENEW_GOLDEN"
KEPT = ("step", "loss", "text_loss", "pixel_loss", "grad_norm", "lr")  # and all of validation
CLOSE = 2e-3  # other processors round differently
DRAWN = 1.540996  # by trunc_normal_ from seed 0; torch 2.11 draws by another method
HOW = f"if the change is meant: {RENEW}=1 pytest tests/train/test_golden.py, and commit {GOLDEN.name} with it"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def curve(run):
    """What a run is compared by: losses, gradient norms, rates, validation figures."""
    return [{k: v for k, v in line.items() if k in KEPT or k.startswith("val_")} for line in metrics(run)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the curve is that of a CPU; CUDA_VISIBLE_DEVICES= compares it")
def test_loss_curve_is_the_stored_one(one_thread, tmp_path):
    first = torch.nn.init.trunc_normal_(torch.empty(1), generator=torch.Generator().manual_seed(0)).item()
    if first != pytest.approx(DRAWN, rel=1e-3):
        pytest.skip(f"torch {torch.__version__} draws other initial weights from a seed")
    data = scenes(tmp_path / "scenes")
    train(data, tmp_path / "run", train__steps=12, eval__every=6, seed=0)
    found = curve(tmp_path / "run")
    assert sum("loss" in line for line in found) == 12 and sum("val_text_loss" in line for line in found) == 2
    if os.environ.get(RENEW) == "1":
        GOLDEN.write_text("[\n" + ",\n".join(json.dumps(line) for line in found) + "\n]\n")
        pytest.skip(f"{GOLDEN.name} renewed")
    stored = json.loads(GOLDEN.read_text())
    assert [sorted(line) for line in found] == [sorted(line) for line in stored], f"other lines or names; {HOW}"
    wrong = [
        f"step {line['step']}: {key} is {line[key]:.7g}, stored {value:.7g}"
        for line, kept in zip(found, stored)
        for key, value in kept.items()
        if line[key] != pytest.approx(value, rel=CLOSE)
    ]
    assert not wrong, "\n".join(["the loss curve is not the stored one", *wrong[:8], HOW])
