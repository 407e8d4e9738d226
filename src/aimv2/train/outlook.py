"""What a dry run says of a run besides its step: visits of the data, room in memory and on the disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from aimv2.config.schema import Config
from aimv2.data.shards.format import scan_shard
from aimv2.data.stream.samples import validation_shards

VALUE = 4  # bytes of a weight, a moment or an average


def visits(config: Config, samples: int, pairs: float) -> dict[str, Any]:
    """How much data there is, and how often a run sees it.

    Args:
        config: of the run.
        samples: of the training data.
        pairs: of a step, over all ranks.
    """
    return {
        "samples": samples,
        "validation_samples": sum(len(scan_shard(tar).keys) for tar in validation_shards(config.data)),
        "visits_a_sample": config.train.steps * pairs / max(samples, 1),
    }


def disk_room(config: Config, model: nn.Module) -> dict[str, Any]:
    """Bytes (1e9) of the checkpoints of a run, and those that are free where it goes."""
    train, sizes = config.train, [(part.numel(), part.requires_grad) for part in model.parameters()]
    weights, trained = sum(count for count, _ in sizes), sum(count for count, learns in sizes if learns)
    one = VALUE * (2 * weights + 2 * trained + (trained if train.ema else 0))  # the model's folder and the state
    saves = math.ceil(train.steps / train.save_every) if train.save_every else 1
    kept = train.keep + 1 + (config.eval.best is not None) if train.keep else saves  # one more while it is written
    folder = Path(config.run or ".").expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return {
        "checkpoints_gb": one * min(kept, saves) / 1e9,
        "disk_free_gb": shutil.disk_usage(there).free / 1e9,
    }
