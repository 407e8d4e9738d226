"""Compiled blocks compute what eager ones do, on one rank and on two, and one kernel serves all numbers of rows."""

import re

import pytest
import torch

from aimv2.batch import make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models.create import create_model
from aimv2.objectives.pretrain import PretrainObjective
from aimv2.train.compiling import can_compile, compile_blocks
from runs import exact, options, torchrun, train

CLOSE = 1e-3  # fp32, other order of sums
PATCHES, TEXT = 64, 32


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if (reason := can_compile(torch.device("cpu"))) is not None:
        pytest.skip(f"torch.compile does not work here: {reason}")


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


@pytest.fixture(scope="module")
def eager(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("eager")
    train(data, run, train__steps=4, train__compile="off")
    return run


def graphs():
    """Graphs compiled so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_close(run, other):
    one, two = exact(run), exact(other)
    assert [sorted(line) for line in one] == [sorted(line) for line in two]
    for left, right in zip(one, two):
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=CLOSE), f"step {left['step']}: {key}"


@pytest.mark.parametrize("checkpointing", ["off", "full", pytest.param("selective", marks=pytest.mark.long)])
def test_compiled_run_has_the_losses_of_an_eager_one(data, eager, tmp_path, checkpointing, monkeypatch, capsys):
    monkeypatch.setattr("aimv2.progress.EVERY", 0.01)
    torch._dynamo.reset()
    before = graphs()
    train(data, tmp_path / "run", train__steps=4, train__compile="on", train__checkpointing=checkpointing)
    assert graphs() > before, "blocks were compiled"
    shown = capsys.readouterr().err
    block = r"(encoder|decoder trunk) block \d of \d, (forward|backward), graphs done: \d+, 00:"
    assert re.search(rf"^compiling: shape 1 of \d \(captions of up to \d+ tokens\), {block}", shown, re.M)
    assert re.search(r"^compiled [1-9]\d* graphs in 00:\d\d:\d\d$", shown, re.M)
    assert len(exact(tmp_path / "run")) == 5  # four steps, one validation
    assert_close(tmp_path / "run", eager)


def test_two_compiled_processes_have_the_losses_of_an_eager_one(data, tmp_path):
    more = {"train__steps": 3, "eval__captions": 0}
    train(data, tmp_path / "one", data__workers=2, train__compile="off", **more)
    words = options(data, tmp_path / "two", data__workers=1, train__compile="on", **more)
    ended = torchrun(2, *words, timeout=280)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "eager" not in ended.stderr
    assert len(exact(tmp_path / "two")) == 4
    assert_close(tmp_path / "one", tmp_path / "two")


def batch_of(tokens, prefixes, seed):
    """Eight pairs of one text width; ``tokens`` a caption and the prefix lengths decide how many rows are scored."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=draw)
    captions = [torch.randint(2, 50, (tokens,), generator=draw).tolist() for _ in range(8)]
    return make_batch(images, captions, prefixes, PATCHES, text_width=TEXT)


# the first has as many scored patches as image positions (8 x 64), so its rows in and out are equally many
SHAPES = [(4, [1] * 8), (9, [20] * 8), (13, [60] * 8), (17, [40] * 8), (32, [50] * 8)]


@pytest.mark.parametrize("order", ["all patches first", "few patches first"])
@pytest.mark.parametrize("separate", [False, True])
def test_new_numbers_of_rows_make_no_new_kernel(order, separate):
    shape = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
    decoder = {f"decoder_{key}": value for key, value in shape.items()}
    model = create_model(
        "aimv2-tiny-patch4-32", True, 0, decoder_vocab_size=50, decoder_separate=separate, **shape, **decoder
    )
    objective = PretrainObjective(ObjectiveConfig())
    shapes = SHAPES if order == "all patches first" else SHAPES[::-1]
    batches = [batch_of(tokens, prefixes, seed) for seed, (tokens, prefixes) in enumerate(shapes)]
    assert len({len(batch.token_rows) for batch in batches}) >= 4
    assert len({len(batch.patch_rows) for batch in batches}) >= 3
    assert {batch.text.shape[1] for batch in batches} == {TEXT}

    def step(batch):
        total = sum(total for total, _ in objective(model, batch).values())
        total.backward()
        return total.item()

    with torch.no_grad():
        expected = [sum(total.item() for total, _ in objective(model, batch).values()) for batch in batches]
    torch._dynamo.reset()
    compile_blocks(model)
    start = graphs()
    found = [step(batches[0])]
    compiled = graphs()
    assert compiled > start, "blocks were compiled"
    found += [step(batch) for batch in batches[1:]]
    assert graphs() == compiled, f"{graphs() - compiled} graphs more for batches that differ in rows alone"
    assert found == pytest.approx(expected, rel=CLOSE)
