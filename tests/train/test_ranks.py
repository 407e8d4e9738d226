"""One rank equals many: the same product of ranks and workers gives the same batches, gradients and losses."""

import io
import re
import time

import pytest
import torch
from PIL import Image

from aimv2.batch import make_batch, split_batch
from aimv2.config.schema import Config
from aimv2.data.shards.format import write_shard
from aimv2.distributed import World, join_world
from aimv2.models.create import create_model
from aimv2.train import plain_state
from aimv2.train.checkpoint import save_checkpoint, step_folder
from aimv2.train.sealing import faults, listed
from aimv2.train.step import TrainStep
from forked import call_on_ranks
from runs import exact, metrics, need_ranks, options, torchrun, train


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


def close(one, other):
    return len(one) == len(other) and all(
        left.keys() == right.keys() and all(right[key] == pytest.approx(left[key], rel=2e-4) for key in left)
        for left, right in zip(one, other)
    )


def run_two(data, run, fresh=False, **more):
    """A run of two processes and two micro-batches."""
    words = options(data, run, data__workers=1, eval__every=3, train__accumulate=2, eval__captions=0, **more)
    ended = torchrun(2, *words, fresh=fresh)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Such a run, undisturbed, by the launcher itself."""
    run = tmp_path_factory.mktemp("two") / "run"
    run_two(data, run, fresh=True)
    return run


def test_two_processes_have_the_losses_of_one(data, two, tmp_path):
    train(data, tmp_path / "one", data__workers=2, eval__every=3)
    one, other = exact(tmp_path / "one"), exact(two)
    assert len(one) == 8
    assert close(one, other)
    assert metrics(two)[-1]["val_text_loss"] > 0
    assert (two / "summary.json").is_file()


def test_two_processes_resume_exactly(data, two, tmp_path):
    run_two(data, tmp_path / "parts", train__stop_at=2)
    ended = torchrun(2, "pretrain", "--run", str(tmp_path / "parts"), "--resume")
    assert ended.returncode == 0, ended.stderr
    assert exact(tmp_path / "parts") == exact(two)


def test_two_processes_end_together_where_too_many_samples_are_bad(tmp_path):
    """Neither rank meets more than the limit."""
    pairs = [(f"k{i}", {"png": picture((i, 0, 0)) if i % 10 else b"no image", "txt": b"a word"}) for i in range(40)]
    write_shard(tmp_path / "train-000000.tar", pairs)
    words = options(tmp_path, tmp_path / "run", data__workers=1, train__steps=30, train__log_every=3)
    ended = torchrun(2, *words, "--data.max_bad", "3")
    assert ended.returncode == 2 and ended.stderr.count("4 samples could not be read, data.max_bad allows 3") == 1
    step = int(re.search(r"until step (\d+), which is saved", ended.stderr)[1])
    assert step < 30 and (tmp_path / "run" / "checkpoints" / f"step-{step:07d}" / "files.json").is_file()
    ended = torchrun(2, "pretrain", "--run", str(tmp_path / "run"), "--resume", "--data.max_bad", "4")
    assert ended.returncode == 0, ended.stderr


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def test_mistake_under_torchrun_is_said_once(data, tmp_path):
    ended = torchrun(2, *options(data, tmp_path / "run", train__batch_size=7))
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: train.batch_size 7 does not divide by 2 ranks x 1 data workers; change train.batch_size or data.workers"
    ]
    assert not (tmp_path / "run").exists()


def save_slowly(run):
    """Rank 1 writes as safetensors does, into a passing file that it renames, and only ends once rank 0 has written all of its own."""
    world, write = join_world(), plain_state.write_state

    def slow(stem, value):
        passing = stem.with_name(f".tmp-{stem.name}")
        write(passing, value)
        limit = time.monotonic() + 60
        while world.rank == 1 and not stem.with_name("trainer.json").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.5 * world.rank)
        for part in stem.parent.glob(f"{passing.name}.*"):
            part.rename(part.with_name(part.name.removeprefix(".tmp-")))

    plain_state.write_state = slow
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    write_model = lambda folder, full: folder.mkdir()  # noqa: E731
    save_checkpoint(run, 1, model, optimizer, {"step": 1}, {"draw": torch.arange(9)}, write_model, world, 0)
    torch.distributed.destroy_process_group()


def test_a_rank_that_writes_slowly_leaves_a_good_checkpoint(tmp_path):
    """A list that is made while another rank writes would name files that go away."""
    need_ranks(2)
    call_on_ranks(2, save_slowly, tmp_path)
    folder = step_folder(tmp_path, 1)
    ranks = [f"state/rank-{rank:05d}.{ending}" for rank in (0, 1) for ending in ("json", "safetensors")]
    assert {*ranks, "state/.metadata", "state/trainer.json"} <= listed(folder).keys()
    assert faults(folder) == []


def pairs():
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=draw)
    captions = [[5, 6, 1], [7, 1], [8, 9, 10, 11, 12, 1], [1]]
    return make_batch(images, captions, [1, 15, 7, 3], 16)


def one_step(world, batch, accumulate=1, checkpointing="off"):
    config = Config()
    config.train.precision, config.train.steps, config.train.accumulate = "fp32", 10, accumulate
    config.train.checkpointing = checkpointing
    config.optim.warmup, config.optim.lr = 0, 1e-3
    config.objective.targets = "both"
    shape = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
    decoder = {f"decoder_{key}": value for key, value in shape.items()}
    model = create_model("aimv2-tiny-patch8-32", True, 0, decoder_vocab_size=20, **shape, **decoder)
    step = TrainStep(model, config, world, False)
    gradients = {}

    def keep():
        for name, parameter in step.model.named_parameters():
            gradient = parameter.grad
            full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            gradients[name.replace("_checkpoint_wrapped_module.", "")] = full.clone()

    clip = step.clip
    step.clip = lambda: (keep(), clip())[1]
    figures = step(batch, 0)
    return figures, gradients


def rank_main(folder):
    world = join_world()
    rank = world.rank
    for accumulate in (1, 2):
        figures, gradients = one_step(world, split_batch(pairs(), 2, 16)[rank], accumulate)
        if rank == 0:
            found = {"means": figures.means, "norm": figures.norm, "gradients": gradients}
            torch.save(found, folder / f"two-{accumulate}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found, one file a number of micro-batches."""
    folder = tmp_path_factory.mktemp("ranks")
    need_ranks(2)
    call_on_ranks(2, rank_main, folder)
    return folder


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_gloo_processes_give_the_gradients_of_one(ranks, accumulate):
    figures, gradients = one_step(World(0, 1, torch.device("cpu")), pairs())
    two = torch.load(ranks / f"two-{accumulate}.pt")
    torch.testing.assert_close(two["means"], figures.means)
    torch.testing.assert_close(two["norm"], figures.norm)
    assert two["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("accumulate", "checkpointing"), [(2, "off"), (4, "off"), (1, "full"), (1, "selective")])
def test_micro_batches_and_recomputation_change_nothing(accumulate, checkpointing):
    world = World(0, 1, torch.device("cpu"))
    figures, gradients = one_step(world, pairs())
    again, same = one_step(world, pairs(), accumulate, checkpointing)
    torch.testing.assert_close(again.means, figures.means)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
