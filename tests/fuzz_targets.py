"""What reads files of others, each with small good files to spoil: for ``tests/long/fuzz.py`` and for the corpus of what failed once."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from aimv2 import api
from aimv2.cli import main
from aimv2.data.shards.format import write_shard
from aimv2.errors import UsageError
from aimv2.models.create import create_model
from runs import TINY, light_collections, scenes, train
from tiny_llm import encoder, language_model

SHAPE = {"width": 16, "depth": 1, "heads": 2, "hidden": 24}
FORMS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP"}


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        make: writes good files into an empty folder.
        spoiled: patterns of the files that are spoiled, one at a time.
        use: reads the folder; ``file`` is the spoiled one. Returns, or raises UsageError.
    """

    make: Callable[[Path], object]
    spoiled: tuple[str, ...]
    use: Callable[[Path, Path], object]

    def files(self, folder: Path) -> list[Path]:
        return sorted({path for pattern in self.spoiled for path in folder.glob(pattern) if path.is_file()})


class Unclear(AssertionError):
    """A command ended with another code than 0, 1 and 2, or with 2 and no line that says why."""


def run(*words: object) -> None:
    """The command line in this process; a mistake of input is a UsageError."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), light_collections():
        code = main([str(word) for word in words])
    text = said.getvalue()
    if code not in (0, 1, 2) or "Traceback" in text or (code == 2 and "error: " not in text):
        raise Unclear(f"exit code {code}: {text[-2000:]}")
    if code == 2:
        raise UsageError(text[text.index("error: ") :].strip())


def picture(number: int, side: int = 20) -> Image.Image:
    rows = np.random.default_rng(number).integers(0, 256, (side, side + number % 5, 3), dtype=np.uint8)
    return Image.fromarray(rows)


def pictures(folder: Path, forms: dict[str, str] = FORMS) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (ending, form) in enumerate(forms.items()):
        picture(number).save(folder / f"p{number}.{ending}", form)
        names.append(f"p{number}.{ending}")
    return names


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "JPEG")
    return stream.getvalue()


def captioned(folder: Path) -> None:
    for name in pictures(folder):
        (folder / name).with_suffix(".txt").write_text(f"a photo of {name}")


def tables(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    names = pictures(folder, {"jpg": "JPEG", "png": "PNG"}) * 3
    rows = [{"image": name, "caption": f"caption, {number}"} for number, name in enumerate(names)]
    (folder / "t.csv").write_text("image,caption\n" + "".join(f'{row["image"]},"{row["caption"]}"\n' for row in rows))
    (folder / "t.tsv").write_text("image\tcaption\n" + "".join(f"{row['image']}\t{row['caption']}\n" for row in rows))
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.json").write_text(json.dumps(rows))
    inside = [{"image": {"bytes": jpeg(number), "path": None}, "caption": "x"} for number in range(6)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(inside), folder / "t.parquet")
    pyarrow.feather.write_feather(pa.Table.from_pylist(inside), str(folder / "t.arrow"), compression="uncompressed")


def shards(folder: Path) -> None:
    rows = [
        (
            f"k{n}",
            {
                "jpg": jpeg(n),
                "txt": b"a dog",
                "cls": str(n % 3).encode(),
                "json": json.dumps({"caption": "a", "n": n}).encode(),
            },
        )
        for n in range(6)
    ]
    write_shard(folder / "train-000000.tar", rows)
    write_shard(folder / "val-000000.tar", [(f"v{key}", parts) for key, parts in rows])


def boxes(folder: Path) -> None:
    names = pictures(folder / "images", {"jpg": "JPEG", "png": "PNG"})
    about = {
        "images": [{"id": n, "file_name": name, "width": 20 + n, "height": 20} for n, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": n % 2, "category_id": 1 + n % 2, "bbox": [2, 3, 5 + n, 6], "area": 30.0, "iscrowd": n % 2,
             "segmentation": {"size": [20, 21], "counts": [0, 40, 380]} if n % 2 else [[2, 3, 8, 3, 8, 9]]}
            for n in range(4)
        ],
        "categories": [{"id": 1, "name": "dog", "frequency": "f"}, {"id": 2, "name": "cat", "frequency": "r"}],
    }  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(about))
    found = [{"image_id": n % 2, "category_id": 1, "bbox": [2, 3, 5, 6.5], "score": 0.5 + n / 10} for n in range(4)]
    (folder / "found.json").write_text(json.dumps(found))


def yolo(folder: Path) -> None:
    for name in pictures(folder / "images" / "train", {"jpg": "JPEG", "png": "PNG"}):
        label = folder / "labels" / "train" / f"{Path(name).stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.25 0.25\n1 0.25 0.5 0.1 0.1\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/train\nnames: {0: dog, 1: cat}\n")


def talks(folder: Path) -> None:
    names = pictures(folder / "images", {"jpg": "JPEG", "png": "PNG"})
    rows = [
        {"id": str(n), "image": name, "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}
        ]} for n, name in enumerate(names)
    ]  # fmt: skip
    (folder / "talks.json").write_text(json.dumps(rows))


def model(folder: Path) -> None:
    made = create_model("aimv2-tiny-patch8-32", True, 5, decoder_vocab_size=20, **SHAPE)
    api.save_pretrained(made, folder / "model")
    run("convert", folder / "model", folder / "transformers", "--to", "transformers")
    pictures(folder / "images", {"jpg": "JPEG"})


def a_run(folder: Path) -> None:
    scenes(folder / "scenes", 40)
    shape = {f"model__{key}": value for key, value in {**SHAPE, "decoder_width": 16, "decoder_depth": 1}.items()}
    train(folder / "scenes", folder / "run", train__steps=2, **shape)
    for sealed in folder.glob("run/checkpoints/*/files.json"):
        sealed.unlink()  # else its hashes would refuse every spoiled file before it is read


def resumed(folder: Path, _: Path) -> None:
    # as if the run had been cut between its last save and its summary
    (folder / "run" / "summary.json").unlink(missing_ok=True)
    run("pretrain", "--run", folder / "run", "--resume")


def used(folder: Path, file: Path) -> None:
    pictures(folder / "images", {"jpg": "JPEG"})
    run("doctor", folder / "run")
    if file.parent.name == "model":
        run("embed", folder / "run", folder / "images", folder / "out", "--batch-size", "2")
    else:
        from aimv2.report import charts, facts
        from aimv2.report.runs import read_run

        found = read_run(folder / "run")
        runs = [found, found]
        facts.curve_section(runs, charts.panels_of(runs))
        for part in (facts.result_section, facts.config_section, facts.machine_section):
            part(found)
        facts.figure_section(runs)
        facts.difference_section(runs)


def classes(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            pictures(folder / "folders" / split / name, {"jpg": "JPEG", "png": "PNG"})
    rows = [
        f"folders/train/{name}/p{n}.{end},{name}" for name in ("cat", "dog") for n, end in enumerate(("jpg", "png"))
    ]
    for split in ("train", "val"):
        (folder / f"{split}.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {
            b"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8),
            b"labels": [*range(10)],
            b"filenames": [b"a.png"] * 10,
        }
        (folder / "cifar").mkdir(exist_ok=True)
        (folder / "cifar" / name).write_bytes(pickle.dumps(batch, protocol=4))
    names = {b"label_names": [str(n).encode() for n in range(10)], b"num_cases_per_batch": 10}
    (folder / "cifar" / "batches.meta").write_bytes(pickle.dumps(names, protocol=4))
    api.save_pretrained(create_model("aimv2-tiny-patch8-32", False, 5, **SHAPE), folder / "model")


def neighbours(folder: Path, file: Path) -> None:
    data = folder / ("cifar" if "cifar" in file.parts else "folders" if "folders" in file.parts else "")
    run(
        "knn",
        folder / "model",
        "--data",
        data if data != folder else file,
        "--k",
        "1",
        "--batch-size",
        "8",
        "--out",
        folder / "out",
    )


def cache(folder: Path) -> None:
    classes(folder)
    (folder / "home").write_text(str(folder))  # features are those of one place
    cached(folder, folder)


def cached(folder: Path, _: Path) -> None:
    home = Path((folder / "home").read_text())
    run("knn", home / "model", "--data", home / "folders", "--k", "1", "--out", folder / "features")


def vlm(folder: Path) -> None:
    encoder(folder / "eyes")
    language_model(folder / "llm")
    api.vlm_build(folder / "eyes", folder / "llm", folder / "vlm")
    pictures(folder / "images", {"png": "PNG"})


def captioned_by(folder: Path, _: Path) -> None:
    run("caption", folder / "vlm", folder / "images" / "p0.png", "--ask", "What?", "--max-tokens", "2")


def settings(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(nested(TINY)))
    shutil.copy(Path(__file__).parents[1] / "recipes" / "chains" / "chain-tiny.yaml", folder / "chain.yaml")
    classes(folder / "made")
    run(
        "knn",
        folder / "made" / "model",
        "--data",
        folder / "made" / "folders",
        "--k",
        "1",
        "--out",
        folder / "made" / "out",
    )
    (folder / "made" / "out" / "result.json").rename(folder / "result.json")
    shutil.rmtree(folder / "made")
    (folder / "captions.txt").write_text("a dog\na cat on a mat\n" * 30)
    (folder / "captions.jsonl").write_text('{"caption": "a dog"}\n' * 30)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


def set_up(folder: Path, file: Path) -> None:
    if file.name == "recipe.yaml":
        from aimv2.config.load import parse, read_recipe

        parse(read_recipe(file))
    elif file.name == "chain.yaml":
        run("run", file, "--status", "true")
    elif file.name == "result.json":
        run("compare", file)
    else:
        run("tokenizer", "train", file, folder / "out", "--vocab-size", "280")


def imported(*more: object, source: str | None = None) -> Callable[[Path, Path], None]:
    def use(folder: Path, file: Path) -> None:
        given = [folder / word if isinstance(word, Path) else word for word in more]
        run("data", "import", file if source is None else folder / source, folder / "out", *given)

    return use


def embedded(folder: Path, file: Path) -> None:
    run("embed", file.parent, folder / "images", folder / "out", "--batch-size", "2")


TARGETS: dict[str, Target] = {
    "images": Target(captioned, ("*.*",), imported(source=".")),
    "tables": Target(tables, ("t.*",), imported("--image-root", Path("."))),
    "shards": Target(shards, ("*.tar",), lambda folder, file: run("data", "check", folder)),
    "boxes": Target(boxes, ("instances.json",), imported("--image-root", Path("images"), "--boxes", "true")),
    "predictions": Target(
        boxes, ("*.json",),
        lambda folder, _: run("detect", "score", "--predictions", folder / "found.json", "--data", folder / "instances.json"),
    ),
    "yolo": Target(yolo, ("data.yaml", "labels/train/*.txt"), imported("--boxes", "true", source="data.yaml")),
    "talks": Target(talks, ("talks.json",), imported("--image-root", Path("images"), "--conversations", "true")),
    "model": Target(model, ("model/*", "transformers/*"), embedded),
    "run": Target(a_run, ("run/*", "run/checkpoints/*/model/*", "run/checkpoints/*.json"), used),
    "checkpoint": Target(a_run, ("run/config.yaml", "run/checkpoints/*/state/*", "run/metrics.jsonl"), resumed),
    "classes": Target(classes, ("*.csv", "cifar/*", "folders/train/cat/*"), neighbours),
    "cache": Target(cache, ("features/**/*",), cached),
    "vlm": Target(vlm, ("vlm/*",), captioned_by),
    "settings": Target(settings, ("*.*",), set_up),
}  # fmt: skip


def try_spoiled(target: str, good: Path, work: Path, name: str, content: bytes) -> bool:
    """Reads the good files with one of them spoiled.

    Args:
        target: of TARGETS.
        good: the folder that its ``make`` filled.
        work: a folder that is made anew.
        name: of the spoiled file, in the folder.
        content: what it holds.

    Returns:
        whether it was read; False: it was refused in one line.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good, work)
    (work / name).write_bytes(content)
    try:
        TARGETS[target].use(work, work / name)
    except UsageError:
        return False
    return True
