"""What a card says is so: of these weights, of what was written, and kept when a model is converted again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from test_layouts import DECODER, encoder, equal, pair, shape

import aimv2
from aimv2 import api
from aimv2.data.text.clip import ClipTokenizer
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.errors import UsageError
from aimv2.interop.card import timm_name
from aimv2.interop.convert import convert
from aimv2.interop.model_folder import save_model
from aimv2.models.create import build
from aimv2.models.lit import LiT, LiTConfig, TextConfig
from aimv2.models.sizes import MODELS, EncoderConfig


def head_of(folder: Path) -> dict:
    """The front matter of a card."""
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def body_of(folder: Path) -> str:
    return (folder / "README.md").read_text().split("---\n", 2)[2]


def count(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:,.1f}M"


def run(folder: Path, steps: tuple[int, ...] = (50, 100)) -> Path:
    """A run whose summary speaks of its last step."""
    for step in steps:
        save_model(build(shape(), DECODER, seed=step), folder / "checkpoints" / f"step-{step:07d}" / "model")
    (folder / "config.yaml").write_text("model:\n  name: aimv2-tiny-patch8-32\n")
    (folder / "summary.json").write_text(json.dumps({"step": steps[-1], "val_text_loss": 1.25, "probe_top1": 0.5}))
    return folder


def test_figures_are_of_the_step_that_was_measured(tmp_path: Path) -> None:
    source = run(tmp_path / "run")
    for name, given in (("new", str(source)), ("last", f"{source}@100"), ("old", f"{source}@50")):
        api.convert(given, str(tmp_path / name), "transformers")
    for name in ("new", "last"):
        assert "| val_text_loss | 1.2500 |" in body_of(tmp_path / name)
    assert "val_text_loss" not in body_of(tmp_path / "old") and "## Recipe" in body_of(tmp_path / "old")
    (source / "summary.json").write_text("{")
    api.convert(str(source), str(tmp_path / "broken"), "transformers")
    assert "measured" not in body_of(tmp_path / "broken")


def test_a_second_conversion_keeps_the_story(tmp_path: Path) -> None:
    api.convert(str(run(tmp_path / "run")), str(tmp_path / "one"), "safetensors", licence="mit")
    api.convert(str(tmp_path / "one"), str(tmp_path / "two"), "transformers")
    api.convert(str(tmp_path / "two"), str(tmp_path / "three"), "timm")
    assert head_of(tmp_path / "three")["license"] == "mit"
    for part in ("| val_text_loss | 1.2500 |", "| probe_top1 | 50.0% |", "name: aimv2-tiny-patch8-32"):
        assert part in body_of(tmp_path / "three")
    api.convert(str(tmp_path / "two"), str(tmp_path / "other"), "released", licence="apache-2.0")
    assert head_of(tmp_path / "other")["license"] == "apache-2.0"


def test_the_licence_of_a_configuration(tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "released")
    stored = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(stored | {"license": "bsd-3-clause"}))
    api.convert(str(tmp_path / "m"), str(tmp_path / "out"), "timm")
    assert head_of(tmp_path / "out")["license"] == "bsd-3-clause"


def test_a_card_of_something_else_is_not_read(tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "timm")
    (tmp_path / "m" / "config.json").rename(tmp_path / "m" / "config.txt")
    (tmp_path / "m" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n# A project\n")
    with pytest.raises(UsageError, match="the number of attention heads can't be inferred"):
        api.convert(str(tmp_path / "m" / "model.safetensors"), str(tmp_path / "out"), "released")
    known = build(MODELS["aimv2-tiny-patch4-32"][0], None, seed=0)
    convert(known, tmp_path / "k", "timm")
    (tmp_path / "k" / "config.json").unlink()
    (tmp_path / "k" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n# A project\n")
    api.convert(str(tmp_path / "k" / "model.safetensors"), str(tmp_path / "out"), "released")
    assert "license" not in head_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "library"), [("transformers", "transformers"), ("timm", "timm"), ("released", None), ("safetensors", None)]
)
def test_fields_are_those_that_the_hub_knows(to: str, library: str | None, tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "safetensors")
    api.convert(str(tmp_path / "m"), str(tmp_path / "out"), to)
    head = head_of(tmp_path / "out")
    assert head.get("library_name") == library and "license" not in head
    assert head["pipeline_tag"] == "image-feature-extraction"
    assert "licence of the weights: none was given" in body_of(tmp_path / "out")


def test_a_pair_is_described_and_counted_as_one(tmp_path: Path) -> None:
    model = pair()
    aimv2.save_pretrained(model, tmp_path / "lit", to="transformers")
    body = body_of(tmp_path / "lit")
    assert "image-text pair" in body and f"- {count(model)} parameters" in body
    assert f"text tower {count(model.text)}" in body and f"image encoder {count(model.image)}" in body
    assert head_of(tmp_path / "lit")["pipeline_tag"] == "zero-shot-image-classification"
    result = api.convert(str(tmp_path / "lit"), str(tmp_path / "timm"), "timm")
    assert result["left_out"] == ["text tower", "image and text projections", "pooling head"]
    body = body_of(tmp_path / "timm")
    assert (
        "Not included, since the layout can't hold them: text tower, image and text projections, pooling head" in body
    )
    assert "image-text pair" not in body and "vision encoder" in body
    loaded = aimv2.load_model(tmp_path / "timm")
    assert loaded.head is None
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.image.state_dict()[key]), key
    assert api.convert(str(tmp_path / "lit"), str(tmp_path / "released"), "released")["left_out"] == []


@pytest.mark.engine
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_exported_pair_says_what_is_not_in_it(to: str, tmp_path: Path) -> None:
    pytest.importorskip(to)
    convert(pair(), tmp_path / "lit", "safetensors")
    result = api.convert(str(tmp_path / "lit"), str(tmp_path / "out"), to)
    assert result["left_out"] == ["text tower", "image and text projections"]
    assert "Not included, since the layout can't hold them: text tower, image and text" in body_of(tmp_path / "out")
    assert head_of(tmp_path / "out").get("library_name") == ("onnx" if to == "onnx" else None)


def test_a_decoder_is_described_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(shape(), DECODER, seed=1)
    aimv2.save_pretrained(model, tmp_path / "m")
    body = body_of(tmp_path / "m")
    assert "multimodal decoder" in body and f"- {count(model)} parameters" in body
    assert f"decoder {count(model.decoder)}" in body
    code = body.split("```python\n")[1].split("```")[0]
    assert "decoder=True" in code
    scope: dict = {}
    monkeypatch.chdir(tmp_path)  # of the folder it has the name only
    exec(code, scope)  # what the card says works
    equal(scope["model"], model)
    assert api.convert(str(tmp_path / "m"), str(tmp_path / "t"), "transformers")["left_out"] == ["decoder"]
    aimv2.save_pretrained(model, tmp_path / "u", to="timm")
    assert "Not included, since the layout can't hold them: decoder" in body_of(tmp_path / "u")


def test_timm_names_are_those_that_timm_has(tmp_path: Path) -> None:
    names = {timm_name(row) for row, _ in MODELS.values()} - {None}
    assert names == {
        f"aimv2_{size}_patch14_{side}" for size in ("large", "huge", "1b", "3b") for side in (224, 336, 448)
    }
    row = MODELS["aimv2-large-patch14-224"][0]
    assert timm_name(EncoderConfig(**{**vars(row), "depth": 2})) is None  # of that name, and another shape
    aimv2.save_pretrained(encoder(), tmp_path / "m", to="timm")
    body = body_of(tmp_path / "m")
    assert "timm.create_model('local-dir:" in body
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    assert about["architecture"] in names  # with the size of these weights in model_args
    assert int(about["model_args"]["embed_dim"] * about["model_args"]["mlp_ratio"]) == 48
    if importlib.util.find_spec("timm"):
        scope: dict = {}
        exec(body.split("```python\n")[1].split("```")[0], scope)
        images = torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            found = scope["model"].eval().forward_features(images)
            torch.testing.assert_close(found, encoder()(images), atol=1e-5, rtol=1e-4)


def clip_tokenizer() -> ClipTokenizer:
    import tokenizers

    words = {word: at for at, word in enumerate(["a", "b", "<unk>", "<|startoftext|>", "<|endoftext|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return ClipTokenizer(Tokenizer(backend, "<|endoftext|>"), 3, 12)


@pytest.mark.parametrize("to", ["safetensors", "transformers", "released"])
def test_a_pair_travels_with_its_tokeniser(to: str, tmp_path: Path) -> None:
    text = TextConfig(width=16, depth=1, heads=2, hidden=24, vocab_size=50, max_text=12, end=4)
    with torch.device("meta"):
        model = LiT(LiTConfig(shape(28, 2), text, projection=20))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.image.fill_constants()
    model.tokenizer = clip_tokenizer()
    aimv2.save_pretrained(model, tmp_path / "m", to=to)
    loaded = aimv2.load_model(tmp_path / "m")
    assert torch.equal(loaded.encode_text(["a b", "b"]), model.eval().encode_text(["a b", "b"]))
    if to == "transformers":
        from transformers import AutoTokenizer

        assert AutoTokenizer.from_pretrained(tmp_path / "m").eos_token_id == 4


def test_save_pretrained_checks_first(tmp_path: Path) -> None:
    for model, to, more, said in (
        (encoder(), "tim", {}, "did you mean 'timm'"),
        (torch.nn.Linear(2, 2), "timm", {}, "a VisionEncoder, a LiT or an AIMv2 is expected, got Linear"),
        ("aimv2-large-patch14-224", "timm", {}, "got str"),
        (encoder(), "timm", {"precision": "int8"}, "precision and pixels are of to='openvino'"),
    ):
        with pytest.raises(UsageError, match=said):
            aimv2.save_pretrained(model, tmp_path / "out", to=to, **more)
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_of_no_run(tmp_path: Path) -> None:
    source = run(tmp_path / "run")
    aimv2.save_pretrained(build(shape(), DECODER, seed=9), source / "mine")
    assert "measured" not in body_of(source / "mine") and "Recipe" not in body_of(source / "mine")
