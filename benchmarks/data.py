"""The training stream beside plain Pillow decoding, interleaved: images a second and their ratio, as one JSON object.

    python benchmarks/data.py [--workers 2] [--rounds 7] [--seconds 10] [--data DIR]

The stream does all that training needs: reads tars, decodes, crops to 224 px, flips, tokenises, collates and hands
batches to this process. The plain path has JPEGs in memory and opens, decodes in full, crops and resizes them (bicubic)
in as many processes, and hands over nothing. They take turns: only ratios of interleaved rounds mean anything on a
shared machine. Without --data both see the same generated JPEGs, 500 x 375 px and as heavy as photographs.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing as mp
import random
import statistics
import tempfile
import time
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE, SCALE, RATIO = 224, (0.4, 1.0), (0.75, 1.3333)
BATCH = 32  # images that a worker sends at once
WORDS = ("two", "old", "small", "dogs", "people", "children", "boats", "near", "beside", "under", "red", "water")


def write_photographs(folder: Path, count: int) -> None:
    """``count`` generated pairs as shards."""
    from aimv2.data.prefetch import batched
    from aimv2.data.shards.format import write_shard
    from aimv2.plan.loading import make_photograph

    rng = np.random.default_rng(0)

    def pair(number: int) -> tuple[str, dict[str, bytes]]:
        caption = " ".join(rng.choice(WORDS, int(rng.integers(6, 30))))
        return f"{number:06d}", {"jpg": make_photograph(rng), "txt": caption.encode()}

    folder.mkdir(parents=True, exist_ok=True)
    for number, keys in enumerate(batched(iter(range(count)), 100)):
        write_shard(folder / f"train-{number:06d}.tar", map(pair, keys))


def read_images(data: str, count: int) -> list[bytes]:
    """The first ``count`` encoded training images."""
    from aimv2.data.shards.format import find_shards, image_of, read_samples

    samples = (sample for tar in find_shards(data, "train", option="--data") for _, sample in read_samples(tar))
    return [found[1] for found in islice(filter(None, map(image_of, samples)), count)]


# ---- the two paths ----


class Stream:
    """The training stream over a folder of shards."""

    def __init__(self, data: str, workers: int) -> None:
        from aimv2.config.schema import DataConfig
        from aimv2.data.stream.samples import TrainStream, View
        from aimv2.data.text.captions import read_captions
        from aimv2.data.text.tokenizer import train_tokenizer

        config = DataConfig(train=data, workers=workers, crop_scale=SCALE[0], crop_ratio=RATIO, shuffle_buffer=100)
        tokenizer = train_tokenizer(islice(read_captions(data), 5000), 1000)
        self.batch = BATCH * max(workers, 1)
        self.stream = TrainStream(config, View(SIDE, (SIDE // 14) ** 2), tokenizer, self.batch, seed=0)

    def rate(self, seconds: float) -> float:
        """Images a second, after what the workers had prepared while the other path ran is used up."""
        for _ in range(4):  # two batches wait for each worker
            next(self.stream)
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            images += len(next(self.stream))
        return images / (time.perf_counter() - start)


def crop_plainly(data: bytes, draw: random.Random) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: a random resized crop as one writes it with Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    for _ in range(10):
        area = draw.uniform(*SCALE) * width * height
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    x, y = draw.randint(0, width - w), draw.randint(0, height - h)
    image = image.crop((x, y, x + w, y + h)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def serve_plain(images: list[bytes], seed: int, pipe: Connection) -> None:
    """A process: crops images for the asked time each time it is asked, and says how many a second."""
    draw = random.Random(seed)
    at = draw.randrange(len(images))
    while (seconds := pipe.recv()) is not None:
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            crop_plainly(images[at % len(images)], draw)
            at, done = at + 1, done + 1
        pipe.send(done / (time.perf_counter() - start))


class Plain:
    """Plain decoding in some processes."""

    def __init__(self, images: list[bytes], processes: int) -> None:
        context = mp.get_context("spawn")
        self.pipes = []
        for seed in range(processes):
            near, far = context.Pipe()
            context.Process(target=serve_plain, args=(images, seed, far), daemon=True).start()
            self.pipes.append(near)

    def rate(self, seconds: float) -> float:
        """Images a second of all processes, after a moment in which the stream's workers fill their queues."""
        self._ask(min(1.0, seconds))
        return self._ask(seconds)

    def _ask(self, seconds: float) -> float:
        for pipe in self.pipes:
            pipe.send(seconds)
        return sum(pipe.recv() for pipe in self.pipes)

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.send(None)


def measure(data: str, workers: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Both paths in turns, after a round of each that does not count."""
    images = read_images(data, 500)
    plain, stream = Plain(images, max(workers, 1)), Stream(data, workers)
    rates: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(rounds + 1):
        for name, path in (("plain", plain), ("ours", stream)):
            rate = path.rate(seconds if number else min(1.0, seconds))
            if number:
                rates[name].append(rate)
    plain.close()
    stream.stream.close()
    ratios = [ours / other for ours, other in zip(rates["ours"], rates["plain"])]
    return {
        "images_per_s": statistics.median(rates["ours"]),
        "plain_images_per_s": statistics.median(rates["plain"]),
        "ratio": statistics.median(ratios),
        "ratio_of_rounds": [round(ratio, 3) for ratio in ratios],
        "kilobytes_an_image": statistics.mean(map(len, images)) / 1000,
        "pixels_an_image": statistics.mean(math.prod(Image.open(io.BytesIO(image)).size) for image in images),
        "bad": len(stream.stream.bad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="shards of one's own; generated photographs without it")
    parser.add_argument("--workers", type=int, default=2, help="data workers, and processes of the plain path")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 7 for a figure to quote")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of each path in a round")
    parser.add_argument("--images", type=int, default=400, help="generated photographs")
    options = parser.parse_args()
    import PIL
    from PIL import features

    result: dict[str, Any] = {"data": options.data or f"{options.images} generated", "crop": SIDE}
    result |= {"workers": options.workers, "rounds": options.rounds, "seconds_a_round": options.seconds}
    result |= {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")}
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data
        if data is None:
            data = scratch + "/shards"
            write_photographs(Path(data), options.images)
        result |= measure(data, options.workers, options.rounds, options.seconds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
