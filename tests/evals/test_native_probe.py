"""Measuring at native: every image at its own size, batches of mixed sizes equal to one image at a time, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api, image_transform
from aimv2.cli import main
from aimv2.data.images.opening import open_labelled
from aimv2.errors import UsageError
from aimv2.evals.probe import from_cache, predict
from aimv2.evals.probe_stream import FeatureStream
from aimv2.features import frozen as frozen_module
from aimv2.features.extraction import Cached, cached_features
from aimv2.features.frozen import Frozen, default_side, open_frozen, packed_rows, raw_pixels
from aimv2.features.ragged import Ragged, RaggedWriter, open_ragged
from aimv2.interop.convert import convert
from aimv2.interop.load import load_model
from aimv2.models.create import build
from aimv2.models.probe_head import AttentiveProbe, EfficientProbe, ProbeSweep, Trial
from aimv2.models.sizes import EncoderConfig

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}
SIZES = [(16, 16), (33, 18), (12, 44), (80, 60), (9, 9), (20, 5)]  # pixels, width x height
PATCH, LOW, HIGH = 4, 4, 64


def write(folder: Path, image_size: int | None, pool_heads: int = 0) -> str:
    shape = EncoderConfig(
        "tiny", 32, 6, 2, 48, PATCH, image_size, min_patches=LOW, max_patches=HIGH, pool_heads=pool_heads
    )
    convert(build(shape, None, seed=0).eval(), folder, "safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("native") / "m", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours, images of six sizes: 12, 6 and 6 images a class."""
    folder = tmp_path_factory.mktemp("native") / "sizes"
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                width, height = SIZES[number % len(SIZES)]
                pixels = np.clip(rng.normal(colour, 60, (height, width, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def grid_of(frozen: Frozen, width: int, height: int) -> tuple[int, int]:
    """Columns and rows of what the encoder is shown."""
    _, high, wide = frozen.see(picture(width, height)).shape
    assert high % PATCH == wide % PATCH == 0
    return wide // PATCH, high // PATCH


def test_each_image_is_seen_whole_at_its_own_size(model: str) -> None:
    frozen = open_frozen(model, image_size="native")
    assert frozen.image_size == "native"
    assert grid_of(frozen, 24, 16) == (6, 4)  # whole patches already: not a pixel is touched
    assert np.array_equal(frozen.see(picture(24, 16)), np.asarray(picture(24, 16)).transpose(2, 0, 1))
    assert grid_of(frozen, 26, 17) == (6, 4)  # to the nearest whole patch
    assert grid_of(frozen, 5, 4) == (2, 2)  # too small: up to the fewest patches
    columns, rows = grid_of(frozen, 800, 200)  # too large: down to the most patches
    assert (columns, rows) == (16, 4)
    for width, height in SIZES:
        wanted = image_transform(frozen.module)(picture(width, height))
        assert np.array_equal(frozen.see(picture(width, height)), wanted)


@pytest.mark.parametrize("layers", [["last"], ["2", "avg6", "last"]])
def test_a_batch_of_mixed_sizes_equals_one_at_a_time(
    model: str, layers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "__defaults__", (60,))  # several rows
    frozen = open_frozen(model, image_size="native")
    images = [torch.from_numpy(frozen.see(picture(*size))) for size in SIZES]
    assert len(list(packed_rows(images, PATCH))) > 1
    together = frozen.each(images, layers)
    encoder = frozen.module
    for number, image in enumerate(images):
        alone = frozen.each([image], layers)
        with torch.no_grad():
            wanted, blocks = encoder(image[None], layers=list(range(6)))  # type: ignore[misc]
        for name, kept, one in zip(layers, together, alone, strict=True):
            assert kept[number].shape == ((image.shape[1] // PATCH) * (image.shape[2] // PATCH), 32)
            torch.testing.assert_close(kept[number], one[0], rtol=1e-4, atol=1e-5)
            if name == "avg6":
                torch.testing.assert_close(kept[number], torch.stack(blocks).mean(0)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[layers.index("last")][number], wanted[0], rtol=1e-4, atol=1e-5)


def test_rows_hold_what_fits() -> None:
    images = [torch.zeros(3, PATCH, PATCH * count) for count in (3, 4, 9, 1, 1, 1)]
    found = [[image.shape[2] // PATCH for image in row] for row in packed_rows(images, PATCH, 7)]
    assert found == [[3, 4], [9], [1, 1, 1]]
    assert frozen_module.ROW >= 4096


@pytest.mark.parametrize("pool", ["mean", "attention", "none"])
def test_features_of_a_folder_equal_each_image_s_own(data: Path, tmp_path: Path, pool: str) -> None:
    frozen = open_frozen(write(tmp_path / "m", None, 2 if pool == "attention" else 0), image_size="native")
    split = open_labelled(str(data), "train")
    assert split is not None
    found = cached_features(frozen, split, pool=pool, batch_size=7, folder=tmp_path / "cache")
    again = cached_features(frozen, split, pool=pool, folder=tmp_path / "cache")  # read, not computed
    head = getattr(frozen.module, "head", None)
    for number in range(0, len(split.labels), 5):
        (tokens,) = frozen.each([torch.from_numpy(frozen.see(split.image(number)))])[0]
        if pool == "attention":
            with torch.no_grad():
                wanted = head(tokens[None])[0]  # type: ignore[misc]
        else:
            wanted = tokens.mean(0) if pool == "mean" else tokens.half()
        got = torch.from_numpy(np.array(found.features[0][number]))
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-3 if pool == "none" else 1e-5)
        assert np.array_equal(again.features[0][number], found.features[0][number])
    with pytest.raises(UsageError, match="another view") as error:
        cached_features(open_frozen(str(tmp_path / "m")), split, pool=pool, folder=tmp_path / "cache")
    assert (error.value.option, error.value.code) == ("--cache", "mismatch")


def test_an_interrupted_pass_goes_on(model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aimv2.features.extraction.PART_BATCHES", 1)
    frozen, split = open_frozen(model, image_size="native"), open_labelled(str(data), "train")
    assert split is not None
    whole = cached_features(frozen, split, ["2", "last"], "none", tmp_path / "whole", 5)
    real, calls = RaggedWriter.append, []

    def stops(self: RaggedWriter, found: list[list[np.ndarray]]) -> None:
        real(self, found)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # the rows are written, the note is not

    monkeypatch.setattr(RaggedWriter, "append", stops)
    with pytest.raises(KeyboardInterrupt):
        cached_features(frozen, split, ["2", "last"], "none", tmp_path / "parts", 5)
    parts = cached_features(frozen, split, ["2", "last"], "none", tmp_path / "parts", 5)
    for left, right in zip(whole.features, parts.features, strict=True):
        assert len(left) == len(right) == 36
        assert np.array_equal(left.rows, right.rows) and np.array_equal(left.starts, right.starts)


def ragged(folder: Path, lengths: list[int], layers: list[str]) -> list[Ragged]:
    rng = np.random.default_rng(3)
    folder.mkdir()
    writer = RaggedWriter(folder, layers, 24, len(lengths), 0)
    images = [[rng.normal(size=(count, 24)).astype(np.float16) for count in lengths] for _ in layers]
    writer.append([layer[:2] for layer in images])
    writer.append([layer[2:] for layer in images])
    writer.flush()
    found = open_ragged(folder, layers, 24, len(lengths))
    for layer, wanted in zip(found, images):
        assert [np.array_equal(layer[at], wanted[at]) for at in range(len(lengths))] == [True] * len(lengths)
    return found


@pytest.mark.parametrize("protocol", ["attentive", "efficient"])
def test_a_sweep_on_images_of_different_lengths_equals_each_probe_alone(tmp_path: Path, protocol: str) -> None:
    """Values and gradients, against the plain probe on one image at a time; the batch norm sees real tokens alone."""
    lengths = [5, 1, 9, 4]
    layers = ragged(tmp_path / "rows", lengths, ["a", "b"])
    torch.manual_seed(0)
    trials = [Trial(layer, 1e-3, 0.1) for layer in ("a", "b") for _ in range(2)]
    sweep = ProbeSweep(24, 3, trials, protocol, heads=4).eval()
    for norm in sweep.norms:
        norm.running_mean.normal_()  # type: ignore[operator,union-attr]
        norm.running_var.uniform_(0.5, 2.0)  # type: ignore[operator,union-attr]
    batch = next(FeatureStream([layers], np.arange(4) % 3, 4, seed=0))
    assert batch.features.shape == (2, 19, 24) and sorted(batch.image_len.tolist()) == sorted(lengths)  # type: ignore[union-attr]
    got = sweep(batch)  # rows in the file's order
    got.square().sum().backward()
    for g, trial in enumerate(trials):
        kind = AttentiveProbe if protocol == "attentive" else EfficientProbe
        single = kind(24, 3, 4).eval()
        own = sweep.norms[sweep.layers.index(trial.layer) if protocol == "attentive" else g]
        single.load_state_dict({**single.state_dict(), **sweep.heads[g].state_dict()})
        single.norm.load_state_dict(own.state_dict())  # type: ignore[union-attr]
        layer = layers[sweep.layers.index(trial.layer)]
        wanted = torch.cat([single(torch.from_numpy(np.array(layer[at])).float()[None]) for at in range(4)])
        torch.testing.assert_close(got[g], wanted, rtol=1e-4, atol=1e-5)
        wanted.square().sum().backward()
        for left, right in zip(sweep.heads[g].parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-5)
    cached = Cached(layers, np.arange(4) % 3, list("abcd"), [])
    assert np.array_equal(predict(sweep, from_cache(cached, 3)), got.detach().argmax(-1).numpy())


def test_batch_norm_sees_real_tokens_alone(tmp_path: Path) -> None:
    (layer,) = ragged(tmp_path / "rows", [5, 1, 9, 4], ["a"])
    sweep = ProbeSweep(24, 3, [Trial("a", 1e-3, 0.1)], heads=4).train()
    sweep(next(FeatureStream([[layer]], np.arange(4) % 3, 4, seed=0)))
    mean = torch.from_numpy(np.array(layer.rows)).float().mean(0)
    torch.testing.assert_close(sweep.norms[0].running_mean, 0.1 * mean)


@pytest.mark.parametrize("verb", ["knn", "linear", "fewshot", "probe"])
def test_verbs_run_at_native_on_images_of_several_sizes(model: str, data: Path, tmp_path: Path, verb: str) -> None:
    options = {
        "knn": {"k": "1,3"},
        "linear": {"solver": "sgd"},
        "fewshot": {"shots": "1,3", "seeds": 2},
        "probe": {
            "epochs": 4,
            "batch_size": 12,
            "rates": "1e-2",
            "decays": "0.1",
            "flip": True,
        },
    }[verb]
    measured = getattr(api, verb)
    result = measured(
        model, str(data), image_size="native", out=str(tmp_path / "out"), baselines="random,pixels", **options
    )
    assert result["model"]["image_size"] == "native" and result["model"]["unchanged"] is True
    assert result["figures"]["baselines"]["pixels"]["top1"] > 0.5  # three colours
    assert result["figures"]["top1"] > 1 / 3
    squares = measured(model, str(data), image_size=16, out=str(tmp_path / "squares"), **options)
    assert squares["model"]["image_size"] == 16


def test_the_command_line_takes_a_number_or_the_word(
    model: str, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for given, wanted in (("native", "native"), ("16", 16)):
        assert main(["knn", model, "--data", str(data), "--k", "3", "--image-size", given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["image_size"] == wanted
    fixed = write(tmp_path / "fixed", 16)
    for verb, name, given, said in (
        ("knn", fixed, "native", "has a fixed grid and takes only 16 px"),
        ("probe", fixed, "native", "has a fixed grid and takes only 16 px"),
        ("knn", model, "nativ", "--image-size nativ: pixels a side, or native"),
        ("knn", model, "0", "--image-size 0: pixels a side, or native"),
        ("knn", model, "40", "--image-size 40: tiny takes 4 to 64 patches"),
        ("segment", model, "native", "--image-size native: maps are of one size"),
    ):
        assert main([verb, name, "--data", str(data), "--image-size", given]) == 2
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1 and said in complaint
    words = ["probe", model, "--data", str(data), "--image-size", "native", "--features", "augmented"]
    assert main(words) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and "--features cached" in complaint


def test_squares_of_a_native_model_are_within_its_range(model: str) -> None:
    assert open_frozen(model).image_size == 32  # 64 patches, the nearest to 224 px
    shape = EncoderConfig("native", 32, 2, 2, 48, 14, None)
    assert default_side(shape) == 224
    assert default_side(EncoderConfig("native", 32, 2, 2, 48, 56, None, min_patches=30)) == 56 * 6


def test_pixels_at_native_are_the_patches(model: str) -> None:
    pixels = raw_pixels(open_frozen(model, image_size="native"))
    image = torch.from_numpy(pixels.see(picture(33, 18)))
    (found,) = pixels.each([image, image[:, :, :8]])
    assert [tuple(x.shape) for x in found] == [(8 * 4, 48), (2 * 4, 48)]


def test_a_fixed_model_at_another_size_has_interpolated_positions(data: Path, tmp_path: Path) -> None:
    fixed = write(tmp_path / "fixed", 16)
    wider = open_frozen(fixed, image_size=32)
    assert wider.image_size == 32 and wider.sha256 != open_frozen(fixed).sha256
    by_hand = load_model(fixed)
    by_hand.set_image_size(32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(wider(images)[0], by_hand(images))
    result = api.knn(fixed, str(data), k="3", image_size=32)
    assert result["model"]["image_size"] == 32 and result["model"]["unchanged"] is True
    with pytest.raises(UsageError, match=r"--image-size 30: .* has patches of 4 px; a multiple"):
        open_frozen(fixed, image_size=30)
