"""The contract of a backbone with every head of transformers that takes one: builds, runs, learns, is saved and opened."""

import pytest
import torch
import transformers
from torch import Tensor

from aimv2.interop.backbone_config import STRIDES, Aimv2BackboneConfig, check_head
from aimv2.models.sizes import EncoderConfig

ENCODER = EncoderConfig("aimv2-tiny-heads", 32, 4, 2, 64, 8, 32)
SIDE, BATCH = 64, 2  # pixels: 8 x 8 patches, twice what the encoder's positions are for
SMALL = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
    encoder_attention_heads=2, decoder_attention_heads=2,
)  # fmt: skip
HYBRID = dict(
    SMALL, encoder_hidden_dim=32, encoder_in_channels=[16] * 3, decoder_in_channels=[32] * 3, num_denoising=0, decoder_n_points=2
)  # fmt: skip
DEPTH = dict(neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8)
LEVELS = dict(feature_form="pyramid", scales=[1, 0.5, 0.25], pyramid_channels=16)  # 8, 16 and 32 px
FOUR = dict(LEVELS, scales=[2, 1, 0.5, 0.25])
TOKENS = dict(feature_form="tokens", out_indices=[1, 2, 3, 4])
BERT = dict(
    model_type="bert", vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
# model type -> configuration and model of transformers, their options, the backbone's
FAMILIES = {
    "detr": ("Detr", "ForObjectDetection", SMALL, dict(feature_form="maps")),
    "deformable_detr": ("DeformableDetr", "ForObjectDetection", dict(SMALL, num_feature_levels=4), LEVELS),
    "rt_detr": ("RTDetr", "ForObjectDetection", HYBRID, LEVELS),
    "rt_detr_v2": ("RTDetrV2", "ForObjectDetection", HYBRID, LEVELS),
    "d_fine": ("DFine", "ForObjectDetection", HYBRID, LEVELS),
    "deimv2": ("Deimv2", "ForObjectDetection", HYBRID, LEVELS),
    "mm-grounding-dino": (
        "MMGroundingDino", "ForObjectDetection", dict(SMALL, text_config=BERT, max_text_len=16), dict(LEVELS, window=4, global_blocks=1)
    ),
    "mask2former": (
        "Mask2Former", "ForUniversalSegmentation",
        dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2,
             num_attention_heads=2, dim_feedforward=32, num_queries=5, train_num_points=16), FOUR,
    ),
    "upernet": ("UperNet", "ForSemanticSegmentation", dict(hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=16), FOUR),
    "dpt": ("DPT", "ForDepthEstimation", DEPTH, TOKENS),
    "depth_anything": ("DepthAnything", "ForDepthEstimation", dict(DEPTH, patch_size=8, reassemble_hidden_size=32), TOKENS),
    "zoedepth": (
        "ZoeDepth", "ForDepthEstimation",
        dict(DEPTH, bottleneck_features=8, num_relative_features=8, num_attractors=[4, 2, 2, 1], bin_embedding_dim=8,
             bin_configurations=[dict(n_bins=8, min_depth=0.1, max_depth=1.0, name="nyu")]), TOKENS,
    ),
    "vitpose": ("VitPose", "ForPoseEstimation", dict(num_labels=3), dict(feature_form="patches", image_size=[SIDE, SIDE])),
}  # fmt: skip


def inputs(family: str) -> dict:
    """Images of noise with one target each, as the family takes them."""
    found: dict = {"pixel_values": torch.randn(BATCH, 3, SIDE, SIDE)}
    if family in ("dpt", "depth_anything", "zoedepth", "vitpose"):  # these train outside of transformers: no labels
        return found
    if family == "upernet":
        return found | {"labels": torch.randint(0, 2, (BATCH, SIDE, SIDE))}
    if family == "mask2former":
        masks = torch.zeros(1, SIDE, SIDE)
        masks[:, 8:32, 16:48] = 1
        return found | {"mask_labels": [masks] * BATCH, "class_labels": [torch.tensor([1])] * BATCH}
    if family == "mm-grounding-dino":
        words = torch.tensor([[101, 1050, 1012, 1060, 1061, 1012, 102]] * BATCH)
        found |= {"input_ids": words, "attention_mask": torch.ones_like(words)}
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]])}
    return found | {"labels": [target] * BATCH}


def answer(out: transformers.utils.ModelOutput) -> Tensor:
    """What a model predicts, whichever family."""
    names = ("logits", "class_queries_logits", "predicted_depth", "heatmaps")
    return next(value for name in names if (value := getattr(out, name, None)) is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family: str, tmp_path) -> None:
    name, task, options, of_backbone = FAMILIES[family]
    backbone = Aimv2BackboneConfig(ENCODER, **of_backbone)
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **options)
    assert config.model_type.replace("_", "") == family.replace("_", "")
    check_head(config, backbone)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{task}")(config).train()
    (inner,) = (module for module in model.modules() if type(module).__name__ == "Aimv2Backbone")
    given = inputs(family)
    maps = inner(given["pixel_values"]).feature_maps
    assert len(maps) == len(inner.channels) == len(inner.config.strides)
    for one, stride, channels in zip(maps, inner.config.strides, inner.channels, strict=True):
        form, count = backbone.feature_form, round(SIDE / stride)
        dummy = form == "tokens"
        shape = (channels, count, count) if form in ("maps", "pyramid") else (dummy + count**2, channels)
        assert one.shape == (BATCH, *shape)
    if strides := next((getattr(config, key) for key in STRIDES if hasattr(config, key)), None):
        assert [*strides] == inner.config.strides
    out = model(**given)
    loss = out.loss if getattr(out, "loss", None) is not None else answer(out).square().mean()
    assert loss.isfinite()
    loss.backward()
    learned = {key: value.grad for key, value in inner.encoder.named_parameters() if value.grad is not None}
    assert learned.keys() == dict(inner.encoder.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in learned.values()) and any(map(torch.any, learned.values()))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {**again.config.backbone_config.to_dict(), "dtype": None} == backbone.to_dict()
    model.eval()
    with torch.no_grad():
        assert torch.equal(answer(model(**given)), answer(again(**given)))
