"""Models of another origin are measured with the weights, the pixels and the layout that are theirs, or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from foreign_models import IMAGES, SHAPE, VERBS, configure, normalised, rewrite, save, two_colours, vit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aimv2 import api
from aimv2.errors import UsageError
from aimv2.evals.scorer import open_matcher
from aimv2.explorer.study import open_shown
from aimv2.features import extraction
from aimv2.features.foreign import LeftOut, flat, of_timm, settle
from aimv2.features.frozen import LAST, open_frozen
from aimv2.features.pixels import Stats
from aimv2.features.teacher import open_teacher
from runs import IMAGENET, assert_refused, write_processor

# ---- weights ----


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_colours(tmp_path_factory.mktemp("colours"))


PREFIXES = (
    *("module.", "_orig_mod.module.", "model.backbone.", "module.vit."),
    *("encoder.", "student.backbone.", "model.vision_tower.", "_orig_mod.student."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_keys_of_training_are_read(tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = vit(tmp_path / "vit")
    wanted = open_frozen(str(folder)).sha256
    capsys.readouterr()
    rewrite(folder, lambda key, value: (prefix + key, value))
    assert open_frozen(str(folder)).sha256 == wanted
    assert "left out" not in capsys.readouterr().err


def test_wrapped_blocks_are_read_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = vit(tmp_path / "vit", head=True)
    wanted = open_frozen(str(folder)).sha256
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "left out 2 keys" in line and "classifier.weight" in line]) == 1
    inner = "layer.1._checkpoint_wrapped_module._orig_mod."
    rewrite(folder, lambda key, value: ("_orig_mod." + key.replace("layer.1.", inner), value))
    assert open_frozen(str(folder)).sha256 == wanted


@pytest.mark.parametrize("pair", [("", "_orig_mod."), ("model.", "module."), ("student.", "teacher.")])
def test_two_models_in_one_file_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    folder = vit(tmp_path / "vit")
    file = folder / "model.safetensors"
    values = load_file(file)
    save_file({before + key: value * n for n, before in enumerate(pair) for key, value in values.items()}, file)
    with pytest.raises(UsageError, match="several models") as refused:
        open_frozen(str(folder))
    assert refused.value.code == "conflict" and pair[1] in str(refused.value)


@pytest.mark.parametrize("lost", ["layer.1.", "layernorm.bias", "embeddings.position_embeddings"])
def test_a_lost_weight_is_named(tmp_path: Path, lost: str) -> None:
    folder = vit(tmp_path / "vit")
    rewrite(folder, lambda key, value: None if lost in key else (key, value))
    with pytest.raises(UsageError, match=r"its weights lack \d+ that its features depend on") as refused:
        open_frozen(str(folder))
    assert lost.replace("layer.1", "layers.1") in str(refused.value)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = vit(tmp_path / "vit")
    rewrite(folder, lambda key, value: (key, value[:, :-1] if key == "embeddings.position_embeddings" else value))
    said = (
        r"embeddings\.position_embeddings is \[1, 16, 32\] there, \[1, 17, 32\] by config\.json; correct config\.json"
    )
    with pytest.raises(UsageError, match=said):
        open_frozen(str(folder))


def test_more_blocks_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    """transformers would drop them: features of a part of the model, under its name."""
    folder = vit(tmp_path / "vit", head=True)
    configure(folder, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"more blocks than its config.json says: .*layers\.2\."):
        open_frozen(str(folder))


def test_statistics_that_are_lost_are_named(tmp_path: Path) -> None:
    """Of a batch norm, whose running mean no gradient reaches; the count of its batches is of no use and may be absent."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    folder = save(tmp_path / "resnet", ResNetModel(config))
    rewrite(folder, lambda key, value: None if key.endswith("num_batches_tracked") else (key, value))
    assert open_frozen(str(folder)).width == 16
    rewrite(folder, lambda key, value: None if key.endswith("embedder.normalization.running_mean") else (key, value))
    with pytest.raises(UsageError, match="running_mean"):
        open_frozen(str(folder))


def test_a_pooler_that_is_lost_is_left_out(tmp_path: Path) -> None:
    """Of a classifier's folder ``AutoModel`` makes a random pooler: it is in neither the model nor its hash."""
    from transformers import ViTForImageClassification

    folder = vit(tmp_path / "vit", head=True)
    first, second = open_frozen(str(folder)), open_frozen(str(folder))
    assert first.module is not None and isinstance(first.module.pooler, LeftOut)
    assert first.sha256 == second.sha256 and first.unchanged()
    theirs = ViTForImageClassification.from_pretrained(folder).eval().vit
    with torch.no_grad():
        wanted = theirs(normalised(IMAGES)).last_hidden_state[:, 1:]
    torch.testing.assert_close(first(IMAGES)[0], wanted, atol=1e-5, rtol=1e-5)
    whole = vit(tmp_path / "whole")  # with a pooler of its own
    assert not isinstance(open_frozen(str(whole)).module.pooler, LeftOut)  # type: ignore[union-attr]


def test_a_pooling_head_that_is_lost_pools_nothing(tmp_path: Path, data: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder = save(tmp_path / "siglip", SiglipVisionModel(SiglipVisionConfig(**SHAPE, intermediate_size=48)))
    words = (str(folder), str(data))
    assert api.knn(*words, k="1", pool="attention")["figures"]["top1"] > 0
    rewrite(folder, lambda key, value: None if "head." in key else (key, value))
    assert api.knn(*words, k="1")["figures"]["top1"] > 0
    with pytest.raises(UsageError, match="has no pooling head"):
        api.knn(*words, k="1", pool="attention")


def test_every_command_that_opens_a_model_refuses(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = vit(tmp_path / "vit")
    rewrite(folder, lambda key, value: None if "layer.1." in key else (key, value))
    where = [str(folder), "--data", str(data)]
    for verb in VERBS:
        assert_refused(capsys, [*verb.split(), *where], "layers.1.")
    assert_refused(capsys, ["data", "teach", str(folder), str(data), str(tmp_path / "out")], "layers.1.")
    with pytest.raises(UsageError, match=r"layers\.1\."):
        open_shown(str(folder), "cpu")
    with pytest.raises(UsageError, match=r"layers\.1\."):
        open_teacher(str(folder), torch.device("cpu"))


@pytest.mark.parametrize("tower", ["text_model", "vision_model", "visual_projection"])
def test_a_pair_that_lacks_a_weight_is_refused(tmp_path: Path, tower: str) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path / "clip"
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 8,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    vision = SHAPE | {"intermediate_size": 48}
    save(folder, CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=16)))
    write_processor(folder, do_resize=True, size={"height": 32, "width": 32})
    letters = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    CLIPTokenizer(vocab=letters, merges=[]).save_pretrained(folder)
    assert open_matcher(str(folder)).by == "contrastive"
    last = {"visual_projection": "visual_projection."}.get(tower, f"{tower}.encoder.layers.1.")
    rewrite(folder, lambda key, value: None if key.startswith(last) else (key, value))
    with pytest.raises(UsageError, match="would be random"):
        open_matcher(str(folder))
    if tower != "vision_model":  # the image tower is whole, and it alone is measured
        assert open_frozen(str(folder)).width == 32


def test_an_adapter_and_code_to_fetch_are_refused(tmp_path: Path) -> None:
    folder = vit(tmp_path / "vit")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(UsageError, match="an adapter"):
        open_frozen(str(folder))
    (folder / "adapter_config.json").unlink()
    for key in ("attn_implementation", "_attn_implementation"):
        for name in (
            "somebody/kernel",
            "flash_attention_2",
        ):  # of the second transformers fetches a kernel where it is absent
            configure(folder, **{key: name})
            with pytest.raises(UsageError, match=f"attention '{name}', code that is not installed"):
                open_frozen(str(folder))
        configure(folder, **{key: "eager"})
    assert open_frozen(str(folder)).width == 32


# ---- passes ----


def test_a_masked_autoencoder_sees_every_patch_in_order(tmp_path: Path, data: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    torch.manual_seed(0)
    whole = ViTMAEForPreTraining(
        ViTMAEConfig(**SHAPE, intermediate_size=48, decoder_intermediate_size=16, **decoder)
    ).eval()
    folder = save(tmp_path / "mae", whole)
    frozen = open_frozen(str(folder))
    found = frozen(IMAGES, ["1", LAST])
    model = whole.vit
    with torch.no_grad():  # by hand, without its masking
        x = model.embeddings.patch_embeddings(normalised(IMAGES)) + model.embeddings.position_embeddings[:, 1:]
        start = (model.embeddings.cls_token + model.embeddings.position_embeddings[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([start, x], 1)
        for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
            x = layer(x)
        wanted = model.layernorm(x)[:, 1:]
    assert wanted.shape == (3, 16, 32)
    torch.testing.assert_close(found[1], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(frozen(IMAGES)[0], found[1])
    figures = [api.knn(str(folder), str(data), k="1,3")["figures"] for _ in range(2)]
    assert figures[0] == figures[1]


def test_features_that_differ_from_pass_to_pass_are_refused() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    settle("m", layer, {}, lambda: [layer(x)])
    with pytest.raises(UsageError, match="two passes over the same image differ"):
        settle("m", layer, {}, lambda: [nn.functional.dropout(layer(x), 0.5, training=True)])


def test_settling_follows_the_graph_not_the_names() -> None:
    """A random weight that is used behind a detour is found; one that is not used is left out, whatever its name."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            self.head(x)
            return x

    model, x = Model(), torch.randn(2, 4)
    with pytest.raises(UsageError, match=r"body\.weight"):
        settle("m", model, dict.fromkeys(("body.weight", "head.weight"), ""), lambda: [model(x)])
    model = Model()
    settle("m", model, dict.fromkeys(("head.weight", "spare"), ""), lambda: [model(x)])
    assert isinstance(model.head, LeftOut) and set(model.state_dict()) == {"body.weight", "body.bias"}


# ---- maps and tokens ----


class Mapped(nn.Module):
    """A stand-in for timm's models, which do not import beside a CPU torch: what they say of themselves, and a map."""

    def __init__(
        self, order: tuple[int, ...] | None, said: str | None = None, before: int | None = None, stray: int = 0
    ) -> None:
        super().__init__()
        self.conv, self.order, self.stray = nn.Conv2d(3, 12, 8, 8), order, stray
        if said is not None:
            self.output_fmt = said
        if before is not None:
            self.num_prefix_tokens = before
        if stray:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 12))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.order is not None:
            return x.permute(*self.order)
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1] * 0 + 7.0] * self.stray + [x], 1)


@pytest.mark.parametrize(
    "order, said",
    [((0, 1, 2, 3), None), ((0, 1, 2, 3), "NCHW"), ((0, 2, 3, 1), "NHWC")],
    ids=["silent", "channels first", "channels last"],
)
def test_a_map_is_read_in_the_layout_that_the_model_says(order: tuple[int, ...], said: str | None) -> None:
    torch.manual_seed(0)
    model = Mapped(order, said).eval()
    frozen = of_timm("timm:x", model, 32, Stats(*map(tuple, IMAGENET)), torch.device("cpu"))
    with torch.no_grad():
        wanted = model.conv(normalised(IMAGES)).flatten(2).transpose(1, 2)
    assert frozen.width == 12
    torch.testing.assert_close(frozen(IMAGES)[0], wanted)


def test_a_map_whose_layout_nothing_tells_is_refused() -> None:
    square = torch.arange(2 * 3 * 3 * 3).view(2, 3, 3, 3)
    with pytest.raises(UsageError, match="NCHW or NHWC"):
        flat("m", square)
    assert torch.equal(flat("m", square, "NHWC"), square.view(2, 9, 3))
    with pytest.raises(UsageError, match="NHWC with two equal sides"):
        flat("m", torch.zeros(2, 12, 3, 3), "NHWC")
    with pytest.raises(UsageError, match="NCHW with two equal sides"):  # silent, and yet channels last
        of_timm("timm:x", Mapped((0, 2, 3, 1)).eval(), 32, Stats((0.5,) * 3, (0.5,) * 3), torch.device("cpu"))


@pytest.mark.parametrize("before, stray", [(1, 1), (None, 1), (None, 0), (0, 0)])
def test_class_tokens_of_timm_are_no_patches(before: int | None, stray: int) -> None:
    """Some models (volo, convit) do not count theirs."""
    model = Mapped(None, before=before, stray=stray).eval()
    frozen = of_timm("timm:x", model, 32, Stats((0.5,) * 3, (0.5,) * 3), torch.device("cpu"))
    found = frozen(IMAGES)[0]
    assert found.shape == (3, 16, 12) and not (found == 7).all(-1).any()
    with pytest.raises(UsageError, match="no square grid"):
        of_timm(
            "timm:x", Mapped(None, before=0, stray=2).eval(), 32, Stats((0.5,) * 3, (0.5,) * 3), torch.device("cpu")
        )


def test_maps_and_detection_tokens_of_transformers(tmp_path: Path) -> None:
    """A convolutional map, and tokens that stand behind the patches (YOLOS): neither shifts the patches."""
    from transformers import ConvNextConfig, ConvNextModel, YolosConfig, YolosModel

    torch.manual_seed(0)
    conv = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4)).eval()
    frozen = open_frozen(str(save(tmp_path / "conv", conv)))
    with torch.no_grad():
        small = IMAGES.repeat(1, 1, 7, 7)
        wanted = conv(normalised(small)).last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(frozen(small)[0], wanted, atol=1e-5, rtol=1e-5)
    shape = SHAPE | {"image_size": [32, 32], "intermediate_size": 48, "num_detection_tokens": 5}
    yolos = YolosModel(YolosConfig(**shape)).eval()
    frozen = open_frozen(str(save(tmp_path / "yolos", yolos)))
    with torch.no_grad():
        wanted = yolos(normalised(IMAGES)).last_hidden_state[:, 1:17]
    torch.testing.assert_close(frozen(IMAGES)[0], wanted, atol=1e-5, rtol=1e-5)


def test_blocks_are_counted_from_the_first_whatever_stands_before_them(tmp_path: Path) -> None:
    """Some families have the embedding among their hidden states (ViT), some do not (SegFormer); Hiera masks nothing here."""
    from transformers import HieraConfig, HieraModel, SegformerConfig, SegformerModel

    torch.manual_seed(0)
    seg = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16
    )
    model = SegformerModel(seg).eval()
    frozen = open_frozen(str(save(tmp_path / "seg", model)))
    images = IMAGES.repeat(1, 1, 7, 7)
    with torch.no_grad():
        hidden = model(normalised(images), output_hidden_states=True).hidden_states
    if frozen.depth:
        for number, block in enumerate(hidden):
            wanted = block.flatten(2).transpose(1, 2)
            torch.testing.assert_close(frozen(images, frozen.layer_names(str(number)))[0], wanted, atol=1e-4, rtol=1e-4)
        assert frozen(images, frozen.layer_names("-1"))[0].shape[-1] == 32
    else:
        with pytest.raises(UsageError, match="--layers 0"):
            frozen.layer_names("0")
    hiera = HieraConfig(
        embed_dim=8, image_size=[64, 64], depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2], masked_unit_size=[4, 4],
        num_query_pool=1,
    )  # fmt: skip
    model = HieraModel(hiera).eval()
    frozen = open_frozen(str(save(tmp_path / "hiera", model)))
    images = IMAGES.repeat(1, 1, 2, 2)
    with torch.no_grad():
        wanted = model(normalised(images)).last_hidden_state
    torch.testing.assert_close(frozen(images)[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("command", ["knn", "probe", "segment"])
def test_a_baseline_that_can_not_be_had_is_refused_before_any_forward_pass(
    command: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = vit(tmp_path / "vit")
    calls: list[str] = []
    real = extraction.cached_features

    def noted(*args: Any, **options: Any) -> Any:
        calls.append("forward")
        return real(*args, **options)

    for module in ("pooled", "probe_run", "dense"):
        monkeypatch.setattr(f"aimv2.evals.{module}.cached_features", noted)
    with pytest.raises(UsageError, match="--baselines random"):
        getattr(api, command)(str(folder), str(data), baselines=["random"])
    assert not calls


def test_timm_without_a_network_ends_at_once_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client uses its cache without retries, and afterwards asks again."""
    from huggingface_hub import constants

    from aimv2.interop import hub

    before, states = constants.HF_HUB_OFFLINE, []

    def create_model(name: str, **_: Any) -> None:
        states.append(constants.HF_HUB_OFFLINE)
        raise OSError("not found")

    timm = ModuleType("timm")
    vars(timm).update(is_model=lambda name: name == "vit_x", list_models=lambda: ["vit_x"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr(hub, "unreachable", lambda: "no route")
    with pytest.raises(UsageError, match=r"timm:vit_x: .*the hub can't be reached \(no route\) and the cache lacks it"):
        open_frozen("timm:vit_x")
    assert states == [True] and before == constants.HF_HUB_OFFLINE
    with pytest.raises(UsageError, match="timm has no such model; did you mean 'vit_x'"):
        open_frozen("timm:vit_xx")
    assert len(states) == 1


def test_a_folder_of_timm_is_called_that(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 0}')
    with pytest.raises(UsageError, match=r"a model of timm \(vit_tiny_patch16_224\).* give timm:local-dir:"):
        open_frozen(str(tmp_path))
