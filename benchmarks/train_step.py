"""Our training step beside the plain one, interleaved: images a second, peak memory, and their ratios, as one JSON object.

    python benchmarks/train_step.py [--rounds 7] [--steps 3] [--pairs 8] [--precision fp32 bf16] [--checkpointing full selective]

Each step lives in a process of its own (so that its peak memory is its own) and they take turns: only ratios of
interleaved rounds mean anything on a shared machine. Both see the same pairs in the same order. On a GPU where there is one:
``--pairs 256`` fills it. ``--checkpointing`` adds our step with recomputed blocks: its speed and memory relative to the one without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from plain_step import SMALL
from turns import in_turns

SHORTEST, LONGEST, BATCHES = 8, 39, 6


def make_pairs(torch: Any, pairs: int, shape: Any) -> list[tuple[Any, list[list[int]], Any]]:
    """Images, captions of 8 to 39 tokens and prefix lengths of a few batches."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        images = torch.randint(0, 256, (pairs, 3, shape.image, shape.image), dtype=torch.uint8, generator=draw)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (pairs,), generator=draw).tolist()
        captions = [torch.randint(2, shape.vocabulary, (n,), generator=draw).tolist() for n in lengths]
        batches.append((images, captions, torch.randint(1, shape.patches, (pairs,), generator=draw)))
    return batches


def plain_path(precision: str, pairs: int, device: str, shape: Any = SMALL) -> tuple[Any, list[Any]]:
    """The plain step and its batches."""
    import torch

    from plain_step import TEXT, PlainStep

    inputs = []
    for images, captions, prefix in make_pairs(torch, pairs, shape):
        text = torch.zeros(pairs, TEXT, dtype=torch.int64)
        for row, caption in enumerate(captions):
            text[row, : len(caption)] = torch.tensor(caption)
        inputs.append((images, text, torch.tensor([len(c) for c in captions]), prefix))
    torch.set_default_device(device)
    step = PlainStep(precision, shape)
    return (lambda batch: step(*batch)), inputs


def our_path(
    precision: str, pairs: int, device: str, shape: Any = SMALL, make: Callable[[], Any] | None = None, **train: Any
) -> tuple[Any, list[Any]]:
    """Our step, as the trainer runs it, and its batches.

    ``make``: of another model for such images and captions; ``train``: more of that section of the configuration.
    """
    import torch

    from aimv2.batch import make_batch
    from aimv2.config.schema import Config
    from aimv2.distributed import World
    from aimv2.train.compiling import want_compile
    from aimv2.train.step import TrainStep

    config = Config()
    for name, value in {"precision": precision, **train}.items():
        setattr(config.train, name, value)
    config.optim.warmup = 10
    world = World(0, 1, torch.device(device))
    compiled, why_not = want_compile(config.train, world)
    if why_not:
        print(why_not, file=sys.stderr, flush=True)
    model = make() if make else our_model(shape)
    step = TrainStep(model, config, world, compiled)
    model.train()
    inputs = [
        make_batch(images, captions, prefix, shape.patches)
        for images, captions, prefix in make_pairs(torch, pairs, shape)
    ]
    return (lambda batch: step(batch, 1).means), inputs


def recomputing_path(precision: str, pairs: int, device: str, mode: str) -> tuple[Any, list[Any]]:
    """Our step with recomputed blocks."""
    return our_path(precision, pairs, device, checkpointing=mode)


def our_model(shape: Any, seed: int | None = 0) -> Any:
    """The same shape in our classes; without a seed also on the meta device."""
    from aimv2.models.create import create_model

    trunk = {"width": shape.width, "heads": shape.heads, "hidden": shape.hidden}
    decoder = {"depth": shape.decoder_blocks, "vocab_size": shape.vocabulary, **trunk}
    return create_model(
        "aimv2-small-patch14-224" if shape.patch == 14 else "aimv2-tiny-patch8-32",
        decoder=True,
        seed=seed,
        image_size=shape.image,
        depth=shape.encoder_blocks,
        **trunk,
        **{f"decoder_{name}": value for name, value in decoder.items()},
    )


def measure(precision: str, rounds: int, steps: int, pairs: int, device: str, modes: list[str]) -> dict[str, Any]:
    """All paths in turns."""
    paths: dict[str, Any] = {
        "plain": (plain_path, (precision, pairs, device)),
        "ours": (our_path, (precision, pairs, device)),
        **{mode: (recomputing_path, (precision, pairs, device, mode)) for mode in modes},
    }
    seconds, memory, missing = in_turns(paths, rounds, steps)
    assert not missing, missing
    rate = {path: pairs / statistics.median(values) for path, values in seconds.items()}
    return {
        "images_per_s": rate["ours"],
        "plain_images_per_s": rate["plain"],
        "ratio": statistics.median(p / o for p, o in zip(seconds["plain"], seconds["ours"])),
        "ratio_of_rounds": [round(p / o, 3) for p, o in zip(seconds["plain"], seconds["ours"])],
        "peak_memory_gb": memory["ours"],
        "plain_peak_memory_gb": memory["plain"],
        "memory_ratio": memory["ours"] / memory["plain"],
        "checkpointing": {
            mode: {
                "images_per_s": rate[mode],
                "speed_ratio": statistics.median(o / r for o, r in zip(seconds["ours"], seconds[mode])),
                "peak_memory_gb": memory[mode],
                "memory_ratio": memory[mode] / memory["ours"],
            }
            for mode in modes
        },
    }


def allocator() -> str:
    """The memory allocator in use: the C library's, unless another is preloaded."""
    import os
    import platform

    return os.environ.get("LD_PRELOAD") or " ".join(platform.libc_ver()) + " malloc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 7 for a figure to quote")
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--checkpointing", nargs="*", choices=("full", "selective"), default=[], help="further modes")
    options = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": device,
        "pairs": options.pairs,
        "rounds": options.rounds,
        "steps_a_round": options.steps,
    }
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "allocator": allocator()}
    for precision in options.precision:
        result[precision] = measure(
            precision, options.rounds, options.steps, options.pairs, device, options.checkpointing
        )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
