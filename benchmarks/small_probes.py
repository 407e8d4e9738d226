"""The automatic attentive probe compared with the linear classifier, on ten small sets.

    python benchmarks/small_probes.py MODEL... --cifar CIFAR10 [--only digits,count] [--test 2000] [--out DIR]

MODEL is anything `aimv2 probe` takes, or `untrained`: random weights of a small size at 32 px. CIFAR10 is a folder of labelled
CIFAR-10. The sets: scikit-learn's digits (1,347 training images), captioned scenes by shape (1,000), colour (500), number (300) and
place (200) of their objects, CIFAR-10 cut to 5,000, 2,000, 1,000, 300 and 100. Both commands run with their defaults. Prints a line
per set, top-1 in percent, and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from aimv2 import api
from aimv2.data.scenes import CaptionedScene, draw_scene
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.sizes import EncoderConfig

SCENES = {"shape": 1000, "colour": 500, "count": 300, "place": 200}
CIFAR = (5000, 2000, 1000, 300, 100)


def write_split(folder: Path, images: Iterable[tuple[np.ndarray, str]]) -> None:
    """Class folders of (pixels uint8 [H, W, 3], class)."""
    for number, (pixels, label) in enumerate(images):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / label / f"{number:05}.png")


def write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    for split, rows in (("train", order[:1347]), ("test", order[1347:])):
        grey = ((found.images[row] * (255 / 16)).astype(np.uint8) for row in rows)
        images = (np.asarray(Image.fromarray(one).resize((32, 32)).convert("RGB")) for one in grey)
        write_split(folder / split, zip(images, (str(found.target[row]) for row in rows)))


def label_of(scene: CaptionedScene, what: str) -> str:
    return str(len(scene.objects)) if what == "count" else str(getattr(scene.objects[0], what))


def write_scenes(folder: Path, what: str, count: int, test: int) -> None:
    for split, images, seed in (("train", count, SCENES[what]), ("test", test, 0)):
        rng = np.random.default_rng(seed)
        scenes = (draw_scene(rng) for _ in range(images))
        write_split(folder / split, ((scene.image, label_of(scene, what)) for scene in scenes))


def small_sets(home: Path, cifar: str | None, test: int) -> dict[str, tuple[str, int]]:
    """By name the data and how many training images of it (0: all)."""
    write_digits(home / "digits")
    for what, count in SCENES.items():
        write_scenes(home / what, what, count, test)
    found = {name: (str(home / name), 0) for name in ("digits", *SCENES)}
    return found | ({f"cifar10-{count}": (cifar, count) for count in CIFAR} if cifar else {})


def untrained(folder: Path) -> str:
    convert(build(EncoderConfig("untrained", 96, 6, 3, 256, 8, 32), None, seed=0).eval(), folder, "safetensors")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="+")
    parser.add_argument("--cifar", help="CIFAR-10, labelled; left out without it")
    parser.add_argument("--only", help="sets, with commas")
    parser.add_argument("--test", type=int, default=2000, help="test images of a set at most")
    parser.add_argument("--out", help="folder for images and features; a temporary one without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(options.out or temporary)
        sets = small_sets(home, options.cifar, options.test)
        rows = []
        for name in options.model:
            model = untrained(home / "untrained") if name == "untrained" else name
            for data in options.only.split(",") if options.only else sets:
                source, limit = sets[data]
                shared = {
                    "train_limit": limit,
                    "test_limit": options.test,
                    "cache": str(home / "cache"),
                    "device": "cpu",
                }
                probe, linear = api.probe(model, source, **shared), api.linear(model, source, **shared)
                tops = [100 * result["figures"]["top1"] for result in (probe, linear)]
                protocol, chosen = probe["protocol"], probe["figures"]["chosen"][0]
                row = {"model": name, "set": data, "probe": tops[0], "linear": tops[1], "difference": tops[0] - tops[1]}
                row |= {key: protocol[key] for key in ("batch_size", "epochs", "steps")}
                rows.append(
                    row | {"lr": chosen["lr"], "weight_decay": chosen["weight_decay"], "seconds": probe["seconds"]}
                )
                print(f"{name} {data}: probe {tops[0]:.1f}, linear {tops[1]:.1f}, {tops[0] - tops[1]:+.1f}", flush=True)
        worst = min(row["difference"] for row in rows)
        print(json.dumps({"rows": rows, "worst": worst}))


if __name__ == "__main__":
    main()
