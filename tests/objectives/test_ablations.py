"""Every variant of AIMV2's Table 9 trains: each parameter that should learn gets a gradient, and no other exists."""

import pytest
import torch

from aimv2.batch import make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.objectives.pretrain import PretrainObjective

TEXT_PARTS = {"trunk", "token_embed", "text_position", "bos", "text_head", "project"}
ABLATIONS = {
    "AIMv2": ({}, {}, TEXT_PARTS | {"pixel_head"}),
    "image only": ({"text": False}, {"targets": "image"}, {"project", "pixel_trunk", "pixel_head"}),
    "captions only, prefix": ({"pixels": False}, {"targets": "text"}, TEXT_PARTS),
    "captions only, bidirectional": (
        {"pixels": False},
        {"targets": "text", "attention": "bidirectional"},
        TEXT_PARTS,
    ),
    "separate decoders": ({"separate": True}, {}, TEXT_PARTS | {"pixel_trunk", "pixel_head"}),
    "narrow decoder": ({"width": 8, "hidden": 16}, {}, TEXT_PARTS | {"pixel_head"}),
    "wide decoder": ({"width": 48, "hidden": 96}, {}, TEXT_PARTS | {"pixel_head"}),
    "one block": ({"depth": 1}, {}, TEXT_PARTS | {"pixel_head"}),
    "four blocks": ({"depth": 4}, {}, TEXT_PARTS | {"pixel_head"}),
    "alpha 0.6": ({}, {"alpha": 0.6}, TEXT_PARTS | {"pixel_head"}),
}


def built(decoder: dict) -> AIMv2:
    options: dict = {"image_size": 12, "width": 16, "heads": 2, "hidden": 24, "depth": 2}
    shape: dict = {"width": 16, "heads": 2, "hidden": 24, "depth": 2, "vocab_size": 9, "max_text": 16} | decoder
    options |= {f"decoder_{key}": value for key, value in shape.items()}
    model = create_model("aimv2-tiny-patch4-32", decoder=True, seed=0, **options)
    assert isinstance(model, AIMv2)
    return model


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_parameter_learns(name: str) -> None:
    decoder, options, parts = ABLATIONS[name]
    model, objective = built(decoder), PretrainObjective(ObjectiveConfig(**options))
    images = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
    captions = [list(range(8, -1, -1)), [*range(1, 9)] * 2, [1]]  # every token is read, the longest fills all positions
    batch = make_batch(images, captions, [1, 4, 8], 9)
    terms = objective(model, batch)
    assert terms.keys() == objective.counts(batch).keys()
    assert all(objective.counts(batch)[term] == count for term, (_, count) in terms.items())
    assert {("text" in terms), ("pixel" in terms)} == ({True} if len(terms) == 2 else {True, False})
    loss = sum(objective.weights[term] * value / count for term, (value, count) in terms.items())
    assert isinstance(loss, torch.Tensor) and loss.isfinite()
    loss.backward()
    assert {key.split(".")[0] for key, _ in model.decoder.named_parameters()} == parts
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


def test_alpha_zero_is_the_caption_loss() -> None:
    batch = make_batch(torch.zeros(1, 3, 12, 12, dtype=torch.uint8), [[3, 1]], [4], 9)
    terms = PretrainObjective(ObjectiveConfig(alpha=0.0))(built({}), batch)
    assert terms.keys() == {"text"}


def test_a_pair_without_a_caption_still_teaches_pixels() -> None:
    model = built({})
    batch = make_batch(torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8), [[]], [4], 9)
    terms = PretrainObjective(ObjectiveConfig())(model, batch)
    assert terms["text"][0].item() == 0 and terms["text"][1].item() == 0 and terms["pixel"][1].item() == 5
    (terms["text"][0] + terms["pixel"][0]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
