"""Initialisation reaches every value and follows the released training code."""

import math

import pytest
import torch
from torch import Tensor, nn

from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build, create_model
from aimv2.models.init import init_weights
from aimv2.models.sizes import IMAGENET_MEAN, DecoderConfig, EncoderConfig

DECODER = {"width": 64, "depth": 3, "heads": 2, "hidden": 96, "vocab_size": 400, "max_text": 12}


def shapes(**changes: object) -> tuple[EncoderConfig, DecoderConfig]:
    native = bool(changes.pop("native", False))
    encoder = EncoderConfig("tiny", 48, 2, 2, 80, 8, None if native else 64)
    return encoder, DecoderConfig(**DECODER | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{}, {"separate": True}, {"text": False}, {"pixels": False}, {"native": True}, None],
    ids=["joint", "separate", "image only", "caption only", "native", "encoder alone"],
)
def test_nothing_is_forgotten(changes: dict | None) -> None:
    encoder, decoder = shapes(**changes or {})
    model: nn.Module = build(encoder, None if changes is None else decoder)
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for value in values.values():
            value.fill_(math.nan)
    init_weights(model, seed=0)
    left = [name for name, value in values.items() if not value.isfinite().all()]
    assert left == []
    first = {name: value.clone() for name, value in values.items()}
    with torch.no_grad():
        for value in values.values():
            value.fill_(7.0)
    init_weights(model, seed=0)
    for name, value in values.items():
        assert not (value == 7).any() and torch.equal(value, first[name]), name
    init_weights(model, seed=1)
    constant = {name for name, value in values.items() if torch.equal(value, first[name])}
    assert constant == {name for name in values if "norm" in name or name.endswith(("mean", "std"))}


def uniform(value: Tensor, bound: float, name: str) -> None:
    value = value.detach()
    assert value.abs().max() <= bound, name
    assert value.abs().max() > 0.9 * bound, name
    assert abs(float(value.std()) / (bound / math.sqrt(3)) - 1) < (0.03 if value.numel() > 1000 else 0.2), name
    assert abs(float(value.mean())) < 5 * bound / math.sqrt(3 * value.numel()), name


def normal(value: Tensor, std: float, name: str) -> None:
    value = value.detach()
    spread = 4 / math.sqrt(2 * value.numel())
    assert abs(float(value.std()) / std - 1) < spread, name
    assert abs(float(value.mean())) < 5 * std / math.sqrt(value.numel()), name


def xavier(fan_in: int, fan_out: int) -> float:
    return math.sqrt(6 / (fan_in + fan_out))


def test_each_kind_has_its_distribution() -> None:
    model = build(*shapes(), seed=0)
    assert isinstance(model, AIMv2)
    encoder, decoder = model.encoder, model.decoder
    uniform(encoder.patch_embed.proj.weight, xavier(192, 48), "patch projection")
    uniform(encoder.patch_embed.proj.bias, 1 / math.sqrt(192), "patch bias")
    normal(encoder.patch_embed.position, 0.02, "positions")
    for trunk, width, hidden in ((encoder, 48, 80), (decoder.trunk, 64, 96)):
        for block in trunk.blocks:
            for part in block.attn.qkv.weight.chunk(3):
                uniform(part, xavier(width, width), "q, k, v as if separate")
            uniform(block.attn.proj.weight, xavier(width, width), "attention output")
            for part in block.mlp.gate_up.weight.chunk(2):
                uniform(part, xavier(width, hidden), "gate, up as if separate")
            uniform(block.mlp.down.weight, xavier(hidden, width), "down")
    uniform(decoder.project.weight, 1 / math.sqrt(48), "image projection")
    uniform(decoder.project.bias, 1 / math.sqrt(48), "image projection's bias")
    normal(decoder.token_embed.weight, 0.02, "token embedding")
    normal(decoder.text_position, 0.01, "text positions")
    normal(decoder.bos, 0.02, "BOS")
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 1 + 2 * 2 + 1 + 2 * 3 + 1 and all(bool((gain == 1).all()) for gain in norms)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(IMAGENET_MEAN))


@pytest.mark.parametrize("depth", [3, 12])
def test_heads_shrink_with_depth(depth: int) -> None:
    model = build(*shapes(depth=depth), seed=0)
    assert isinstance(model, AIMv2)
    wanted = math.sqrt(1 / ((1 + depth) * 64))  # what is left of the truncated normal's std
    for head in (model.decoder.text_head.linear, model.decoder.pixel_head):
        normal(head.weight, wanted, "head")
        edge = 2 * wanted / 0.87962566
        assert 0.95 * edge < head.weight.abs().max() <= edge


def test_the_papers_heads() -> None:
    """Depth 12 and width 1024: a truncated normal of std sqrt(1 / (13 * 1024)) / 0.8796, cut at twice that."""
    decoder = DecoderConfig(width=1024, depth=12, heads=8, hidden=2, vocab_size=8, text=False)
    model = build(shapes()[0], decoder, seed=0)
    assert isinstance(model, AIMv2)
    std = math.sqrt(1 / (13 * 1024)) / 0.8796
    weight = model.decoder.pixel_head.weight
    assert 1.98 * std < weight.abs().max() < 2.001 * std
    normal(weight, std * 0.8796, "head")


def test_the_seed_decides() -> None:
    options = {"decoder": True, "decoder_vocab_size": 20, "depth": 1, "decoder_depth": 1}
    one, two, three = (create_model("aimv2-tiny-patch8-32", seed=seed, **options).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], three[key]) for key in one)
    torch.manual_seed(0)
    free = create_model("aimv2-tiny-patch8-32", **options).state_dict()
    again = create_model("aimv2-tiny-patch8-32", **options).state_dict()
    torch.manual_seed(0)
    repeated = create_model("aimv2-tiny-patch8-32", **options).state_dict()
    assert torch.equal(free["decoder.bos"], repeated["decoder.bos"])
    assert not torch.equal(free["decoder.bos"], again["decoder.bos"])
