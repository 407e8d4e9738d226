"""Likelihoods of captions: the training objective's own values, whatever is in the batch, with the image read once."""

import itertools

import pytest
import torch
from torch import Tensor

from aimv2.batch import make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models import likelihood
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.likelihood import log_likelihood, read_images, score
from aimv2.objectives.pretrain import PretrainObjective

PATCHES, END = 16, 1
CAPTIONS = [[5, 0, 3, 9, 1], [1], [7, 7, 2, 0, 0, 4, 8, 10, 6, 3, 5, 1], [0, 0, 1], [5, 0, 3, 9, 2, 1]]


def tiny(vocab: int = 11, max_text: int = 12, **decoder: object) -> AIMv2:
    """With heads and embeddings so large that captions and images matter."""
    options: dict = {"image_size": 16, "width": 24, "heads": 2, "hidden": 40, "depth": 2}
    options |= {"decoder_width": 32, "decoder_heads": 2, "decoder_hidden": 48, "decoder_depth": 3}
    options |= {"decoder_vocab_size": vocab, "decoder_max_text": max_text, **decoder}
    model = create_model("aimv2-tiny-patch4-32", decoder=True, seed=0, **options)
    assert isinstance(model, AIMv2)
    with torch.no_grad():
        if model.decoder.config.text:
            model.decoder.text_head.linear.weight.mul_(8)
            model.decoder.token_embed.weight.mul_(30)
    return model.eval()


def pictures(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("separate", [False, True])
def test_equals_the_objective(separate: bool) -> None:
    """Each image with each caption, through the packed decoder of training."""
    model, images = tiny(decoder_separate=separate), pictures()
    objective = PretrainObjective(ObjectiveConfig(targets="text", attention="bidirectional"))
    found = log_likelihood(model, read_images(model, images), CAPTIONS)
    assert found.shape == (3, 5) and found.dtype == torch.float64 and bool((found < 0).all())
    for image, caption in itertools.product(range(3), range(5)):
        batch = make_batch(images[image : image + 1], [CAPTIONS[caption]], [PATCHES - 1], PATCHES)
        with torch.no_grad():
            total, count = objective(model, batch)["text"]
        assert int(count) == len(CAPTIONS[caption])
        assert found[image, caption].item() == pytest.approx(-total.item(), rel=1e-5, abs=1e-5)
    assert found.std(dim=0).min() > 0.05  # images matter


def test_equals_the_path_without_a_cache() -> None:
    model, images = tiny(), pictures()
    found = log_likelihood(model, read_images(model, images), CAPTIONS)
    with torch.no_grad():
        features = model.encoder(images)
        for place, ids in enumerate(CAPTIONS):
            text = torch.tensor([ids] * 3)
            logs = model.decoder.full_logits(features, text[:, :-1]).double().log_softmax(-1)
            wanted = logs.gather(2, text[:, :, None]).sum((1, 2))
            torch.testing.assert_close(found[:, place], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("positions", "rows"), [(16384, 1024), (1, 1), (60, 7), (100, 3)])
def test_parts_padding_and_company_change_nothing(positions: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``positions`` 1: one caption of one image at a time."""
    model, images = tiny(), pictures()
    whole = log_likelihood(model, read_images(model, images), CAPTIONS)
    monkeypatch.setattr(likelihood, "CHUNK_POSITIONS", positions)
    monkeypatch.setattr(likelihood, "CHUNK_ROWS", rows)
    memory = read_images(model, images)
    order = [3, 0, 4, 2, 1]
    parts = log_likelihood(model, memory, [CAPTIONS[place] for place in order])
    torch.testing.assert_close(parts, whole[:, order], rtol=0, atol=1e-5)
    again = log_likelihood(model, memory, [CAPTIONS[0]])  # what was scored before is not remembered
    torch.testing.assert_close(again, whole[:, :1], rtol=0, atol=1e-5)
    alone = log_likelihood(model, read_images(model, images[2:]), CAPTIONS)
    torch.testing.assert_close(alone, whole[2:], rtol=0, atol=1e-5)


def test_probabilities_of_all_captions_sum_to_one() -> None:
    """Every text of up to two tokens: the end of text at once, or any token and any other behind it."""
    model = tiny(vocab=6, max_text=2)
    every = [[END]] + [[first, second] for first in range(6) if first != END for second in range(6)]
    found = log_likelihood(model, read_images(model, pictures()), every)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)


def test_an_image_is_read_once() -> None:
    """Positions that pass the decoder's first block: the images' own, and the captions' (here none is padded)."""
    model, passed = tiny(), []
    model.decoder.trunk.blocks[0].register_forward_pre_hook(
        lambda block, args: passed.append(args[0].shape[:2].numel())
    )
    memory = read_images(model, pictures())
    log_likelihood(model, memory, [[5, 0, 1], [2, 2, 1]] * 20)
    log_likelihood(model, memory, [[5, 1]])
    assert sum(passed) == 3 * PATCHES + 3 * 40 * 3 + 3 * 2


class Letters:
    """A tokeniser of five letters."""

    eos_id = END

    def encode(self, text: str, max_tokens: int) -> list[int]:
        ids = ["abcde".index(letter) + 2 for letter in text]
        return [*ids[: max_tokens - 1], END]

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def test_texts_are_scored_as_their_tokens() -> None:
    model, images = tiny(max_text=4), pictures()
    wanted = log_likelihood(model, read_images(model, images), [[2, 3, 1], [4, 4, 4, 1]])
    found = score(model, images, ["ab", "ccccc"], Letters())  # the second is cut as in training
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(
        score(model, images, ["ab", "ccccc"], Letters(), mean=True), wanted / torch.tensor([3, 4])
    )
    with pytest.raises(ValueError, match="without a tokenizer"):
        score(model, images, ["ab"])
    with pytest.raises(ValueError, match="no text head"):
        read_images(tiny(decoder_text=False), images)
