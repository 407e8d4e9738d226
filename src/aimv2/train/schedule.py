"""The learning rate of each step: a pure function (AIMV2, Table A1; the released training code)."""

import math

from aimv2.config.schema import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig, peak: float | None = None) -> float:
    """The rate of optimizer step ``step`` (0 .. steps - 1).

    Linear warm-up from ``start_lr``, then: *cosine* to ``min_lr``; *half-cosine*, ``lr * (1 + cos(pi t / 2)) / 2``, half
    the peak at the end; *cooldown*, linear to ``min_lr``; *constant*. ``peak`` replaces ``optim.lr``.
    """
    peak, warmup = config.lr if peak is None else peak, min(config.warmup, steps)
    if step < warmup:
        return config.start_lr + (peak - config.start_lr) * step / warmup
    t = (step - warmup) / max(steps - warmup, 1)
    if config.schedule == "cosine":
        return config.min_lr + (peak - config.min_lr) * (1 + math.cos(math.pi * t)) / 2
    if config.schedule == "half-cosine":
        return peak * (1 + math.cos(math.pi * t / 2)) / 2
    if config.schedule == "cooldown":
        return peak + (config.min_lr - peak) * t
    return peak
