"""Blocks that recompute in the backward pass: equal gradients, and what is computed twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aimv2.batch import Batch, make_batch
from aimv2.config.load import parse, read_recipe
from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.create import create_model
from aimv2.train.checkpoint import read_about
from aimv2.train.half import linears
from aimv2.train.outlook import step_memory
from aimv2.train.same_run import check_edits
from aimv2.train.step import TrainStep
from runs import exact, resume, train

SHAPE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}


class Computed(TorchDispatchMode):
    """Calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make_step(mode: str, precision: str) -> TrainStep:
    config = Config()
    config.train.precision, config.train.checkpointing = precision, mode  # type: ignore[assignment]
    decoder = {f"decoder_{key}": value for key, value in SHAPE.items()}
    model = create_model("aimv2-tiny-patch8-32", True, 0, decoder_vocab_size=20, **SHAPE, **decoder)  # type: ignore[arg-type]
    return TrainStep(model, config, World(0, 1, torch.device("cpu")), False)


def batch_of(pairs: int) -> Batch:
    images = torch.randint(0, 256, (pairs, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    captions = [[5, 6, 1], [7, 1], [8, 9, 10, 11, 12, 1], [1]]
    return make_batch(images, captions[:pairs], [1, 15, 7, 3][:pairs], 16)


def gradients(mode: str, precision: str) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients of a batch by name, and what was computed for them."""
    step, batch = make_step(mode, precision), batch_of(3)
    counts = torch.stack(list(step.objective.counts(batch).values())).double()
    with step.cast_once(), Computed() as computed:
        step.backward(batch, counts)
    named = step.model.named_parameters()
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in named}, computed.count  # type: ignore[misc]


class Casts(TorchDispatchMode):
    """Casts of some tensors to half precision."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.places, self.count = {tensor.data_ptr(): at for at, tensor in enumerate(tensors)}, Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count[self.places[args[0].data_ptr()]] += kwargs["dtype"] == torch.bfloat16
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["off", "full", "selective"])
def test_no_weight_of_a_linear_is_cast_twice_in_a_step(mode: str) -> None:
    step = make_step(mode, "bf16")
    step.config.train.accumulate = 2
    weights = [part.weight for part in linears(step.model)]
    assert len(weights) == 2 * SHAPE["depth"] * 4 + 1
    with Casts(weights) as casts:
        step(batch_of(4), 0)
    assert casts.count == Counter({at: 1 for at in range(len(weights))})
    assert all(isinstance(weight, torch.nn.Parameter) for weight in (part.weight for part in linears(step.model)))
    assert {weight.dtype for weight in weights} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_modes_give_the_same_gradients_and_selective_computes_no_matmul_twice(precision: str) -> None:
    wanted, once = gradients("off", precision)
    (full, twice), (selective, some) = (gradients(mode, precision) for mode in ("full", "selective"))
    for found in (full, selective):
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=0, msg=name)
    blocks = 2 * SHAPE["depth"]
    assert once["silu"] == blocks and twice["silu"] == some["silu"] == 2 * blocks
    assert some["mm"] == once["mm"] and twice["mm"] - once["mm"] >= 3 * blocks


def test_less_memory_is_expected_of_it() -> None:
    config, found = Config(), {}
    model = create_model("aimv2-tiny-patch8-32", True, 0, **SHAPE)  # type: ignore[arg-type]
    for mode in ("off", "selective", "full"):
        config.train.checkpointing = mode  # type: ignore[assignment]
        found[mode] = step_memory(config, model)
    assert found["full"] < found["selective"] < found["off"]


@pytest.mark.parametrize(
    ("given", "found"),
    [(True, "full"), ("true", "full"), (False, "off"), ("false", "off"), ("off", "off"), ("selective", "selective")],
)
def test_true_and_false_are_accepted(given: Any, found: str) -> None:
    assert parse({"train.checkpointing": given}).train.checkpointing == found


def test_yaml_reads_off_as_false(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train:\n  checkpointing: off\n")
    assert parse(read_recipe(tmp_path / "r.yaml")).train.checkpointing == "off"


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.checkpointing .*off, full, selective"):
        parse({"train.checkpointing": "some"})


def test_a_run_of_an_earlier_version_goes_on(world: Any, tmp_path: Path) -> None:
    """Its config.yaml and its checkpoint say true."""
    run = tmp_path / "run"
    train(world.scenes, tmp_path / "whole", train__steps=4)
    train(world.scenes, run, train__steps=4, train__checkpointing=True, train__stop_at=2)
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("checkpointing: full", "checkpointing: true"))
    about = read_about(run / "checkpoints" / "step-0000002")
    assert about["stored"]["train.checkpointing"] == "full"
    about["stored"]["train.checkpointing"] = True
    assert check_edits(run, parse(read_recipe(path)), about) == []
    resume(run, train__checkpointing="selective")
    for left, right in zip(exact(tmp_path / "whole"), exact(run), strict=True):
        assert left == pytest.approx(right, rel=1e-5)
