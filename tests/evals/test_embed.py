"""Features on disk: rows in order, unreadable images marked, and a stopped run goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.data.images import decode_image
from aimv2.data.scenes import write_scenes
from aimv2.data.transforms import image_transform
from aimv2.errors import UsageError
from aimv2.evals import embed as module
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.sizes import EncoderConfig


def model_at(folder: Path, image_size: int | None = 28) -> torch.nn.Module:
    config = EncoderConfig("tiny", 32, 3, 2, 48, 14, image_size, min_patches=4, max_patches=40)
    model = build(config, None, seed=0).eval()
    convert(model, folder, "safetensors")
    return model


def photographs(folder: Path, count: int = 7) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        size = (int(rng.integers(30, 90)), int(rng.integers(30, 90)), 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_rows_are_the_models_features(tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    files = photographs(tmp_path / "photos")
    files[3].write_bytes(b"no image")
    result = api.embed(str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "out"), batch_size=3)
    assert (result["images"], result["rejected"], result["shape"]) == (7, 1, [7, 32])
    features = np.load(tmp_path / "out" / "features.npy", mmap_mode="r")
    rows = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [file.name for file in files]
    see = image_transform(model)
    for row, file in enumerate(files):
        if row == 3:
            assert "rejected" in rows[3] and np.isnan(features[3]).all()
            continue
        wanted = model.encode(see(decode_image(file))[None], pool="mean")[0].detach()
        torch.testing.assert_close(torch.from_numpy(features[row].copy()), wanted, rtol=1e-5, atol=1e-5)


def test_native_layers_and_patches(tmp_path: Path) -> None:
    model = model_at(tmp_path / "native", None)
    files = photographs(tmp_path / "photos")
    api.embed(str(tmp_path / "native"), str(tmp_path / "photos"), str(tmp_path / "a"), layer=-2)
    see = image_transform(model)
    stored = json.loads((tmp_path / "native" / "config.json").read_text())["encoder"]
    assert (stored["min_patches"], stored["max_patches"]) == (4, 40)
    wanted = model.encode(see(decode_image(files[5]))[None], layers=[-2], pool="mean")[0][0].detach()
    got = torch.from_numpy(np.load(tmp_path / "a" / "features.npy")[5])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="--pool none: a native model"):
        api.embed(str(tmp_path / "native"), str(tmp_path / "photos"), str(tmp_path / "b"), pool="none")
    model_at(tmp_path / "m")
    assert api.embed(str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "b"), pool="none")["shape"] == [
        7,
        4,
        32,
    ]


def test_nothing_readable_leaves_nothing(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"none of 1 could be read; broken\.jpg: "):
        api.embed(str(tmp_path / "m"), str(tmp_path / "broken.jpg"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shards_are_images_too(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    write_scenes(tmp_path / "scenes", 12, val_count=2, size=32)
    result = api.embed(str(tmp_path / "m"), str(tmp_path / "scenes"), str(tmp_path / "out"))
    assert result["images"] == 12


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos")
    words = (str(tmp_path / "m"), str(tmp_path / "photos"))
    api.embed(*words, str(tmp_path / "whole"), batch_size=2)
    real, calls = module.embed_batch, []

    def stops(*args: object) -> object:
        calls.append(len(args[1]))  # type: ignore[arg-type]
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "embed_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        api.embed(*words, str(tmp_path / "parts"), batch_size=2)
    with (tmp_path / "parts" / "images.jsonl").open("a") as lines:
        lines.write('{"image": "half a li')
    api.embed(*words, str(tmp_path / "parts"), batch_size=2)
    assert calls == [2, 2, 2, 2, 1]  # the third was done again, the first two were not
    for name in ("images.jsonl", "embed.json"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert np.array_equal(np.load(tmp_path / "parts" / "features.npy"), np.load(tmp_path / "whole" / "features.npy"))
    with pytest.raises(UsageError, match="holds features of another pool"):
        api.embed(*words, str(tmp_path / "parts"), batch_size=2, pool="none")
    with pytest.raises(UsageError, match="holds something else"):
        api.embed(*words, str(tmp_path / "photos"))
