"""One contract for every family of image models: what a patch is, where it lies, which pixels it is given.

The families are those that the libraries list, each built small with random weights.
"""

from __future__ import annotations

import importlib.util
import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from aimv2.errors import UsageError
from aimv2.features.foreign import of_timm
from aimv2.features.frozen import Frozen, open_frozen
from aimv2.features.pixels import Stats, quiet, refuse_other_inputs

SIZE = 128  # pixels a side: four cells of the coarsest maps
STATS = Stats((0.3, 0.4, 0.5), (0.2, 0.25, 0.4))
TIMM = importlib.util.find_spec("timm") is not None

# values of a configuration by key, where it has a number there
SMALL: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 8, "d_model": 32, "n_embd": 32, "embedding_size": 8, "projection_dim": 16, "mlp_dim": 32,
    "intermediate_size": 48, "decoder_hidden_size": 16, "decoder_intermediate_size": 16, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "num_hidden_layers": 2, "n_layer": 2, "decoder_num_hidden_layers": 1, "encoder_layers": 1,
    "decoder_layers": 1, "num_attention_heads": 2, "n_head": 2, "num_key_value_heads": 2, "decoder_num_attention_heads": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "image_size": SIZE, "window_size": 2, "num_groups": 4,
    "width_coefficient": 0.25, "depth_coefficient": 0.2, "depth_multiplier": 0.25, "vocab_size": 512, "pad_token_id": 0,
}  # fmt: skip
WIDTHS = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "neck_hidden_sizes")
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
# families that need more than that: their own values
OWN: dict[str, dict[str, Any]] = {
    "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "depth_pro": {
        "patch_size": 32, "intermediate_hook_ids": [1, 0], "fusion_hidden_size": 16, "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [16] * 3,
        **{f"{part}_model_config": {"image_size": 32, "patch_size": 8} for part in ("image", "patch", "fov")},
    },
    "efficientnet": {"hidden_dim": 320},
    "hiera": {"patch_size": [7, 7]},
    "levit": {"hidden_sizes": [32, 48, 64], "key_dim": [8, 8, 8]},
    "llama4": {"vision_config": {
        "intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
    }},
    "sam2_vision_model": {
        "backbone_config": {
            "hidden_size": 8, "embed_dim_per_stage": [8, 16, 24, 32], "blocks_per_stage": [1] * 4,
            "num_attention_heads_per_stage": [1, 2, 2, 2], "global_attention_blocks": [],
        },
        "backbone_channel_list": [32, 24, 16, 8],
    },
    "swin2sr": {"image_size": 32},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
}  # fmt: skip
QUERIES = ("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer")
OWN |= {name: {"backbone_config": RESNET} for name in QUERIES}
# families that are not built here, and why
LEFT = {
    "dinat": "needs the package natten",
    "granite4_vision": "its default configuration builds no model",
    "edgetam_vision_model": "its default backbone, of timm, does not run in it",
    "timm_backbone": "its default configuration names no model",
    **({} if TIMM else dict.fromkeys(("gemma3n_vision", "timm_wrapper"), "needs timm")),
}
# families of the lists of image models that are no encoders of RGB images, and what the refusal names
REFUSED = {
    "cohere2_vision": "input_ids", "imagegpt": "input_ids", "mllama": "aspect_ratio_ids", "perceiver": "inputs",
    "siglip2": "spatial_shapes", "timesformer": "videos of 8 frames", "videomae": "videos of 16 frames",
    "videoprism": "pixel_values_videos", "videoprism_vision_model": "pixel_values_videos", "vivit": "videos of 32 frames",
    **dict.fromkeys(QUERIES, "queries of a decoder"),
}  # fmt: skip
BLURRED = (
    "efficientnet",
    "levit",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilevitv2",
)  # each cell sees the whole image, with random weights
MASKED = ("vit_mae",)  # the library's own pass hides patches


def families() -> tuple[set[str], set[str]]:
    """Types of models that ``transformers`` lists for images, and image towers of others."""
    from transformers.models.auto import modeling_auto as auto

    lists = ("IMAGE", "IMAGE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "BACKBONE")
    listed = {name for part in lists for name in getattr(auto, f"MODEL_FOR_{part}_MAPPING_NAMES")}
    towers = {name for name in auto.MODEL_MAPPING_NAMES if name.endswith(("_vision", "_vision_model"))}
    return listed & set(auto.MODEL_MAPPING_NAMES), towers - listed


def tiny(kind: Any, own: dict[str, Any] | None = None) -> Any:
    """A small configuration of a class."""
    from transformers import PreTrainedConfig

    own, given = dict(own or {}), dict[str, Any]()
    for key, value in vars(kind()).items():
        if isinstance(value, PreTrainedConfig) and "model_type" not in own.get(key, {}):
            given[key] = tiny(type(value), own.pop(key, None))
        elif isinstance(value, list | tuple):
            if key in WIDTHS:
                given[key] = [8 * (i + 1) for i in range(len(value))]
            elif key in ("depths", "num_heads", "num_attention_heads"):
                given[key] = [1 if key == "depths" else 2] * len(value)
            elif key in ("image_size", "patch_size"):
                given[key] = [SIZE if key == "image_size" else 16] * len(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if key in SMALL:
                given[key] = SMALL[key]
            elif key == "patch_size" and value > 8:
                given[key] = 16
    return kind(**{**given, **own})


@torch.no_grad()
def liven(model: nn.Module) -> None:
    """Scales convolutions and gives batch norms statistics, else deep ones of random weights give next to nothing."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for module in norms:
        module.reset_parameters()
        module.momentum = None
        module.train()
    if norms:
        model(torch.randn(4, 3, SIZE, SIZE))
    model.eval()


def noise(size: int) -> Tensor:
    return torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def check_grid(frozen: Frozen, patch: int | None, local: bool = True) -> None:
    """A square grid by rows, each quarter of it at its place in the image; the same at every pass."""
    size, image = frozen.side, noise(frozen.side)
    first = frozen(image)[0]
    side = int(first.shape[1] ** 0.5)
    assert first.shape == (1, side * side, frozen.width) and side > 1, list(first.shape)
    assert patch is None or side == size // patch, (side, patch)
    assert torch.equal(first, frozen(image)[0]), "two passes differ"
    rows, cells = (slice(size // 2), slice(size // 2, None)), (slice(side // 2), slice(-(side // 2), None))
    changes = []
    for row in rows:
        for column in rows:
            other = image.clone()
            other[..., row, column] = 255 - other[..., row, column].flip(-1)
            change = (frozen(other)[0] - first).norm(dim=-1).view(side, side)
            changes.append([change[r, c].mean() for r in cells for c in cells])
    found = torch.tensor(changes)  # [changed quarter of the image, quarter of the grid]
    table = (found + found.mean() / 1000).log()
    table = table - table.mean(0) - table.mean(1, keepdim=True)
    assert found.min() >= 0 and found.max() > 0 and (not local or table.argmax(0).tolist() == [0, 1, 2, 3]), (
        found.tolist()
    )


def check_reference(frozen: Frozen, part: Any, folder: Path) -> None:
    """The library's own pass over the pixels of its own processor gives these features in this order, and a few more tokens."""
    from transformers import AutoImageProcessor

    image = noise(frozen.side)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(Image.fromarray(np.asarray(image[0].permute(1, 2, 0))), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = part(pixel_values=pixels)
    raw = out.feature_maps[-1] if hasattr(out, "feature_maps") else out.last_hidden_state
    tokens, found = raw, frozen(image)[0]
    if raw.ndim == 4:  # the width tells the layout
        tokens = raw.flatten(1, 2) if raw.shape[-1] == frozen.width else raw.flatten(2).transpose(1, 2)
    more, near = tokens.shape[1] - found.shape[1], dict(rtol=1e-3, atol=1e-3 * float(found.abs().max()))
    assert any(torch.allclose(tokens[:, k : k + found.shape[1]], found, **near) for k in range(more + 1)), more


def check_family(name: str, folder: Path) -> None:
    """Raises AssertionError where the family does not meet the contract, UsageError where it is refused."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    own = OWN.get(name, {})
    config = tiny(CONFIG_MAPPING[name], own)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    part = getattr(model, "vision_model", model)
    refuse_other_inputs(name, part, part.forward)  # most are refused here, and need no weights
    model = AutoModel.from_config(config).eval()
    part = getattr(model, "vision_model", model)
    liven(part)
    model.save_pretrained(folder)
    size = own.get("image_size", SIZE)
    about: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    about |= {"image_mean": STATS.mean, "image_std": STATS.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    frozen = open_frozen(str(folder))
    if frozen.pixels is not None:
        assert frozen.pixels.stats == STATS
    else:
        assert frozen.module.mean.flatten().tolist() == pytest.approx(STATS.mean)  # type: ignore[union-attr, operator]
    cells = getattr(part.config, "patch_size", None) if frozen.depth else None
    shuffled = hasattr(part.config, "pixel_shuffle_ratio")
    check_grid(frozen, 16 if cells == 16 and not shuffled else None, name not in BLURRED)
    if name not in MASKED:
        check_reference(frozen, part, folder)


@pytest.mark.slow
def test_every_family_of_transformers_keeps_the_contract_or_says_what_it_takes(tmp_path: Path) -> None:
    """Patches a token, order of maps, tokens of class and registers left out, pixels by the processor, equal passes."""
    listed, towers = families()
    wrong, kept = {}, 0
    for name in sorted((listed | towers) - set(LEFT)):
        folder = tmp_path / name
        folder.mkdir()
        try:
            with quiet():
                check_family(name, folder)
            kept += 1
            if name in REFUSED:
                wrong[name] = "not refused"
        except UsageError as error:
            said = str(error)
            if error.code != "unsupported" or "\n" in said or REFUSED.get(name, "takes") not in said:
                wrong[name] = said
            elif name in listed and name not in REFUSED:
                wrong[name] = f"refused: {said}"
        except Exception as error:
            wrong[name] = f"{error!r} at {traceback.extract_tb(error.__traceback__)[-1]}"[:400]
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())
    assert kept >= 70 and set(LEFT) | set(REFUSED) <= listed | towers


# ---- timm ----

SMALLEST = (
    "test_",
    "_atto",
    "_femto",
    "_pico",
    "_nano",
    "_tiny",
    "_xxs",
    "_xs",
    "_050",
    "_b0",
    "_s0",
    "_m0",
    "_small",
    "_s",
    "",
)
SHALLOW = (
    "beit",
    "deepseek_vit",
    "gemma4_vit",
    "naflexvit",
    "qwen3_vit",
    "vision_transformer_sam",
)  # of large members only
TOO_LARGE = ("mobilenetv5",)  # no member below 290M parameters, and no depth to choose
# families that are refused, and why: several maps, or class tokens only
SAID = {**dict.fromkeys(("coat", "crossvit", "efficientvim"), "gives no patch features"), "pit": "no square grid"}


@pytest.mark.slow
@pytest.mark.skipif(not TIMM, reason="timm is not installed")
def test_every_family_of_timm_keeps_the_contract_or_says_what_it_gives() -> None:
    """The smallest member of each, with random weights; the layout of a map is settled by its sides."""
    import timm

    wrong, kept = {}, 0
    for family in sorted(set(timm.list_modules()) - set(TOO_LARGE)):
        names = sorted(timm.list_models(module=family), key=len)
        name = next(name for part in SMALLEST for name in names if part in name)
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, num_classes=0, **({"depth": 2} if family in SHALLOW else {})).eval()
            shape = timm.data.resolve_model_data_config(model)["input_size"]
            frozen = of_timm(name, model, shape[-1], STATS, torch.device("cpu"))
            if model.forward_features(torch.zeros(1, *shape)).ndim == 3:
                check_grid(frozen, None, family != "levit")  # its residuals start at zero
            kept += 1
        except UsageError as error:
            if SAID.get(family, "nothing") not in str(error):
                wrong[name] = str(error)
        except Exception as error:
            wrong[name] = f"{error!r} at {traceback.extract_tb(error.__traceback__)[-1]}"[:400]
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())
    assert kept >= 80
