"""What int8 costs a frozen encoder: the same attentive probe on features of fp32 and of OpenVINO's int8.

    python benchmarks/int8_probe.py MODEL DATA [--train 20000] [--calibration 300] [--seeds 3]

DATA is a folder of labelled shards (train-*, test-*). Prints JSON: top-1 of both for each seed, and the loss in points.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

import aimv2
from aimv2.data.shards.format import find_shards
from aimv2.data.stream.samples import View
from aimv2.evals.after_training import features, labelled_batches
from aimv2.evals.probe import train_probe
from aimv2.interop.convert import convert
from aimv2.interop.openvino import OpenVINOEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--train", type=int, default=20_000, help="training images")
    parser.add_argument("--calibration", type=int, default=300, help="training images that tell int8 its ranges")
    parser.add_argument("--seeds", type=int, default=3, help="probes of each")
    options = parser.parse_args()
    encoder = aimv2.load_model(options.model)
    view = View(encoder.config.image_size, encoder.config.patches, captions=False)
    train, test = (
        [torch.cat(part) for part in zip(*labelled_batches(find_shards(options.data, split), view, limit))]
        for split, limit in (("train", options.train), ("test", 0))
    )
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "int8"
        convert(encoder, out, "openvino", precision="int8", pixels=[train[0][: options.calibration]])
        encoders = {"fp32": encoder, "int8": OpenVINOEncoder(out)}
        scores: dict[str, list[float]] = {}
        for name, one in encoders.items():
            found = [torch.cat([features(one, part) for part in images.split(256)]) for images in (train[0], test[0])]
            scores[name] = [
                100 * train_probe([found[0]], train[1], found[1], test[1], seed=seed) for seed in range(options.seeds)
            ]
    lost = statistics.mean(scores["fp32"]) - statistics.mean(scores["int8"])
    print(json.dumps({"model": options.model, "train": len(train[1]), "test": len(test[1]), **scores, "lost": lost}))


if __name__ == "__main__":
    main()
