"""Rows of conversations: which are put together, which are too long, and which language models may have them share rows."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.config.load import parse
from aimv2.data.images.decode import ImageError
from aimv2.data.shards.format import write_shard
from aimv2.data.stream.conversations import ConversationStream, RowMaker, TooLong, pack_texts, rows_to_batch
from aimv2.data.stream.rejected import BadSample
from aimv2.distributed import World
from aimv2.errors import RankError, UsageError
from aimv2.objectives.instruct import InstructObjective
from aimv2.objectives.pretrain import text_targets
from aimv2.tasks.instruct import Instruct, answers_right, check_packing
from aimv2.vlm.model import open_vlm
from aimv2.vlm.tuned import TunedVisionLanguage
from tiny_llm import encoder, language_model, picture

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vlm`` of a Qwen2 (biases, untied), and shards of 48 conversations: short and long, of no image to two, some of them bad."""
    root = tmp_path_factory.mktemp("rows")
    encoder(root / "eyes")
    language_model(root / "qwen", "qwen2", initializer_range=0.1)
    api.vlm_build(root / "eyes", root / "qwen", root / "vlm")
    (root / "talks").mkdir()
    write_shard(root / "talks" / "train-000000.tar", [sample(number) for number in range(48)])
    return root


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    images = number % 3
    question, answer = "<image>\n" * images + "What is this?", "a red square " * (1 + 5 * (number % 4))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if number == 7:
        turns = turns[:1]
    parts = {"json": json.dumps({"conversations": turns}).encode()}
    for at in range(images):
        out = io.BytesIO()
        picture(32, 24).save(out, "PNG")
        parts["png" if not at else f"{at}.png"] = out.getvalue()
    return f"s{number:04}", parts


@pytest.fixture(scope="module")
def processor(root: Path) -> Any:
    return open_vlm(root / "vlm")[1]


def stream(
    root: Path, processor: Any, window: int = 0, limit: int | None = None, cut: bool = False, **more: Any
) -> ConversationStream:
    config = parse(
        {
            "objective.name": "instruct",
            "data.train": str(root / "talks"),
            "data.workers": 0,
            "data.shuffle_buffer": 10,
            **more,
        }
    )
    maker = RowMaker(processor, limit, cut, "What?", config.data.max_pixels)
    return ConversationStream(config.data, maker, 4, 0, 0, 1, window, 1, False)


def test_rows_of_similar_length_share_a_batch(root: Path, processor: Any) -> None:
    def spread(window: int) -> float:
        found = [next(one)[0].text_len for one in [stream(root, processor, window)] for _ in range(12)]
        return statistics.mean(float(lengths.max() - lengths.min()) for lengths in found)

    assert spread(6) < 0.5 * spread(0)


def test_a_window_goes_on_where_it_was_stopped(root: Path, processor: Any) -> None:
    one = stream(root, processor, 3)
    batches = [next(one)[0] for _ in range(4)]
    state = one.state()
    batches += [next(one)[0] for _ in range(4)]
    other = stream(root, processor, 3)
    other.restore(state)
    for wanted in batches[4:]:
        found = next(other)[0]
        assert (
            found.keys == wanted.keys
            and torch.equal(found.text, wanted.text)
            and torch.equal(found.images, wanted.images)
        )


def test_bad_rows_are_counted_and_named(root: Path, processor: Any, capfd: pytest.CaptureFixture[str]) -> None:
    one = stream(root, processor)
    for _ in range(14):
        next(one)
    assert [bad for bad in one.rejected.named.values() if "s0007" in bad.name and "no answer" in bad.why]
    one.close()
    said = capfd.readouterr().err
    assert "no answer: 1" in said and "s0007" in said


def mostly_bad(folder: Path, good: int, bad: int) -> Path:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}]
    lines = [json.dumps({"conversations": turns[: 1 + (at < good)]}).encode() for at in range(good + bad)]
    folder.mkdir()
    write_shard(folder / "train-000000.tar", [(f"k{at:04}", {"json": line}) for at, line in enumerate(lines)])
    return folder


def test_many_bad_rows_end_no_run(processor: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of an image-text set end it at ``data.max_bad``, and where it is given those of conversations too."""
    data = {"objective.name": "instruct", "data.train": str(mostly_bad(tmp_path / "talks", 250, 220))}
    one = stream(tmp_path, processor, **data)
    for _ in range(100):
        next(one)
    one.close()
    assert 150 < len(one.rejected) <= 220
    said = [line for line in capfd.readouterr().err.splitlines() if "no answer" in line]
    assert f"no answer: {len(one.rejected)} (" in said[-1] and len(said) <= 4
    one = stream(tmp_path, processor, **data, **{"data.max_bad": 100})
    for _ in range(100):
        next(one)
    one.close()
    assert one.rejected.too_many and "data.max_bad allows 100" in one.rejected.line()


@pytest.mark.parametrize(
    ("good", "limit", "words"), [(20, None, "rows are bad: .*no answer"), (60, 4, "is a conversation that fits")]
)
def test_a_run_ends_where_next_to_nothing_is_left(
    good: int, limit: int | None, words: str, processor: Any, tmp_path: Path
) -> None:
    data = {"objective.name": "instruct", "data.train": str(mostly_bad(tmp_path / "talks", good, 60 - good))}
    one = stream(tmp_path, processor, limit=limit, **data)
    with pytest.raises(RankError, match=words):
        for _ in range(200):
            next(one)


@pytest.mark.parametrize(("cut", "words"), [(False, "left out"), (True, "cut there")])
def test_long_rows_are_counted_and_said(
    cut: bool, words: str, root: Path, processor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    one = stream(root, processor, limit=75, cut=cut)
    batches = [next(one)[0] for _ in range(12)]
    assert one.long > 5 and not [name for name in one.rejected.named if "s0007" not in name]
    said = capfd.readouterr().err
    assert words in said and "objective.row_tokens" in said and "75 tokens" in said
    lengths = torch.cat([batch.text_len for batch in batches])
    assert int(lengths.max()) <= 75
    assert bool((lengths == 75).any()) == cut
    assert all(int(batch.token_count) > 0 for batch in batches)


def test_kinds_of_bad_rows_are_said_at_once_after_a_resume(
    root: Path, processor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    one = stream(root, processor, limit=None)
    for number in range(30):  # of the run before
        one.rejected.add(BadSample(f"before/{number}", "no answer"))
    for _ in range(12):
        next(one)
    assert "bad rows so far, left out: no answer: 1 " in capfd.readouterr().err.replace(" (s", " ")


def test_a_row_that_would_lose_an_image_is_never_cut(processor: Any) -> None:
    maker = RowMaker(processor, 45, True, "What?", 10**8)
    with pytest.raises(TooLong, match="32 of them of images"):
        maker("s", sample(2)[1])
    assert len(maker("s", sample(1)[1]).ids) == 45
    with pytest.raises(ImageError, match="no answer"):
        maker("s", sample(7)[1])


def test_a_caption_answers_the_prompt(processor: Any) -> None:
    maker = RowMaker(processor, None, False, "What do you see?", 10**8)
    row = maker("s", {"png": sample(1)[1]["png"], "txt": b"a blue cross"}, np.random.default_rng(0))
    text = processor.tokenizer.decode(row.ids).replace("<image>" * 16, "<image>")
    assert text == "user: <image>\nWhat do you see?\nassistant: a blue cross\n"
    scored = processor.tokenizer.decode([number for number, mark in zip(row.ids, row.scored) if mark])
    assert scored == "a blue cross\n"


def test_held_out_rows_that_are_left_out_are_said(
    root: Path, processor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    world = World(0, 1, torch.device("cpu"))
    config = parse({"objective.name": "instruct", "init": str(root / "vlm"), "objective.row_tokens": 75})
    held = Instruct(config).held_out([root / "talks" / "train-000000.tar"], None, None, world)  # type: ignore[arg-type]
    said = capfd.readouterr().err
    assert f"{47 - len(held.rows)} are longer than 75 tokens" in said and len(held.rows) > 10
    assert "no answer: 1 (s0007 (question 1 has no answer))" in said


def test_packed_rows_have_the_loss_and_the_gradient_of_their_own(root: Path, processor: Any) -> None:
    maker = RowMaker(processor, None, False, "What?", 10**8)
    batch = rows_to_batch([maker(str(at), sample(at)[1]) for at in (3, 0, 6, 1, 2, 11, 8)], SHAPE)
    packed = pack_texts(batch)
    assert len(packed.text) < len(batch.text) and len(packed) == len(batch) == 7
    assert int(packed.token_count) == int(batch.token_count)
    found = []
    for one in (batch, packed):
        model = TunedVisionLanguage.opened(root / "vlm")
        loss, count = InstructObjective()(model, one)["answer"]
        (loss / count).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_padding_and_other_rows_change_no_loss(root: Path, processor: Any) -> None:
    maker, model = RowMaker(processor, None, False, "What?", 10**8), TunedVisionLanguage.opened(root / "vlm")
    rows = [maker(str(at), sample(at)[1]) for at in (0, 3, 1, 5)]
    with torch.no_grad():
        whole = model(batch := rows_to_batch(rows, SHAPE), text_targets(batch), True)
        alone = [model(batch, text_targets(batch), True) for batch in (rows_to_batch([row], SHAPE) for row in rows)]
    torch.testing.assert_close(whole.loss, sum(one.loss for one in alone), rtol=1e-5, atol=1e-5)
    rights = [
        bool(answers_right(rows_to_batch([row], SHAPE).real_tokens(), one.right).item())
        for row, one in zip(rows, alone)
    ]
    batch = rows_to_batch(rows, SHAPE)
    assert answers_right(batch.real_tokens(), whole.right).bool().tolist() == rights


def test_rows_without_images_are_as_if_there_were_no_encoder(root: Path, processor: Any) -> None:
    """A blank image keeps ranks together; it changes neither the loss nor a gradient."""
    maker, model = RowMaker(processor, None, False, "What?", 10**8), TunedVisionLanguage.opened(root / "vlm")
    batch = rows_to_batch([maker(str(at), sample(at)[1]) for at in (0, 3)], SHAPE)
    loss = model(batch, text_targets(batch)).loss
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())
    learning = list(model.language.parameters())
    hidden = model.language(input_ids=batch.text, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = model.head(hidden[batch.real_tokens() - 1])
    wanted = torch.nn.functional.cross_entropy(logits, batch.text.flatten()[batch.real_tokens()], reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    for p, grad in zip(learning, torch.autograd.grad(wanted, learning), strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


def test_right_answers_are_those_whose_tokens_all_are() -> None:
    rows = torch.tensor([3, 4, 5, 9, 10, 64])
    right = torch.tensor([True, True, False, True, True, True, False])  # the last one is padding
    assert answers_right(rows, right).tolist() == [0.0, 1.0, 1.0]


def test_a_language_model_that_mixes_packed_rows_is_refused(root: Path, tmp_path: Path) -> None:
    check_packing(TunedVisionLanguage.opened(root / "vlm"), SHAPE)
    language_model(tmp_path / "llm", "lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8)
    api.vlm_build(root / "eyes", tmp_path / "llm", tmp_path / "vlm")
    with pytest.raises(UsageError, match="Lfm2Model") as error:
        check_packing(TunedVisionLanguage.opened(tmp_path / "vlm"), SHAPE)
    assert (error.value.option, error.value.code) == ("objective.pack", "unsupported")


def test_each_part_learns_at_a_rate_of_its_own(root: Path) -> None:
    config = parse(
        {
            "objective.name": "instruct",
            "init": str(root / "vlm"),
            "objective.freeze": False,
            "objective.encoder_scale": 0.25,
        }
    )
    model = TunedVisionLanguage.opened(root / "vlm")
    groups = Instruct(config).parameter_groups(model, config.optim)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert {scale[id(p)] for p in model.connector.parameters()} == {8.0}
    assert {scale[id(p)] for p in model.encoder.parameters()} == {0.25}
    assert {scale[id(p)] for p in (*model.language.parameters(), *model.head.parameters())} == {1.0}
    assert len(scale) == len(list(model.parameters()))
    model.encoder.requires_grad_(False)
    groups = Instruct(config).parameter_groups(model, config.optim)
    assert not {id(p) for group in groups for p in group["params"]} & {id(p) for p in model.encoder.parameters()}


def test_an_image_is_padded_as_the_processor_does(processor: Any) -> None:
    maker = RowMaker(processor, None, False, "What?", 10**8)
    image = Image.new("RGB", (64, 20), (10, 200, 30))
    pixels, size, tokens = maker.image(image)
    wanted = processor.image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")[
        "pixel_values"
    ][0]
    assert np.array_equal(pixels, wanted) and size == (32, 32) and tokens == 16
