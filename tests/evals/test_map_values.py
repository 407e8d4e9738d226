"""Values of maps that are none: marks for no depth, another unit, grey levels and blurred edges in place of class ids."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aimv2.commands.depth import DepthOptions
from aimv2.commands.segment import SegmentOptions
from aimv2.data.images.maps import MapKind, depths, masks, open_pairs
from aimv2.errors import UsageError
from aimv2.evals.dense import depth_work, segmentation_work


def pngs(root: Path, maps: str, arrays: list[np.ndarray]) -> Path:
    """Images and maps of a training split."""
    for part in ("images", maps):
        (root / part).mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(arrays):
        Image.new("RGB", values.shape[::-1], (90, 90, 90)).save(root / "images" / f"{number}.png")
        Image.fromarray(values).save(root / maps / f"{number}.png")
    return root


def test_depths_without_a_unit_or_with_marks_are_refused_until_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 1500], [65535, 2000]], np.uint16)).save(file)
    with pytest.raises(UsageError, match=r"holds 65535, .* in 25\.0% of its pixels.* give --invalid 0,65535") as caught:
        depths().read(file)
    assert caught.value.option == "--invalid"
    np.testing.assert_array_equal(depths(None, (0, 65535)).read(file), np.array([[0, 1.5], [0, 2]], np.float32))
    np.testing.assert_array_equal(depths(None, (1500,)).read(file), np.array([[0, 0], [65.535, 2]], np.float32))
    Image.fromarray(np.array([[0, 255], [50, 100]], np.uint8)).save(file)
    with pytest.raises(UsageError, match="has 8 bits") as caught:
        depths().read(file)
    assert caught.value.option == "--depth-scale"
    with pytest.raises(UsageError, match="holds 255"):
        depths(10).read(file)
    np.testing.assert_array_equal(depths(10, (0, 255)).read(file), np.array([[0, 0], [5, 10]], np.float32))


def test_depths_of_another_unit_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pngs(tmp_path, "depth", [np.full((4, 4), 2 + number, np.uint16) for number in range(4)])
    options = DepthOptions(model="", val_fraction=0.5)
    depth_work(options, str(root), (depths(),) * 2, 8, tmp_path)
    assert "is --depth-scale right?" in caplog.text
    caplog.clear()
    depth_work(options, str(root), (depths(1),) * 2, 8, tmp_path)
    assert not caplog.text


def test_grey_levels_are_no_class_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """0 and 255 would be 256 classes."""
    root = pngs(tmp_path, "masks", [np.array([[0, 255], [255, 0]], np.uint8)] * 4)
    options = SegmentOptions(model="", val_fraction=0.5)

    def classes(kind: MapKind, given: int | None = None) -> int:
        return segmentation_work(options, str(root), (kind, kind), 8, given, tmp_path).task.outputs

    with pytest.raises(UsageError, match=r"the values 0, 255 only, which would be 256 classes: give --values 0,255"):
        classes(masks(-1))
    with pytest.raises(UsageError, match=r"--values 0,255 makes it a class"):
        classes(masks())
    assert classes(masks(255, values=(0, 255)), 2) == 2 and classes(masks(-1), 256) == 256
    np.testing.assert_array_equal(masks(values=(255, 0)).read(root / "masks" / "0.png"), [[1, 0], [0, 1]])
    with pytest.raises(UsageError, match=r"--values: .* holds 255 too"):
        masks(-1, values=(0, 1)).read(root / "masks" / "0.png")
    pngs(tmp_path, "masks", [np.array([[0, 1], [30, 0]], np.uint8)] * 4)
    with pytest.raises(UsageError, match=r"the values 0, 1, 30 only, which would be 31 classes: give --values 0,1,30"):
        classes(masks())
    assert classes(masks(), 31) == 31 and not caplog.text


def test_masks_with_blurred_edges_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[:10], mask[10] = 30, np.arange(20) + 5
    root = pngs(tmp_path, "masks", [mask] * 4)
    segmentation_work(SegmentOptions(model="", val_fraction=0.5), str(root), (masks(),) * 2, 20, None, tmp_path)
    assert "two of 22 mask values hold 95.0% of the pixels" in caplog.text


def test_a_mark_for_no_depth_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options, said = DepthOptions(model="", val_fraction=0.5), "25.0% of the training depths are 65.534 m"
    for top, marked in ((65534, True), (3100, False)):  # a sensor that ends there
        root = pngs(tmp_path, "depth", [np.array([[1000, 2000], [3000, top]], np.uint16)] * 4)
        caplog.clear()
        depth_work(options, str(root), (depths(),) * 2, 2, tmp_path)
        assert (said in caplog.text) == marked and ("--invalid" in caplog.text) == marked


def test_maps_are_found_in_any_case_and_normal_form(tmp_path: Path) -> None:
    root = pngs(tmp_path, "masks", [np.eye(4, dtype=np.uint8)] * 3)
    (root / "images" / "0.png").rename(root / "images" / "Caf\u00e9.JPG")
    (root / "masks" / "0.png").rename(root / "masks" / "cafe\u0301.PNG")
    (root / "masks" / "._1.png").touch()
    (root / "val.txt").write_text("CAF\u00c9\n")
    train, test, _ = open_pairs(str(root), masks())
    assert [pair.map.name for pair in train] == ["1.png", "2.png"] and test[0].map.name == "cafe\u0301.PNG"
    (root / "images").rename(root / "Images")
    (root / "masks").rename(root / "Masks")
    assert len(open_pairs(str(root), masks())[0]) == 2
    (root / "Masks" / "CAFE\u0301.png").touch()
    with pytest.raises(UsageError, match="has several masks"):
        open_pairs(str(root), masks())
