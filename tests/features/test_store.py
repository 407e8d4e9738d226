"""The feature store: whatever changes the features is refused, for every command that reads it; a stopped pass resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import vit
from PIL import Image

from aimv2.config.schema import DataConfig
from aimv2.data.images.labelled import Labelled
from aimv2.data.images.opening import open_labelled
from aimv2.data.images.readers import contents_of_rows
from aimv2.data.scenes import write_scenes
from aimv2.data.shards.format import read_samples, write_shard
from aimv2.errors import RankError, UsageError
from aimv2.evals.probe import ProbeSettings
from aimv2.evals.probe_result import ProbeWork, identity
from aimv2.evals.probe_run import SweepSplits
from aimv2.explorer.stored import Stored
from aimv2.features.embed import Wanted, embed_images, list_images
from aimv2.features.extraction import cached_features
from aimv2.features.fingerprint import architecture
from aimv2.features.frozen import of_encoder, open_frozen
from aimv2.features.store import FeatureStore, check_notes, open_array
from aimv2.features.teach import Lesson, teach
from aimv2.features.teacher import open_teacher
from aimv2.features.training_cache import training_features
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig

CONFIG = EncoderConfig("tiny", 32, 2, 2, 48, 14, 28)
CPU = torch.device("cpu")


def encoder(seed: int = 0, eps: float | None = None, **changes: Any) -> VisionEncoder:
    """The same weights in another architecture."""
    model = build(replace(CONFIG, **changes), None, seed=0).eval()
    model.load_state_dict(build(CONFIG, None, seed=seed).state_dict())
    for module in model.modules():
        if eps is not None and isinstance(module, torch.nn.RMSNorm):
            module.eps = eps
    assert isinstance(model, VisionEncoder)
    return model


MODELS: dict[str, dict[str, Any]] = {  # equal weights but for the first
    "weights": {"seed": 1},
    "heads": {"heads": 4},
    "mean": {"mean": (0.5, 0.5, 0.5)},
    "std": {"std": (0.5, 0.5, 0.5)},
    "eps": {"eps": 1e-3},
    "patches": {"max_patches": 2000},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Class folders of photographs, and shards."""
    rng = np.random.default_rng(0)
    for number in range(10):
        folder = tmp_path / "photos" / "train" / ("red", "blue")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{number}.png")
    write_scenes(tmp_path / "all", 20, val_count=1, size=32)
    (tmp_path / "shards").mkdir()
    samples = [sample for tar in sorted((tmp_path / "all").glob("train-*.tar")) for sample in read_samples(tar)]
    for number in range(2):
        write_shard(tmp_path / "shards" / f"train-{number:06d}.tar", samples[number * 10 : number * 10 + 10])
    return tmp_path


def replace_photographs(data: Path) -> None:
    """Other pixels under the same names, and captions as they were."""
    first, second = sorted((data / "photos" / "train" / "red").iterdir())[:2]
    first.write_bytes(second.read_bytes())
    tar = data / "shards" / "train-000000.tar"
    samples = list(read_samples(tar))
    images = [parts["png" if "png" in parts else "jpg"] for _, parts in samples]
    samples[0][1]["png" if "png" in samples[0][1] else "jpg"] = images[1]
    write_shard(tar, samples)


def states(data: Path) -> Iterator[str]:
    """Other states of the photographs and of the shards, each undone before the next: time, size, names in another order."""
    photo, tar = data / "photos" / "train" / "red" / "2.png", data / "shards" / "train-000001.tar"
    old = {file: (file.read_bytes(), file.stat()) for file in (photo, tar)}

    def restore() -> None:
        for file, (content, about) in old.items():
            file.write_bytes(content)
            os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))

    for file, (_, about) in old.items():
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    yield "time"
    restore()
    for file, (content, about) in old.items():
        file.write_bytes(content + bytes(1024))
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    yield "size"
    restore()
    for one, two in ((photo, photo.with_name("4.png")), (tar, tar.with_name("train-000000.tar"))) * 2:
        one.rename(data / "aside")
        two.rename(one)
        (data / "aside").rename(two)
        if one == tar:
            yield "order" if (one.stat().st_size, one.read_bytes()) != (old[tar][1].st_size, old[tar][0]) else ""


def evaluate(data: Path, model: VisionEncoder, **changes: Any) -> Path:
    split = open_labelled(str(data / "photos"), "train")
    assert split is not None
    frozen = replace(of_encoder("m", model), precision=changes.get("precision", "fp32"))
    layers, pool = changes.get("layers", ("last",)), changes.get("pool", "mean")
    folder = data / "store"
    cached_features(frozen, split, layers, pool, folder, 2, changes.get("flip", False))
    return next(folder.iterdir()) / "about.json"


def embed(data: Path, model: VisionEncoder, **changes: Any) -> Path:
    wanted = Wanted("mean", (), "npy", 3, 2, "fp32")
    embed_images("m", model, str(data / "photos"), str(data / "store"), replace(wanted, **changes))
    return data / "store" / "embed.json"


def tune(data: Path, model: VisionEncoder, precision: str = "fp32", **changes: Any) -> Path:
    config = DataConfig(train=str(data / "shards"), features=str(data / "store"), **changes)
    training_features(config, model, CPU, precision)
    return data / "store" / "about.json"


def teach_views(data: Path, model: VisionEncoder, precision: str = "fp32", **changes: Any) -> Path:
    frozen = replace(of_encoder("t", model), precision=precision)
    lesson = Lesson("t", frozen.sha256, 28, 2, 32, 2, 0.4, (0.75, 1.3333), 0.5, 0, frozen.fingerprint())
    teach(str(data / "shards"), str(data / "store"), replace(lesson, **changes), lambda x: frozen(x)[0], 4)
    return data / "store" / "aimv2.json"


USERS: dict[str, tuple[Callable[..., Path], list[dict[str, Any]]]] = {
    "evaluate": (evaluate, [{"precision": "bf16"}]),
    "embed": (embed, [{"precision": "bf16"}, {"pool": "none"}, {"layers": (0,)}, {"format": "parquet"}]),
    "tune": (tune, [{"precision": "bf16"}, {"max_pixels": 10**6}]),
    "teach": (
        teach_views,
        [
            {"precision": "bf16"},
            {"views": 3},
            {"crop_scale": 0.5},
            {"crop_ratio": (0.5, 2.0)},
            {"flip": 0.0},
            {"seed": 1},
        ],
    ),
}


@pytest.mark.parametrize("user", USERS)
def test_whatever_changes_the_features_is_refused(user: str, data: Path) -> None:
    run, others = USERS[user]
    run(data, encoder())
    before = {path: path.read_bytes() for path in (data / "store").rglob("*") if path.is_file()}
    run(data, encoder(name="renamed"))  # a name changes nothing
    for changes in MODELS.values():
        with pytest.raises(UsageError, match="give a new folder") as error:
            run(data, encoder(**changes))
        assert error.value.code == "mismatch", changes
    for changes in others:
        with pytest.raises(UsageError, match="give a new folder") as error:
            run(data, encoder(), **changes)
        assert error.value.code == "mismatch", changes
    for state in filter(None, states(data)):
        with pytest.raises(UsageError, match="replaced or changed") as error:
            run(data, encoder())
        assert error.value.code == "mismatch", state
    run(data, encoder())
    replace_photographs(data)
    with pytest.raises(UsageError, match="replaced or changed") as error:
        run(data, encoder())
    assert error.value.code == "mismatch"
    assert {path: path.read_bytes() for path in (data / "store").rglob("*") if path.is_file()} == before


def test_layers_pools_and_flips_have_stores_of_their_own(data: Path) -> None:
    """Evaluations share a folder; each of these is a store in it."""
    for changes in ({}, {"pool": "none"}, {"layers": ("0",)}, {"flip": True}):
        evaluate(data, encoder(), **changes)
    assert len(list((data / "store").iterdir())) == 4


def test_the_processor_and_the_architecture_of_a_transformers_model_count(data: Path) -> None:
    model, split = vit(data / "vit"), open_labelled(str(data / "photos"), "train")
    assert split is not None
    cached_features(open_frozen(str(model)), split, folder=data / "store")
    taught = open_teacher(str(model), CPU).fingerprint
    for name, changes in (
        ("preprocessor_config.json", {"image_mean": [0.4, 0.4, 0.4]}),
        ("preprocessor_config.json", {"rescale_factor": 1 / 128}),
        ("config.json", {"num_attention_heads": 1}),
        ("config.json", {"layer_norm_eps": 1e-3}),
    ):
        kept = (model / name).read_text()
        (model / name).write_text(json.dumps({**json.loads(kept), **changes}))
        with pytest.raises(UsageError) as error:
            cached_features(open_frozen(str(model)), split, folder=data / "store")
        assert error.value.code == "mismatch", changes
        assert open_teacher(str(model), CPU).fingerprint != taught, changes
        (model / name).write_text(kept)
    cached_features(open_frozen(str(model)), split, folder=data / "store")


@pytest.mark.parametrize(
    ("user", "former"),
    [
        ("evaluate", {"about": {"weights_sha256": "0", "layers": ["last"]}, "done": 10, "written": 10, "rejected": []}),
        ("embed", {"model": "m", "weights_sha256": "0", "images": 10, "pool": "mean", "layers": []}),
        ("tune", {"encoder": "0", "data": "0", "samples": 20, "image_size": 28, "precision": "fp32", "view": "centre"}),
        ("teach", {"format": "aimv2 shards 1", "taught": {"teacher": {"sha256": "0"}, "source": [], "summary": {}}}),
    ],
)
def test_a_store_of_an_earlier_version_is_one_line(user: str, former: dict[str, Any], data: Path) -> None:
    about = USERS[user][0](data, encoder())
    about.write_text(json.dumps(former))
    with pytest.raises(UsageError, match="earlier version") as error:
        USERS[user][0](data, encoder())
    assert error.value.code == "mismatch" and str(error.value).endswith("give a new folder")


@pytest.mark.parametrize("user", USERS)
def test_an_interrupted_pass_resumes_to_equal_bytes(user: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the data of a part and before its note."""
    monkeypatch.setattr("aimv2.features.extraction.PART_BATCHES", 2)
    monkeypatch.setattr("aimv2.features.training_cache.PART_BATCHES", 1)
    monkeypatch.setattr("aimv2.features.training_cache.BATCH", 7)
    run, store = USERS[user][0], data / "store"
    (data / "photos" / "train" / "red" / "2.png").write_bytes(b"no image")
    run(data, encoder())
    whole = {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    store.rename(data / "whole")
    real, parts = FeatureStore.commit, []

    def stops(self: FeatureStore, part: int, note: Any) -> None:
        parts.append(part)
        if len(parts) == 2:
            raise KeyboardInterrupt
        real(self, part, note)

    monkeypatch.setattr(FeatureStore, "commit", stops)
    with pytest.raises(KeyboardInterrupt):
        run(data, encoder())
    run(data, encoder())
    assert parts[:3] == [0, 1, 1] and len(parts) == len(set(parts)) + 1
    assert {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()} == whole


def test_the_explorer_reads_pictures_where_features_do_not_fit(data: Path) -> None:
    about = embed(data, encoder())
    assert Stored(data / "store").of(encoder())
    assert not any(Stored(data / "store").of(encoder(**changes)) for changes in MODELS.values())
    kept = about.read_text()
    about.write_text(json.dumps({key: value for key, value in json.loads(kept).items() if key != "fingerprint"}))
    former = Stored(data / "store")
    assert not former.of(encoder()) and "earlier version" in former.note(encoder(), False)
    about.write_text(kept)
    assert all(Stored(data / "store").stale for _ in filter(None, states(data))) and not Stored(data / "store").stale
    replace_photographs(data)
    changed = Stored(data / "store")
    assert not changed.of(encoder()) and "replaced or changed" in changed.note(encoder(), False)


def test_a_picture_in_a_shard_has_an_identity(data: Path) -> None:
    before = list_images(str(data / "shards")).fingerprint()
    assert list_images(str(data / "shards")).fingerprint() == before
    replace_photographs(data)
    after = list_images(str(data / "shards")).fingerprint()
    assert [key for key in before if after[key] != before[key]] == ["contents_sha256"]


def test_ranks_share_a_folder(tmp_path: Path) -> None:
    about = {"fingerprint": 2, "pool": "mean"}
    first, second = (FeatureStore(tmp_path / "s", about, "OUT", rank=rank, ranks=2) for rank in range(2))
    assert first.missing(5) == [0, 2, 4] and second.missing(5) == [1, 3]
    second.commit(3, {"rows": 7})
    assert second.missing(5) == [1] and first.note(3) == {"rows": 7} and first.note(1) is None
    for part in (0, 1):
        (tmp_path / "s" / f".part-0000{part}.json.aside").write_text("half")
    FeatureStore(tmp_path / "s", about, "OUT", rank=1, ranks=2)
    assert [path.name for path in (tmp_path / "s").glob(".*")] == [".part-00000.json.aside"]  # of the other rank


def test_no_room_is_one_line(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "s", {"fingerprint": 2}, "data.features")
    with pytest.raises(UsageError) as error:
        store.array("features", np.float16, (10**9, 10**6))
    assert (error.value.option, error.value.code) == ("data.features", "limit")


def test_what_another_command_is_writing_stays(tmp_path: Path) -> None:
    """Two commands with one cache: neither removes what the other writes, nor begins its array again."""
    first = FeatureStore(tmp_path / "s", {"fingerprint": 2}, "--cache")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        alive, old = (tmp_path / "s" / f".last.npy.{pid}.aside" for pid in (other.pid, 2**22 + 1))
        for path in (alive, old, tmp_path / "s" / ".last.npy.aside"):
            path.write_bytes(b"")
        second = FeatureStore(tmp_path / "s", {"fingerprint": 2}, "--cache")
        assert [path.name for path in (tmp_path / "s").glob(".*.aside")] == [alive.name]
        other.communicate(b"\n")
    begun = first.array("last", np.float32, (4, 2))
    begun[:] = 1
    begun.flush()
    again = tmp_path / "s" / "last.npy"
    again.rename(tmp_path / "kept.npy")  # the second looked before the first one's was there
    real = Path.is_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: path != again and real(path))
        (tmp_path / "kept.npy").rename(again)
        patch.setattr(second, "_wait", lambda files: None)
        assert second.array("last", np.float32, (4, 2)).tolist() == [[1, 1]] * 4


def test_a_rank_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aimv2.features.store.LONGEST_WAIT", 0.0)
    with pytest.raises(RankError, match="rank 1 waited"):
        FeatureStore(tmp_path / "s", {"fingerprint": 2}, "data.features", rank=1, ranks=2)


def test_every_field_of_a_configuration_and_every_norm_counts() -> None:
    """Whatever a later version adds to it; a name alone does not."""
    model = encoder()
    known = architecture(model)
    for field in fields(EncoderConfig):
        value = getattr(CONFIG, field.name)
        other = (*value[:2], 9.0) if isinstance(value, tuple) else "other" if isinstance(value, str) else value + 1
        changed = build(CONFIG, None, seed=0)
        changed.config = replace(CONFIG, **{field.name: other})
        assert (architecture(changed) != known) == (field.name != "name"), field.name
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps, kept = 1e-3, module.eps
            assert architecture(model) != known, name
            module.eps = kept
    other = type("Other", (VisionEncoder,), {})(CONFIG)
    assert architecture(other) != known == architecture(model)


def test_every_bit_of_the_weights_counts() -> None:
    model = encoder()
    known, seen = of_encoder("m", model).sha256, set()
    for name, value in model.state_dict().items():
        bits = value.view(torch.int32).view(-1)
        bits[-1] ^= 1
        seen.add(of_encoder("m", model).sha256)
        bits[-1] ^= 1
        assert known not in seen, name
    assert len(seen) == len(model.state_dict()) and of_encoder("m", model).sha256 == known
    seen.add(of_encoder("m", encoder().bfloat16().float()).sha256)
    assert len(seen) == len(model.state_dict()) + 1


def test_an_unfinished_probe_is_of_its_labels(data: Path) -> None:
    """The same photographs under other labels, other names of classes, or in another order."""
    split = open_labelled(str(data / "photos"), "train")
    assert split is not None
    work = ProbeWork(ProbeSettings(), "auto", (0,), 0, 0, 8, 0)

    def of(other: Labelled) -> Any:
        return identity(of_encoder("m", encoder()), SweepSplits(other, None, split), "test", work)

    assert of(replace(split)) == of(split)
    for changes in (
        {"labels": split.labels[::-1]},
        {"classes": split.classes[::-1]},
        {"keys": [*split.keys[1:], split.keys[0]]},
    ):
        found, known = of(replace(split, **changes)), of(split)
        assert [key for key in known if found[key] != known[key]] == ["labels"], changes


@pytest.mark.parametrize("form", ["text", "struct"])
def test_files_that_a_table_names_count(form: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set saved with paths in the place of images: a photograph replaced behind them is another image."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(data)
    names = [f"photos/train/red/{number}.png" for number in (0, 2, 4)]
    kind = (
        datasets.Value("string")
        if form == "text"
        else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    )
    cells = names if form == "text" else [{"bytes": None, "path": name} for name in names]
    features = datasets.Features({"image": kind, "label": datasets.Value("int64")})
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0]}, features)).save_to_disk(
        "set"
    )
    shutil.copytree("photos/train/red", "set/photos/train/red", dirs_exist_ok=True)  # paths start at the table

    def mark() -> str:
        split = open_labelled("set", "train")
        assert split is not None and split.image(1).size == (50, 40)
        return contents_of_rows(split.image, np.arange(3))

    before = mark()
    assert mark() == before
    os.utime(data / "set" / names[1], ns=(0, 0))
    assert mark() != before


HEAD = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (4, 16), }"
SPOILED = {
    "empty": b"",
    "no numpy": b"[1, 2]",
    "version": b"\x93NUMPY\x81\x00v\x00" + HEAD[10:],
    "cut head": HEAD[:9],
    "no bracket": HEAD.replace(b", }", b", ("),
    "a name": HEAD.replace(b"False", b"Fblse"),
    "no rows": HEAD + b" " * 57 + b"\n",
    "objects": HEAD.replace(b"'<f4'", b"'|O' ") + b" " * 57 + b"\n" + bytes(256),
    "other shape": HEAD.replace(b"(4, 16)", b"(2, 32)") + b" " * 57 + b"\n" + bytes(256),
}


@pytest.mark.parametrize("content", SPOILED.values(), ids=list(SPOILED))
def test_a_spoiled_array_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "last.npy"
    file.write_bytes(HEAD + b" " * 57 + b"\n" + bytes(256))
    assert open_array(file, "--cache", (4,)).shape == (4, 16)
    file.write_bytes(content)
    for mode in ("r", "r+"):
        with pytest.raises(UsageError, match=r"--cache .*: last\.npy can't be read .*; give a new folder"):
            open_array(file, "--cache", (4,), mode)


@pytest.mark.parametrize(
    "note",
    ['{"rows": 4}', '{"rows": 4, "rejected": true}', '{"rows": 4, "rejected": ["a"]}', '{"rows": -1, "rejected": []}',
     '{"rows": 4, "rejected": [{"row": "1", "key": "a", "reason": "b"}]}', '{"rows": 4, "rejected": [{"row": 1}]}', "[]", "{"],
)  # fmt: skip
def test_a_spoiled_note_is_one_line(tmp_path: Path, note: str) -> None:
    store = FeatureStore(tmp_path / "store", {"fingerprint": "a"}, "--cache")
    store.note_file(0).write_text('{"rows": 4, "rejected": [{"row": 1, "key": "a", "reason": "b"}]}')
    assert check_notes(store, store.gather(1))[0]["row"] == 1
    store.note_file(0).write_text(note)
    with pytest.raises(UsageError, match="give a new folder"):
        check_notes(store, store.gather(1))
