"""Every layout of ranks computes what one process does, and a checkpoint of one goes on in another."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from aimv2.batch import Batch, make_batch, split_batch
from aimv2.config.schema import Config, ParallelConfig
from aimv2.distributed import World, join_world
from aimv2.errors import UsageError
from aimv2.models.create import create_model
from aimv2.tasks.held_out import evaluating
from aimv2.train.checkpoint import load_checkpoint, save_checkpoint
from aimv2.train.parallel import layout_of
from aimv2.train.step import TrainStep
from forked import call_on_ranks
from runs import exact, need_ranks, options, resume, torchrun, train

RANKS = 4
LAYOUTS = {"whole": (1, -1), "hybrid": (2, 2), "copies": (-1, 1)}
SHAPE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}


@pytest.mark.parametrize(
    ("given", "ranks", "found"),
    [
        ((1, -1), 8, (1, 8)), ((-1, 1), 8, (8, 1)), ((2, -1), 8, (2, 4)), ((-1, 8), 8, (1, 8)), ((2, 2), 4, (2, 2)),
        ((1, -1), 1, (1, 1)),
    ],
)  # fmt: skip
def test_layouts(given: tuple[int, int], ranks: int, found: tuple[int, int]) -> None:
    assert layout_of(ParallelConfig(*given), ranks) == found


@pytest.mark.parametrize("given", [(2, 3), (3, -1), (-1, -1), (0, 4), (4, 0), (-1, 3), (8, -1), (-2, 2)])
def test_a_layout_of_other_ranks_is_refused(given: tuple[int, int]) -> None:
    replicate, shard = given
    with pytest.raises(UsageError, match=rf"parallel.replicate {replicate} x parallel.shard {shard} .* 4 ranks"):
        layout_of(ParallelConfig(*given), 4)


def pairs() -> Batch:
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=draw)
    captions = [[*torch.randint(2, 20, (length,), generator=draw).tolist(), 1] for length in (1, 7, 3, 5, 2, 2, 8, 4)]
    return make_batch(images, captions, [1, 15, 7, 3, 9, 12, 5, 8], 16)


def make_step(
    world: World, layout: str = "whole", reshard: bool = True, precision: str = "fp32", accumulate: int = 1
) -> TrainStep:
    config = Config()
    config.train.precision, config.train.steps, config.train.accumulate = precision, 10, accumulate  # type: ignore[assignment]
    config.train.ema, config.optim.warmup, config.optim.clip = 0.5, 0, 0.5
    config.parallel.replicate, config.parallel.shard = LAYOUTS[layout]
    config.parallel.reshard = reshard
    decoder = {f"decoder_{key}": value for key, value in SHAPE.items()}
    model = create_model("aimv2-tiny-patch8-32", True, 0, decoder_vocab_size=20, **SHAPE, **decoder)  # type: ignore[arg-type]
    return TrainStep(model, config, world, False)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def first_step(step: TrainStep, batch: Batch) -> dict[str, Any]:
    """Losses, norm and the clipped gradient of a step."""
    gradient: dict[str, torch.Tensor] = {}
    clip = step.clip

    def keep() -> torch.Tensor:
        norm = clip()
        gradient.update({name: whole(p.grad).clone() for name, p in step.model.named_parameters()})  # type: ignore[arg-type]
        return norm

    step.clip = keep  # type: ignore[method-assign]
    figures = step(batch, 0)
    step.clip = clip  # type: ignore[method-assign]
    return {"means": figures.means, "norm": figures.norm, "gradient": gradient}


def loss_of(model: Any, step: TrainStep, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), evaluating(model):
        return torch.stack([total for total, _ in step.objective(model, batch).values()])


def check_precision(step: TrainStep, batch: Batch, reshard: bool) -> None:
    """What a block gathers in training and when it is freed, and that it is validated in fp32."""
    model: Any = step.model
    found = []
    block = model.encoder.blocks[0]
    hook = block.attn.qkv.register_forward_pre_hook(lambda module, given: found.append(module.weight.dtype))
    with step.autocast():
        step.objective(model, batch)
    assert isinstance(block.attn.qkv.weight, DTensor) == reshard, "freed after the forward pass"
    step.backward(batch, torch.ones(2, dtype=torch.float64))
    assert {whole(p.grad).dtype for p in model.parameters()} == {torch.float32}
    assert isinstance(block.attn.qkv.weight, DTensor)
    step.optimizer.zero_grad()
    assert set(found) == {torch.bfloat16}
    found.clear()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = create_model("aimv2-tiny-patch8-32", True, 0, decoder_vocab_size=20, **SHAPE, **{  # type: ignore[arg-type]
        f"decoder_{key}": value for key, value in SHAPE.items()
    })  # fmt: skip
    step.ema, average = None, step.ema
    with step.evaluated():
        scored = loss_of(model, step, batch)
    step.ema = average
    plain.load_state_dict({name: whole(value) for name, value in weights.items()})  # type: ignore[arg-type]
    torch.testing.assert_close(scored, loss_of(plain, step, batch), rtol=1e-6, atol=0)
    assert found == [torch.float32]
    hook.remove()


class Exchanges(TorchDispatchMode):
    """Sums over ranks, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce" in func.name() and func.namespace == "c10d":
            self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def sums_of(step: TrainStep, batch: Batch) -> Counter[str]:
    """Sums over ranks in one step, by operator."""
    with Exchanges() as found:
        step(batch, 1)
    return found.count


def on_ranks(folder: Path) -> None:
    """On each of four ranks: every layout, with both precisions."""
    world = join_world()
    batch = split_batch(pairs(), RANKS, 16)[world.rank]
    found: dict[Any, Any] = {}
    for layout in LAYOUTS:
        for reshard, precision in ((True, "fp32"), (False, "bf16")):
            step = make_step(world, layout, reshard, precision, 2)
            found[layout, precision] = first_step(step, batch)
            if precision == "bf16":
                check_precision(step, batch, False)
            else:
                once = sums_of(make_step(world, layout), batch)
                assert once == sums_of(step, batch), "gradients are summed once, after the last micro-batch"
                assert max(once.values()) >= 5, "four blocks and the rest"
    check_precision(make_step(world, "whole", True, "bf16"), batch, True)
    check_relayout(world, folder, batch)
    if world.main:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def check_relayout(world: World, folder: Path, batch: Batch) -> None:
    """A checkpoint of the hybrid layout goes on in every layout as it would have gone on."""
    step = make_step(world, "hybrid")
    step(batch, 0)
    save_checkpoint(
        folder, 1, step.model, step.optimizer, {"step": 1, "layout": [RANKS, 0]}, {"data": {}, "rng": torch.arange(2)},
        lambda to, full: to.mkdir(), world, 0, step.ema,
    )  # fmt: skip
    wanted = step(batch, 1)
    for layout in LAYOUTS:
        other = make_step(world, layout)
        load_checkpoint(folder / "checkpoints" / "step-0000001", other.model, other.optimizer, world, 0, other.ema)
        figures = other(batch, 1)
        torch.testing.assert_close(figures.norm, wanted.norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(figures.means, wanted.means, rtol=1e-5, atol=0)
        assert step.ema is not None and other.ema is not None
        for name, value in step.ema.average.items():
            torch.testing.assert_close(whole(other.ema.average[name]), whole(value), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    need_ranks(RANKS)
    folder = tmp_path_factory.mktemp("sharded")
    call_on_ranks(RANKS, on_ranks, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-6), ("bf16", 3e-4)])
def test_four_ranks_in_every_layout_compute_what_one_process_does(
    found: dict[Any, Any], layout: str, precision: str, close: float
) -> None:
    one, four = (
        first_step(make_step(World(0, 1, torch.device("cpu")), precision=precision), pairs()),
        found[layout, precision],
    )
    torch.testing.assert_close(four["means"], one["means"], rtol=close, atol=0)
    torch.testing.assert_close(four["norm"], one["norm"], rtol=close, atol=0)
    assert four["gradient"].keys() == one["gradient"].keys()
    if precision == "fp32":
        for name, gradient in one["gradient"].items():
            torch.testing.assert_close(four["gradient"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_two_copies_go_on_as_one_process(world: Any, tmp_path: Path) -> None:
    more = {"train__accumulate": 2, "eval__every": 3, "eval__captions": 0}
    train(world.scenes, tmp_path / "one", data__workers=2, **more)
    words = options(world.scenes, tmp_path / "two", data__workers=1, train__stop_at=3, **more)
    ended = torchrun(2, *words, "--parallel.replicate", "-1", "--parallel.shard", "1")
    assert ended.returncode == 0, ended.stderr
    resume(tmp_path / "two")
    for left, right in zip(exact(tmp_path / "one"), exact(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=2e-4)
