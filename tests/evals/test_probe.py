"""The verb on real folders: splits, choice, seeds, layers, baselines, resuming, and what is refused."""

import io
import json
import multiprocessing
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.commands.probe import ProbeOptions
from aimv2.data.images.labelled import subset
from aimv2.data.images.opening import open_labelled
from aimv2.data.images.readers import contents_of_rows
from aimv2.errors import UsageError
from aimv2.evals.probe import ProbeSettings, ProbeTrainer
from aimv2.evals.probe_result import ProbeWork, find_splits
from aimv2.evals.probe_stream import ImageStream
from aimv2.features.extraction import cached_features
from aimv2.features.frozen import Frozen, open_frozen
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.sizes import EncoderConfig
from aimv2.train.interrupt import Interrupted
from runs import write_processor

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def model_at(folder: Path, seed: int = 0) -> str:
    convert(build(EncoderConfig("tiny", 64, 6, 2, 96, 7, 28), None, seed=seed).eval(), folder, "safetensors")
    return str(folder)


def squares(folder: Path, split: str, count: int, seed: int) -> None:
    """``count`` images a class: noise around the class's colour."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / split / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(rng.normal(colour, 60, (30, 34, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_at(tmp_path_factory.mktemp("probe") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours: 16, 4 and 8 images a class."""
    folder = tmp_path_factory.mktemp("probe") / "colours"
    for seed, (split, count) in enumerate((("train", 16), ("val", 4), ("test", 8))):
        squares(folder, split, count, seed)
    return folder


QUICK = {"epochs": 8, "batch_size": 16, "rates": "1e-3,1e-2", "decays": "0.05,0.1", "refit": False}


def test_the_best_head_is_chosen_on_the_validation_split(model: str, data: Path, tmp_path: Path) -> None:
    broken = data / "test" / "red" / "0.png"
    kept = broken.read_bytes()
    broken.write_bytes(b"no image")
    try:
        result = api.probe(model, str(data), out=str(tmp_path / "out"), baselines="random,pixels", **QUICK)
    finally:
        broken.write_bytes(kept)
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    figures = result["figures"]
    assert figures["selected_on"] == "validation split" and len(figures["table"]) == 4
    best = max(figures["table"], key=lambda row: row["selection_top1"])
    assert figures["chosen"][0]["lr"] == best["lr"] and result["protocol"]["chosen_by"] == "best top-1"
    assert figures["top1"] >= 0.9 and figures["unreadable"] == 1
    confusion = np.array(figures["confusion"])
    assert confusion.sum() == 23 and confusion.trace() / 23 == pytest.approx(figures["top1"])
    low, high = figures["top1_interval"]
    assert low < figures["top1"] <= high
    assert figures["baselines"]["pixels"]["top1"] > 0.5 and set(figures["baselines"]) == {"random", "pixels"}
    assert result["model"]["unchanged"] is True and len(result["model"]["weights_sha256"]) == 64
    assert (result["data"]["train_images"], result["data"]["test_images"]) == (48, 24)
    assert list(figures["per_class"]) == ["blue", "green", "red"]


def test_seeds_layers_and_a_held_out_part(model: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = api.probe(
        model, str(data), layers="all", seeds="0,1", select="heldout", protocol="efficient", out=str(out), **QUICK
    )
    figures = result["figures"]
    assert list(figures["by_layer"]) == ["0", "1", "2", "3", "4", "last"]
    assert figures["selected_on"] == "6 training images, held out" and result["data"]["train_images"] == 42
    assert len(figures["top1_by_seed"]) == 2 and figures["interval"].startswith("95%, t")
    assert len(figures["table"]) == 6 * 4 and (out / "layers.png").stat().st_size > 1000
    measured = api.probe(model, str(data), layers="avg6,-2", select="test", **QUICK)
    assert measured["figures"]["selected_on"].startswith("test") and measured["data"]["train_images"] == 60, (
        "nothing is chosen on the validation split, so it is learnt from"
    )


def test_augmented_images_differ_by_epoch_and_train(model: str, data: Path) -> None:
    train = open_labelled(str(data), "train")
    assert train is not None
    stream = ImageStream(train, 28, 24, seed=0, workers=0)
    batches = [next(stream) for _ in range(4)]
    again = ImageStream(train, 28, 24, seed=0, workers=2)
    again.restore(2)
    third = next(again)
    again.close()
    assert np.array_equal(third.images, batches[2].images) and np.array_equal(third.labels, batches[2].labels)
    assert batches[0].images.shape == (24, 3, 28, 28)
    assert sorted(np.concatenate([batches[0].labels, batches[1].labels])) == sorted(train.labels)
    result = api.probe(model, str(data), features="augmented", workers=0, **{**QUICK, "epochs": 12})
    assert result["protocol"]["features"] == "augmented" and result["figures"]["top1"] > 0.6


def test_workers_where_python_would_not_fork(data: Path) -> None:
    """Python 3.14 and macOS start other processes by default, which can't be given memory in common."""
    train, before = open_labelled(str(data), "train"), multiprocessing.get_start_method()
    assert train is not None
    multiprocessing.set_start_method("spawn", force=True)
    stream = ImageStream(train, 28, 24, seed=0, workers=1)
    try:
        assert next(stream).images.shape == (24, 3, 28, 28)
    finally:
        stream.close()
        multiprocessing.set_start_method(before, force=True)


def test_stopped_and_gone_on_is_not_stopping(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {**QUICK, "seeds": "3", "refit": True}
    whole = api.probe(model, str(data), out=str(tmp_path / "a"), **words)
    real, calls = ProbeTrainer.train_step, []

    def stops(self: ProbeTrainer, batch: object) -> None:
        calls.append(1)
        if len(calls) == 11:
            signal.raise_signal(signal.SIGINT)
        real(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(ProbeTrainer, "train_step", stops)
    with pytest.raises(Interrupted, match=r"stopped at step 11, saved; go on with: aimv2"):
        api.probe(model, str(data), out=str(tmp_path / "b"), **words)
    parts = api.probe(model, str(data), out=str(tmp_path / "b"), **words)
    assert len(calls) == 8 * 3 + 8 * 3, "the sweep, and the best head again on all images"
    protocol = parts["protocol"]
    assert (protocol["refit_on"], protocol["refit_steps"]) == ("training and validation images", 8 * 3)
    assert parts["figures"] == whole["figures"]
    with pytest.raises(UsageError, match="evaluation with another settings"):
        api.probe(model, str(data), out=str(tmp_path / "b"), **{**words, "epochs": 9})


def test_a_cache_of_another_model_is_refused(model: str, data: Path, tmp_path: Path) -> None:
    train = open_labelled(str(data), "train")
    assert train is not None
    first = cached_features(open_frozen(model), train, folder=tmp_path / "features")
    again = cached_features(open_frozen(model), train, folder=tmp_path / "features")
    assert np.array_equal(first.features[0], again.features[0])
    other = open_frozen(model_at(tmp_path / "other", seed=1))
    with pytest.raises(UsageError, match="another model"):
        cached_features(other, train, folder=tmp_path / "features")


def test_verbs_share_a_cache(model: str, data: Path, tmp_path: Path) -> None:
    """Twice the same figures; the second verb runs no trunk; other layers, models, precisions live beside each other."""
    cache = str(tmp_path / "cache")
    first = api.knn(model, str(data), cache=cache, k="3")
    stamps = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.npy")}
    assert len(stamps) == 3  # train, val, test
    again = api.linear(model, str(data), cache=cache)
    assert {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.npy")} == stamps
    assert api.linear(model, str(data))["figures"]["top1"] == again["figures"]["top1"]
    half = api.knn(model, str(data), cache=cache, k="3", precision="bf16", layers="0,last", baselines="random,pixels")
    assert half["model"]["precision"] == "bf16" and abs(half["figures"]["top1"] - first["figures"]["top1"]) < 0.3
    assert len(list(Path(cache).rglob("*.npy"))) > 3
    with pytest.raises(UsageError, match="--precision fp8"):
        api.knn(model, str(data), precision="fp8")
    with pytest.raises(UsageError, match="device foo: can't be used here"):
        api.knn(model, str(data), device="foo")


def test_a_vision_model_of_transformers_is_measured_too(data: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    for name, theirs in (
        ("vit", ViTModel(ViTConfig(**common, intermediate_size=48))),
        ("dino", Dinov2Model(Dinov2Config(**common, mlp_ratio=2))),
    ):
        theirs.save_pretrained(tmp_path / name)
        write_processor(tmp_path / name)
        frozen = open_frozen(str(tmp_path / name))
        assert (frozen.kind, frozen.width, frozen.image_size, frozen.depth) == ("transformers", 32, 28, 2)
        pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
        first, block, last = frozen(pixels, ["0", "1", "last"])
        torch.testing.assert_close(block, last)  # the last block through the last norm
        torch.testing.assert_close(first.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)  # the other one too
    assert api.probe(str(tmp_path / "dino"), str(data), layers="all", **QUICK)["figures"]["top1"] > 0.4
    CLIPVisionModel(CLIPVisionConfig(**common, intermediate_size=48)).save_pretrained(tmp_path / "clip")
    write_processor(tmp_path / "clip")
    raw, last = open_frozen(str(tmp_path / "clip"))(pixels, ["1", "last"])  # whose last features have no norm either
    torch.testing.assert_close(raw, last)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"data": None}, "--data is missing"),
        ({"protocol": "attentiv"}, "did you mean 'attentive'"),
        ({"layers": "9"}, "--layers 9: last, all, avg6"),
        ({"rates": "a"}, "--rates a: numbers"),
        ({"rates": "0,1e-3"}, "--rates 0,1e-3: numbers, above 0"),
        ({"decays": "inf"}, "--decays inf: numbers"),
        ({"seeds": "1,0,1"}, "--seeds 1,0,1: the same number twice"),
        ({"seeds": "0.5"}, r"--seeds 0\.5: whole numbers"),
        ({"warmup": 8.0}, "--warmup 8: less than the 8 --epochs"),
        ({"warmup": -1.0}, "--warmup -1: at least 0"),
        ({"heads": 5}, "--heads 5 does not divide"),
        ({"select": "validation"}, "--select validation"),
        ({"image_size": 30}, "--image-size 30: .* patches of 7 px"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(options: dict, said: str, model: str, data: Path) -> None:
    with pytest.raises(UsageError, match=said):
        api.probe(model, **{"data": str(data), **QUICK, **options})


def test_a_cache_of_replaced_images_is_refused(model: str, data: Path, tmp_path: Path) -> None:
    """In any form of data: another image under the same name, of the same size in bytes too."""
    shutil.copytree(data, copy := tmp_path / "colours")
    cache = {"cache": str(tmp_path / "cache"), "k": "3"}
    first = api.knn(model, str(copy), **cache)["figures"]
    assert api.knn(model, str(copy), **cache)["figures"] == first
    file = copy / "test" / "red" / "0.png"
    file.write_bytes((copy / "test" / "blue" / "0.png").read_bytes())
    with pytest.raises(UsageError, match="replaced or changed"):
        api.knn(model, str(copy), **cache)


def test_contents_of_every_form_are_told(tmp_path: Path) -> None:
    import datasets

    def contents_of(data: Any) -> str:
        return contents_of_rows(data.image, np.arange(len(data.keys)))

    def marks(source: Path) -> tuple[str, str]:
        found = [open_labelled(str(source), "train"), open_labelled(str(source), "train")]
        assert found[0] is not None and found[1] is not None
        part = contents_of(subset(found[0], np.array([0])))
        assert contents_of(found[0]) == contents_of(found[1]) != "unknown"
        assert contents_of(subset(subset(found[0], np.array([1, 0])), np.array([1]))) == part
        return contents_of(found[0]), part

    (tmp_path / "tars").mkdir()
    tars = []
    for text in ("a", "b"):
        with tarfile.open(tmp_path / "tars" / "train-0.tar", "w") as tar:
            for number in range(2):
                for name, body in ((f"{number}.png", text.encode()), (f"{number}.cls", b"%d" % number)):
                    (about := tarfile.TarInfo(name)).size = len(body)
                    tar.addfile(about, io.BytesIO(body))
        tars.append(marks(tmp_path / "tars"))
    assert tars[0] != tars[1]
    for text in ("a", "b"):
        rows = {"image": [{"bytes": text.encode(), "path": None}] * 2, "label": [0, 1]}
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
        table.save_to_disk(str(tmp_path / text))
    assert marks(tmp_path / "a") != marks(tmp_path / "b")


def test_the_same_weights_under_another_name_share_a_cache(model: str, data: Path, tmp_path: Path) -> None:
    (other := tmp_path / "link").symlink_to(model)
    first = api.knn(model, str(data), cache=str(tmp_path / "cache"), k="3")
    again = api.knn(str(other), str(data), cache=str(tmp_path / "cache"), k="3")
    assert again["model"]["name"] == str(other) and again["figures"] == first["figures"]


def test_pixels_of_other_patches_are_other_features(data: Path, tmp_path: Path) -> None:
    """Two encoders of one input size share a cache; their pixels are averaged over patches of their own."""
    found, alone = [], []
    for patch in (7, 14):
        convert(
            build(EncoderConfig("tiny", 64, 1, 2, 96, patch, 28), None).eval(), tmp_path / str(patch), "safetensors"
        )
        words = {"baselines": "pixels", "k": "3", "test_limit": 9}
        shared = api.knn(str(tmp_path / str(patch)), str(data), cache=str(tmp_path / "cache"), **words)
        found.append(shared["figures"]["baselines"])
        alone.append(api.knn(str(tmp_path / str(patch)), str(data), **words)["figures"]["baselines"])
    assert found == alone
    assert {path.name for path in (tmp_path / "cache").glob("pixels-*")} == {"pixels-7-28-fp32", "pixels-14-28-fp32"}


def test_the_held_out_tenth_is_of_each_class(tmp_path: Path) -> None:
    """A class with few images is there where a head is chosen, and where it learns."""
    for split, counts in (("train", (40, 3, 12)), ("test", (1, 1, 1))):
        for name, count in zip(COLOURS, counts):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), COLOURS[name]).save(tmp_path / split / name / f"{number}.png")
    options = ProbeOptions(model="", data=str(tmp_path))
    splits, said, _ = find_splits(options, ProbeWork(ProbeSettings(), "auto", (0,), 0, 0, 8, 0))
    assert splits.select is not None and said == "6 training images, held out"
    assert np.bincount(splits.select.labels).tolist() == [4, 1, 1]
    assert np.bincount(splits.train.labels).tolist() == [36, 2, 11]
    assert not set(splits.select.keys) & set(splits.train.keys)


def test_a_file_of_openvino_is_hashed_again(model: str, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("openvino")
    folder = tmp_path / "ov"
    api.convert(model, str(folder), to="openvino")
    assert api.knn(str(folder), str(data), k="3", device="cpu")["model"]["unchanged"] is True
    (weights,) = folder.glob("*.bin")
    real = Frozen.__call__

    def spoils(self: Frozen, *args: Any) -> Any:
        found = real(self, *args)
        (other := tmp_path / "other.bin").write_bytes(bytes(100))
        other.replace(weights)  # the old one is still mapped
        return found

    monkeypatch.setattr(Frozen, "__call__", spoils)
    with pytest.raises(UsageError, match=r"MODEL .*/ov: its file .*\.bin changed meanwhile"):
        api.knn(str(folder), str(data), k="3", device="cpu")
