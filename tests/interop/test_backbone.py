"""The AIMV2 backbone of transformers: feature maps, pyramid, windows, and how it is found, saved and opened."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor

import aimv2
from aimv2 import api
from aimv2.errors import UsageError
from aimv2.interop import registration
from aimv2.interop.backbone import Aimv2Backbone, optimizer_groups
from aimv2.interop.backbone_config import Aimv2BackboneConfig, check_head, scales_of
from aimv2.models.layers import Block
from aimv2.models.pyramid import run_blocks, spread, windows
from aimv2.models.sizes import EncoderConfig

TINY = EncoderConfig("aimv2-tiny-test", 32, 4, 2, 64, 4, 32)


def backbone(seed: int = 0, **options) -> Aimv2Backbone:
    torch.manual_seed(seed)
    return Aimv2Backbone(Aimv2BackboneConfig(options.pop("encoder", TINY), **options)).eval()


def test_import_loads_nothing_and_auto_classes_know_it():
    code = (
        "import sys, aimv2; assert not {'torch', 'transformers'} & sys.modules.keys(); from transformers import AutoConfig;"
        "c = AutoConfig.for_model('aimv2_backbone', encoder='aimv2-tiny-patch8-32'); assert type(c) is aimv2.Aimv2BackboneConfig;"
        "from transformers import AutoBackbone; assert type(AutoBackbone.from_config(c)) is aimv2.Aimv2Backbone"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_older_transformers_is_left_alone(monkeypatch):
    def lacking(auto):
        raise ImportError("no backbone_utils")

    (name, *_) = registration.WATCHED
    monkeypatch.setitem(registration.WATCHED, name, lacking)
    registration.watch()  # no error, though the module is imported already
    assert sum(isinstance(finder, registration.AfterImport) for finder in sys.meta_path) == 1


def test_maps_are_the_encoders():
    model = backbone(feature_form="maps", out_indices=[0, 2, 4])
    images = torch.randn(2, 3, 32, 32)
    found = model(images).feature_maps
    expected = model.encoder.encode(images, layers=[1, 3], as_map=True)
    assert torch.equal(found[0], model.form(model.encoder.norm(model.encoder.embed(images)), (8, 8)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1:], expected, strict=True))
    assert model.channels == [32, 32, 32] and model.out_features == ["stem", "stage2", "stage4"]
    assert len(model(images, output_hidden_states=True).hidden_states) == 5
    assert torch.equal(model(images, return_dict=False)[0][1], found[1])


def test_positions_are_interpolated_to_the_images():
    model, images = backbone(feature_form="maps"), torch.randn(1, 3, 64, 64)
    found = model(images).feature_maps[0]
    model.encoder.set_image_size(64)
    assert torch.equal(found, model.encoder.encode(images, as_map=True))


def test_tokens_lose_no_patch():
    model = backbone(feature_form="tokens")
    images = torch.randn(2, 3, 32, 32)
    tokens = model(images).feature_maps[0]
    assert tokens.shape == (2, 65, 32) and not tokens[:, 0].any()
    assert torch.equal(tokens[:, 1:], model.encoder(images))
    assert torch.equal(backbone(feature_form="patches")(images).feature_maps[0], tokens[:, 1:])


def test_pyramid_has_vitdets_strides_and_every_parameter_learns():
    model = backbone().train()
    images = torch.randn(2, 3, 37, 30)  # 10 x 8 patches, padded
    maps = model(images).feature_maps
    assert [tuple(one.shape) for one in maps] == [(2, 256, 40, 32), (2, 256, 20, 16), (2, 256, 10, 8), (2, 256, 5, 4)]
    assert model.channels == [256] * 4 and model.config.strides == [1, 2, 4, 8]
    sum(one.square().mean() for one in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_save_and_open(tmp_path):
    model, images = backbone(out_indices=[1, 2]), torch.randn(1, 3, 40, 40)
    model.save_pretrained(tmp_path)
    again = AutoBackbone.from_pretrained(tmp_path)
    assert type(again) is Aimv2Backbone and type(AutoConfig.from_pretrained(tmp_path)) is Aimv2BackboneConfig
    assert all(torch.equal(a, b) for a, b in zip(model(images).feature_maps, again(images).feature_maps, strict=True))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "aimv2_backbone"
    tokens = AutoBackbone.from_pretrained(str(tmp_path), feature_form="tokens", out_indices=[2, 4])
    assert [one.shape[1] for one in tokens(images).feature_maps] == [101, 101]
    encoder = aimv2.load_model(tmp_path)  # also a model folder of ours
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)
    other = backbone(seed=1, encoder=None, weights=tmp_path)
    assert torch.equal(other.encoder.norm.weight, model.encoder.norm.weight)
    assert torch.equal(other.encoder.patch_embed.position, model.encoder.patch_embed.position)
    with pytest.raises(UsageError) as caught:
        backbone(encoder=replace(TINY, depth=3), weights=tmp_path)
    assert (caught.value.option, caught.value.code) == ("weights", "mismatch")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "model.safetensors").unlink()  # what it was made from is not read again
    assert torch.equal(AutoBackbone.from_pretrained(tmp_path / "other").encoder.norm.weight, other.encoder.norm.weight)


def masked(block: Block, x: torch.Tensor, height: int, width: int, side: int) -> torch.Tensor:
    """One block in windows of a padded map whose padding is masked, window by window."""
    tall, wide = height + -height % side, width + -width % side
    padded = torch.full((len(x), tall, wide, x.shape[2]), 1e3)
    padded[:, :height, :width] = x.unflatten(1, (height, width))
    real = torch.zeros(tall, wide, dtype=torch.bool)
    real[:height, :width] = True
    out = torch.zeros_like(padded)
    for top in range(0, tall, side):
        for left in range(0, wide, side):
            cell = (slice(top, top + side), slice(left, left + side))
            keys = real[cell].flatten().expand(1, 1, side * side, -1)
            out[:, *cell] = block(padded[:, *cell].flatten(1, 2), keys).unflatten(1, (side, side))
    return out[:, :height, :width].flatten(1, 2)


@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 9)])
def test_windows_are_padded_and_masked_windows(grid):
    model, x = backbone(), torch.randn(2, grid[0] * grid[1], 32)
    block = model.encoder.blocks[0]
    (found,) = run_blocks([block], x, grid, [0], window=4)
    torch.testing.assert_close(found, masked(block, x, *grid, 4), atol=1e-5, rtol=1e-5)
    layout = windows(*grid, 4)
    assert sorted(layout.order.tolist()) == [*range(grid[0] * grid[1])]


@pytest.mark.parametrize("grid", [(8, 8), (5, 8)])
def test_a_window_over_the_map_is_global(grid):
    images = torch.randn(2, 3, *(4 * side for side in grid))
    plain, windowed = backbone(feature_form="maps"), backbone(feature_form="maps", window=8, global_blocks=1)
    torch.testing.assert_close(windowed(images).feature_maps, plain(images).feature_maps, atol=1e-5, rtol=1e-5)
    smaller = backbone(feature_form="maps", window=4, global_blocks=1)
    assert not torch.allclose(smaller(images).feature_maps[0], plain(images).feature_maps[0], atol=1e-3)


def test_global_blocks_are_spread():
    assert spread(4, 24) == [5, 11, 17, 23] and spread(0, 4) == [] and spread(4, 4) == [0, 1, 2, 3]
    images = torch.randn(1, 3, 32, 32)
    every = backbone(feature_form="maps", window=4, global_blocks=[0, 1, 2, 3])
    torch.testing.assert_close(every(images).feature_maps, backbone(feature_form="maps")(images).feature_maps)


def test_refusals():
    for options, option in (
        (dict(feature_form="map"), "feature_form"),
        (dict(scales=[4, 1]), "scales"),
        (dict(window=16, image_size=32), "window"),
        (dict(window=-1), "window"),
        (dict(windows=4), "windows"),
        (dict(window=4, global_blocks=5), "global_blocks"),
        (dict(window=4, global_blocks=[4]), "global_blocks"),
        (dict(encoder="aimv2-tiny"), "model.name"),
    ):
        with pytest.raises(UsageError) as caught:
            backbone(**options)
        assert caught.value.option == option
    with pytest.raises(UsageError) as caught:
        backbone(window=9)(torch.randn(1, 3, 32, 32))
    assert caught.value.code == "mismatch" and caught.value.option == "window"


def test_strides_that_a_head_needs():
    assert scales_of([8, 16, 32], 14) == [2, 1, 0.5] and scales_of([4, 8, 16, 32], 16) == [4, 2, 1, 0.5]
    head = AutoConfig.for_model("rt_detr")
    check_head(head, Aimv2BackboneConfig(scales=[2, 1, 0.5]))
    for config in (Aimv2BackboneConfig(), Aimv2BackboneConfig(scales=[1, 0.5]), Aimv2BackboneConfig(TINY)):
        with pytest.raises(UsageError) as caught:
            check_head(head, config)
        assert caught.value.code == "mismatch"


def test_every_weight_is_initialised():
    model = backbone()
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.encoder.mean.fill_(float("nan"))
    for module in model.modules():
        model._init_weights(module)
    assert all(parameter.isfinite().all() for parameter in model.parameters()) and model.encoder.mean.isfinite().all()


def test_convert_and_export(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    source = aimv2.create_model("aimv2-tiny-patch8-32", seed=0, depth=2)
    aimv2.save_pretrained(source, tmp_path / "model")
    made = api.convert(str(tmp_path / "model"), str(tmp_path / "backbone"), to="backbone")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} == made["files"].keys()
    model, images = AutoBackbone.from_pretrained(tmp_path / "backbone", image_size=[40, 64]), torch.randn(3, 3, 40, 64)
    assert torch.equal(model.encoder.blocks[1].mlp.down.weight, source.blocks[1].mlp.down.weight)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "backbone")
    assert tuple(processor.image_mean) == source.config.mean and type(processor).__name__.startswith(
        "DetrImageProcessor"
    )
    model.save_pretrained(tmp_path / "wide")
    api.convert(str(tmp_path / "wide"), str(tmp_path / "onnx"), to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert [one.name for one in session.get_outputs()] == ["stage1", "stage2", "stage3", "stage4"]
    with torch.no_grad():
        expected = model(images).feature_maps
    for one, other in zip(session.run(None, {"pixel_values": images.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-4, rtol=1e-4)


def test_frozen_lora_and_layer_wise_decay(tmp_path):
    model, images = backbone().train(), torch.randn(1, 3, 32, 32)
    groups = optimizer_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    learned = {id(one): group for group in groups for one in group["params"]}
    assert len(learned) == sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    rates = {name: learned[id(one)]["lr"] for name, one in model.named_parameters()}
    assert rates["encoder.patch_embed.position"] == 0.5**5 and rates["encoder.blocks.3.mlp.down.weight"] == 0.5
    assert rates["encoder.norm.weight"] == rates["pyramid.stage1.0.weight"] == 1
    assert (
        learned[id(model.encoder.norm.weight)]["weight_decay"] == 0
        and learned[id(model.pyramid.stage1[0].weight)]["weight_decay"] == 0.1
    )
    model.freeze_encoder()
    model(images).feature_maps[0].sum().backward()
    assert (
        not any(one.grad is not None for one in model.encoder.parameters())
        and model.pyramid.stage1[0].weight.grad is not None
    )
    pytest.importorskip("peft")
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    model.add_lora(2)
    for name, one in model.encoder.named_parameters():
        assert one.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(one)
    expected = model.eval()(images).feature_maps
    model.merge_lora()
    assert before.keys() == model.encoder.state_dict().keys()
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], model.encoder.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(model(images).feature_maps, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_checkpointed_blocks_give_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        model = backbone(window=4, global_blocks=1).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.gradient_checkpointing
        torch.manual_seed(1)
        model(torch.randn(1, 3, 36, 36)).feature_maps[0].square().mean().backward()
        found.append([one.grad for one in model.encoder.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
