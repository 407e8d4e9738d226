"""All weight initialisation, as in the released training code."""

import math

import torch
from torch import nn

from aimv2.models.aimv2 import AIMv2
from aimv2.models.decoder import MultimodalDecoder, TextHead
from aimv2.models.distilled import Projection
from aimv2.models.encoder import PatchEmbed, VisionEncoder
from aimv2.models.layers import Block
from aimv2.models.lit import LiT, TextEncoder, TunedLiT
from aimv2.models.pool import AttentionPool
from aimv2.models.probe_head import AttentiveProbe

SIGMOID_BIAS = -10.0  # initial logit bias: the first steps do not only correct for the negatives (SigLIP, section 3.2)


def _xavier(weight: torch.Tensor, parts: int, generator: torch.Generator | None) -> None:
    """Xavier-uniform for each of ``parts`` projections fused along the output dimension, as if they were separate."""
    fan_out, fan_in = weight.shape[0] // parts, weight[0].numel()
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def _head(weight: torch.Tensor, depth: int, generator: torch.Generator | None) -> None:
    """Truncated normal of variance 1 / ((1 + depth) * fan_in)."""
    std = math.sqrt(1 / ((1 + depth) * weight.shape[1])) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def _block(block: Block, generator: torch.Generator | None) -> None:
    _xavier(block.attn.qkv.weight, 3, generator)
    _xavier(block.attn.proj.weight, 1, generator)
    _xavier(block.mlp.gate_up.weight, 2, generator)
    _xavier(block.mlp.down.weight, 1, generator)


def _patch_embed(embed: PatchEmbed, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(embed.proj.weight[0].numel())
    assert embed.proj.bias is not None
    _xavier(embed.proj.weight, 1, generator)
    nn.init.uniform_(embed.proj.bias, -bound, bound, generator=generator)
    if embed.config.image_size is not None:
        nn.init.normal_(embed.position, std=0.02, generator=generator)


def _probe(head: AttentiveProbe, generator: torch.Generator | None) -> None:
    nn.init.normal_(head.query, std=0.02, generator=generator)
    for linear in (head.key, head.value, head.linear):
        bound = 1 / math.sqrt(linear.in_features)
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    nn.init.zeros_(head.linear.bias)
    if head.norm is not None:
        head.norm.reset_running_stats()


def _pool(head: AttentionPool, generator: torch.Generator | None) -> None:
    nn.init.normal_(head.query, std=0.02, generator=generator)
    for linear in (head.key, head.value, head.proj):
        _xavier(linear.weight, 1, generator)
    nn.init.zeros_(head.proj.bias)


def _decoder(decoder: MultimodalDecoder, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(decoder.project.in_features)
    nn.init.uniform_(decoder.project.weight, -bound, bound, generator=generator)
    nn.init.uniform_(decoder.project.bias, -bound, bound, generator=generator)
    depth = decoder.config.depth
    if decoder.config.text:
        nn.init.normal_(decoder.token_embed.weight, std=0.02, generator=generator)
        nn.init.normal_(decoder.text_position, std=0.01, generator=generator)
        nn.init.normal_(decoder.bos, std=0.02, generator=generator)
        _head(decoder.text_head.linear.weight, depth, generator)
    if decoder.config.pixels:
        _head(decoder.pixel_head.weight, depth, generator)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int | None = None) -> None:
    """Overwrite every parameter and buffer of an encoder or a model that contains one.

    Args:
        model: VisionEncoder, AIMv2, LiT or Classifier, on any device but meta.
        seed: seed of a separate generator; None uses torch's global one.
    """
    device = next(model.parameters()).device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PatchEmbed):
            _patch_embed(module, generator)
        elif isinstance(module, Block):
            _block(module, generator)
        elif isinstance(module, MultimodalDecoder):
            _decoder(module, generator)
        elif isinstance(module, VisionEncoder):
            module.fill_constants()
        elif isinstance(module, Projection):
            _xavier(module.weight, 1, generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, AttentiveProbe):
            _probe(module, generator)
        elif isinstance(module, AttentionPool):
            _pool(module, generator)
        elif isinstance(module, TextEncoder):
            nn.init.normal_(module.embed.weight, std=0.02, generator=generator)
            nn.init.normal_(module.position, std=0.01, generator=generator)
        elif isinstance(module, LiT):
            _xavier(module.image_projection.weight, 1, generator)
            _xavier(module.text_projection.weight, 1, generator)
            nn.init.constant_(module.log_scale, -math.log(module.config.temperature))
            if isinstance(module, TunedLiT) and module.bias is not None:
                nn.init.constant_(module.bias, SIGMOID_BIAS)
        else:
            known = isinstance(module, AIMv2 | TextHead | nn.Linear | nn.Conv2d | nn.Embedding | nn.BatchNorm1d)
            assert known or not [*module.parameters(recurse=False)], f"no initialisation for {type(module).__name__}"
