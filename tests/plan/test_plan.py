"""`aimv2 plan`: what is counted equals what stands elsewhere, what is computed follows the options, wrong use is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aimv2 import api
from aimv2.cli.dispatch import main
from aimv2.data.scenes import write_scenes
from aimv2.errors import UsageError
from aimv2.models.cards import CARDS, card_of_device, find_card

RECIPE = {"config": "aimv2-large-224", "gpus": 64, "gpu": "h100", "nodes": 8, "decode_rate": 100.0}


def plan(**changed: Any) -> dict[str, Any]:
    return api.plan(**{**RECIPE, **changed})


def test_counts_are_those_of_the_recipe() -> None:
    """The recipe's header: 7.81e11 FLOPs a pair with 32 caption tokens, 105 hours on 64 H100 at 40% of the peak."""
    found = plan(price=2.5)
    assert found["flops_a_pair"] == pytest.approx(7.81e11, rel=2e-3)
    assert found["days"] * 24 == pytest.approx(105, rel=5e-3)
    assert found["cost"] == pytest.approx(2.5 * 64 * found["days"] * 24)
    assert found["gpu_hours"] == pytest.approx(64 * found["days"] * 24)
    assert found["checkpoint_gb"] == pytest.approx(16 * found["parameters"] / 1e9)
    assert found["cores"] == pytest.approx(found["pairs_per_s"] / 100)
    assert found["encoder_parameters"] < found["parameters"] and found["vocabulary_from"].startswith("assumed")


def test_assumptions_are_options() -> None:
    one, other = plan(), plan(mfu=0.2)
    assert other["days"] == pytest.approx(2 * one["days"]) and one["cost"] is None
    assert plan(tokens=64)["flops_a_pair"] > one["flops_a_pair"]
    assert plan(write_speed=2.0)["save_seconds"] == pytest.approx(one["save_seconds"] / 2)
    assert plan(nodes=1)["save_seconds"] > one["save_seconds"]


def test_memory_follows_the_layout() -> None:
    whole, shared = plan(gpus=8, nodes=1, options={"train.batch_size": 64}), plan(options={"train.batch_size": 512})
    for part in ("weights", "moments"):
        before, after = (found["configured"]["memory_gb"][part] for found in (whole, shared))
        assert before == pytest.approx(8 * after, rel=1e-6), "sharded over 8 and over 64"
    kept = [
        plan(options={"train.checkpointing": mode})["configured"]["memory_gb"]["activations"] for mode in (False, True)
    ]
    assert kept[1] < kept[0] / 4
    copies = plan(options={"parallel.replicate": 8})["configured"]
    assert (copies["replicate"], copies["shard"]) == (8, 8)
    halved = plan(options={"train.accumulate": 2})["configured"]
    assert halved["memory_gb"]["activations"] == pytest.approx(kept[0] / 2, rel=0.05)
    assert halved["pairs_at_once"] == 64


def test_what_does_not_fit_gets_a_layout_that_does() -> None:
    found = plan(config="aimv2-3B-224", gpu="a100-40")
    assert not found["configured"]["fits"] and found["planned"] == "suggested"
    assert found["suggested"]["fits"] and found["suggested"]["peak_gb"] <= found["suggested"]["room_gb"]
    layout = found["suggested"]
    assert layout["replicate"] * layout["shard"] == 64 and layout["pairs_at_once"] * layout["accumulate"] == 128
    nothing = plan(config="aimv2-3B-224", gpu="l4", gpus=1, nodes=1, options={"train.batch_size": 64})
    assert nothing["suggested"] is None and nothing["planned"] == "configured"


def test_the_loader_is_measured_on_the_data(tmp_path: Path) -> None:
    write_scenes(str(scenes := tmp_path / "scenes"), 40, size=32)
    found = plan(options={"data.train": str(scenes)}, decode_rate=None, config="cifar10-small", gpus=1, nodes=1)
    assert found["decoded_per_core_and_s"] > 0 and "samples of data.train" in found["decoded"]
    assert 0 < found["read_mb_per_s"] < found["pairs_per_s"] * 1e5 / 1e6, "a scene is a few kB"


@pytest.mark.parametrize(
    ("words", "option", "told"),
    [
        ("--gpu h10", "--gpu", "did you mean 'h100'?"),
        ("--gpu abacus", "--gpu", "known are"),
        ("--gpus 48", "--gpus", "does not divide by 48"),
        ("--parallel.shard 48", "parallel.shard", "does not make 64 ranks"),
        ("--parallel.replicate 2 --parallel.shard 8", "parallel.shard", "does not make 64 ranks"),
        ("--nodes 3", "--nodes", "don't divide by --nodes 3"),
        ("--train.accumulate 256", "train.accumulate", "128 pairs each"),
        ("--train.precision fp32", "train.precision", "bf16"),
        ("--optim.lora 4 --init m", "optim.lora", "not planned"),
        ("--run new-run", "--run", "leave it out"),
        ("--train.accumulat 2", "train.accumulat", "did you mean '--train.accumulate'?"),
    ],
)
def test_wrong_use_is_one_line(words: str, option: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = "plan --config aimv2-large-224 --gpus 64 --nodes 8 --decode-rate 100 --json"
    assert main([*common.split(), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and option in err and told in err


def test_no_recipe_or_another_task_is_refused() -> None:
    with pytest.raises(UsageError, match="--config is not given"):
        api.plan(gpus=1)
    for name in ("aimv2-large-lit", "aimv2-large-native"):
        with pytest.raises(UsageError, match="planned"):
            plan(config=name)


def test_cards_are_found_by_name_and_by_device() -> None:
    assert find_card("NVIDIA RTX 4090") is CARDS["rtx4090"] and find_card("A100-80") is CARDS["a100"]
    for device, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("AMD Instinct MI300X", "mi300x"),
    ):
        assert card_of_device(device) is CARDS[name], device
    for device in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"):
        assert card_of_device(device) is None, device
    assert all(50e12 < card.bf16 < 3e15 and 20e9 < card.memory < 300e9 for card in CARDS.values())
    assert all(card.fp8 is None or card.fp8 == pytest.approx(2 * card.bf16, rel=0.02) for card in CARDS.values())


def test_nothing_is_imported_by_pretrain() -> None:
    import subprocess
    import sys

    code = "import aimv2.train.launch, sys; print([m for m in sys.modules if m.startswith('aimv2.plan')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == []


def test_meta_model_holds_nothing() -> None:
    from aimv2.models.sizes import model_config
    from aimv2.train.defaults import unfilled

    assert all(p.device == torch.device("meta") for p in unfilled(*model_config("aimv2-tiny-patch4-32")).parameters())
