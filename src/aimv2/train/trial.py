"""A dry run: everything is built, a few steps run on one batch, and nothing is written."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from aimv2.config.schema import Config
from aimv2.distributed import free_memory, join_world
from aimv2.io import say
from aimv2.progress import tracked
from aimv2.train import defaults
from aimv2.train.launch import build_trainer, count, rate_curve
from aimv2.train.loop import memory_gb
from aimv2.train.outlook import disk_room, too_large, too_long, visits

TRIED = 3  # steps; the fastest is reported


def try_one_step(config: Config, most: int | None = None) -> dict[str, Any]:
    """Builds everything, runs TRIED steps on one batch (the first one warms up) and writes nothing.

    ``most``: see :func:`aimv2.train.launch.start`.
    """
    world = join_world()
    free = free_memory(world.device)
    with tempfile.TemporaryDirectory() as scratch:
        config.data.index_dir = config.data.index_dir or str(Path(scratch) / "index")
        config.data.features = None  # nothing is written: the encoder runs
        trainer = build_trainer(config, Path(scratch), world)
        try:
            batch = next(trainer.stream)
            trainer.model.train()
            compile_seconds = trainer.compile()
            taken = []
            for _ in tracked(range(TRIED), "trying steps", TRIED):
                begin = time.perf_counter()
                trainer.train_step(batch)
                trainer.check_finite()
                taken.append(time.perf_counter() - begin)
            seconds = min(taken)
        finally:
            trainer.close()
    parts = batch if isinstance(batch, list) else [batch]
    tokens, samples = sum(int(part.token_count) for part in parts), getattr(trainer.stream, "samples")  # noqa: B009
    for line in (
        *(defaults.too_many_visits(config, samples, most) if most else ()),
        *too_long(config, seconds * config.train.steps / 3600),
        *too_large(memory_gb(world.device), world.device),
    ):
        say(line)
    encoder = count(trainer.unwrapped().encoder)
    return {
        "encoder_parameters": encoder,
        "decoder_parameters": count(trainer.model) - encoder,
        "ranks": world.size,
        "batch_size": config.train.batch_size if config.train.patch_budget is None else None,
        "patches_a_step": config.train.patch_budget or config.train.batch_size * trainer.view.patches,
        "tokens_a_step": tokens * world.size,
        "memory_gb": memory_gb(world.device),
        "memory_free_gb": free,
        **disk_room(config, trainer.model),
        "compile_seconds": compile_seconds,
        "seconds_a_step": seconds,
        "expected_hours": seconds * config.train.steps / 3600,
        **visits(config, samples, sum(map(len, parts)) * world.size),
        "learning_rate": rate_curve(config),
    }
