"""A model of another origin is shown the pixels that its image processor makes, or that the user describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import IMAGES, SHAPE, VERBS, save, two_colours, vit

from aimv2 import api
from aimv2.cli import main
from aimv2.errors import UsageError
from aimv2.evals.scorer import open_matcher
from aimv2.features.frozen import open_frozen
from aimv2.features.pixels import read_stats
from runs import IMAGENET, assert_refused, write_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_colours(tmp_path_factory.mktemp("colours"))


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
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_processor_decides_the_pixels(
    tmp_path: Path, stored: dict[str, Any], wanted: Any, file: str, nested: bool
) -> None:
    from transformers import AutoModel

    folder = vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    (folder / file).write_text(json.dumps({"image_processor": stored} if nested else stored))
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
    assert_refused(capsys, ["knn", *words, "--image-mean", "127", "--image-std", "0.5"], "--image-mean 127", "0 to 1")
    assert_refused(capsys, ["knn", *words, "--image-mean", "0.5", "--image-std", "127"], "--image-std 127", "0 to 1")
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


@pytest.mark.parametrize(
    "stored, said",
    [
        ({"rescale_factor": "abc"}, "rescale_factor 'abc'"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
        ({"size": "abc"}, "size 'abc'"),
        ({"image_mean": "abc"}, "image_mean abc"),
        ({"image_mean": [123, 116, 103]}, "of pixels in 0 to 1"),
        ({"image_std": [58, 57, 57]}, "of pixels in 0 to 1"),
        ({"image_mean": [0.1] * 4}, "image_mean"),
        ({"image_std": [0.0] * 3}, "image_std"),
        ({"auto_map": {"AutoImageProcessor": "code.Processor"}}, "custom code"),
    ],
    ids=str,
)
def test_a_processor_file_that_makes_no_sense_is_named(tmp_path: Path, stored: dict[str, Any], said: str) -> None:
    """Not known by its class, so that nothing but the file counts."""
    folder = vit(tmp_path / "vit")
    write_processor(folder, **{"image_processor_type": "NotYetKnown", "do_resize": True, **stored})
    with pytest.raises(UsageError) as refused:
        open_frozen(str(folder))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert "--image-mean abc" not in str(refused.value)


def test_the_users_mean_and_std_leave_the_channels_in_their_order(tmp_path: Path) -> None:
    folder = vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "MobileViTImageProcessor"}')
    assert str(open_frozen(str(folder), stats=read_stats(0, 1)).pixels) == "bgr * 0.0039215686 - 0; 0,0,0 1,1,1"


def _kind(name: str) -> Any:
    import transformers

    text = {key: value for key, value in SHAPE.items() if key not in ("image_size", "patch_size")} | {
        "intermediate_size": 48
    }
    shape: dict[str, Any] = {
        "Bert": text | {"vocab_size": 10},
        "Wav2Vec2": text | {"num_feat_extract_layers": 1, "conv_dim": [8], "conv_stride": [5], "conv_kernel": [10],
                            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2},
        "Siglip2Vision": text | {"num_patches": 16, "patch_size": 8},
        "VideoMAE": SHAPE | {"intermediate_size": 48, "num_frames": 2},
        "ViT": SHAPE | {"intermediate_size": 48, "num_channels": 1},
    }[name]  # fmt: skip
    return getattr(transformers, name + "Model")(getattr(transformers, name + "Config")(**shape))


@pytest.mark.parametrize(
    ("name", "processor", "said"),
    [
        ("Bert", None, r"BertModel takes input_ids \(token ids of a text\)"),
        ("Wav2Vec2", {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, r"takes input_values \(a waveform"),
        ("Siglip2Vision", {"image_processor_type": "Siglip2ImageProcessor"}, r"spatial_shapes \(patches .* NaFlex"),
        ("VideoMAE", {"image_processor_type": "VideoMAEImageProcessor"}, "videos of 2 frames"),
        ("ViT", {"image_processor_type": "ViTImageProcessor"}, "takes images of 1 channel; an encoder of RGB images"),
    ],
)
def test_a_model_for_anything_but_rgb_images_says_what_it_takes(
    tmp_path: Path, name: str, processor: dict[str, Any] | None, said: str
) -> None:
    folder = save(tmp_path / "model", _kind(name))
    (folder / "preprocessor_config.json").unlink()
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for opened in (open_frozen, open_matcher):
        with pytest.raises(UsageError, match=said) as refused:
            opened(str(folder))
        assert refused.value.code == "unsupported" and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [("CLIP", {"num_channels": 1, "image_size": 32, "patch_size": 8}, "images of 1 channel"),
     ("Siglip2", {"num_patches": 16, "patch_size": 8}, r"spatial_shapes \(patches .* NaFlex")],
)  # fmt: skip
def test_a_pair_for_anything_but_rgb_images_says_what_it_takes(
    tmp_path: Path, name: str, shape: dict[str, Any], said: str
) -> None:
    import transformers

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 10, "projection_size": 32, "max_position_embeddings": 8}
    config = getattr(transformers, name + "Config")(text_config=text, vision_config={**tower, **shape})
    folder = save(tmp_path / "pair", getattr(transformers, name + "Model")(config))
    with pytest.raises(UsageError, match=said) as refused:
        open_matcher(str(folder))
    assert refused.value.code == "unsupported"


def test_a_naflex_processor_of_another_model_is_named(tmp_path: Path) -> None:
    folder = vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Siglip2ImageProcessor"}')
    with pytest.raises(UsageError, match=r"Siglip2ImageProcessor\w* gives patches of images at their own size"):
        open_frozen(str(folder))


def test_queries_of_a_decoder_are_no_patches(tmp_path: Path) -> None:
    """A detector's 4 queries would pass as a grid of 2 x 2."""
    from transformers import DetrConfig, DetrModel, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4}
    folder = save(tmp_path / "detr", DetrModel(DetrConfig(backbone_config=backbone, **shape, **heads)))
    with pytest.raises(UsageError, match="DetrModel gives the queries of a decoder"):
        open_frozen(str(folder))
