"""Each ablation is a value of the configuration: it trains the right terms and heads, and resumes exactly."""

import io
import json
import math
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors import safe_open

from aimv2.data.shards.format import write_shard
from runs import exact, metrics, resume, train

BOTH, TEXT, PIXEL = {"text", "pixel"}, {"text"}, {"pixel"}

# name: (options, terms that are trained, values of the decoder's config.json)
ABLATIONS = {
    "alpha-0": ({"objective__alpha": 0.0}, TEXT, {}),
    "alpha-0.2": ({"objective__alpha": 0.2}, BOTH, {}),
    "alpha-1": ({"objective__alpha": 1.0}, BOTH, {}),
    "image": ({"objective__targets": "image"}, PIXEL, {}),
    "text-prefix": ({"objective__targets": "text", "objective__attention": "prefix"}, TEXT, {}),
    "text-bidirectional": ({"objective__targets": "text", "objective__attention": "bidirectional"}, TEXT, {}),
    "separate": ({"model__decoder_separate": True}, BOTH, {"separate": True}),
    "narrow": (
        {"model__decoder_width": 16, "model__decoder_heads": 1, "model__decoder_hidden": 48},
        BOTH,
        {"width": 16, "heads": 1, "hidden": 48},
    ),
    "deep": ({"model__decoder_depth": 3}, BOTH, {"depth": 3}),
}
UNCHANGED = {"width": 32, "depth": 2, "heads": 2, "hidden": 64, "separate": False, "max_text": 77}
WEIGHTS = {"text": 1.0, "pixel": 0.4}  # of the two terms in the loss, where the options do not say otherwise


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run of an ablation, trained once: name -> run folder."""
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("whole") / name
            train(data, runs[name], train__steps=3, **ABLATIONS[name][0])
        return runs[name]

    return run


def trained(run, step=3):
    """The model of a run: its decoder's config, its weights by name, its folder."""
    folder = run / "checkpoints" / f"step-{step:07d}" / "model"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    return SimpleNamespace(
        decoder=json.loads((folder / "config.json").read_text())["decoder"], shapes=shapes, folder=folder
    )


@pytest.mark.parametrize("name", ABLATIONS)
def test_terms_of_the_metrics(whole, name):
    given, terms, _ = ABLATIONS[name]
    lines = metrics(whole(name))
    steps = [line for line in lines if "loss" in line]
    (validation,) = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    weights = WEIGHTS | ({"pixel": 1.0} if terms == PIXEL else {})
    weights |= {"pixel": given["objective__alpha"]} if "objective__alpha" in given else {}
    for line in steps:
        assert all(math.isfinite(value) for value in line.values()), line
        assert {key for key in line if key.endswith("_loss")} == {f"{term}_loss" for term in terms}
        assert line["loss"] == pytest.approx(sum(weights[term] * line[f"{term}_loss"] for term in terms))
        assert line["grad_norm"] > 0
    losses = {key for key in validation if key in ("val_text_loss", "val_pixel_loss")}
    assert losses == {f"val_{term}_loss" for term in terms}
    assert all(math.isfinite(value) for value in validation.values()), validation
    assert ("val_perplexity" in validation) == ("text" in terms)
    assert any(key.startswith("val_pixel_loss_") for key in validation) == ("pixel" in terms)


@pytest.mark.parametrize("name", ABLATIONS)
def test_heads_of_the_checkpoint(whole, name):
    _, terms, shape = ABLATIONS[name]
    model = trained(whole(name))
    expected = UNCHANGED | shape | {"text": "text" in terms, "pixels": "pixel" in terms}
    assert {key: model.decoder[key] for key in expected} == expected
    width = expected["width"]
    heads = {key: value for key, value in model.shapes.items() if "_head" in key}
    wanted = {"decoder.text_head.linear.weight": (300, width)} if "text" in terms else {}
    wanted |= {"decoder.pixel_head.weight": (3 * 8 * 8, width)} if "pixel" in terms else {}
    assert heads == wanted
    trunks = {
        trunk: len({key.split(".")[3] for key in model.shapes if key.startswith(f"decoder.{trunk}.blocks.")})
        for trunk in ("trunk", "pixel_trunk")
    }
    depth = expected["depth"]
    assert trunks == {
        "trunk": depth if "text" in terms else 0,
        "pixel_trunk": depth if expected["separate"] or terms == PIXEL else 0,
    }
    assert model.shapes["decoder.project.weight"] == (width, 32)
    has_tokenizer = (model.folder / "tokenizer.json").exists()
    assert has_tokenizer == ("text" in terms)


@pytest.mark.parametrize("name", ABLATIONS)
def test_resumed_run_equals_an_undisturbed_one(data, whole, tmp_path, name):
    train(data, tmp_path / "parts", train__steps=3, train__stop_at=2, **ABLATIONS[name][0])
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2]
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(whole(name))
    weights = [trained(run).folder / "model.safetensors" for run in (tmp_path / "parts", whole(name))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def first(run):
    return metrics(run)[0]


def test_alpha_weighs_the_pixel_loss_and_nothing_else(whole):
    less, more = first(whole("alpha-0.2")), first(whole("alpha-1"))
    for key in ("text_loss", "pixel_loss"):
        assert less[key] == more[key], "the first step sees the same weights and pairs"
    assert more["loss"] - less["loss"] == pytest.approx(0.8 * less["pixel_loss"])
    assert less["grad_norm"] != more["grad_norm"]


def test_attention_of_the_encoder_changes_what_captions_see(whole):
    prefix, full = first(whole("text-prefix")), first(whole("text-bidirectional"))
    assert prefix["text_loss"] != full["text_loss"]
    assert prefix["text_loss"] == pytest.approx(full["text_loss"], rel=0.05)  # same weights, same captions
    assert exact(whole("text-prefix")) == exact(whole("alpha-0")), "alpha 0 is text alone"


def test_images_alone_need_neither_captions_nor_a_tokenizer(tmp_path):
    samples = []
    for number in range(40):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (6 * number, 255 - 6 * number, 90)).save(file, "PNG")
        samples.append((f"k{number}", {"png": file.getvalue()}))
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train-000000.tar", samples)
    run = tmp_path / "run"
    nowhere = str(tmp_path / "no tokenizer")
    train(tmp_path / "data", run, objective__targets="image", data__tokenizer=nowhere, train__steps=3, train__stop_at=2)
    result = resume(run)
    assert result["step"] == 3 and not any("text" in key or "caption" in key for key in result)
    assert [line["step"] for line in metrics(run) if math.isfinite(line["pixel_loss"])] == [1, 2, 3]
    assert not list(run.rglob("tokenizer*"))
