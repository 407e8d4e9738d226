"""A module's own forward is what runs: hooks fire everywhere, and whatever replaces a part takes its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from aimv2.batch import make_batch
from aimv2.data.stream.native import make_native_batch
from aimv2.models.aimv2 import AIMv2
from aimv2.models.classifier import Classifier
from aimv2.models.create import build
from aimv2.models.distilled import Distiller
from aimv2.models.generate import generate
from aimv2.models.init import init_weights
from aimv2.models.likelihood import log_likelihood, read_images
from aimv2.models.lit import LiT, LiTConfig, TextConfig, TunedLiT
from aimv2.models.sizes import DecoderConfig, EncoderConfig
from aimv2.objectives.pretrain import text_targets
from aimv2.report.predictions import _CachedReader

ENCODER = EncoderConfig("tiny", 16, 2, 2, 24, 4, 16)
NATIVE = EncoderConfig("tiny", 16, 2, 2, 24, 4, None, min_patches=4)
POOLED = EncoderConfig("tiny", 16, 2, 2, 24, 4, 16, pool_heads=2)
SHAPE = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "vocab_size": 11, "max_text": 6}
PAIR = LiTConfig(POOLED, TextConfig(16, 2, 2, 24, 11, 6, 1), 8)
IMAGES = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = [[5, 3, 1], [7, 1]]
BATCH = make_batch(IMAGES, CAPTIONS, [3, 9], 16, text_width=6, labels=[0, 2])
STRIPS = make_native_batch(list(IMAGES), CAPTIONS, [3, 9], 4, 16)


def whole(encoder: EncoderConfig = ENCODER, **decoder: bool) -> AIMv2:
    model = build(encoder, DecoderConfig(**SHAPE | decoder), seed=0)  # type: ignore[arg-type]
    assert isinstance(model, AIMv2)
    return model


def made(model: nn.Module) -> nn.Module:
    init_weights(model, seed=0)
    return model


# a model, and what runs it: its forward, or methods
FORWARD: dict[str, tuple[Callable[[], nn.Module], Callable[..., object]]] = {
    "encoder": (lambda: build(POOLED, None, 0), lambda m: m.encode(IMAGES, pool="attention")),
    "encoder, prefix": (lambda: build(ENCODER, None, 0), lambda m: m(IMAGES, torch.tensor([3, 9]))),
    "native, a list": (lambda: build(NATIVE, None, 0), lambda m: m([IMAGES[0], IMAGES[1, :, :12]])),
    "native, strips": (lambda: build(NATIVE, None, 0), lambda m: m.forward_batch(STRIPS)),
    "joint": (whole, lambda m: m(BATCH)[:2]),
    "joint, losses": (whole, lambda m: m(BATCH, text_targets(BATCH))[:2]),
    "separate": (lambda: whole(separate=True), lambda m: m(BATCH)[:2]),
    "image only": (lambda: whole(text=False), lambda m: m(BATCH)[0]),
    "caption only": (lambda: whole(pixels=False), lambda m: m(BATCH)[1]),
    "native pair": (lambda: whole(NATIVE), lambda m: m(STRIPS)[:2]),
    "distiller": (lambda: Distiller(whole(), 8), lambda m: m(BATCH, features=True)),
    "classifier": (lambda: made(Classifier(ENCODER, 3)), lambda m: m(BATCH)),
    "tuned pair": (lambda: made(TunedLiT(PAIR, bias=True)), lambda m: m(BATCH)[:2]),
    "pair": (lambda: made(LiT(PAIR)), lambda m: m(IMAGES, BATCH.text)),
}
OTHER: dict[str, tuple[Callable[[], nn.Module], Callable[..., object]]] = {
    "captions": (lambda: whole(pixels=False), lambda m: generate(m, IMAGES, 1, 3)),
    "captions, no cache": (lambda: whole(pixels=False), lambda m: generate(m, IMAGES, 1, 3, cached=False)),
    "likelihood": (lambda: whole(pixels=False), lambda m: log_likelihood(m, read_images(m, IMAGES), CAPTIONS)),
    "pixels": (lambda: whole(text=False), lambda m: [_CachedReader(m).next(IMAGES[:1], k) for k in (3, 4)]),
    "image and text": (lambda: made(LiT(PAIR)), lambda m: (m.encode_image(IMAGES), m.encode_text(BATCH.text))),
}


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds parameters, itself or further down, and can be called."""
    for name, module in model.named_modules():
        if any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList):
            yield name, module


def numbers(found: object) -> Tensor:
    """All tensors of a result in one."""
    if isinstance(found, Tensor):
        return found.detach().double().flatten()
    return torch.cat([numbers(one) for one in found if one is not None])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [*FORWARD, *OTHER])
def test_every_hook_fires(name: str) -> None:
    make, run = {**FORWARD, **OTHER}[name]
    model, before, after = make().eval(), Counter[str](), Counter[str]()
    names = {part for part, _ in parts(model)}
    if name not in FORWARD:  # a method of these runs, not their forward
        names -= {"", "decoder", "encoder"} if name == "pixels" else {"", "decoder"}
    for part, module in parts(model):
        module.register_forward_pre_hook(lambda *_, part=part: before.update([part]))
        module.register_forward_hook(lambda *_, part=part: after.update([part]))
    run(model)
    assert before == after and not names - after.keys(), sorted(names - after.keys())


class Wrapped(nn.Module):
    """Another module's outputs plus a pattern; it has no attribute of that module."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.much = base, 0.0

    def forward(self, *args: Tensor) -> Tensor:
        out = self.base(*args)
        return out + self.much * torch.arange(out.numel()).cos().view(out.shape)


@pytest.mark.parametrize("name", FORWARD)
def test_a_wrapper_takes_a_layer_s_place(name: str) -> None:
    """Around every layer at once it keeps the bits; around any one of them it changes the outputs."""
    make, run = FORWARD[name]
    model = make().eval()
    wanted = numbers(run(model))
    leaves = [part for part, module in parts(model) if not list(module.children())]
    assert any(part.endswith("patch_embed.proj") for part in leaves)
    for part in leaves:
        model.set_submodule(part, Wrapped(model.get_submodule(part)))
    assert torch.equal(numbers(run(model)), wanted)
    for part in leaves:
        wrapper = model.get_submodule(part)
        wrapper.much = 1.0  # type: ignore[assignment]
        assert not torch.allclose(numbers(run(model)), wanted, atol=1e-6), part
        wrapper.much = 0.0  # type: ignore[assignment]


@pytest.mark.parametrize("target", ["patch_embed.proj", "blocks.1.attn.qkv", "decoder.project", "decoder.token_embed"])
def test_low_rank_updates_reach_the_outputs_and_learn(target: str) -> None:
    peft = pytest.importorskip("peft")
    model = whole()
    wanted = numbers(model(BATCH)[:2])
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=r".*" + target.replace(".", r"\."))
    peft.inject_adapter_in_model(config, model)
    assert torch.equal(numbers(model(BATCH)[:2]), wanted)  # one factor starts at zero
    adapters = {key: value for key, value in model.named_parameters() if "lora_" in key}
    for value in adapters.values():
        nn.init.normal_(value, std=0.5, generator=torch.Generator().manual_seed(0))
    found = numbers(model(BATCH)[:2])
    assert not torch.allclose(found, wanted, atol=1e-4)
    sum(part.square().sum() for part in model(BATCH)[:2]).backward()
    assert adapters and all(value.grad is not None and value.grad.any() for value in adapters.values())
