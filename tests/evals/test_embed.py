"""Features on disk: rows in order, unreadable images listed, files shared over processes, and a stopped run goes on."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.data.images import decode_image
from aimv2.data.pictures import pictures
from aimv2.data.scenes import write_scenes
from aimv2.data.transforms import image_transform
from aimv2.errors import UsageError
from aimv2.evals import embed as module
from aimv2.evals.weights import weights_hash
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


def keys_of(folder: Path) -> list[str]:
    return [key for file in sorted(folder.glob("keys-*.txt")) for key in file.read_text().splitlines()]


def rows_of(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(file, mmap_mode="r") for file in sorted(folder.glob("features-*.npy"))])


def test_rows_are_the_models_features(tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    files = photographs(tmp_path / "photos")
    files[3].write_bytes(b"no image")
    out = tmp_path / "out"
    result = api.embed(str(tmp_path / "m"), str(tmp_path / "photos"), str(out), batch_size=2, shard_size=3)
    assert (result["images"], result["rows"], result["rejected"], result["files"]) == (7, 6, 1, 3)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in rejected] == ["3.png"] and "known format" in rejected[0]["reason"]
    good = [file for file in files if file.name != "3.png"]
    assert keys_of(out) == [file.name for file in good]
    see = image_transform(model)
    wanted = torch.cat([model.encode(see(decode_image(file))[None], pool="mean") for file in good]).detach()
    torch.testing.assert_close(torch.from_numpy(rows_of(out)), wanted, rtol=1e-5, atol=1e-5)
    assert json.loads((out / "embed.json").read_text())["weights_sha256"] == weights_hash(model)


def test_layers_patches_and_parquet(tmp_path: Path) -> None:
    model = model_at(tmp_path / "native", None)
    files = photographs(tmp_path / "photos")
    see = image_transform(model)
    api.embed(str(tmp_path / "native"), str(tmp_path / "photos"), str(tmp_path / "a"), layers="0,-2")
    wanted = model.encode(see(decode_image(files[5]))[None], layers=[0, -2], pool="mean")
    got = torch.from_numpy(rows_of(tmp_path / "a")[5])
    torch.testing.assert_close(got, torch.cat(wanted).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="--pool none: a native model"):
        api.embed(str(tmp_path / "native"), str(tmp_path / "photos"), str(tmp_path / "b"), pool="none")
    words = (str(tmp_path / "native"), str(tmp_path / "photos"), str(tmp_path / "c"))
    api.embed(*words, pool="none", layers="1,2", format="parquet", shard_size=4)
    table = pq.read_table(tmp_path / "c" / "features-00001.parquet")
    assert table.column("key").to_pylist() == ["4.png", "5.png", "6.png"]
    wanted = model.encode(see(decode_image(files[5]))[None], layers=[1, 2])
    assert table.column("patches")[1].as_py() == wanted[0].shape[1]
    for name, one in zip(("layer_1", "layer_2"), wanted):
        got = torch.tensor(table.column(name)[1].as_py()).view(1, -1, 32)
        torch.testing.assert_close(got, one.detach(), rtol=1e-5, atol=1e-5)
    model_at(tmp_path / "m")
    api.embed(str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "d"), pool="none", precision="bf16")
    assert rows_of(tmp_path / "d").shape == (7, 4, 32) and rows_of(tmp_path / "d").dtype == np.float16


def test_nothing_readable_leaves_nothing(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"none of 1 could be read; broken\.jpg: "):
        api.embed(str(tmp_path / "m"), str(tmp_path / "broken.jpg"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shards_and_lists_are_images_too(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    write_scenes(tmp_path / "scenes", 12, val_count=2, size=32)
    assert api.embed(str(tmp_path / "m"), str(tmp_path / "scenes"), str(tmp_path / "out"))["images"] == 12
    files = photographs(tmp_path / "photos", 3)
    listed = tmp_path / "some.txt"
    listed.write_text(f"photos/2.png\n\n{files[0]}\nphotos/none.png\n")
    result = api.embed(str(tmp_path / "m"), str(listed), str(tmp_path / "out2"))
    assert keys_of(tmp_path / "out2") == ["photos/2.png", str(files[0])] and result["rejected"] == 1
    assert "No such file" in (tmp_path / "out2" / "rejected.jsonl").read_text()


def test_pictures_are_listed_without_being_held(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "a.jpg", "c.txt", ".hidden/x.png", "b/d/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [key for key, _ in pictures(str(tmp_path))] == ["a.jpg", "b/1.jpg", "b/2.png", "b/d/0.png"]


def test_memory_is_flat_in_the_number_of_images(tmp_path: Path) -> None:
    """Peak of Python's and numpy's memory over ten times as many images in files of the same size."""
    model_at(tmp_path / "m")
    peaks = []
    for count in (40, 400):
        write_scenes(tmp_path / f"scenes{count}", count, val_count=1, size=32)
        words = (str(tmp_path / "m"), str(tmp_path / f"scenes{count}"), str(tmp_path / f"out{count}"))
        api.embed(*words, shard_size=20, batch_size=10)  # everything is imported
        for file in (tmp_path / f"out{count}").iterdir():
            file.unlink()
        tracemalloc.start()
        api.embed(*words, shard_size=20, batch_size=10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000, peaks


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    files = photographs(tmp_path / "photos", 9)
    files[4].write_bytes(b"no image")
    words = [str(tmp_path / "m"), str(tmp_path / "photos")]
    api.embed(*words, str(tmp_path / "one"), shard_size=2)
    command = [sys.executable, "-m", "aimv2", "embed", *words, str(tmp_path / "two"), "--shard-size", "2", "--json"]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads(said[0])["rows"] == 8 and said[1] == ""
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos")
    words = (str(tmp_path / "m"), str(tmp_path / "photos"))
    more = {"batch_size": 1, "shard_size": 2}
    api.embed(*words, str(tmp_path / "whole"), **more)
    real, calls = module.features_of, []

    def stops(*args: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "features_of", stops)
    with pytest.raises(KeyboardInterrupt):
        api.embed(*words, str(tmp_path / "parts"), **more)
    api.embed(*words, str(tmp_path / "parts"), **more)
    assert len(calls) == 4 + 5  # the first file was whole; the second was done again
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="holds features of another pool"):
        api.embed(*words, str(tmp_path / "parts"), **more, pool="none")
    with pytest.raises(UsageError, match="holds something else"):
        api.embed(*words, str(tmp_path / "photos"))
