"""What does not fit is one line: weights, configurations, devices, types, images, in every form that a traceback was seen of."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_layouts import DECODER, encoder, equal, pair, shape

import aimv2
from aimv2 import cli
from aimv2.errors import UsageError
from aimv2.interop.convert import convert
from aimv2.interop.shapes import PROCESSORS
from aimv2.models.create import build
from aimv2.models.lit import LiT, LiTConfig

PATCH, FC1, POSITION = (
    "preprocessor.patchifier.proj.weight",
    "trunk.blocks.0.mlp.fc1.weight",
    "preprocessor.pos_embed",
)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def retold(folder: Path, file: str = "config.json", **values: object) -> None:
    """Changes a JSON file; a dotted key is within an object (with two underscores for the dot)."""
    stored = json.loads((folder / file).read_text())
    for key, value in values.items():
        *inner, last = key.split("__")
        at = stored
        for name in inner:
            at = at[name]
        at[last] = value
    (folder / file).write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (PATCH, torch.zeros(32, 588), r"\[32, 588\], \[width, 3, patch, patch\] expected"),
        (POSITION, torch.zeros(32), r"\[32\], \[1, positions, width\] expected"),
        (FC1, torch.tensor(1.0), r"has shape \[\], \[hidden, width\] expected"),
        (FC1, torch.zeros(48, 32, dtype=torch.int64), "holds I64, floating-point numbers expected"),
        ("trunk.post_trunk_norm.weight", torch.zeros(32, dtype=torch.bool), "holds BOOL, floating-point"),
    ],
)
def test_tensors(key: str, value: torch.Tensor, said: str, tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "released")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**tensors, key: value}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UsageError, match=said) as error:
        aimv2.load_model(tmp_path / "m")
    assert key in one_line(error)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_attention_heads": "two"}, "num_attention_heads 'two', a whole number above 0 expected"),
        ({"num_attention_heads": 2.5}, "num_attention_heads 2.5, a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads 0, a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads True, a whole number"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide the width 32"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers '3', a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 in config.json"),
        ({"rms_norm_eps": None}, "rms_norm_eps None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06"),
        ({"vision_config": [1]}, r"vision_config \[1\], an object expected"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' in config.json; AIMV2 has 'silu'"),
        ({"act_layer": "gelu"}, "act_layer 'gelu'"),
        ({"model_args": {"norm_layer": "layernorm"}}, "norm_layer 'layernorm'"),
        ({"qkv_bias": True}, "qkv_bias True"),
        ({"use_bias": True}, "use_bias True"),
        ({"num_channels": 1}, "num_channels 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_native": True}, "is_native True in config.json, False by the weights"),
        ({"image_size": 56}, "image_size 56 in config.json, 28 by the weights"),
        ({"patch_size": 16}, "patch_size 16"),
        ({"hidden_size": 64}, "hidden_size 64"),
        ({"intermediate_size": 64}, "intermediate_size 64"),
    ],
)
def test_configurations(values: dict, said: str, tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "released")
    retold(tmp_path / "m", **values)
    with pytest.raises(UsageError, match=said) as error:
        aimv2.load_model(tmp_path / "m")
    one_line(error)


@pytest.mark.parametrize(
    "values",
    [{"image_mean": [0.5, 0.5]}, {"image_std": ["a", 1, 1]}, {"image_std": [1, 1, 0]}, {"image_mean": 0.5}],
    ids=str,
)
def test_means_and_deviations(values: dict, tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "released")
    retold(tmp_path / "m", "preprocessor_config.json", **values)
    with pytest.raises(UsageError, match=r"(mean|std) .*, three numbers expected") as error:
        aimv2.load_model(tmp_path / "m")
    one_line(error)


@pytest.mark.parametrize(
    "values",
    [
        {"text_config__num_attention_heads": 3},
        {"text_config__num_attention_heads": "x"},
        {"text_config__eos_token_id": "end"},
        {"text_config__eos_token_id": 50},
        {"init_temperature": "warm"},
        {"max_logit_scale": -1},
        {"text_config": 3},
        {"text_config__hidden_size": 64},
    ],
    ids=str,
)
def test_configurations_of_pairs(values: dict, tmp_path: Path) -> None:
    convert(pair(), tmp_path / "m", "released")
    retold(tmp_path / "m", **values)
    with pytest.raises(UsageError, match=r"expected|do not divide|by the weights") as error:
        aimv2.load_model(tmp_path / "m")
    one_line(error)


@pytest.mark.parametrize(
    "values",
    [
        {"encoder__mean": [0.5, 0.5]},
        {"encoder__std": "flat"},
        {"encoder__width": 32.0},
        {"encoder__heads": 5},
        {"encoder__pool_heads": 3},
        {"encoder__hidden": None},
    ],
    ids=str,
)
def test_our_own_configuration(values: dict, tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "safetensors")
    retold(tmp_path / "m", **values)
    with pytest.raises(UsageError) as error:
        aimv2.load_model(tmp_path / "m")
    assert next(iter(values)).split("__")[1] in one_line(error)


def test_our_own_pair(tmp_path: Path) -> None:
    convert(pair(), tmp_path / "m", "safetensors")
    retold(tmp_path / "m", lit__text__heads=3)
    with pytest.raises(UsageError, match="heads of the text tower 3") as error:
        aimv2.load_model(tmp_path / "m")
    one_line(error)


def test_devices_and_types(tmp_path: Path) -> None:
    model = encoder()
    convert(model, tmp_path / "m", "released")
    places = ["foo", "cpu:x"] + (["cuda"] if not torch.cuda.is_available() else [f"cuda:{torch.cuda.device_count()}"])
    for device in places:
        with pytest.raises(UsageError, match=f"device {device}: can't be used here") as error:
            aimv2.load_model(tmp_path / "m", device=device)
        one_line(error)
    for number in (0, "0", 1):  # of a GPU; 0 was taken for none given, which is the CPU
        if torch.cuda.is_available() and not int(number):
            assert next(aimv2.load_model(tmp_path / "m", device=number).parameters()).device == torch.device("cuda:0")
        elif int(number) >= torch.cuda.device_count():
            with pytest.raises(UsageError, match=f"device {number}: can't be used here"):
                aimv2.load_model(tmp_path / "m", device=number)
    for empty in ("", None):
        if empty is None:
            assert next(aimv2.load_model(tmp_path / "m", device=None).parameters()).device.type == "cpu"
        else:
            with pytest.raises(UsageError, match="can't be used here"):
                aimv2.load_model(tmp_path / "m", device=empty)
    equal(aimv2.load_model(tmp_path / "m", dtype="bfloat16"), model.bfloat16())
    for dtype in ("bf17", "int8", torch.int32, "nn"):
        with pytest.raises(UsageError, match=r"dtype .*: float32, bfloat16 or float16") as error:
            aimv2.load_model(tmp_path / "m", dtype=dtype)
        one_line(error)


def test_folders_of_other_engines(tmp_path: Path) -> None:
    for name, said in (("openvino_model.xml", "OpenVINOEncoder opens it"), ("model.onnx", "InferenceSession opens")):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("<xml/>")
        with pytest.raises(UsageError, match=said) as error:
            aimv2.load_model(folder)
        one_line(error)


def test_no_decoder_is_worded_for_what_it_is(tmp_path: Path) -> None:
    convert(pair(), tmp_path / "ours", "safetensors")
    convert(pair(), tmp_path / "released", "released")
    convert(encoder(), tmp_path / "encoder", "safetensors")
    for name, said in (
        ("ours", "an image-text pair, without a decoder"),
        ("released", "an image-text pair, without a decoder"),
        ("encoder", "only an encoder, without a decoder"),
    ):
        with pytest.raises(UsageError, match=said):
            aimv2.load_model(tmp_path / name, decoder=True)


def test_captions_without_a_tokeniser(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    aimv2.save_pretrained(build(shape(), DECODER, seed=1), tmp_path / "m")
    loaded = aimv2.load_model(tmp_path / "m", decoder=True)
    with pytest.raises(UsageError, match="the model has no tokenizer"):
        loaded.caption(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert cli.main(["caption", str(tmp_path / "m"), str(tmp_path / "a.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- images ----


@pytest.mark.parametrize(
    ("images", "kind", "said"),
    [
        (np.zeros((1, 3, 28, 28), np.float32), TypeError, r"got numpy.ndarray; aimv2.image_transform"),
        (Image.new("RGB", (28, 28)), TypeError, r"got PIL.Image.Image; aimv2.image_transform"),
        ([Image.new("RGB", (28, 28))], TypeError, r"got PIL.Image.Image"),
        ([np.zeros((3, 28, 28))], TypeError, r"got numpy.ndarray"),
        ([None], TypeError, r"got builtins.NoneType"),
        ([torch.zeros(1, 3, 28, 28)], ValueError, r"images of a list must be \[3, H, W\] each, got \[1, 3, 28, 28\]"),
        (torch.zeros(3, 28, 28), ValueError, r"images must be \[B, 3, H, W\], got \[3, 28, 28\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_images_of_another_kind(images: Any, kind: type, said: str) -> None:
    for call in (encoder(28, 2), encoder(28, 2).encode, encoder(28, 2).pooled, pair().encode_image):
        with pytest.raises(kind, match=said):
            call(images)


def test_a_list_has_no_prefix() -> None:
    with pytest.raises(ValueError, match="prefix_len goes with one tensor"):
        encoder()([torch.zeros(3, 28, 28)], prefix_len=torch.tensor([2]))


def test_a_pair_sees_lists() -> None:
    model = pair()
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    for normalize in (True, False):
        wanted = model.encode_image(images, normalize)
        torch.testing.assert_close(model.encode_image(list(images), normalize), wanted, rtol=1e-5, atol=1e-6)
    with torch.device("meta"):
        native = LiT(LiTConfig(shape(None, 2), model.config.text, projection=20))
    native.to_empty(device="cpu")
    native.image.fill_constants()
    native.load_state_dict({k: v for k, v in model.state_dict().items() if k != "image.patch_embed.position"})
    mixed = [torch.randn(3, 28, 42), torch.randn(3, 56, 28)]
    together = native.encode_image(mixed)
    for row, image in zip(together, mixed):
        torch.testing.assert_close(row, native.encode_image(image[None])[0], rtol=1e-5, atol=1e-6)


def test_transforms_by_released_names() -> None:
    for name, side in (("aimv2-large-patch14-336-distilled", 336), ("aimv2-large-patch14-224-lit", 224)):
        assert aimv2.image_transform(name)(Image.new("RGB", (500, 400))).shape == (3, side, side)
    with pytest.raises(UsageError, match="did you mean 'aimv2-large-patch14-224-lit'"):
        aimv2.image_transform("aimv2-large-patch14-225-lit")


# ---- types that differ within a file ----


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),  # neither holds the other
        ((torch.float64, torch.bfloat16), torch.float64),
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float8_e4m3fn, torch.float8_e5m2), torch.bfloat16),
    ],
    ids=str,
)
def test_mixed_files_lose_no_bit(kinds: tuple, wanted: torch.dtype, tmp_path: Path) -> None:
    """The first kind is of the first tensors that loading meets, the second of all others."""
    convert(encoder(), tmp_path / "m", "released")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for key in tensors:
        tensors[key] = tensors[key].to(kinds[0] if key.startswith("preprocessor") else kinds[1])
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    loaded = aimv2.load_model(tmp_path / "m")
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    convert(loaded, tmp_path / "back", "released")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for key, value in tensors.items():
        assert torch.equal(back[key], value.to(wanted)) and torch.equal(
            back[key].to(value.dtype).float(), value.float()
        )


# ---- through the command line ----


def pickled(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    return folder / "model.pt"


def truncated(folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def unfit(folder: Path) -> Path:
    save_file({"some.key": torch.zeros(2)}, folder / "model.safetensors")
    return folder


def extra(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "trunk.extra": torch.zeros(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (pickled, "a pickle is never read"),
        (truncated, "can't be read as safetensors"),
        (unfit, "no layout of AIMV2 fits its keys (the first is 'some.key')"),
        (extra, "key 'trunk.extra' is not part of the model"),
    ],
)
def test_the_command_says_it_in_one_line(
    spoil: Callable[[Path], Path], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert(encoder(), tmp_path / "m", "released")
    source = str(spoil(tmp_path / "m"))
    for words in (["convert", source, str(tmp_path / "a" / "out")], ["embed", source, source, str(tmp_path / "out")]):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and said in error, error
    assert not (tmp_path / "a").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra_name", ["onnx", "openvino"])
def test_the_command_names_a_missing_extra(
    extra_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == extra_name else real(name, *a))
    convert(encoder(), tmp_path / "m", "released")
    assert cli.main(["convert", str(tmp_path / "m"), str(tmp_path / "new" / "out"), "--to", extra_name]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"pip install 'aimv2[{extra_name}]'" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_missing_array_library_is_named(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == backend else real(name, *a))
    convert(encoder(), tmp_path / "m", "released")
    with pytest.raises(
        UsageError, match=rf"backend='{backend}' needs the package {backend}: pip install 'aimv2\[{backend}\]'"
    ):
        aimv2.load_model(tmp_path / "m", backend=backend)


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aimv2.interop import convert as module

    def breaks(model: object, folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_model", breaks)
    (tmp_path / "empty").mkdir()
    for out, left in (("empty", ["empty"]), ("a/b/c", ["empty"])):
        with pytest.raises(KeyboardInterrupt):
            convert(encoder(), tmp_path / out, "safetensors")
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == left


def test_pooling_heads_of_another_number_are_kept_by_ours_alone(tmp_path: Path) -> None:
    model = build(replace(shape(28, 4)), None, seed=0)
    with pytest.raises(UsageError, match="a pooling head of 4 heads"):
        convert(model, tmp_path / "out", "released")
    assert not (tmp_path / "out").exists()
    convert(model, tmp_path / "out", "safetensors")
    equal(aimv2.load_model(tmp_path / "out"), model)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "processor, mean, std",
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}, (0.1, 0.2, 0.3), (1, 1, 2)),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
        ),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (0, 0, 0), (1, 1, 1)),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 2 / 255}, (0.25,) * 3, (0.25,) * 3),
        ({"image_mean": [51.0] * 3, "image_std": [255.0] * 3, "do_rescale": False}, (0.2,) * 3, (1.0,) * 3),
    ],
    ids=["values", "of its class", "not normalised", "another scale", "not scaled"],
)
def test_the_processor_beside_an_aimv2_decides_its_pixels(
    processor: dict, mean: tuple, std: tuple, nested: bool, name: str, tmp_path: Path
) -> None:
    """In either file of transformers; what it can not follow is refused."""
    convert(encoder(), tmp_path / "m", "transformers")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    (tmp_path / "m" / name).write_text(json.dumps({"image_processor": processor} if nested else processor))
    config = aimv2.load_model(tmp_path / "m").config
    assert config.mean == pytest.approx(mean) and config.std == pytest.approx(std)
    for wrong in ({"do_flip_channel_order": True}, {"rescale_factor": 0}, {"rescale_factor": "x"}):
        stored = {**processor, "do_rescale": True, **wrong}
        (tmp_path / "m" / name).write_text(json.dumps({"image_processor": stored} if nested else stored))
        with pytest.raises(UsageError, match="its image processor") as error:
            aimv2.load_model(tmp_path / "m")
        one_line(error)


def test_what_says_the_same_in_other_words_is_read(tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "transformers")
    retold(tmp_path / "m", hidden_act="swish", image_size=[28, 28], attention_dropout=0.1)
    equal(aimv2.load_model(tmp_path / "m"), encoder())
    retold(tmp_path / "m", hidden_act="relu")
    with pytest.raises(UsageError, match="hidden_act 'relu'") as error:
        aimv2.load_model(tmp_path / "m")
    assert error.value.code == "unsupported"
    convert(pair(), tmp_path / "pair", "transformers")
    for key, value in (("hidden_act", "gelu"), ("rms_norm_eps", 1e-6)):  # of the text tower, too
        before = json.loads((tmp_path / "pair" / "config.json").read_text())
        retold(tmp_path / "pair", **{f"text_config__{key}": value})
        with pytest.raises(UsageError, match=key):
            aimv2.load_model(tmp_path / "pair")
        (tmp_path / "pair" / "config.json").write_text(json.dumps(before))


def test_a_file_of_no_image_processor_is_refused(tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "transformers")
    (tmp_path / "m" / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')  # names no pixels
    equal(aimv2.load_model(tmp_path / "m"), encoder())
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.raises(UsageError, match=r"preprocessor_config\.json: nothing of an image processor") as error:
        aimv2.load_model(tmp_path / "m")
    one_line(error)


@pytest.mark.parametrize("values", [{"mean": [123, 116, 103]}, {"std": [58, 57, 57]}], ids=str)
def test_a_mean_of_bytes_is_refused(values: dict, tmp_path: Path) -> None:
    """With the default scale, and in our own configuration."""
    convert(encoder(), tmp_path / "m", "transformers")
    convert(encoder(), tmp_path / "ours", "safetensors")
    retold(tmp_path / "m", "preprocessor_config.json", **{f"image_{key}": value for key, value in values.items()})
    retold(tmp_path / "ours", **{f"encoder__{key}": value for key, value in values.items()})
    for folder in ("m", "ours"):
        with pytest.raises(UsageError, match="of pixels in 0 to 1") as error:
            aimv2.load_model(tmp_path / folder)
        one_line(error)
