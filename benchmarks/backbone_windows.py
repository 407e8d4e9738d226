"""Attention in windows compared with attention over the whole map: seconds, peak memory and their ratios, as one JSON object.

    python benchmarks/backbone_windows.py [--model aimv2-large-patch14-224] [--depth 4] [--side 1024] [--windows 16 24 32]
        [--global-blocks 1] [--rounds 3] [--train] [--threads 1] [--device cpu]

Every way of attention runs the same random encoder on the same image, in turns: only ratios of interleaved rounds mean anything on
a shared machine. ``--depth`` cuts the encoder; one global block of four has the proportion that ViTDet has, four of 24. ``--train``
adds a backward pass. Peak memory is that of the device; on a CPU the growth of resident memory above the model's, in a process of its
own for each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import statistics
import sys
import time
from typing import Any

import torch

from aimv2.interop.backbone import Aimv2Backbone
from aimv2.interop.backbone_config import Aimv2BackboneConfig
from aimv2.models.sizes import model_config


def build(given: argparse.Namespace) -> Aimv2Backbone:
    """The encoder cut to its first blocks, without attention in windows."""
    shape, _ = model_config(given.model, depth=given.depth)
    torch.manual_seed(0)
    model = Aimv2Backbone(Aimv2BackboneConfig(shape, feature_form="maps", global_blocks=given.global_blocks))
    return model.to(given.device).train(given.train)


def choose(model: Aimv2Backbone, window: int, blocks: int) -> None:
    """Set the side of the windows; 0: attention over the whole map."""
    from aimv2.models.pyramid import spread

    model.config.window = window
    model.global_blocks = spread(blocks, len(model.encoder.blocks)) if window else []


def run(model: Aimv2Backbone, images: torch.Tensor, train: bool) -> float:
    """Seconds of one pass."""
    began = time.perf_counter()
    with torch.set_grad_enabled(train):
        (found,) = model(images).feature_maps
        if train:
            found.square().mean().backward()
            model.zero_grad()
        found[0, 0, 0, 0].item()  # waits for the device
    return time.perf_counter() - began


def peak(given: argparse.Namespace, window: int, send: Any) -> None:
    """Bytes at the highest point of one pass above those before it."""
    torch.set_num_threads(given.threads)
    model, images = build(given), torch.randn(1, 3, given.side, given.side, device=given.device)
    choose(model, window, given.global_blocks)
    if given.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(model, images, given.train)
        send.send(torch.cuda.max_memory_allocated() - before)
        return
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(model, images, given.train)
    send.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="aimv2-large-patch14-224")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 24, 32])
    parser.add_argument("--global-blocks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    memory = {}
    for window in [0, *given.windows]:
        receive, send = mp.get_context("spawn").Pipe(duplex=False)
        process = mp.get_context("spawn").Process(target=peak, args=(given, window, send))
        process.start()
        memory[window] = receive.recv()
        process.join()
    model, images = build(given), torch.randn(1, 3, given.side, given.side, device=given.device)
    seconds: dict[int, list[float]] = {window: [] for window in memory}
    for turn in range(given.rounds + 1):
        for window, found in seconds.items():
            choose(model, window, given.global_blocks)
            taken = run(model, images, given.train)
            if turn:  # the first warms up
                found.append(taken)
    result: dict[str, Any] = {**vars(given), "grid": -(-given.side // model.config.patch_size)}
    for window, found in seconds.items():
        ratio = statistics.median(whole / one for whole, one in zip(seconds[0], found))
        result[f"window_{window}" if window else "whole_map"] = {
            "seconds": round(statistics.median(found), 3),
            "times_faster": round(ratio, 2),
            "peak_MB": round(memory[window] / 1e6, 1),
            "times_less_memory": round(memory[0] / max(memory[window], 1), 2),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
