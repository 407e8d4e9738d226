"""What all 14 heads of the probe's grid cost beside one head, on cached features and behind a trunk that runs each time.

    python benchmarks/probe_sweep.py [--rounds 7] [--model aimv2-base-patch14-224] [--images 8] [--cached 64]

Steps of one head, of 14 heads in one sweep, and of 14 plain probes one after another take turns. ``cached`` reads features
of the model's size from memory; ``augmented`` runs the frozen trunk on the batch first. Prints JSON: seconds a step, medians,
and ratios to one head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from aimv2.batch import make_batch
from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.evals.probe import ProbeSettings, SweepTask, fresh_sweep
from aimv2.features.frozen import of_encoder
from aimv2.models.create import create_model
from aimv2.models.probe_head import AttentiveProbe
from aimv2.train.step import TrainStep

CLASSES = 1000


def stepper(
    settings: ProbeSettings, width: int, trunk: object, batch: object, device: torch.device
) -> Callable[[], None]:
    """A training step of a sweep in the one loop's step."""
    sweep = fresh_sweep(width, CLASSES, settings, 0, device, trunk)
    config = Config()
    config.train.precision, config.optim.clip = "fp32", 3.0
    step = TrainStep(sweep, config, World(0, 1, device), False, task=SweepTask(config, sweep))
    sweep.train()
    return lambda: step(batch, 0)  # type: ignore[arg-type,return-value]


def plain(settings: ProbeSettings, width: int, features: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """What one writes first: every head a module of its own, trained one after the other."""
    heads = [AttentiveProbe(width, CLASSES).to(features.device) for _ in settings.trials()]
    made = [
        torch.optim.AdamW(head.parameters(), trial.lr, weight_decay=trial.weight_decay)
        for head, trial in zip(heads, settings.trials())
    ]

    def run() -> None:
        for head, optimizer in zip(heads, made):
            loss = F.cross_entropy(head(features.float()), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 3.0)
            optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="aimv2-base-patch14-224")
    parser.add_argument("--images", type=int, default=8, help="of a batch behind the trunk")
    parser.add_argument("--cached", type=int, default=64, help="images of a batch of cached features")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = create_model(options.model, seed=0).to(device)
    frozen = of_encoder(options.model, encoder)  # type: ignore[arg-type]
    width, patches = encoder.config.width, encoder.config.patches  # type: ignore[union-attr]
    one, all_ = ProbeSettings(rates=(1e-3,), decays=(0.05,)), ProbeSettings()
    features = torch.randn(options.cached, 1, patches, width).half()
    images = torch.randint(256, (options.images, 3, frozen.image_size, frozen.image_size), dtype=torch.uint8)
    cached, seen = (
        make_batch(None, [[]] * len(x), None, 0, labels=torch.randint(CLASSES, (len(x),)), features=x)
        for x in (features, images)
    )
    paths: dict[str, Callable[[], None]] = {
        "cached_1": stepper(one, width, None, cached, device),
        "cached_14": stepper(all_, width, None, cached, device),
        "cached_14_plain": plain(all_, width, features[:, 0].to(device), cached.labels.to(device)),
        "augmented_1": stepper(one, width, frozen, seen, device),
        "augmented_14": stepper(all_, width, frozen, seen, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(options.rounds + 1):
        for name, run in paths.items():
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "cached_14_to_1": medians["cached_14"] / medians["cached_1"],
        "cached_plain_14_to_1": medians["cached_14_plain"] / medians["cached_1"],
        "augmented_14_to_1": medians["augmented_14"] / medians["augmented_1"],
    }
    print(
        json.dumps(
            {
                "model": options.model,
                "device": device.type,
                "seconds_a_step": medians,
                "ratios": ratios,
                "rounds": options.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
