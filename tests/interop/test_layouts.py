"""Every layout reads back bit for bit, equals transformers in values and gradients, and names the key that does not fit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aimv2
from aimv2.errors import UsageError
from aimv2.interop import hub, layouts
from aimv2.interop.convert import convert, renamed
from aimv2.interop.load import load_model
from aimv2.interop.shapes import config_name
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.models.lit import LiT, LiTConfig, TextConfig
from aimv2.models.sizes import MODELS, DecoderConfig, EncoderConfig

TEXT = TextConfig(width=16, depth=2, heads=2, hidden=24, vocab_size=50, max_text=12, end=49)
DECODER = DecoderConfig(width=24, depth=2, heads=2, hidden=40, vocab_size=60, max_text=9)


def shape(image_size: int | None = 28, pool_heads: int = 0, patch: int = 14) -> EncoderConfig:
    config = EncoderConfig("tiny", 32, 3, 2, 48, patch, image_size, pool_heads=pool_heads, min_patches=2)
    return EncoderConfig(**{**vars(config), "name": config_name(config)})


def encoder(image_size: int | None = 28, pool_heads: int = 0) -> VisionEncoder:
    model = build(shape(image_size, pool_heads), None, seed=0)
    spread_norms(model)
    return model.eval()


def pair() -> LiT:
    with torch.device("meta"):
        model = LiT(LiTConfig(shape(28, 2), TEXT, projection=20))
    model.to_empty(device="cpu")
    init_weights(model, 0)
    spread_norms(model)
    return model.eval()


def spread_norms(model: nn.Module) -> None:
    """Gains that tell one norm from another."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)


def equal(left: nn.Module, right: nn.Module) -> None:
    one, two = left.state_dict(), right.state_dict()
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key


def assert_near(got: Tensor, wanted: Tensor, what: str) -> None:
    """To 1e-5 of the largest value."""
    error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)
    assert error < 1e-5, f"{what}: {error:.1e}"


# ---- round trips ----


@pytest.mark.parametrize("layout", ["released", "transformers", "timm", "safetensors"])
@pytest.mark.parametrize("image_size", [28, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_for_bit(layout: str, image_size: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    if layout == "timm" and image_size is None:
        pytest.skip("timm has no native AIMV2")
    model = encoder(image_size).to(dtype)
    convert(model, tmp_path / "out", layout)
    loaded = aimv2.load_model(tmp_path / "out")
    assert isinstance(loaded, VisionEncoder) and not loaded.training
    equal(model, loaded)
    assert vars(loaded.config) == {**vars(model.config), "min_patches": loaded.config.min_patches}
    alone = aimv2.load_model(tmp_path / "out" / "model.safetensors")
    equal(model, alone)


@pytest.mark.parametrize("layout", ["released", "transformers", "safetensors"])
def test_pair_there_and_back(layout: str, tmp_path: Path) -> None:
    model = pair()
    convert(model, tmp_path / "out", layout)
    loaded = aimv2.load_model(tmp_path / "out")
    assert isinstance(loaded, LiT)
    equal(model, loaded)
    assert loaded.config.text == model.config.text and loaded.config.max_scale == 100
    tokens = torch.tensor([[3, 5, 49, 49], [8, 49, 49, 49]])
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    assert torch.equal(loaded(images, tokens), model(images, tokens))


def test_pooling_head_there_and_back(tmp_path: Path) -> None:
    model = encoder(28, pool_heads=2)
    for layout in ("released", "transformers", "safetensors"):
        convert(model, tmp_path / layout, layout)
        equal(model, aimv2.load_model(tmp_path / layout))
    with pytest.raises(UsageError, match="timm layout has no pooling head"):
        convert(model, tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()  # nothing half-written


def trainer_file(folder: Path) -> AIMv2:
    """A checkpoint of the released training code, as safetensors; of known widths, for it tells no heads."""
    config = EncoderConfig("tiny", 128, 3, 2, 48, 14, 28)
    decoder = DecoderConfig(width=128, depth=2, heads=2, hidden=40, vocab_size=60, max_text=9)
    model = build(config, decoder, seed=3)
    assert isinstance(model, AIMv2)
    tensors = renamed(model, layouts.trainer_rules(config, decoder))
    start = "models.text_decoder.preprocessor.text_preprocessor.cls_token"
    tensors[start] = model.decoder.bos.detach()[None, None].clone()
    save_file(tensors, folder / "checkpoint.safetensors")
    return model


def test_the_released_training_codes_checkpoint(tmp_path: Path) -> None:
    model = trainer_file(tmp_path)
    keys = load_file(tmp_path / "checkpoint.safetensors").keys()
    assert "models.image_encoder.trunk.blocks.2.attn.k_proj.weight" in keys
    assert "models.text_decoder.trunk.blocks.1.mlp.fc3.weight" in keys
    whole = aimv2.load_model(tmp_path / "checkpoint.safetensors", decoder=True)
    equal(whole, model)
    equal(aimv2.load_model(tmp_path / "checkpoint.safetensors"), model.encoder)


def test_decoder_travels_in_our_folder(tmp_path: Path) -> None:
    model = build(shape(), DECODER, seed=3)
    convert(model, tmp_path / "ours", "safetensors")
    equal(aimv2.load_model(tmp_path / "ours", decoder=True), model)
    convert(model, tmp_path / "released", "released")  # the encoder alone
    equal(aimv2.load_model(tmp_path / "released"), model.encoder)
    with pytest.raises(UsageError, match="only an encoder, without a decoder"):
        aimv2.load_model(tmp_path / "released", decoder=True)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    model = encoder()
    convert(model, tmp_path, "transformers")
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    (tmp_path / "model.safetensors").unlink()
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    equal(aimv2.load_model(tmp_path), model)
    index["weight_map"]["x"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"elsewhere.*, which is not in the folder"):
        aimv2.load_model(tmp_path)


# ---- parity with transformers ----

SIZES = [(28, 28, 28), (42, 42, 42), (None, 28, 28), (None, 14, 70), (None, 98, 42)]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("image_size", "height", "width"), SIZES)
def test_exported_encoder_opens_in_transformers(
    head: bool, image_size: int | None, height: int, width: int, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    model = encoder(image_size, 2 if head else 0)
    convert(model, tmp_path / "out", "transformers")
    theirs = AutoModel.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "Aimv2VisionModel"
    images = torch.randn(2, 3, height, width)
    wanted = theirs(pixel_values=images)
    got = model(images)
    assert_near(got, wanted.last_hidden_state, "features")
    pull = torch.randn_like(got)
    loss, target = (got * pull).sum(), (wanted.last_hidden_state * pull).sum()
    if head:
        assert_near(model.pooled(images), wanted.pooler_output, "pooled")
        loss, target = loss + model.pooled(images).square().sum(), target + wanted.pooler_output.square().sum()
    loss.backward()
    target.backward()
    theirs_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for ours, names in layouts.encoder_rules("transformers", model.config).items():
        gradient = model.get_parameter(ours).grad
        for name, part in zip(names, gradient.chunk(len(names))):
            assert_near(part.reshape(theirs_gradients[name].shape), theirs_gradients[name], f"gradient of {name}")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == list(model.config.mean)


def test_exported_pair_opens_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = pair()
    convert(model, tmp_path / "out", "transformers")
    theirs = AutoModel.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(theirs).__name__ == "Aimv2Model"
    images, tokens = torch.randn(2, 3, 28, 28), torch.tensor([[3, 5, 49, 49], [8, 49, 49, 49], [1, 2, 3, 49]])
    mask = torch.ones_like(tokens)
    wanted = theirs(input_ids=tokens, pixel_values=images, attention_mask=mask)
    assert_near(model.encode_image(images), wanted.image_embeds, "image")
    assert_near(model.encode_text(tokens), wanted.text_embeds, "text")
    assert_near(model(images, tokens), wanted.logits_per_image, "logits")
    raw = model.encode_image(images, normalize=False)
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(2)) and torch.allclose(
        nn.functional.normalize(raw, dim=-1), model.encode_image(images)
    )
    pull = torch.randn(2, 3)
    (model(images, tokens) * pull).sum().backward()
    (wanted.logits_per_image * pull).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for ours, names in layouts.pair_rules("transformers", model.config.encoder, model.config.text).items():
        gradient = model.get_parameter(ours).grad
        for name, part in zip(names, gradient.chunk(len(names)) if len(names) > 1 else [gradient]):
            if gradients[name] is None:
                assert gradient.abs().max() == 0, ours
                continue
            assert_near(part.reshape(gradients[name].shape), gradients[name], f"gradient of {name}")


def test_the_scale_is_held_below_one_hundred() -> None:
    model = pair()
    for value, scale in ((10.0, 100.0), (-3.0, 1.0), (2.0, 7.389056)):
        model.log_scale.data.fill_(value)
        assert model.scale.item() == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize(
    "name", sorted({name.removesuffix("-distilled") for name in hub.RELEASED if "lit" not in name})
)
def test_names_and_shapes_of_every_released_size_are_those_of_transformers(name: str) -> None:
    """Key and shape tables of the real sizes, without memory."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    from aimv2.interop.convert import transformers_config

    config = MODELS[name][0]
    with torch.device("meta"):
        ours = VisionEncoder(config)
        theirs = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(config)))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    found = {}
    for key, names in layouts.encoder_rules("transformers", config).items():
        for part, part_name in zip(ours.state_dict()[key].chunk(len(names)), names):
            found[part_name] = tuple(part.shape[1:] if part_name.startswith("embeddings.position") else part.shape)
    assert found == shapes


TIMM = {  # of timm's vit_large_patch14 with SwiGLU and RMSNorm, block 0
    "patch_embed.proj.weight": (1024, 3, 14, 14),
    "patch_embed.proj.bias": (1024,),
    "patch_embed.norm.weight": (1024,),
    "pos_embed": (1, 256, 1024),
    "blocks.0.norm1.weight": (1024,),
    "blocks.0.attn.qkv.weight": (3072, 1024),
    "blocks.0.attn.proj.weight": (1024, 1024),
    "blocks.0.norm2.weight": (1024,),
    "blocks.0.mlp.fc1_g.weight": (2816, 1024),
    "blocks.0.mlp.fc1_x.weight": (2816, 1024),
    "blocks.0.mlp.fc2.weight": (1024, 2816),
    "norm.weight": (1024,),
}


def test_timm_names_and_shapes() -> None:
    config = MODELS["aimv2-large-patch14-224"][0]
    with torch.device("meta"):
        state = VisionEncoder(config).state_dict()
    found = {}
    for key, names in layouts.encoder_rules("timm", config).items():
        found |= {name: tuple(part.shape) for name, part in zip(names, state[key].chunk(len(names)))}
    assert {key: value for key, value in found.items() if not key.startswith("blocks.") or ".0." in key} == TIMM
    assert len(found) == 4 + 24 * 7 + 1


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_registered_model_is_found_again(name: str, tmp_path: Path) -> None:
    """The contract of the table: each row, thin, saved in each layout that can hold it, is read back as it was."""
    row = MODELS[name][0]
    thin = {**vars(row), "width": 16, "depth": 1, "heads": 2, "hidden": 8}
    model = build(EncoderConfig(**thin), None, seed=1).eval()
    for layout in ("released", "transformers", "timm", "safetensors"):
        if layout == "timm" and row.image_size is None:
            continue
        convert(model, tmp_path / layout, layout)
        loaded = load_model(tmp_path / layout)
        equal(model, loaded)
        same = {key: value for key, value in vars(loaded.config).items() if key != "name"}
        assert same == {key: value for key, value in vars(model.config).items() if key != "name"}


# ---- what the preprocessor file says ----


def test_mean_and_std_are_those_of_the_folder(tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "out", "released")
    path = tmp_path / "out" / "preprocessor_config.json"
    about = json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    path.write_text(json.dumps(about))
    loaded = load_model(tmp_path / "out")
    assert loaded.config.mean == (0.1, 0.2, 0.3)
    assert loaded.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    path.unlink()
    assert load_model(tmp_path / "out").config.mean == (0.485, 0.456, 0.406)  # as in pre-training


# ---- wrong use ----


def changed(tmp_path: Path, change: dict[str, Tensor | None]) -> Path:
    convert(encoder(), tmp_path / "out", "released")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for key, value in change.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, file)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trunk.blocks.1.mlp.fc2.weight": None}, "key 'trunk.blocks.1.mlp.fc2.weight' is missing"),
        ({"trunk.blocks.2.norm_1.weight": None}, "key 'trunk.blocks.2.norm_1.weight' is missing"),
        ({"trunk.extra": torch.zeros(1)}, "key 'trunk.extra' is not part of the model"),
        (
            {"trunk.blocks.0.mlp.fc2.weight": torch.zeros(32, 40)},
            r"key 'trunk.blocks.0.mlp.fc2.weight' has shape \[32, 40\], expected \[32, 48\]",
        ),
        ({"preprocessor.patchifier.proj.weight": None}, "no layout of AIMV2 fits its keys"),
        ({"preprocessor.pos_embed": torch.zeros(1, 5, 32)}, "holds 5 positions, a square grid expected"),
    ],
)
def test_keys_that_do_not_fit_are_named(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(changed(tmp_path, change))


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("pytorch_model.bin", "model.pt", "weights.pkl"):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(UsageError, match="a pickle is never read"):
            load_model(tmp_path / "m" / name)
    with pytest.raises(UsageError, match=r"only a pickle \(model.pt\), which is never read"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(pickle.dumps(Trap()))  # under another name
    with pytest.raises(UsageError, match="can't be read as safetensors"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "out", "released")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="can't be read as safetensors"):
        load_model(tmp_path / "out")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'aimv2-large-patch14-224'"):
        load_model("aimv2-larg-patch14-224")
    with pytest.raises(UsageError, match="no released weights"):
        load_model("aimv2-tiny-patch8-32")
    with pytest.raises(UsageError, match="no such file"):
        load_model("nowhere/at/all.safetensors")


def test_a_mistyped_run_names_the_one_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    with pytest.raises(UsageError, match=r"did you mean '.*/photographs'"):
        aimv2.load_model(tmp_path / "photographs-2")
    with pytest.raises(UsageError, match="no such file") as caught:  # nor is anything guessed where there is nothing
        aimv2.load_model(tmp_path / "none" / "photographs")
    assert "did you mean" not in str(caught.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="something is there already"):
        convert(encoder(), tmp_path / "out", "released")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="did you mean 'transformers'"):
        convert(encoder(), tmp_path / "new", "transformer")
    assert not (tmp_path / "new").exists()
