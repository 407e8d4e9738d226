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
from aimv2.data.images.decode import decode_image
from aimv2.data.images.pictures import pictures
from aimv2.data.passed import PassedOver
from aimv2.data.scenes import write_scenes
from aimv2.data.stream.transforms import image_transform
from aimv2.errors import RankError, UsageError
from aimv2.evals.caption import image_files
from aimv2.explorer.stored import Stored
from aimv2.features import embed as module
from aimv2.features.fingerprint import weights_hash
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig
from aimv2.progress import ProgressLines


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
    assert (
        api.embed(str(tmp_path / "m"), str(tmp_path / "scenes"), str(tmp_path / "out"))["images"] == 14
    )  # both splits
    train = str(tmp_path / "scenes" / "train-*.tar")
    assert api.embed(str(tmp_path / "m"), train, str(tmp_path / "out1"))["images"] == 12
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
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "aimv2", "embed", *words, str(tmp_path / out), "--shard-size", "2", "--json"],
            env={**os.environ, "RANK": rank, "WORLD_SIZE": size},
            stdout=subprocess.PIPE,
            text=True,
        )
        for out, rank, size in (("two", "0", "2"), ("two", "1", "2"), ("one", "0", "1"))
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
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
    with pytest.raises(UsageError, match="pool") as other:
        api.embed(*words, str(tmp_path / "parts"), **more, pool="none")
    with pytest.raises(UsageError) as taken:
        api.embed(*words, str(tmp_path / "photos"))
    assert [(e.value.option, e.value.code) for e in (other, taken)] == [("OUT", "mismatch"), ("OUT", "exists")]


# ---- going on ----


def test_another_list_of_as_many_images_is_not_gone_on_with(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos", 5)
    words = (str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "out"))
    api.embed(*words, shard_size=2)
    note = json.loads((tmp_path / "out" / "features-00001.json").read_text())
    assert (note["first"], note["last"]) == ("2.png", "3.png")
    (tmp_path / "photos" / "0.png").rename(tmp_path / "photos" / "9.png")
    with pytest.raises(UsageError, match="list of images"):
        api.embed(*words, shard_size=2)
    (tmp_path / "photos" / "9.png").rename(tmp_path / "photos" / "0.png")  # a name is no content
    api.embed(*words, shard_size=2)
    part = tmp_path / "out" / "features-00001.json"
    part.write_text(part.read_text().replace("2.png", "1.png"))
    with pytest.raises(RankError, match=r"features-00001.json is not of the images 2.png to 3.png"):
        api.embed(*words, shard_size=2)


def test_images_that_change_meanwhile_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_at(tmp_path / "m")
    files = photographs(tmp_path / "photos", 4)
    real = module.list_images
    words = (str(tmp_path / "m"), str(tmp_path / "photos"))

    def renamed(source: str, *others: object) -> object:
        found = real(source, *others)
        files[0].rename(tmp_path / "photos" / "new.png")
        return found

    def replaced(source: str, *others: object) -> object:
        found = real(source, *others)
        files[1].write_bytes(files[2].read_bytes() + b"more")
        return found

    for number, change in enumerate((renamed, replaced)):
        monkeypatch.setattr(module, "list_images", change)
        with pytest.raises(UsageError, match="the images changed while they were embedded") as error:
            api.embed(*words, str(tmp_path / f"out{number}"))
        assert (error.value.option, error.value.code) == ("IMAGES", "mismatch")


def test_the_same_weights_under_another_name_go_on(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos", 3)
    words = (str(tmp_path / "photos"), str(tmp_path / "out"))
    api.embed(str(tmp_path / "m"), *words)
    before = (tmp_path / "out" / "embed.json").read_bytes()
    api.embed(str(tmp_path / "m" / "." / ".." / "m"), *words)
    (tmp_path / "m").rename(tmp_path / "other")
    assert api.embed(str(tmp_path / "other"), *words)["rows"] == 3
    assert (tmp_path / "out" / "embed.json").read_bytes() == before
    config = EncoderConfig("tiny", 32, 3, 2, 48, 14, 28)
    convert(build(config, None, seed=1), tmp_path / "another", "safetensors")
    with pytest.raises(UsageError, match="features of another model"):
        api.embed(str(tmp_path / "another"), *words)


def test_leftovers_go_and_a_broken_note_is_one_line(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos", 3)
    words, out = (str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "out")), tmp_path / "out"
    out.mkdir()
    for name in (".embed.json.aside", ".features-00000.npy.aside", ".features-00001.json.aside"):
        (out / name).write_bytes(b"half")
    assert api.embed(*words, shard_size=2)["rows"] == 3
    (out / ".features-00000.parquet.aside").write_bytes(b"half")
    api.embed(*words, shard_size=2)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for text in ("{", "[]", "\xff"):
        (out / "embed.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UsageError, match=r"embed\.json") as error:
            api.embed(*words, shard_size=2)
        assert (error.value.option, error.value.code) == ("OUT", "unreadable")
        assert len(str(error.value).splitlines()) == 1
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds something else"):
        api.embed(*words[:2], str(tmp_path / "new"))


def test_the_bar_counts_this_processs_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos")
    bars = []

    class Kept(ProgressLines):
        def __init__(self, title: str, total: int | None, completed: int = 0) -> None:
            super().__init__(title, total, completed)
            bars.append(self)

    monkeypatch.setattr("aimv2.progress.ProgressLines", Kept)
    words = (str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "out"))
    api.embed(*words, shard_size=3)
    (tmp_path / "out" / "features-00001.json").unlink()  # one to do again, two to skip
    api.embed(*words, shard_size=3)
    assert [(bar.done, bar.total) for bar in bars] == [(7, 7), (7, 7)]


# ---- images that others would stumble over ----


def test_names_and_links_that_are_odd(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    folder = tmp_path / "photos"
    one = photographs(folder, 1)[0].read_bytes()
    names = [b"a\xff.png", b"line\nend.png", b"re\rturn.png", b'quote"d.png', "é\u2028.png".encode()]
    for name in names:
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(one)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "inner").mkdir()
    (folder / "inner" / "2.png").write_bytes(one)
    (folder / "inner" / "back").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    for form in ("npy", "parquet"):
        result = api.embed(str(tmp_path / "m"), str(folder), str(tmp_path / form), format=form)
        assert (result["rows"], result["rejected"]) == (len(names) + 2, 2)
    rejected = [json.loads(line) for line in (tmp_path / "npy" / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in rejected] == ["gone.png", "loop.png"]
    lines = (tmp_path / "npy" / "keys-00000.txt").read_text(encoding="utf-8").splitlines()
    assert "a\\udcff.png" in lines and "line\\nend.png" in lines
    back = {os.fsencode(json.loads(f'"{line}"')) for line in lines}
    assert back == {*names, b"0.png", b"inner/2.png"}
    assert pq.read_table(tmp_path / "parquet" / "features-00000.parquet").column("key").to_pylist() == lines


def test_a_folder_that_may_not_be_read_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos", 2)
    shut = tmp_path / "photos" / "shut"
    shut.mkdir(mode=0)
    if os.geteuid() == 0:  # who may read everything
        real = os.scandir

        def refuses(path: Path) -> object:
            if Path(path) == shut:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr("aimv2.data.images.catalogue.os.scandir", refuses)
    result = api.embed(str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "out"))
    assert (result["rows"], result["rejected"]) == (2, 1)
    line = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert line == {"key": "shut", "reason": "folder can't be read: Permission denied"}


def test_a_cut_shard_gives_its_whole_samples(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    write_scenes(tmp_path / "scenes", 12, val_count=2, size=32)
    tar = tmp_path / "scenes" / "train-000000.tar"
    whole = api.embed(str(tmp_path / "m"), str(tar), str(tmp_path / "whole"))["rows"]
    tar.write_bytes(tar.read_bytes()[:-12_000])
    result = api.embed(str(tmp_path / "m"), str(tmp_path / "scenes"), str(tmp_path / "out"))
    assert 2 < result["rows"] < whole + 2 and result["rejected"] == 1
    line = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert line["key"] == "train-000000.tar" and "only its whole samples are read" in line["reason"]
    rows, all_rows = rows_of(tmp_path / "out"), rows_of(tmp_path / "whole")
    np.testing.assert_allclose(rows[: result["rows"] - 2], all_rows[: result["rows"] - 2], rtol=1e-4, atol=1e-5)


def test_a_stray_tar_among_photographs_is_none_of_them(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 4, val_count=2, size=32)
    photographs(tmp_path / "photos", 2)
    (tmp_path / "photos" / "backup.tar").write_bytes((tmp_path / "scenes" / "train-000000.tar").read_bytes())
    assert [key for key, _ in pictures(str(tmp_path / "photos"))] == ["0.png", "1.png"]
    for name in ("stats.json", "notes.txt", "train-000000.tar.idx"):
        (tmp_path / "scenes" / name).write_text("{}")
    assert sum(1 for _ in pictures(str(tmp_path / "scenes"))) == 6


def test_a_list_of_odd_lines(tmp_path: Path) -> None:
    model_at(tmp_path / "m")
    photographs(tmp_path / "photos", 1)
    listed = tmp_path / "some.txt"
    listed.write_text("photos/0.png\n~nobody-of-that-name/x.png\nphotos/\0.png\nphotos\n")
    result = api.embed(str(tmp_path / "m"), str(listed), str(tmp_path / "out"))
    assert (result["rows"], result["rejected"]) == (1, 3)
    listed.write_bytes(b"photos/0.png\nphotos/\x81\xff.png\n")
    with pytest.raises(UsageError, match=r"some.txt is not UTF-8") as error:
        api.embed(str(tmp_path / "m"), str(listed), str(tmp_path / "out2"))
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out2").exists()


def test_a_list_may_name_other_folders_only_if_it_is_allowed(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", 3)
    (tmp_path / "lists").mkdir()
    names = {"absolute": tmp_path / "photos" / "0.png", "dots": "../photos/0.png", "URL": "https://example.org/0.png"}
    for kind, name in names.items():
        given = tmp_path / "lists" / f"{kind}.txt"
        given.write_text(f"{name}\n")
        with pytest.raises(UsageError, match="a URL" if kind == "URL" else "--image-root DIR") as error:
            next(pictures(str(given)))
        assert error.value.option == ("" if kind == "URL" else "--image-root")
        if kind != "URL":
            ((key, read),) = pictures(str(given), image_root=tmp_path / "photos")
            assert key == str(name) and read() == (tmp_path / "photos" / "0.png").read_bytes()
    (tmp_path / "lists" / "linked").symlink_to(tmp_path / "photos")
    (tmp_path / "lists" / "all.txt").write_text(f"linked/1.png\n{names['absolute']}\n0.png\n")
    assert [read() for _, read in pictures(str(tmp_path / "lists" / "all.txt"), image_root=tmp_path / "photos")]
    model_at(tmp_path / "m")
    words = (str(tmp_path / "m"), str(tmp_path / "lists" / "all.txt"), str(tmp_path / "out"))
    assert api.embed(*words, image_root=str(tmp_path / "photos"))["rows"] == 3
    stored = Stored(tmp_path / "out")
    assert not stored.stale and stored.image_root == tmp_path / "photos"
    with pytest.raises(UsageError) as error:
        api.embed(*words, image_root=str(tmp_path / "gone"))
    assert (error.value.option, error.value.code) == ("--image-root", "not-found")


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", 2)
    for name in ("a.NEF", "notes.md", "._0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    model_at(tmp_path / "m")
    result = api.embed(str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "out"))
    assert result["rows"] == 2 and result["rejected"] == 0
    assert {about["examples"][0] for about in result["passed_over"].values()} == {
        "a.NEF",
        "notes.md",
        "._0.png",
        "@eaDir/",
    }
    for name in ("a.NEF", "0.png", "1.png"):
        (tmp_path / "photos" / name).rename(tmp_path / "photos" / f"{name[0]}.cr3")
    with pytest.raises(UsageError, match=r"passed over: RAW images of cameras"):
        next(pictures(str(tmp_path / "photos")))
    passed = PassedOver()
    with pytest.raises(UsageError, match="no image in the folder"):
        list(image_files([str(tmp_path / "photos")], passed))
    assert sum(about["number"] for about in passed.result().values()) == 6


def test_files_of_all_patches_are_bounded() -> None:
    def size(width: int, image: int | None, layers: int, precision: str, pool: str = "none") -> int:
        config = EncoderConfig("x", width, 1, 2, 48, 14, image)
        with torch.device("meta"):
            encoder = VisionEncoder(config)
        return module.default_shard_size(encoder, module.Wanted(pool, tuple(range(layers)), "npy", None, 1, precision))

    assert size(1024, 224, 0, "fp32") == 512  # 256 patches of 4 KiB: a MiB an image
    assert size(1024, 224, 4, "fp32") == 128 and size(1024, 224, 0, "bf16") == 1000
    assert size(1024, None, 0, "fp32") == 32  # up to 4096 patches
    assert size(1024, 224, 0, "fp32", "mean") == 1000


def test_what_one_rank_meets_is_said_by_it(tmp_path: Path) -> None:
    config = EncoderConfig("tiny", 32, 1, 2, 48, 14, 28)
    model = build(config, None, seed=0)
    torch.nn.init.constant_(model.norm.weight, 1e6)
    convert(model, tmp_path / "m", "safetensors")
    photographs(tmp_path / "photos", 2)
    with pytest.raises(RankError, match="larger than float16 holds"):
        api.embed(str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "out"), precision="bf16")


def test_a_table_is_refused_with_what_is_taken(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\na.png,1\n")
    with pytest.raises(UsageError, match="a table; a folder of images, shards, one image or a list of paths") as error:
        pictures(str(tmp_path / "list.csv"))
    assert (error.value.option, error.value.code) == ("IMAGES", "unsupported")
