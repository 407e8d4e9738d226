"""Linear probes on patch maps: figures by hand and by scikit-learn, heads at once and one by one, folders as people have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.cli import main
from aimv2.data.images.maps import depths, masks, nearest_map, open_pairs, scan_maps
from aimv2.errors import UsageError
from aimv2.evals import dense_heads
from aimv2.evals.dense import depth_task
from aimv2.evals.dense_heads import (
    DenseSettings,
    Depth,
    Segmentation,
    depth_sums,
    likeliest,
    output_gradient,
    sums_of,
    train_heads,
    upsample,
)
from aimv2.features.fingerprint import weights_hash
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.dpt_head import DptHead
from aimv2.models.sizes import EncoderConfig

CPU = torch.device("cpu")
COLOURS = np.array([[20, 20, 20], [230, 30, 30], [30, 60, 230]], dtype=np.uint8)


def model_at(folder: Path, image_size: int | None = 56) -> torch.nn.Module:
    config = EncoderConfig("tiny", 32, 3, 2, 48, 7, image_size, min_patches=4, max_patches=100)
    model = build(config, None, seed=0).eval()
    convert(model, folder, "safetensors")
    return model


def shapes(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """uint8 images [64, 48, 3] of two coloured rectangles on dark ground, and class ids [64, 48]."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        ids = np.zeros((64, 48), np.uint8)
        for one in rng.permutation([1, 2]):
            top, left = rng.integers(0, 30), rng.integers(0, 20)
            ids[top : top + rng.integers(16, 34), left : left + rng.integers(14, 28)] = one
        noise = rng.integers(-15, 16, (64, 48, 3))
        out.append((np.clip(COLOURS[ids] + noise, 0, 255).astype(np.uint8), ids))
    return out


def draw(
    root: Path,
    train: tuple[str, str],
    val: tuple[str, str] | None,
    to_map: Callable[[np.ndarray], np.ndarray] = lambda ids: ids,
    counts: tuple[int, int] = (24, 8),
) -> Path:
    """Images (JPEG in training, PNG in test) and maps under the named folders."""
    for place, count, seed, end in ((train, counts[0], 1, "jpg"), (val, counts[1], 2, "png")):
        if place is None:
            continue
        for part in place:
            (root / part).mkdir(parents=True, exist_ok=True)
        for number, (image, ids) in enumerate(shapes(count, seed)):
            Image.fromarray(image).save(root / place[0] / f"{seed}_{number:02}.{end}", quality=95)
            Image.fromarray(to_map(ids)).save(root / place[1] / f"{seed}_{number:02}.png")
    return root


def metres_of(ids: np.ndarray) -> np.ndarray:
    """1, 2.5 and 4 m by colour, in millimetres; the first row has no value."""
    depth = np.array([4000, 1000, 2500], np.uint16)[ids]
    depth[0] = 0
    return depth


SPLIT = ("train/images", "train/masks"), ("val/images", "val/masks")
DEPTH_SPLIT = ("train/images", "train/depth"), ("val/images", "val/depth")
QUICK: dict[str, Any] = {"epochs": 25, "batch_size": 8, "rates": "1e-5,1e-2"}


# ---- figures ----

TRUE = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 1, 1, -1], [0, 0, 1, 1, 3], [2, 2, 2, 2, 3], [2, 2, 2, 2, 3]])
SAID = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 1, 1, 0], [0, 0, 1, 1, 3], [2, 2, 2, 0, 0], [2, 2, 2, 2, 0]])


def test_miou_is_a_hand_count() -> None:
    task = Segmentation(6)
    low = torch.nn.functional.one_hot(SAID, 6).permute(2, 0, 1).float()
    sums = task.tally(low, TRUE.short())
    figures = task.figures(sums)
    # class 0: 5 right, 1 missed, 4 of others' pixels; 1: 5, 1, 1; 2: 7, 1, 0 (the ignored pixel said 2 does not count);
    # 3: 1, 2, 0; 4 and 5 are neither there nor said
    assert figures["per_class_iou"] == [5 / 10, 5 / 7, 7 / 8, 1 / 3, None, None]
    assert figures["miou"] == pytest.approx((5 / 10 + 5 / 7 + 7 / 8 + 1 / 3) / 4, abs=1e-12)
    assert figures["pixel_accuracy"] == pytest.approx(18 / 23, abs=1e-12)
    assert sums.sum() == 23 and sums[3, 0] == 2


def test_a_split_is_summed_before_it_is_divided_and_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    task, sums, true, said = Segmentation(7), 0, [], []
    for size in ((9, 5), (4, 4), (12, 7)):
        low, target = torch.randn(7, 3, 3, generator=rng), torch.randint(-1, 5, size, generator=rng)
        low[6] -= 100  # never predicted, never there
        sums = sums + task.tally(low, target.short())
        true += target[target >= 0].tolist()
        said += likeliest(low, size)[target >= 0].tolist()
    figures = task.figures(sums)
    assert figures["miou"] == pytest.approx(metrics.jaccard_score(true, said, average="macro"), abs=1e-12)
    wanted = metrics.jaccard_score(true, said, average=None, labels=range(6))
    np.testing.assert_allclose(figures["per_class_iou"][:6], wanted)
    assert figures["per_class_iou"][6] is None
    assert figures["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(true, said), abs=1e-12)


def test_depth_figures_are_a_hand_count() -> None:
    sums = depth_sums(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 2.2, 4.0]))
    figures = Depth(0, 1, 1, 5).figures(sums + depth_sums(torch.tensor([3.0]), torch.tensor([1.5])))
    assert figures["rmse"] == pytest.approx(((0.04 + 1 + 2.25) / 4) ** 0.5, abs=1e-6)
    assert figures["abs_rel"] == pytest.approx((0.2 / 2.2 + 0.25 + 1) / 4, abs=1e-6)
    assert figures["delta1"] == 2 / 4  # 5 / 4 is not below 1.25
    task = Depth(mean=2.0, std=0.5, low=1.0, high=3.0)
    outputs = torch.tensor([[[-4.0, 2.0], [8.0, 0.0]]])  # 0, 3, 6, 2 m: kept within 1 to 3
    got = task.tally(outputs, torch.tensor([[1.0, 3.0], [3.0, 0.0]]))
    np.testing.assert_array_equal(got, [3, 0, 0, 3])


def test_classes_of_a_large_map_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    low = torch.randn(11, 4, 4, generator=torch.Generator().manual_seed(1))
    wanted = upsample(low[None], (13, 9))[0].argmax(0)
    monkeypatch.setattr(dense_heads, "BUDGET", 3 * 13 * 9)
    assert torch.equal(likeliest(low, (13, 9)), wanted)
    assert torch.equal(likeliest(low - 1000, (13, 9)), wanted)


# ---- heads ----


def separable(count: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float16 features [N, 16, 6] around a class's own point on a 4 x 4 grid, and ids [N, 16, 16]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3, (count, 4, 4))
    centres = np.array([[3, 0, 0, 1, 0, 0], [0, 3, 0, 0, 1, 0], [0, 0, 3, 0, 0, 1]], np.float32)
    x = centres[ids] + rng.normal(0, 0.2, (count, 4, 4, 6))
    return x.reshape(count, 16, 6).astype(np.float16), ids.repeat(4, 1).repeat(4, 2).astype(np.int16)


def test_separable_features_reach_all_of_it() -> None:
    """At the patches' own size, where no pixel lies between two classes; features in two layers."""
    features, ids = separable()
    low = np.ascontiguousarray(ids[:, ::4, ::4])
    task, layers = Segmentation(3), [features[..., :4], features[..., 4:]]
    settings = DenseSettings(rates=(1e-5, 3e-2), epochs=40, batch_size=8)
    heads = train_heads(task, layers, lambda rows: low[rows], np.arange(30), settings, 0, CPU)
    sums = sums_of(task, heads, [0, 1], layers, lambda row: low[row], np.arange(30, 40), CPU)
    mious = [task.figures(part)["miou"] for part in sums]
    assert mious[1] == 1.0 and mious[0] < 0.9


def test_a_linear_map_is_found() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(60, 9, 5)).astype(np.float16)
    low = features.astype(np.float32) @ np.array([0.5, -0.3, 0.2, 0, 0.1], np.float32) + 5
    maps = upsample(torch.from_numpy(low.reshape(60, 1, 3, 3)), (12, 12))[:, 0].numpy()
    maps[:, 0] = 0  # no value there: the metres 0 must not be learned
    task = depth_task(maps[:50])
    assert task is not None and task.mean == pytest.approx(maps[:50][maps[:50] > 0].mean(), rel=1e-5)
    assert task.std == pytest.approx(maps[:50][maps[:50] > 0].std(), rel=1e-4)
    settings = DenseSettings(rates=(3e-2,), epochs=150, batch_size=10, weight_decay=0.0)
    heads = train_heads(task, [features], lambda rows: maps[rows], np.arange(50), settings, 0, CPU)
    (sums,) = sums_of(task, heads, [0], [features], lambda row: maps[row], np.arange(50, 60), CPU)
    figures = task.figures(sums)
    assert sums[0] == 10 * 11 * 12
    assert figures["rmse"] < 0.03 and figures["abs_rel"] < 0.01 and figures["delta1"] == 1.0, figures
    assert task.std > 0.3  # what predicting the mean would give


def test_heads_at_once_are_heads_one_by_one() -> None:
    features, ids = separable(12)
    rates = (1e-4, 1e-3, 1e-2)

    def heads_of(chosen: tuple[float, ...]) -> dense_heads.DenseHeads:
        settings = DenseSettings(rates=chosen, epochs=4, batch_size=5, weight_decay=0.1)
        return train_heads(Segmentation(3), [features], lambda rows: ids[rows], np.arange(12), settings, 7, CPU)

    together = heads_of(rates)
    for place, rate in enumerate(rates):
        alone = heads_of((rate,))
        torch.testing.assert_close(together.weights[place], alone.weights[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.biases[place], alone.biases[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.norm.running_var, alone.norm.running_var)
    assert (together.weights[0] - together.weights[2]).abs().max() > 0.01


def test_gradient_in_parts_is_each_heads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through the plain mean of one head."""
    rng = torch.Generator().manual_seed(0)
    low, target = torch.randn(3, 4, 5, 2, 2, generator=rng), torch.randint(-1, 5, (4, 8, 8), generator=rng).short()
    wanted = []
    for head in low:
        leaf = head.clone().requires_grad_()
        torch.nn.functional.cross_entropy(upsample(leaf, (8, 8)), target.long(), ignore_index=-1).backward()
        wanted.append(leaf.grad)
    for budget in (2**22, 5 * 8 * 8 * 3):
        monkeypatch.setattr(dense_heads, "BUDGET", budget)
        torch.testing.assert_close(output_gradient(Segmentation(5), low, target), torch.stack(wanted))


# ---- folders ----


def test_forms_of_folders(tmp_path: Path) -> None:
    few = (3, 2)
    forms = [
        draw(tmp_path / "a", *SPLIT, counts=few),
        draw(tmp_path / "b", ("images/training", "annotations/training"), ("images/validation", "annotations/validation"),
             counts=few),
        draw(tmp_path / "c", ("images/train", "labels/train"), ("images/val", "labels/val"), counts=few),
    ]  # fmt: skip
    for root in forms:
        train, test, name = open_pairs(str(root), masks())
        assert [pair.key for pair in train] == ["1_00.jpg", "1_01.jpg", "1_02.jpg"]
        assert [pair.key for pair in test] == ["2_00.png", "2_01.png"]
        assert name == ("validation" if root.name == "b" else "val")
        assert test[1].map.name == "2_01.png" and test[1].map != test[1].image


def test_flat_folders_are_cut(tmp_path: Path) -> None:
    root = draw(tmp_path, ("images/deep", "masks/deep"), None, counts=(10, 0))
    with pytest.raises(UsageError, match="no test split there; --val-fraction"):
        open_pairs(str(root), masks())
    first = open_pairs(str(root), masks(), val_fraction=0.3)
    assert (len(first[0]), len(first[1])) == (7, 3) and first == open_pairs(str(root), masks(), val_fraction=0.3)
    assert not {pair.key for pair in first[0]} & {pair.key for pair in first[1]}
    (root / "val.txt").write_text("deep/1_03\n\ndeep/1_07.jpg\n")
    train, test, name = open_pairs(str(root), masks())
    assert [pair.key for pair in test] == ["deep/1_03.jpg", "deep/1_07.jpg"] and len(train) == 8
    assert name == "listed in val.txt"
    (tmp_path / "other.txt").write_text("deep/1_99\n")
    with pytest.raises(UsageError, match="'deep/1_99' is the name of no image"):
        open_pairs(str(root), masks(), str(tmp_path / "other.txt"))
    with pytest.raises(UsageError, match="both cut the test split"):
        open_pairs(str(root), masks(), str(tmp_path / "other.txt"), 0.5)
    with pytest.raises(UsageError, match="none is left for training"):
        open_pairs(str(root), masks(), val_fraction=0.99)
    with pytest.raises(UsageError, match=r"--val-fraction 1\.5: 0 to 1"):
        open_pairs(str(root), masks(), val_fraction=1.5)


def test_values_of_masks_and_depths(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 150], [255, 2, 0]], np.uint8)
    grey, palette, deep = (tmp_path / f"{name}.png" for name in ("l", "p", "d"))
    Image.fromarray(ids).save(grey)
    coloured = Image.fromarray(ids).convert("P")
    coloured.putdata(ids.ravel().tolist())
    coloured.save(palette)
    for file in (grey, palette):
        np.testing.assert_array_equal(masks().read(file), [[0, 1, 150], [-1, 2, 0]])
        np.testing.assert_array_equal(masks(150).read(file), [[0, 1, -1], [255, 2, 0]])
        np.testing.assert_array_equal(masks(255, True).read(file), [[-1, 0, 149], [-1, 1, -1]])
    Image.fromarray(np.array([[0, 1500], [65535, 250]], np.uint16)).save(deep)
    np.testing.assert_array_equal(depths(500, (0,)).read(deep), np.array([[0, 3], [131.07, 0.5]], np.float32))
    values = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(nearest_map(values, 2), [[7, 10], [19, 22]])
    np.testing.assert_array_equal(nearest_map(values[:2, :2], 4), [[0, 0, 1, 1]] * 2 + [[6, 6, 7, 7]] * 2)


def test_an_upright_image_is_compared(tmp_path: Path) -> None:
    """A photograph that is stored lying (EXIF) has a mask of its upright size."""
    root = draw(tmp_path, *SPLIT, counts=(2, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(shapes(1, 1)[0][0].transpose(1, 0, 2)).save(root / "train/images/1_00.jpg", exif=exif)
    scan = scan_maps(open_pairs(str(root), masks())[0], masks(), 8, tmp_path / "maps.npy")
    assert scan.maps is not None and scan.maps.shape == (2, 8, 8) and scan.largest[0] == 2 and scan.empty == 0


# ---- verbs ----


def test_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_at(tmp_path / "m")
    before = weights_hash(model)
    root = draw(tmp_path / "data", *SPLIT)
    (root / "train/images/1_03.jpg").write_bytes(b"no image")
    words = ["segment", str(tmp_path / "m"), "--data", str(root), "--baselines", "random,pixels", "--json"]
    options = ["--epochs", "25", "--batch-size", "8", "--rates", "1e-5,1e-2", "--out", str(tmp_path / "out")]
    assert main([*words, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out/result.json").read_text())
    figures = result["figures"]
    assert (result["verb"], result["data"]["classes"], result["data"]["train_images"]) == ("segment", 3, 24)
    assert figures["miou"] > 0.6 and figures["pixel_accuracy"] > 0.8 and len(figures["per_class_iou"]) == 3, figures
    assert figures["miou"] == pytest.approx(np.mean(figures["per_class_iou"]))
    assert figures["chosen"] == [1e-2] and [row["rate"] for row in figures["table"]] == [1e-5, 1e-2]
    assert figures["table"][1]["held_out_miou"] > figures["table"][0]["held_out_miou"]
    assert figures["selected_on"] == "2 training images, held out"
    assert [line["key"] for line in figures["unreadable"]["train"]] == ["1_03.jpg"]
    assert figures["baselines"]["pixels"]["miou"] > 0.5
    assert figures["baselines"]["random"]["miou"] == figures["miou"]  # the model is untrained, drawn with the same seed
    assert result["model"]["unchanged"] and result["model"]["weights_sha256"] == before
    again = api.segment(str(tmp_path / "m"), str(root), out=str(tmp_path / "out"), **QUICK)
    assert again["figures"]["miou"] == figures["miou"] and "baselines" not in again["figures"]


def test_layers_seeds_and_a_native_model(tmp_path: Path) -> None:
    model_at(tmp_path / "native", None)
    root = draw(tmp_path / "data", *SPLIT)
    result = api.segment(str(tmp_path / "native"), str(root), layers="0,last", seeds="0,5", image_size=42, **QUICK)
    figures = result["figures"]
    assert result["seed"] == [0, 5] and result["model"]["image_size"] == 42
    assert result["protocol"]["layers"] == ("0", "last")
    assert figures["miou"] == pytest.approx(np.mean(figures["miou_by_seed"])) and figures["miou"] > 0.5
    assert figures["miou_by_seed"][0] != figures["miou_by_seed"][1]


def test_a_dpt_head_on_four_layers(tmp_path: Path) -> None:
    """Four layers by default; it learns, and the same command gives the same figures."""
    model_at(tmp_path / "m")
    root = draw(tmp_path / "data", *SPLIT)
    quick: dict[str, Any] = {"epochs": 12, "batch_size": 8, "rates": "1e-5,3e-3"}
    found = api.segment(str(tmp_path / "m"), str(root), head="dpt", **quick)
    assert found["protocol"]["layers"] == ("0", "1", "2", "last") and found["protocol"]["name"] == "DPT segment probe"
    assert found["figures"]["chosen"] == [3e-3] and found["figures"]["miou"] > 0.6, found["figures"]
    again = api.segment(str(tmp_path / "m"), str(root), head="dpt", **quick)
    assert again["figures"] == found["figures"]


def test_dpt_heads_see_their_own_layers() -> None:
    """Scale k of four is made of layer ``k * layers // 4``; outputs are four times as fine as the patches."""
    head = DptHead((6, 4), 5, channels=8)
    assert head.layer_of == [0, 0, 1, 1]
    x = torch.randn(2, 9, 10, generator=torch.Generator().manual_seed(0))
    out = head(x)
    assert out.shape == (2, 5, 12, 12)
    for parts, scales in ((slice(0, 6), (0, 1)), (slice(6, 10), (2, 3))):
        leaf = x.clone().requires_grad_()
        head(leaf).square().sum().backward()
        assert leaf.grad is not None and (leaf.grad[..., parts] != 0).all()
        for scale in scales:
            assert head.project[scale].in_channels == parts.stop - parts.start
    with pytest.raises(ValueError, match="5 layers: 1 to 4"):
        DptHead((4,) * 5, 2)


def test_dpt_heads_at_once_are_heads_one_by_one() -> None:
    features, ids = separable(8)
    rates = (1e-4, 1e-2)

    def heads_of(chosen: tuple[float, ...]) -> Any:
        settings = DenseSettings(rates=chosen, epochs=2, batch_size=4, weight_decay=0.1, head="dpt")
        return train_heads(Segmentation(3), [features], lambda rows: ids[rows], np.arange(8), settings, 7, CPU)

    together = heads_of(rates)
    for place, rate in enumerate(rates):
        for one, other in zip(together.heads[place].parameters(), heads_of((rate,)).heads[0].parameters()):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_depth(tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    root = draw(tmp_path / "data", *DEPTH_SPLIT, to_map=metres_of)
    result = api.depth(str(tmp_path / "m"), str(root), baselines="pixels", out=str(tmp_path / "out"), **QUICK)
    figures = result["figures"]
    true = np.concatenate([metres_of(ids)[1:].ravel() / 1000 for _, ids in shapes(8, 2)])
    assert 0 < figures["rmse"] < 0.6 * true.std() and 0 < figures["abs_rel"] < 0.4 and figures["delta1"] > 0.5, figures
    assert figures["chosen"] == [1e-2] and figures["baselines"]["pixels"]["rmse"] > 0
    assert result["data"]["train_depths_metres"] == [1.0, 4.0]
    assert result["model"]["weights_sha256"] == weights_hash(model)
    ten = api.depth(str(tmp_path / "m"), str(root), depth_scale=100, **QUICK)["figures"]
    assert ten["rmse"] == pytest.approx(10 * figures["rmse"], rel=1e-3)
    assert ten["abs_rel"] == pytest.approx(figures["abs_rel"], rel=1e-3)


# ---- wrong use ----


def spoil_masks(root: Path) -> None:
    (root / "train/masks").rename(root / "train/other")


def spoil_one(root: Path) -> None:
    (root / "val/masks/2_01.png").unlink()


def spoil_size(root: Path) -> None:
    Image.fromarray(np.ones((48, 64), np.uint8)).save(root / "train/masks/1_02.png")


def spoil_classes(root: Path) -> None:
    for file in root.glob("*/masks/*.png"):
        Image.fromarray(np.array(Image.open(file)) // 3).save(file)


def spoil_kind(root: Path) -> None:
    (root / "train/masks/1_01.png").rename(root / "train/masks/1_01.bmp")


def spoil_bytes(root: Path) -> None:
    Image.fromarray(np.ones((64, 48), np.uint8)).save(root / "val/masks/2_00.png", "JPEG")


def spoil_colour(root: Path) -> None:
    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(root / "val/masks/2_00.png")


def spoil_values(root: Path) -> None:
    for file in root.glob("val/masks/*.png"):
        Image.fromarray(np.full((64, 48), 255, np.uint8)).save(file)


WRONG: list[tuple[Callable[[Path], object] | None, dict[str, Any], str]] = [
    (spoil_masks, {}, r"no mask folder \(masks, annotations, labels\) in .*train, next to its images"),
    (spoil_one, {}, r"val/images/2_01\.png has no mask; .*val/masks/2_01\.png expected"),
    (spoil_size, {}, r"1_02\.png is 64 x 48 px, its image 1_02\.jpg is 48 x 64"),
    (spoil_classes, {}, "1 class in the masks, at least two expected; see --ignore"),
    (spoil_kind, {}, r"1_01\.bmp is not a PNG"),
    (spoil_bytes, {}, r"2_00\.png is not a PNG that can be read"),
    (spoil_colour, {}, r"2_00\.png is a PNG of mode RGB; class ids"),
    (spoil_values, {}, "all pixels of the test masks are ignored; see --ignore"),
    (None, {"classes": 2}, r"--classes 2: .*\.png holds class 2, the last one is 1"),
    (None, {"classes": 1}, "--classes 1: at least 2"),
    (None, {"image_size": 30}, "--image-size 30: .* has patches of 7 px"),
    (None, {"val_fraction": 0.5}, "has a test split of its own, val"),
    (None, {"layers": "9"}, "--layers 9: last"),
    (None, {"rates": "fast"}, "--rates fast: numbers"),
    (None, {"rates": "1e-3,1e38"}, "--rates 1e-3,1e38: numbers, above 0 and at most 1,"),
    (None, {"weight_decay": -0.1}, r"--weight-decay -0\.1: 0 to 1"),
    (None, {"seeds": "2,2"}, "--seeds 2,2: the same number twice"),
    (None, {"epochs": 0}, "--epochs 0: at least 1"),
    (None, {"baselines": "pixel"}, "--baselines pixel: .*did you mean 'pixels'"),
]


@pytest.mark.parametrize(("spoil", "options", "said"), WRONG, ids=[said[:24] for _, _, said in WRONG])
def test_wrong_use(spoil: Callable[[Path], object] | None, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    root = draw(tmp_path / "data", *SPLIT, counts=(4, 2))
    if spoil is not None:
        spoil(root)
    with pytest.raises(UsageError, match=said) as error:
        api.segment(str(tmp_path / "m"), str(root), **{"epochs": 1, **options})
    assert "\n" not in str(error.value)


def test_wrong_use_of_native_models_depth_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_at(tmp_path / "native", None)
    root = draw(tmp_path / "data", *SPLIT, counts=(4, 2))
    for size, said in ((45, "a multiple of .* patch of 7 px"), (140, "takes 4 to 100 patches")):
        with pytest.raises(UsageError, match=f"--image-size {size}: .*{said}"):
            api.segment(str(tmp_path / "native"), str(root), image_size=size)
    flat = draw(tmp_path / "flat", *DEPTH_SPLIT, to_map=lambda ids: np.zeros_like(ids, np.uint16), counts=(3, 2))
    with pytest.raises(UsageError, match="no depth in the training maps: every pixel is 0"):
        api.depth(str(tmp_path / "native"), str(flat), image_size=28)
    with pytest.raises(UsageError, match=r"--depth-scale 0: above 0"):
        api.depth(str(tmp_path / "native"), str(flat), depth_scale=0.0)
    with pytest.raises(UsageError, match=r"no depth folder \(depth, depths\)"):
        api.depth(str(tmp_path / "native"), str(root), image_size=28)
    with pytest.raises(UsageError, match="no images folder there; ROOT/"):
        api.segment(str(tmp_path / "native"), str(root / "train" / "images"), image_size=28)
    capsys.readouterr()
    assert main(["segment", str(tmp_path / "native"), "--image-size", "28", "--data", str(tmp_path / "none")]) == 2
    assert main(["depth", str(tmp_path / "native")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: --data {tmp_path / 'none'}: no such folder",
        "error: --data is missing: a folder of images and depth maps",
    ]
