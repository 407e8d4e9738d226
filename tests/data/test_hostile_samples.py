"""One hostile sample, image or row costs itself, and nothing else."""

import io
import json
import math
import os
import random
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from aimv2.batch import make_batch
from aimv2.config.load import parse
from aimv2.config.schema import DataConfig, ObjectiveConfig
from aimv2.data.images.boxes import regions_of
from aimv2.data.images.decode import ImageError, decode_image, header_size, image_size, store_image
from aimv2.data.images.entries import FileReader, SourceEntry
from aimv2.data.images.tables import row_groups, table_shape, whole_column
from aimv2.data.shards.format import write_shard
from aimv2.data.stream.rejected import CUT, BadSample
from aimv2.data.stream.samples import TrainStream, View
from aimv2.errors import RankError, UsageError
from aimv2.io import read_file
from aimv2.objectives.probe import ProbeObjective
from aimv2.tasks.classify import count_classes
from aimv2.train.defaults import median_side


def picture(number: int = 0, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(colours).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG that says that it has 10,000 million pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    )


def wordy() -> bytes:
    """A PNG with a compressed text of 3 MB, and one that is stored after the pixels."""
    about = PngImagePlugin.PngInfo()
    about.add_text("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    png = picture(pnginfo=about)
    return png[:-12] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"y" * 2_000_000)) + png[-12:]


def animation(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((32, 32, 3), value, np.uint8)) for value in (0, 90, 200)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


DEEP = b'{"captions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
USED: dict[str, dict[str, bytes]] = {  # all but a part of it can be used
    "deep-json": {"json": DEEP},
    "long-number": {"json": b'{"captions": {"a": ["x"]}, "id": ' + b"9" * 5000 + b"}"},
    "odd-class": {"cls": "²".encode()},
    "long-class": {"cls": b"7" * 5000},
    "large-class": {"cls": str(2**70).encode()},
    "negative-class": {"cls": b"-3"},
    "own-name": {"__key__": b"another", "__shard__": b"x", "__restore_key__": b"x"},
    "captions-of-all-kinds": {"json": json.dumps({"captions": [None, 1, {"a": [[]]}, "x"]}).encode()},
    "wordy-png": {"png": wordy()},
}
LOST: dict[str, dict[str, bytes]] = {
    "bomb": {"png": bomb()},
    "cut-gif": {"png": cut(animation("GIF"))[:60]},
    "cut-webp": {"png": cut(picture(kind="WEBP", lossless=True))},
    "cut-jpeg-header": {"png": picture(kind="JPEG")[:40]},
    "no-image": {"png": b"\0" * 100},
    "empty": {"png": b""},
}


def tar_of(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def good(count: int) -> dict[str, dict[str, bytes]]:
    return {f"good{number}": {"png": picture(number), "txt": b"a word", "cls": b"1"} for number in range(count)}


class Words:
    """A tokenizer of bytes."""

    def encode(self, text: str, limit: int) -> list[int]:
        return [*list(text.encode()[: limit - 1]), 0]


def stream_of(folder: Path, words: Words | None = None) -> TrainStream:
    config = DataConfig(train=str(folder), workers=0, shuffle_buffer=8, index_dir=str(folder / "index"))
    return TrainStream(config, View(32, 16), words or Words(), 4, 0)  # type: ignore[arg-type]


def test_hostile_samples_cost_themselves(tmp_path: Path) -> None:
    samples = {key: {"png": picture(), "txt": b"a word", "cls": b"1", **parts} for key, parts in (USED | LOST).items()}
    tar_of(tmp_path / "train-000000.tar", good(6) | samples | {f"late{key}": parts for key, parts in good(3).items()})
    stream, labels = stream_of(tmp_path), dict[str, int]()
    for _ in range(40):
        batch = next(stream)
        labels |= dict(zip(batch.keys, batch.labels.tolist()))  # type: ignore[union-attr]
    stream.close()
    assert {key for key in labels if "good" not in key} == set(USED)
    assert {name.partition("/")[2] for name in stream.rejected.named} == set(LOST)
    assert {labels[key] for key in USED if key.endswith("-class")} == {-1} and labels["good1"] == labels[
        "deep-json"
    ] == 1


def test_an_error_that_nobody_thought_of_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "train-000000.tar", good(6) | {f"odd{n}": {"png": picture(), "txt": b"odd"} for n in range(3)})

    class Odd(Words):
        def encode(self, text: str, limit: int) -> list[int]:
            if text == "odd":
                raise ZeroDivisionError("of our own")
            return super().encode(text, limit)

    stream = stream_of(tmp_path, Odd())
    for _ in range(20):
        next(stream)
    stream.close()
    assert len(stream.rejected) == 3
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "an error that no sample should" in line)
    assert "(ZeroDivisionError: of our own) caused" in line


def test_mistakes_of_our_own_end_a_run_soon(tmp_path: Path) -> None:
    """What nobody thought of costs its sample; where that is every sample, no run goes on for ever."""
    tar_of(tmp_path / "train-000000.tar", good(12))

    class Broken(Words):
        def encode(self, text: str, limit: int) -> list[int]:
            raise ZeroDivisionError("of our own")

    with pytest.raises(RankError, match=r"none of 25 samples in a row .*ZeroDivisionError: of our own"):
        next(stream_of(tmp_path, Broken()))


def test_a_tar_that_is_cut_while_it_is_read_costs_its_samples_and_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        pairs = [(f"s{number}k{at}", parts) for at, parts in enumerate(good(12).values())]
        write_shard(tmp_path / f"train-{number:06}.tar", pairs)
    stream, met = stream_of(tmp_path), set[str]()
    met |= set(next(stream).keys)  # type: ignore[union-attr]
    os.truncate(tmp_path / "train-000001.tar", (tmp_path / "train-000001.tar").stat().st_size // 2)
    for _ in range(60):
        met |= set(next(stream).keys)  # type: ignore[union-attr]
    stream.close()
    lost = [bad for bad in stream.rejected.named.values() if bad.why == CUT]
    assert 4 <= len(lost) <= 9 and all(bad.name.startswith("train-000001.tar/") for bad in lost)
    assert {f"s0k{at}" for at in range(12)} < met
    said = capsys.readouterr().err
    assert said.count("data.train: train-000001.tar was cut or damaged since it was indexed") == 1
    assert not stream.reject(BadSample(*lost[0]))


def test_a_shard_that_is_gone_ends_in_one_line(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", list(good(12).items()))
    stream = stream_of(tmp_path)
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(RankError, match=r"samples in a row can be used.*No such file"):
        next(stream)


NUMBERS: list[Any] = [10**400, -(10**400), float("nan"), float("inf"), 2**70, -1, None, True, "x", [], {}, "9" * 5000]
BOXES: list[Any] = [*NUMBERS, [10**400] * 4, [float("nan")] * 4, [1, 2, 10**400, 4], [[10**400] * 6], [1, "x", 3, 4]]


def test_boxes_of_any_value_are_faults() -> None:
    for value in BOXES:
        for about in (
            {"objects": [{"box": value, "class": "a"}]},
            {"objects": [{"box": [1, 2, 3, 4], "class": value, "crowd": value, "segmentation": value}]},
            {"objects": [{"box": [1, 2, 3, 4], "class": "a", "segmentation": {"size": value, "counts": value}}]},
            {"objects": value, "phrases": value, "negative": value},
            {"size": [value, value], "objects": []},
            {"phrases": [{"phrase": "x", "box": value, "boxes": [value]}], "objects": []},
        ):
            found, _ = regions_of(about, (32, 32))
            assert np.isfinite(found.boxes).all()


def test_a_label_beyond_the_classes_is_none() -> None:
    objective = ProbeObjective(ObjectiveConfig(name="probe", classes=3))
    labels = [0, 2, -1, 3, 10**17]
    batch = make_batch(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), [[]] * 5, None, 0, labels=labels)
    loss, count = objective(lambda _: torch.zeros(5, 3), batch)["class"]  # type: ignore[arg-type]
    assert int(count) == 2 and float(loss) == pytest.approx(2 * math.log(3), rel=1e-5)


def test_a_class_that_no_head_can_have_is_named(tmp_path: Path) -> None:
    tar_of(tmp_path / "train-000000.tar", good(4) | {"odd": {"png": picture(), "cls": b"123456789012345"}})
    config = parse({"objective.name": "probe", "data.train": str(tmp_path), "init": "x"})
    with pytest.raises(UsageError, match=r"label 123,456,789,012,345 .*objective\.classes"):
        count_classes(config)


# ---- images ----


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_damaged_animations_are_image_errors(kind: str) -> None:
    whole, draw, refused = animation(kind), random.Random(0), 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 4, 16])):
            data[draw.randrange(6, len(data))] = draw.randrange(256)
        for function in (decode_image, image_size, store_image, header_size):
            try:
                function(bytes(data[: draw.randrange(20, len(data) + 1)]))
            except ImageError:
                refused += 1
    assert refused > 60, "no other error was raised"


def test_an_image_above_the_limit_is_left_out_of_the_defaults() -> None:
    with pytest.raises(ImageError, match="pixels"):
        header_size(bomb())
    assert median_side([{"png": bomb()}, {"png": cut(bomb())}, {"png": picture()}]) == 32


def test_pipes_and_devices_under_an_image_name_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good.png").write_bytes(picture())
    for name, why in (("pipe", "a pipe, a device"), ("endless", "a pipe, a device"), ("folder", "directory")):
        file = tmp_path / f"{name}.png"
        with pytest.raises(ImageError, match=why):
            decode_image(file)
        with pytest.raises(ImageError, match=why):
            FileReader().read(SourceEntry("k", file.name, (str(file),), {}, None, {}, FileReader()))
    assert read_file(tmp_path / "good.png") == picture()
    with pytest.raises(OSError, match="of 10 at most"):
        read_file(tmp_path / "good.png", 10)


# ---- tables ----


def test_damaged_arrow_files_end_no_process(tmp_path: Path) -> None:
    """Each in a process of its own: without validation one in twenty ends it."""
    import pyarrow as pa
    import pyarrow.ipc

    cells = [{"bytes": bytes([number] * 40), "path": f"p{number}"} for number in range(40)]
    table = pa.table({"image": pa.array(cells), "text": pa.array([f"a word {number}" for number in range(40)])})
    with pa.OSFile(str(tmp_path / "whole.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, 20)
    whole = (tmp_path / "whole.arrow").read_bytes()
    for seed in range(60):
        draw, data = random.Random(seed), bytearray(whole)
        for _ in range(draw.choice([1, 3, 10])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "damaged.arrow").write_bytes(data)
        child = os.fork()
        if child == 0:
            os._exit(outcome(tmp_path / "damaged.arrow"))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, f"seed {seed}: {code}"


def outcome(file: Path) -> int:
    """0 where a table is read, or refused by what its readers catch."""
    import pyarrow

    try:
        table_shape(file)
        for _, read in row_groups(file):
            for column in ("image", "text"):
                for batch in read([column]):
                    batch.to_pylist()
        whole_column(file, None, "image").to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError, UsageError):
        return 0
    except BaseException:
        return 1
    return 0
