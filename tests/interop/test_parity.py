"""The same numbers as others: transformers at real numbers of patches, and two layouts computed here with plain functions.

Legend: B images, I patches, D width, H heads.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_layouts import assert_near, spread_norms
from torch import Tensor

import aimv2
from aimv2.interop.convert import convert
from aimv2.interop.shapes import config_name
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig

HEADS = 2


def small(image_size: int | None, pool_heads: int = 0, width: int = 64) -> VisionEncoder:
    config = EncoderConfig("", width, 2, HEADS, 96, 14, image_size, pool_heads=pool_heads, min_patches=2)
    model = build(EncoderConfig(**{**vars(config), "name": config_name(config)}), None, seed=0)
    assert isinstance(model, VisionEncoder)
    spread_norms(model)
    return model.eval()


@pytest.mark.parametrize(
    ("image_size", "height", "width", "patches"), [(224, 224, 224, 256), (336, 336, 336, 576), (None, 700, 420, 1500)]
)
def test_transformers_at_real_numbers_of_patches(
    image_size: int | None, height: int, width: int, patches: int, tmp_path: Path
) -> None:
    from transformers import AutoModel

    model = small(image_size)
    convert(model, tmp_path / "out", "transformers")
    theirs = AutoModel.from_pretrained(tmp_path / "out")
    torch.manual_seed(2)
    images = torch.randn(1, 3, height, width)
    got, wanted = model(images), theirs(pixel_values=images).last_hidden_state
    assert got.shape == (1, patches, 64)
    assert_near(got, wanted, "features")
    pull = torch.randn_like(got)
    (got * pull).sum().backward()
    (wanted * pull).sum().backward()
    ours, reference = model.patch_embed.proj.weight.grad, theirs.embeddings.patch_embed.weight.grad
    assert ours is not None and reference.abs().max() > 0
    assert_near(ours, reference, "gradient of the patch kernel")


# ---- two layouts, forward, with nothing of ours ----


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def heads_of(x: Tensor) -> Tensor:
    """[B, I, D] -> [B, H, I, d]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, I, d] each -> [B, I, D]."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def block(x: Tensor, names: dict[str, Tensor]) -> Tensor:
    """One block; ``names`` are norm1, qkv, proj, norm2, gate (through SiLU), up, down."""
    q, k, v = (heads_of(part) for part in F.linear(rms(x, names["norm1"]), names["qkv"]).chunk(3, dim=-1))
    x = x + F.linear(attend(q, k, v), names["proj"])
    y = rms(x, names["norm2"])
    return x + F.linear(F.silu(F.linear(y, names["gate"])) * F.linear(y, names["up"]), names["down"])


def patches_of(images: Tensor, weight: Tensor, bias: Tensor, norm: Tensor) -> Tensor:
    return rms(F.conv2d(images, weight, bias, stride=14).flatten(2).transpose(1, 2), norm)


def sincos(height: int, width: int, dim: int) -> Tensor:
    """The column in the first half, the row in the last; each all sines, then all cosines."""
    out = torch.zeros(height * width, dim)
    quarter = dim // 4
    for row in range(height):
        for column in range(width):
            for k in range(quarter):
                rate = 10000 ** (-k / quarter)
                angles = torch.tensor([column * rate, row * rate])
                at = out[row * width + column]
                at[k], at[quarter + k] = angles[0].sin(), angles[0].cos()
                at[2 * quarter + k], at[3 * quarter + k] = angles[1].sin(), angles[1].cos()
    return out


def released_forward(w: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and pooled features from the keys of the authors' files."""
    start = "preprocessor.patchifier."
    x = patches_of(images, w[start + "proj.weight"], w[start + "proj.bias"], w[start + "norm.weight"])
    if "preprocessor.pos_embed" in w:
        x = x + w["preprocessor.pos_embed"]
    else:
        x = x + sincos(images.shape[2] // 14, images.shape[3] // 14, x.shape[-1])
    for i in range(2):
        parts = {
            "norm1": "norm_1",
            "qkv": "attn.qkv",
            "proj": "attn.proj",
            "norm2": "norm_2",
            "gate": "mlp.fc1",
            "up": "mlp.fc3",
            "down": "mlp.fc2",
        }
        x = block(x, {key: w[f"trunk.blocks.{i}.{name}.weight"] for key, name in parts.items()})
    x = rms(x, w["trunk.post_trunk_norm.weight"])
    query = w["head.cls_token"].expand(len(x), 1, -1)
    pooled = attend(heads_of(query), heads_of(x @ w["head.k.weight"].T), heads_of(x @ w["head.v.weight"].T))
    return x, F.linear(pooled[:, 0], w["head.linear.weight"], w["head.linear.bias"])


def timm_forward(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """Features from the keys of timm's VisionTransformer with SwiGLU and RMSNorm."""
    start = "patch_embed."
    x = patches_of(images, w[start + "proj.weight"], w[start + "proj.bias"], w[start + "norm.weight"]) + w["pos_embed"]
    for i in range(2):
        parts = {
            "norm1": "norm1",
            "qkv": "attn.qkv",
            "proj": "attn.proj",
            "norm2": "norm2",
            "gate": "mlp.fc1_g",
            "up": "mlp.fc1_x",
            "down": "mlp.fc2",
        }
        x = block(x, {key: w[f"blocks.{i}.{name}.weight"] for key, name in parts.items()})
    return rms(x, w["norm.weight"])


@pytest.mark.parametrize(("image_size", "height", "width"), [(56, 56, 56), (None, 168, 140)])
def test_released_files_mean_what_the_released_code_computes(
    image_size: int | None, height: int, width: int, tmp_path: Path
) -> None:
    model, images = small(image_size, HEADS, 32), torch.randn(2, 3, height, width)
    convert(model, tmp_path / "out", "released")
    features, pooled = released_forward(load_file(tmp_path / "out" / "model.safetensors"), images)
    loaded = aimv2.load_model(tmp_path / "out")
    for one in (model, loaded):
        assert_near(one(images), features, "features")
        assert_near(one.pooled(images), pooled, "pooled")


def swapped(weights: dict[str, Tensor], one: str, other: str) -> dict[str, Tensor]:
    """The same file with two tensors of each block exchanged."""
    turn = {one: other, other: one}
    return {
        ".".join(turn.get(part, part) for part in key.split(".")): value.contiguous() for key, value in weights.items()
    }


def test_timm_files_mean_what_timm_computes(tmp_path: Path) -> None:
    model, images = small(56, width=32), torch.randn(2, 3, 56, 56)
    convert(model, tmp_path / "out", "timm")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert_near(model(images), timm_forward(weights, images), "features")
    save_file(swapped(weights, "fc1_g", "fc1_x"), tmp_path / "out" / "model.safetensors")
    with pytest.raises(AssertionError, match="features"):  # gate and up exchanged are another model, and seen to be
        assert_near(aimv2.load_model(tmp_path / "out")(images), timm_forward(weights, images), "features")
