"""Section D.2 at its full size, on tensors that have a shape and no values."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.initialization import no_init_weights

from aimv2.config.load import parse, read_recipe
from aimv2.config.recipes import recipe_file
from aimv2.interop.backbone import optimizer_groups
from aimv2.interop.backbone_config import Aimv2BackboneConfig, check_head

SIDE, BATCH, WINDOW = 1024, 64, 16  # D.2
LAYER_DECAY, LR, WEIGHT_DECAY = 0.8, 1e-4, 0.1  # ours: D.2 names layer-wise decay and gives no number


@pytest.mark.long
def test_d2_with_mask2former() -> None:
    """Forward, backward and groups of ViT-L with the nearest head of transformers, ours in the place of Mask R-CNN."""
    backbone = Aimv2BackboneConfig("aimv2-large-patch14-224", window=WINDOW)
    config = Mask2FormerConfig(backbone_config=backbone)
    check_head(config, backbone)
    assert backbone.strides == [3.5, 7, 14, 28]
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        model = Mask2FormerForUniversalSegmentation(config).eval()  # in training its head looks at values
        assert model.model.pixel_level_module.encoder.global_blocks == [5, 11, 17, 23]
        out = model(pixel_values=torch.empty(BATCH, 3, SIDE, SIDE))
        side = 4 * -(-SIDE // 14)
        assert out.masks_queries_logits.shape == (BATCH, 100, side, side)
        (out.class_queries_logits.sum() + out.masks_queries_logits.sum()).backward()
        encoder = model.model.pixel_level_module.encoder.encoder
        assert all(parameter.grad is not None for parameter in encoder.parameters())
        groups = optimizer_groups(model, LR, WEIGHT_DECAY, LAYER_DECAY)
        rates = {id(one): group["lr"] for group in groups for one in group["params"]}
        assert len(rates) == len([*model.parameters()])
        assert rates[id(encoder.patch_embed.position)] == pytest.approx(LR * LAYER_DECAY**25)
        assert rates[id(encoder.blocks[23].attn.qkv.weight)] == pytest.approx(LR * LAYER_DECAY)


def test_the_recipe_holds_what_d2_says() -> None:
    file = recipe_file("detect-masks", "--config")
    config = parse(read_recipe(file))
    assert (config.train.batch_size, config.objective.image_size, config.objective.window) == (BATCH, SIDE, WINDOW)
    assert (config.optim.layer_decay, config.optim.lr, config.optim.weight_decay) == (LAYER_DECAY, LR, WEIGHT_DECAY)
    assert config.optim.schedule == "cosine" and config.objective.freeze is False
    assert round(config.train.steps * BATCH / 118_287) == 100  # epochs of COCO's training pictures
    for line in file.read_text().splitlines():
        assert (
            line.startswith("#")
            or line.endswith(":")
            or "name: detect" in line
            or re.search("# .*(ours|section D.2)", line)
        ), line
