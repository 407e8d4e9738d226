"""Ways to batch images of their own size, one training step each in turns: patches and pairs a second, as one JSON object.

    python benchmarks/native_train.py [--rounds 7] [--areas 6 8] [--budget 512] [--precision fp32 bf16]

Every path takes an optimizer step on the same pairs, one mini-batch of each area of ``budget`` patches:

- ``strips``: a mini-batch of one area at a time (the paper's way), compiled where a compiler is found, as the trainer runs it;
- ``strips_eager``: the same without torch.compile;
- ``packed``: all mini-batches in one row without padding, eager, as the trainer runs it (its lengths are new each step);
- ``padded``: all images in one mini-batch, padded to the largest area, eager: what one does without either.

Expected before measuring, in fp32 and bf16 alike: packed over strips_eager 1.0 to 1.1 (no padding, one pass instead of one for
each area, but rows are gathered for attention), packed over strips 0.8 to 1.0 (what compiling gains is lost), padded over
strips_eager 0.35 to 0.5 (2.3 times the rows, and attention over 256 places for each image).
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from turns import in_turns

PATHS = ("strips", "strips_eager", "packed", "padded")
SHAPES = ((4, 3), (3, 4), (3, 2), (1, 1), (16, 9))  # width to height, as photographs come
SHORTEST, LONGEST, VOCABULARY, INPUTS = 8, 39, 32_000, 2
MODEL = {"width": 384, "depth": 6, "heads": 6, "hidden": 1024, "min_patches": 1}
DECODER = {"width": 384, "depth": 3, "heads": 6, "hidden": 1024, "vocab_size": VOCABULARY}


def make_inputs(torch: Any, patch: int, areas: list[int], budget: int, path: str) -> list[Any]:
    """For each input the micro-batches of a step; every path gets the same pairs."""
    from aimv2.data.stream.native import fit_area, make_native_batch, pack

    draw = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    inputs = []
    for _ in range(INPUTS):
        pairs: dict[int, list[Any]] = {area: [] for area in areas}
        for area in areas:
            for _ in range(budget // area):
                columns, rows = fit_area(*SHAPES[some(0, len(SHAPES))], area)
                size = (3, rows * patch, columns * patch)
                image = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
                caption = torch.randint(2, VOCABULARY, (some(SHORTEST, LONGEST + 1),), generator=draw).tolist()
                pairs[area].append((image, caption, some(1, columns * rows)))
        if path == "padded":
            every = [pair for area in areas for pair in pairs[area]]
            inputs.append([make_native_batch(*zip(*every), patch, max(areas))])
            continue
        strips = [make_native_batch(*zip(*pairs[area]), patch, area) for area in areas]
        inputs.append([pack(strips)] if path == "packed" else strips)
    return inputs


def one_path(path: str, precision: str, areas: list[int], budget: int) -> tuple[Any, list[Any]]:
    """The trainer's step and its inputs."""
    import torch

    from aimv2.config.schema import Config
    from aimv2.distributed import World
    from aimv2.models.create import create_model
    from aimv2.train.compiling import want_compile
    from aimv2.train.step import TrainStep

    shape: dict[str, Any] = {**MODEL, **{f"decoder_{key}": value for key, value in DECODER.items()}}
    model = create_model("aimv2-base-patch14-native", decoder=True, seed=0, max_patches=max(areas), **shape)
    config = Config()
    config.train.precision = precision  # type: ignore[assignment]
    config.train.patch_budget = budget * len(areas)
    config.optim.warmup = 10
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    compiled = path == "strips" and want_compile(config.train, world)[0]
    step = TrainStep(model, config, world, compiled)
    model.train()
    inputs = make_inputs(torch, model.encoder.config.patch_size, areas, budget, path)
    return (lambda batches: step(batches, 1).means), inputs


def measure(
    precision: str, areas: list[int], budget: int, rounds: int, steps: int, patches: float, pairs: int
) -> dict[str, Any]:
    """All paths in turns, on steps of so many real patches and pairs; ratios of speed, the median over rounds."""
    paths = {path: (one_path, (path, precision, areas, budget)) for path in PATHS}
    seconds, memory, missing = in_turns(paths, rounds, steps)  # type: ignore[arg-type]
    assert not missing, missing

    def ratio(path: str, than: str) -> dict[str, Any]:
        found = [slow / fast for slow, fast in zip(seconds[than], seconds[path])]
        return {"ratio": statistics.median(found), "ratio_of_rounds": [round(one, 3) for one in found]}

    return {
        **{
            path: {
                "patches_per_s": patches / statistics.median(seconds[path]),
                "pairs_per_s": pairs / statistics.median(seconds[path]),
                "peak_memory_gb": memory[path],
            }
            for path in PATHS
        },
        "packed_over_strips": ratio("packed", "strips"),
        "packed_over_strips_eager": ratio("packed", "strips_eager"),
        "padded_over_strips_eager": ratio("padded", "strips_eager"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 7 for a figure to quote")
    parser.add_argument("--steps", type=int, default=1, help="steps a round")
    parser.add_argument("--areas", type=int, nargs=2, default=(6, 8), help="the least and the largest n of 2^n patches")
    parser.add_argument("--budget", type=int, default=512, help="patches of a mini-batch")
    parser.add_argument("--precision", nargs="+", default=("fp32", "bf16"))
    options = parser.parse_args()
    import torch

    areas = [2**n for n in range(options.areas[0], options.areas[1] + 1)]
    strips = make_inputs(torch, 1, areas, options.budget, "strips")
    real = sum(int(batch.image_len.sum()) for batches in strips for batch in batches) / INPUTS
    pairs = sum(options.budget // area for area in areas)
    result: dict[str, Any] = {"areas": areas, "budget": options.budget, "pairs": pairs, "patches": real}
    result |= {"rounds": options.rounds, "steps_a_round": options.steps}
    result["share_of_padding"] = {
        "strips": 1 - real / (options.budget * len(areas)),
        "padded": 1 - real / (pairs * max(areas)),
    }
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for precision in options.precision:
        result[precision] = measure(precision, areas, options.budget, options.rounds, options.steps, real, pairs)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
