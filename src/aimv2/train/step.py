"""One optimizer step: forward, backward, clip, update. Nothing in it waits for the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aimv2.batch import Batch, split_batch
from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.models.matmul import fast_matmul
from aimv2.objectives import Objective
from aimv2.tasks import Task, task_of
from aimv2.train.ema import Ema
from aimv2.train.optim import make_optimizer, release_encoder, step_if_finite, zero_frozen_grads
from aimv2.train.parallel import Trainable, layout_of, parallelize
from aimv2.train.schedule import learning_rate

FIRST_SCALE, SCALE_EVERY = 2.0**15, 1000  # of the loss in fp16


@dataclass
class StepFigures:
    """Figures of a step, still on the device and equal on every rank.

    Attributes:
        names: terms of the objective.
        means: float64 [terms], sum / count of each term over all ranks.
        counts: float64 [terms].
        norm: float64 [], the gradient's norm before clipping.
        broken: bool [terms + 1], which terms and (last) whether the gradient were not finite; then nothing was updated.
            In fp16 the gradient is never called broken: the loss was scaled too much, and is scaled less from then on.
    """

    names: list[str]
    means: Tensor
    counts: Tensor
    norm: Tensor
    broken: Tensor


class TrainStep:
    """A model made ready for the machine, its optimizer, and the step over both."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        world: World,
        compiled: bool,
        objective: Objective | None = None,
        task: Task | None = None,
    ) -> None:
        """``task`` and ``objective``: the ones of ``config`` and of the task by default."""
        self.config, self.world = config, world
        self.task = task or task_of(config)
        self.objective: Objective = objective or self.task.objective(model)
        self.patches = self.image_size = 0
        encoder = getattr(model, "encoder", None)  # heads on features have none; they are never split or warmed up
        if encoder is not None and encoder.config.image_size:  # native batches come split already
            self.image_size, self.patches = encoder.config.image_size, encoder.config.patches
        fast_matmul(world.device)
        self.model: nn.Module = model.to(world.device)
        parallelize(cast(Trainable, model), config, world, compiled)
        self.reshard = config.parallel.reshard and layout_of(config.parallel, world.size)[1] > 1
        self.optimizer = make_optimizer(self.model, config.optim, self.task.parameter_groups(self.model, config.optim))
        self.ema = Ema(self.model, config.train.ema) if config.train.ema else None
        # of the loss, in fp16: (factor, steps since it last changed); kept on the device
        start = FIRST_SCALE if config.train.precision == "fp16" else 1.0
        self.loss_scale = torch.tensor([start, 0.0], device=world.device)

    def __call__(self, batch: Batch | list[Batch], step: int) -> StepFigures:
        """Optimizer step number ``step`` on this rank's part of the global batch: one batch to split, or micro-batches."""
        config, world = self.config, self.world
        parts = batch if isinstance(batch, list) else split_batch(batch, config.train.accumulate, self.patches)
        micro = [part.to(world.device) for part in parts]
        names = list(self.objective.counts(micro[0]))
        known = [torch.stack(list(self.objective.counts(part).values())) for part in micro]
        counts = world.sum(torch.stack(known).sum(0).double())  # [terms]
        sums = torch.zeros_like(counts)
        frozen = self.freeze(step)
        with self.cast_once():
            for index, part in enumerate(micro):
                if world.size > 1:
                    self.sync(index == len(micro) - 1)
                sums += self.backward(part, counts)
        if frozen:
            zero_frozen_grads(self.model.encoder)  # type: ignore[arg-type]
        means = world.sum(sums) / counts.clamp(min=1)
        norm = self.clip()
        broken = ~torch.isfinite(torch.cat([means, norm[None]]))
        rate = partial(learning_rate, step, config.train.steps, config.optim)
        step_if_finite(self.optimizer, broken.any().float(), rate, frozen)
        self.task.after_step(self.model)
        if self.ema is not None:
            self.ema.update()
        if config.train.precision == "fp16":
            self.adapt_scale(broken[-1])
            broken = torch.cat([broken[:-1], torch.zeros_like(broken[-1:])])
            norm = torch.where(torch.isfinite(norm), norm, torch.zeros_like(norm))
        self.optimizer.zero_grad(set_to_none=True)
        return StepFigures(names, means, counts, norm, broken)

    def sync(self, last: bool) -> None:
        """Sums gradients over ranks after the last micro-batch only; where blocks keep gathered weights, they do until then."""
        model = cast(Any, self.model)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or self.reshard)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model as it is validated: with the average's weights, where there is one, and gathered in fp32."""
        with contextlib.ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            if self.world.size > 1:
                from aimv2.train.sharding import gathered_in_fp32

                stack.enter_context(gathered_in_fp32(self.model))
            yield

    def freeze(self, step: int) -> bool:
        """Sets and returns whether the encoder is frozen in step ``step``; a frozen one keeps nothing for the backward pass."""
        until = self.config.optim.freeze_encoder
        if not until:
            return False
        cast(Trainable, self.model).encoder.frozen = step < until
        if step == until:
            release_encoder(self.optimizer)
        return step < until

    def backward(self, batch: Batch, counts: Tensor) -> Tensor:
        """Adds a micro-batch's gradient of ``sum of weight * sum / global count``; its sums, float64 [terms]."""
        with self.autocast():
            terms = self.objective(self.model, batch)
        totals = {name: total.float() for name, (total, _) in terms.items()}
        means = [total / count for total, count in zip(totals.values(), counts.clamp(min=1).float())]
        loss = torch.stack([self.objective.weights[name] * mean for name, mean in zip(totals, means)]).sum()
        (loss * self.loss_scale[0]).backward()  # FSDP2 sums over ranks
        return torch.stack(list(totals.values())).detach().double()

    def cast_once(self) -> contextlib.AbstractContextManager[Any]:
        """Casts the weights of linears for all micro-batches of a step, in half precision; FSDP2 gathers them so."""
        if self.world.size > 1 or self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        from aimv2.train.half import half_weights

        return half_weights(self.model, torch.bfloat16 if self.config.train.precision == "bf16" else torch.float16)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Half-precision matmuls where the config says so; weights, residual stream, targets and losses stay fp32."""
        if self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        half = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float16
        return torch.autocast(self.world.device.type, half)

    def adapt_scale(self, overflowed: Tensor) -> None:
        """Halves the scale of the loss where the gradient overflowed, doubles it after SCALE_EVERY steps without."""
        factor, since = self.loss_scale
        grows = since + 1 >= SCALE_EVERY
        factor = torch.where(overflowed, factor / 2, torch.where(grows, factor * 2, factor)).clamp(1.0, 2.0**24)
        self.loss_scale = torch.stack([factor, torch.where(overflowed | grows, torch.zeros_like(since), since + 1)])

    def clip(self) -> Tensor:
        """Divides the gradient by the loss scale and clips it to ``optim.clip``; its norm before, float64 []."""
        limit = self.config.optim.clip or math.inf
        if self.config.train.precision == "fp16":
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self.loss_scale[0])
        norm = self.task.clip(self.model, limit)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).double()
