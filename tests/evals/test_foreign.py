"""Models of another origin are measured with the weights, the pixels and the layout that are theirs, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aimv2 import api
from aimv2.cli import main
from aimv2.errors import UsageError
from aimv2.evals.foreign import LeftOut, flat, of_timm, open_transformers, settle
from aimv2.evals.frozen import LAST, open_frozen
from aimv2.evals.pixels import Stats, read_stats
from aimv2.evals.scorer import open_matcher
from aimv2.explorer.study import open_shown
from aimv2.teacher import open_teacher
from runs import IMAGENET, assert_refused, write_processor

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
VERBS = ("knn --k 1", "linear", "fewshot --shots 1", "probe", "segment", "depth")
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    write_processor(folder)
    return folder


def vit(folder: Path, head: bool = False) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(**SHAPE, intermediate_size=48)
    return save(folder, ViTForImageClassification(config) if head else ViTModel(config))


def rewrite(folder: Path, change: Any) -> None:
    """Changes the weights file: ``change`` gets every (key, tensor) and gives another pair, or None to drop it."""
    file = folder / "model.safetensors"
    kept = [change(key, value) for key, value in load_file(file).items()]
    save_file(dict(pair for pair in kept if pair is not None), file, {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **values}))


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return (images / 255 - mean) / std


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``test`` of two colours."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("red", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 * number] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


# ---- weights ----


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "backbone."])
def test_keys_of_training_are_refused(tmp_path: Path, prefix: str) -> None:
    folder = vit(tmp_path / "vit")
    rewrite(folder, lambda key, value: (prefix + key, value))
    with pytest.raises(UsageError, match="random") as refused:
        open_frozen(str(folder))
    assert "embeddings.cls_token" in str(refused.value)
    assert prefix == "backbone." or f"begin with '{prefix[:7]}" in str(refused.value)


@pytest.mark.parametrize("lost", ["layer.1.", "layernorm.bias", "embeddings.position_embeddings"])
def test_a_lost_weight_is_named(tmp_path: Path, lost: str) -> None:
    folder = vit(tmp_path / "vit")
    rewrite(folder, lambda key, value: None if lost in key else (key, value))
    with pytest.raises(UsageError, match=r"that its features depend on are not in its weights") as refused:
        open_frozen(str(folder))
    assert lost.replace("layer.1", "layers.1") in str(refused.value)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = vit(tmp_path / "vit")
    rewrite(folder, lambda key, value: (key, value[:, :-1] if key == "embeddings.position_embeddings" else value))
    with pytest.raises(UsageError, match=r"embeddings\.position_embeddings"):
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
        configure(folder, **{key: "somebody/kernel"})
        with pytest.raises(UsageError, match="attention 'somebody/kernel', code that is not installed"):
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
    settle("m", layer, set(), lambda: [layer(x)])
    with pytest.raises(UsageError, match="two passes over the same image differ"):
        settle("m", layer, set(), lambda: [nn.functional.dropout(layer(x), 0.5, training=True)])


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
        settle("m", model, {"body.weight", "head.weight"}, lambda: [model(x)])
    model = Model()
    settle("m", model, {"head.weight", "spare"}, lambda: [model(x)])
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


# ---- pixels ----


@pytest.mark.parametrize(
    "stored, wanted",
    [
        ({"image_processor_type": "ViTImageProcessor"}, lambda x: (x / 255 - 0.5) / 0.5),  # the defaults of its class
        ({"image_processor_type": "ViTImageProcessor", "do_normalize": False}, lambda x: x / 255),
        ({"image_processor_type": "ViTImageProcessor", "do_rescale": False, "do_normalize": False}, lambda x: x),
        ({"image_processor_type": "ViTImageProcessor", "rescale_factor": 1 / 128, "do_normalize": False}, lambda x: x / 128),
        (
            {"image_processor_type": "EfficientNetImageProcessor", "rescale_factor": 1 / 127.5, "rescale_offset": True},
            lambda x: ((x / 127.5 - 1) - 0.5) / 0.5**2,  # its ``include_top``: once more by the std
        ),
        ({"image_processor_type": "MobileViTImageProcessor"}, lambda x: x.flip(1) / 255),
        ({"image_processor_type": "NotYetKnown", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]},
         lambda x: (x / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1, 1, 2]).view(3, 1, 1)),
    ],
    ids=["defaults of the class", "not normalised", "not scaled", "another scale", "offset", "blue first", "unknown class"],
)  # fmt: skip
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_processor_decides_the_pixels(tmp_path: Path, stored: dict[str, Any], wanted: Any, file: str) -> None:
    from transformers import AutoModel

    folder = vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    (folder / file).write_text(json.dumps(stored if file.startswith("pre") else {"image_processor": stored}))
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder).eval()(wanted(IMAGES.float())).last_hidden_state[:, 1:]
    frozen = open_frozen(str(folder))
    torch.testing.assert_close(frozen(IMAGES)[0], theirs, atol=1e-4, rtol=1e-4)
    assert frozen.pixels is not None and frozen.pixels.origin == file


def test_a_folder_without_a_processor_is_refused_unless_the_user_says_it(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = vit(tmp_path / "vit")
    right = open_frozen(str(folder))
    (folder / "preprocessor_config.json").unlink()
    words = [str(folder), "--data", str(data)]
    for verb in VERBS:
        assert_refused(capsys, [*verb.split(), *words], "preprocessor_config.json", "--image-mean")
    assert_refused(capsys, ["knn", *words, "--image-mean", "0.5"], "--image-mean without --image-std")
    assert_refused(capsys, ["knn", *words, "--image-mean", "0.5,1", "--image-std", "1"], "--image-mean 0.5,1")
    assert_refused(
        capsys, ["knn", *words, "--image-mean", "0.5", "--image-std", "0,1,1"], "--image-std 0,1,1", "above 0"
    )
    stats = ["--image-mean", ",".join(map(str, IMAGENET[0])), "--image-std", ",".join(map(str, IMAGENET[1]))]
    assert main(["knn", *words, *stats, "--k", "1", "--json"]) in (None, 0)
    about = json.loads(capsys.readouterr().out)["model"]
    assert about["pixels"]["mean"] == IMAGENET[0] and about["pixels"]["from"] == "options"
    assert about["weights_sha256"] == right.sha256  # the same weights, the same arithmetic
    given = open_frozen(str(folder), stats=read_stats(*IMAGENET))
    assert torch.equal(given(IMAGES)[0], right(IMAGES)[0])
    assert open_frozen(str(folder), stats=read_stats(0, 1)).sha256 != right.sha256


def test_a_cache_of_other_pixels_is_another_one(tmp_path: Path, data: Path) -> None:
    folder, cache = vit(tmp_path / "vit"), str(tmp_path / "cache")
    first = api.knn(str(folder), str(data), k="1", cache=cache)["model"]
    write_processor(folder, mean=[0.0, 0.0, 0.0])
    second = api.knn(str(folder), str(data), k="1", cache=cache)["model"]
    assert first["weights_sha256"] != second["weights_sha256"] and len(list((tmp_path / "cache").iterdir())) == 2


def test_models_of_ours_keep_their_own_mean_and_std(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from aimv2.interop.model_folder import save_model
    from aimv2.models.create import create_model

    save_model(create_model("aimv2-tiny-patch8-32", seed=0, width=32, heads=2, hidden=48, depth=2), tmp_path / "ours")
    words = [str(tmp_path / "ours"), "--data", str(data), "--image-mean", "0.5", "--image-std", "0.5"]
    for verb in ("knn", "probe", "zeroshot"):
        assert_refused(capsys, [verb, *words], "is an AIMV2")


def test_a_processor_that_does_more_is_refused(tmp_path: Path) -> None:
    folder = vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "VideoMAEImageProcessor"}')
    with pytest.raises(UsageError, match=r"VideoMAEImageProcessor.* gives pixels of"):
        open_frozen(str(folder))
    assert open_frozen(str(folder), stats=read_stats(0.5, 0.5)).width == 32


def test_what_takes_no_images_is_one_line(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    text = {key: value for key, value in SHAPE.items() if key not in ("image_size", "patch_size")}
    folder = save(tmp_path / "bert", BertModel(BertConfig(**text, vocab_size=10, intermediate_size=48)))
    assert open_transformers(str(folder), folder, "cpu")[1] == set()
    with pytest.raises(UsageError, match="BertModel can't be measured on RGB images of 224 x 224 px"):
        open_frozen(str(folder))
