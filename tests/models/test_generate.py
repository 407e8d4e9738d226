"""Writing captions: the cache changes nothing but the speed, captions end, and beams find what they should."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.generate import generate, penalize, pick

NEVER = -1  # no token: nothing ends a caption but its length


def tiny(vocab: int = 13, max_text: int = 8, seed: int = 0, **decoder: object) -> AIMv2:
    """With heads and embeddings so large that captions are lively and differ between images."""
    options: dict = {"image_size": 16, "width": 24, "heads": 2, "hidden": 40, "depth": 1}
    options |= {"decoder_width": 32, "decoder_heads": 2, "decoder_hidden": 48, "decoder_depth": 2, **decoder}
    options |= {"decoder_vocab_size": vocab, "decoder_max_text": max_text}
    model = create_model("aimv2-tiny-patch4-32", decoder=True, seed=seed, **options)
    assert isinstance(model, AIMv2)
    with torch.no_grad():
        if model.decoder.config.text:
            model.decoder.text_head.linear.weight.mul_(10)
            model.decoder.token_embed.weight.mul_(50)
            model.decoder.text_position.mul_(50)
    return model.eval()


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2


WAYS = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 3},
    "drawn from the likeliest": {"temperature": 1.5, "top_p": 0.7, "seed": 4},
    "beams": {"beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("separate", [False, True])
def test_cached_equals_uncached(way: str, separate: bool) -> None:
    model = tiny(decoder_separate=separate)
    for eos in (NEVER, 4):
        cached = generate(model, pictures(), eos, 8, **WAYS[way])
        assert cached == generate(model, pictures(), eos, 8, cached=False, **WAYS[way])
    assert len({tuple(ids) for ids in cached}) > 1 and max(len(set(ids)) for ids in cached) > 2  # lively


def test_greedy_by_hand() -> None:
    model = tiny()
    features = model.encoder(pictures())
    written = torch.zeros(3, 0, dtype=torch.int64)
    for _ in range(8):
        token = model.decoder.full_logits(features, written)[:, -1].argmax(-1)
        written = torch.cat([written, token[:, None]], 1)
    assert generate(model, pictures(), NEVER, 8) == written.tolist()


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_caption_stops_at_end_of_text_and_disturbs_no_other(way: str) -> None:
    model = tiny()
    free = generate(model, pictures(), NEVER, 8)
    eos = free[0][2]
    assert eos not in free[0][:2]
    together = generate(model, pictures(), eos, 8, **WAYS[way])
    if way == "greedy":
        assert together == [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in free]
        assert len(together[0]) == 3 < max(map(len, together))
    for ids, image in zip(together, pictures().split(1)):
        assert generate(model, image, eos, 8, **WAYS[way]) == [ids]
        assert eos not in ids[:-1] and (ids[-1] == eos or len(ids) == 8)


def test_writing_ends_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    eos = generate(model, pictures(1), NEVER, 8)[0][0]
    steps = []
    step = model.decoder.next_logits
    monkeypatch.setattr(model.decoder, "next_logits", lambda *args: steps.append(1) or step(*args))
    assert generate(model, pictures(1), eos, 8) == [[eos]] and len(steps) == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_image_is_read_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    seen: list[str] = []
    read: Callable = model.decoder.read_image
    monkeypatch.setattr(model.decoder, "read_image", lambda *args: seen.append("decoder") or read(*args))
    model.encoder.register_forward_hook(lambda *args: seen.append("encoder"))
    lengths: list[int] = []
    model.decoder.trunk.norm.register_forward_hook(lambda module, inputs, out: lengths.append(out.shape[1]))
    generate(model, pictures(), NEVER, 6, **WAYS[way])
    assert seen == ["encoder", "decoder"] and lengths == [16, 1, 1, 1, 1, 1, 1]


@torch.no_grad()
def mean_log_probability(model: AIMv2, image: Tensor, ids: list[int]) -> float:
    logs = model.decoder.full_logits(model.encoder(image), torch.tensor([ids[:-1]], dtype=torch.int64))[0]
    return float(logs.log_softmax(-1)[range(len(ids)), ids].mean())


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_enough_beams_find_the_best_caption_of_all(seed: int) -> None:
    model, vocab, longest, eos = tiny(vocab=4, max_text=3, seed=seed), 4, 3, 0
    words = range(1, vocab)
    every = [[*ids, eos] for n in range(longest) for ids in itertools.product(words, repeat=n)]
    for image in pictures().split(1):
        (found,) = generate(model, image, eos, longest, beams=64)
        best = max(every, key=lambda ids: mean_log_probability(model, image, ids))
        assert found == best


def test_a_caption_that_is_cut_wins_only_where_none_has_ended() -> None:
    """However likely a repetition is, a caption that ends is taken, and of cut ones the likeliest."""
    model, eos, longest = tiny(vocab=4, max_text=4), 0, 4
    with torch.no_grad():
        model.decoder.text_head.linear.weight[eos] *= 0
        model.decoder.text_head.linear.weight[1:] *= 0.1
    assert all(eos in ids for ids in generate(model, pictures(), eos, longest, beams=4))
    cut = generate(model, pictures(1), NEVER, longest, beams=4**4)[0]
    every = [list(ids) for ids in itertools.product(range(4), repeat=longest)]
    assert cut == max(every, key=lambda ids: mean_log_probability(model, pictures(1), ids))


def test_a_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [2.0, -1.0, 0.5]])
    written = torch.tensor([[0, 0], [1, 2]])
    assert penalize(logits, written, 2.0).tolist() == [[1.0, -1.0, 0.5], [2.0, -2.0, 0.25]]
    assert penalize(logits, written[:, :0], 2.0).tolist() == logits.tolist()
    from transformers import RepetitionPenaltyLogitsProcessor

    assert torch.equal(penalize(logits, written, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(written, logits.clone()))


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_repetition_penalty_makes_captions_of_different_tokens(way: str) -> None:
    model = tiny()
    free, varied = (generate(model, pictures(), NEVER, 8, repetition_penalty=p, **WAYS[way]) for p in (1.0, 1e6))
    assert sum(len(set(ids)) for ids in varied) > sum(len(set(ids)) for ids in free)


def test_beams_beat_greedy_where_greed_misleads() -> None:
    """Some image of a fixed few has a better caption than the greedy one; two beams see it."""
    model = tiny(vocab=6, max_text=4)
    gains = []
    for image in pictures(12).split(1):
        captions = [generate(model, image, 0, 4, beams=beams)[0] for beams in (1, 4)]
        gains.append(mean_log_probability(model, image, captions[1]) - mean_log_probability(model, image, captions[0]))
    assert max(gains) > 0.01


def test_one_beam_is_greedy() -> None:
    model = tiny()
    assert generate(model, pictures(), 4, 8, beams=1) == generate(model, pictures(), 4, 8)


def test_the_seed_decides_the_draw() -> None:
    model = tiny()
    one, two, three = (generate(model, pictures(), NEVER, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == two != three


def test_pick_draws_from_the_smallest_set_of_that_mass() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log().repeat(2000, 1)

    def shares(temperature: float, top_p: float) -> list[float]:
        drawn = pick(logits, temperature, top_p, torch.Generator().manual_seed(0))
        return (torch.bincount(drawn, minlength=4) / 2000).tolist()

    assert shares(0, 1.0) == [0, 1, 0, 0] == shares(1.0, 0.4) == shares(1.0, 0.5)
    assert shares(1.0, 0.7) == pytest.approx([0, 5 / 8, 0, 3 / 8], abs=0.04)
    assert shares(1.0, 1.0) == pytest.approx([0.1, 0.5, 0.1, 0.3], abs=0.04)
    cold = [p**2 for p in (0.1, 0.5, 0.1, 0.3)]
    assert shares(0.5, 1.0) == pytest.approx([p / sum(cold) for p in cold], abs=0.04)
    assert shares(1e-6, 1.0)[1] == 1 and math.isclose(sum(shares(100.0, 1.0)), 1, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "1 to 8, got 0"),
        ({"max_tokens": 9}, "1 to 8, got 9"),
        ({"temperature": -1.0}, "temperature >= 0.*got -1.0"),
        ({"top_p": 0.0}, "top_p.*got .*0.0"),
        ({"top_p": 1.5}, "top_p.*got .*1.5"),
        ({"beams": 0}, "beams >= 1.* 0$"),
        ({"beams": 2, "temperature": 1.0}, "beam search does not sample"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_options_out_of_range(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(tiny(), pictures(), 0, **{"max_tokens": 8} | options)
    with pytest.raises(ValueError, match=words):
        tiny().caption(pictures(), tokenizer=Numbers(), **options)


def test_no_text_head_and_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="no text head"):
        generate(tiny(decoder_text=False), pictures(), 0, 8)
    with pytest.raises(ValueError, match="no tokenizer"):
        tiny().caption(pictures())


class Numbers:
    """Tokens are their numbers."""

    eos_id = 4

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids)


def test_caption_is_generate_and_the_tokenizer() -> None:
    model = tiny().train()
    model.tokenizer = Numbers()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    wanted = generate(model, pixels, 4, 8, beams=2)
    assert model.caption(pixels, beams=2) == [model.tokenizer.decode(ids) for ids in wanted]
    assert len(model.caption(pixels, max_tokens=1)[0].split()) == 1
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
