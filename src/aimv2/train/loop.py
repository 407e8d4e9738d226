"""The training loop of every task."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import aimv2
from aimv2.batch import Batch
from aimv2.config.schema import Config, to_dict
from aimv2.data.stream.samples import TrainStream, View, validation_shards
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.errors import UsageError, WorkerLost
from aimv2.models.flops import peak_flops
from aimv2.tasks import Task, task_of
from aimv2.tasks.held_out import HeldOut
from aimv2.tasks.task import Context
from aimv2.train.best import Best
from aimv2.train.card import model_card
from aimv2.train.checkpoint import load_checkpoint, read_about, save_checkpoint
from aimv2.train.interrupt import Interrupted, StopFlag
from aimv2.train.log import Log, duration, say
from aimv2.train.parallel import Trainable
from aimv2.train.schedule import learning_rate
from aimv2.train.step import StepFigures, TrainStep
from aimv2.train.view import make_view


class Stream(Protocol):
    """Endless batches of this rank, restorable."""

    def __next__(self) -> Batch | list[Batch]: ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...

    def close(self) -> None: ...


class Trainer:
    """Model, optimizer, data and log of a run, and the loop over them.

    Attributes:
        step: optimizer steps done.
        figures: the newest validation.
        seconds: spent training, over all starts of the run.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        run: Path,
        world: World,
        compiled: bool = False,
        stream: Stream | None = None,
        task: Task | None = None,
    ) -> None:
        """``model`` has its weights already, equal on every rank. Writes nothing yet.

        ``task``: has built the model; that of ``config`` by default. ``stream``: in place of the task's.
        """
        part, accumulate = config.train.batch_size // world.size, config.train.accumulate
        if config.train.patch_budget is None and part % accumulate:
            raise UsageError(
                f"train.batch_size {config.train.batch_size} gives {world.size} ranks {part} pairs each, which do not "
                f"divide by train.accumulate {accumulate}; change one of them",
                code="mismatch",
            )
        self.config, self.world, self.run, self.tokenizer = config, world, run, tokenizer
        self.flag: StopFlag | None = None
        self.task = task or task_of(config)
        if stream is None:
            self.encoder = cast(Trainable, model).encoder.config
            view = self.task.view(self.encoder)
            self.view = view or make_view(config, self.encoder, self.task.reads_text(), world)
            self.view.teacher = self.task.stored_width()
            self.stream: Stream = self.task.stream(Context(tokenizer, world), model) or TrainStream(
                config.data, self.view, tokenizer, config.train.batch_size, config.seed, world.rank, world.size
            )
        else:
            self.stream, self.view = stream, View(0, 0, False)
        self.watched = getattr(self.stream, "watched", None)  # its data workers
        self.update = TrainStep(model, config, world, compiled, task=self.task)
        self.model, self.optimizer = self.update.model, self.update.optimizer
        self.last: StepFigures | None = None
        self.compiled = compiled
        self.step, self.seconds, self.figures = 0, 0.0, dict[str, float]()
        self.terms = [name for name, weight in self.update.objective.weights.items() if weight]
        self.window = torch.zeros(len(self.terms) + 2, dtype=torch.float64, device=world.device)  # terms, norm, tokens
        self.window_steps = 0
        self.waited, self.starved = 0.0, False  # seconds for data since the last metrics; whether that was said
        self.pairs = self.patches = 0  # since the last line of metrics, of this start of the run only
        self.first_broken: Tensor | None = None
        self.held_out: HeldOut | None = None
        self.voters: HeldOut | None = None  # of eval.knn
        self.best = Best(run, config.eval.best, world)
        self.log: Log | None = None
        self.notes = dict[str, Any]()  # of what the run is, for its checkpoints; see aimv2.train.same_run
        self.rejected: Any = getattr(self.stream, "rejected", None)  # of streams that read samples on the way

    def open_log(self) -> Log:
        """Starts writing figures into the run folder, after the step that was reached."""
        from aimv2.train.together import on_first

        given = (self.run, self.config.log, self.config.train.steps, self.step)
        again = f"make room and go on with: {self.command_to_go_on()}"
        self.log = on_first(self.world, lambda: Log(*given, True), self.run, again) or Log(*given, False)
        self.peak = peak_flops(self.world.device, self.config.train.precision) if self.world.main else None
        return self.log

    def train(self) -> None:
        """Runs to the last step (``train.stop_at``, ``train.max_hours``), saving on the way.

        Raises:
            Interrupted: a signal came; the run has been saved.
            UsageError: a loss or the gradient is not finite, the disk is full, too many bad samples, a data worker is lost.
        """
        train, every = self.config.train, self.config.eval.every
        log = self.log or self.open_log()
        last = min(train.steps, train.stop_at or train.steps)
        if last < self.step:
            raise UsageError(
                f"train.stop_at {last}: the run is at step {self.step} already; give a later one, or leave it out",
                option="train.stop_at",
                code="conflict",
            )
        self.end_if_too_many_bad(restored=True)
        self.flag = StopFlag()  # before any data worker starts
        if self.watched is not None:
            self.watched.hurry = self.flag.impatient
        self.model.train()
        if self.step < last and self.compiled:
            with self.flag.at_once(f"while compiling, after step {self.step}; go on with: {self.command_to_go_on()}"):
                self.compile()
        log.start()
        self.mark, self.marked = time.perf_counter(), self.step
        self.waited, began, before = 0.0, self.mark, self.seconds
        saved = self.step if self.step else -1
        while self.step < last:
            self.train_step(self.next_batch(saved))
            self.seconds = before + time.perf_counter() - began
            if self.step % self.check_every == 0 or self.step == last:
                self.check_finite()
            if self.step % train.log_every == 0 or self.step == train.steps:
                self.report(log)
            elif log.wants(self.step):
                log.early(self.step, self.loss())
            best = False
            if self.step == train.steps or (every and self.step % every == 0):
                self.validate(log)
                try:
                    best = self.best.improves(self.figures)
                except UsageError:  # a name that no figure has: known only now, and nothing is lost
                    self.save()
                    raise
            if best or self.step == last or (train.save_every and self.step % train.save_every == 0):
                self.save()
                saved = self.step
            if best:
                self.best.keep(self.step, self.figures)
            self.stop_if_signalled(saved, self.step == last)
            if train.max_hours is not None and self.step < last and self.is_over(began + 3600 * train.max_hours):
                log.say(
                    f"train.max_hours {train.max_hours:g}: ended at step {self.step}; go on with: {self.command_to_go_on()}"
                )
                break
        if saved != self.step:
            self.save()

    def compile(self) -> float:
        """Compiles the blocks for every shape that will come, where that is wanted, and says so; seconds that it took."""
        if not self.compiled:
            return 0.0
        from aimv2.train.compiling import warm_up, watch_compile  # torch's compiler

        began, train = time.perf_counter(), self.config.train
        with watch_compile(self.unwrapped()) as watch:
            pairs = train.batch_size // self.world.size // train.accumulate
            warm_up(self.update, pairs, self.config.data.max_tokens, self.view, watch.next_shape)
        seconds = time.perf_counter() - began
        say(f"compiled {watch.graphs} graphs in {duration(seconds)}")
        return seconds

    def next_batch(self, saved: int) -> Batch | list[Batch]:
        """The stream's. Where it has lost a data worker the run is saved, unless other ranks are amid a step."""
        start = time.perf_counter()
        try:
            batch = next(self.stream)
            self.waited += time.perf_counter() - start
            return batch
        except WorkerLost as lost:
            if self.world.size == 1 and self.step not in (0, saved):
                self.save()
                saved = self.step
            raise self.without_worker(lost, saved) from None

    def without_worker(self, lost: WorkerLost, saved: int) -> Exception:
        """Where the run stands that lost a data worker, or was signalled while one hung."""
        where = f"saved at step {saved}" if saved > 0 else "nothing was to be saved yet"
        end = f"{where}; go on with: {self.command_to_go_on()}"
        if self.flag is not None and self.flag.code:
            return Interrupted(f"stopped at step {self.step}, {end}", self.flag.code)
        return WorkerLost(f"{lost}; {end}")

    def train_step(self, batch: Batch | list[Batch]) -> None:
        """One optimizer step, and its part of the next line of metrics (kept on the device)."""
        self.last = figures = self.update(batch, self.step)
        self.step += 1
        self.window_steps += 1
        tokens = 0
        for part in batch if isinstance(batch, list) else [batch]:
            tokens += int(part.token_count) * self.world.size
            self.pairs += len(part) * self.world.size
            patches = len(part) * self.view.patches if part.places is None else part.places[..., 0].numel()
            self.patches += patches * self.world.size
        read = torch.full_like(figures.norm, tokens)  # where no term counts them: as if all ranks had as many
        means, counts = (dict(zip(figures.names, values)) for values in (figures.means, figures.counts))
        row = [*(means[term] for term in self.terms), figures.norm, counts.get("text", read)]
        self.window += torch.stack(row)
        if self.first_broken is None:
            self.first_broken = torch.zeros_like(figures.broken, dtype=torch.int64)
        new = figures.broken & (self.first_broken == 0)
        self.first_broken = torch.where(new, self.step, self.first_broken)

    def loss(self) -> float:
        """The loss of the last step; waits for the device."""
        assert self.last is not None
        weights = self.update.objective.weights
        means = zip(self.last.names, self.last.means.tolist())
        return sum(weights[name] * mean for name, mean in means if weights[name])

    def check_finite(self) -> None:
        """Stops all ranks together where a step since the last check was non-finite; its update was skipped."""
        if self.last is None or self.first_broken is None:
            return
        broken = {name: at for name, at in zip([*self.last.names, "gradient"], self.first_broken.tolist()) if at}
        if broken:
            step = min(broken.values())
            terms = ", ".join(name for name, at in broken.items() if at == step)
            raise UsageError(
                f"step {step}: non-finite loss or gradient ({terms}). The update was skipped and the last checkpoint is intact; try a "
                "lower optim.lr, a longer optim.warmup or a smaller optim.clip",
                code="non-finite",
            )

    def report(self, log: Log) -> None:
        """One line of metrics: means over the steps since the last one."""
        from aimv2.train.waits import data_wait

        start = time.perf_counter()
        window, steps = self.window.tolist(), self.window_steps
        now = time.perf_counter()
        idle, self.waited = max(self.waited - (now - start), 0.0), 0.0  # a GPU had work meanwhile, which is done now
        seconds, done = now - self.mark, self.step - self.marked
        self.mark, self.marked = now, self.step
        self.window.zero_()
        self.window_steps = 0
        *means, norm, tokens = (value / steps for value in window)
        pairs, patches = self.pairs / max(done, 1), self.patches / max(done, 1)  # per step
        self.pairs = self.patches = 0
        weights = self.update.objective.weights
        figures: dict[str, Any] = {"loss": sum(weights[term] * mean for term, mean in zip(self.terms, means))}
        figures |= {f"{term}_loss": mean for term, mean in zip(self.terms, means)}
        rate = learning_rate(self.step - 1, self.config.train.steps, self.config.optim)
        figures |= {"lr": rate, "grad_norm": norm, "pairs_per_s": pairs * done / seconds}
        figures["tokens_per_s"] = (tokens + patches) * done / seconds
        if self.peak and (flops := self.task.flops(self.model, pairs, patches / pairs, max(tokens, 1))) is not None:
            figures["mfu"] = flops * done / seconds / (self.peak * self.world.size)
        figures |= {"memory_gb": memory_gb(self.world.device), "data_wait": data_wait(self, idle / seconds)}
        if self.rejected is not None:
            self.rejected.exchange(self.world)
            figures |= {"bad_samples": len(self.rejected)} if len(self.rejected) else {}
        log.write(self.step, figures)

    def unwrapped(self) -> Trainable:
        return cast(Trainable, self.model)

    @property
    def check_every(self) -> int:
        """Steps between checks that sync the device: 1 where that is free."""
        return 1 if self.world.device.type == "cpu" else self.config.train.log_every

    def validate(self, log: Log) -> None:
        """Scores the validation split, where there is one."""
        if self.held_out is None:
            shards = validation_shards(self.config.data)
            self.held_out = self.task.held_out(shards, self.view, self.tokenizer, self.world)
        if not shards_held(self.held_out, self.world):
            return
        start = time.perf_counter()
        with self.update.evaluated():
            self.figures = self.task.validate(self.model, self.update.objective, self.held_out, self.world)
            if self.config.eval.knn:
                from aimv2.tasks.knn import knn_top1, read_voters

                if self.voters is None:
                    self.voters = read_voters(self.config, self.view, self.world.rank, self.world.size)
                self.figures |= knn_top1(self.model, self.voters, self.held_out, self.world)
        log.write(self.step, self.figures)
        self.mark += time.perf_counter() - start  # not training time

    def save(self) -> None:
        """A complete checkpoint of this step."""
        start = time.perf_counter()
        self.check_finite()
        if self.rejected is not None:
            self.rejected.exchange(self.world)
        about = {
            "step": self.step,
            "seconds": self.seconds,
            "window": [*self.window.tolist(), self.window_steps],
            "figures": self.figures,
            "version": aimv2.__version__,
            "torch": torch.__version__,
            "config": to_dict(self.config),
            "layout": [self.world.size, self.config.data.workers],
            "tokenizer": self.tokenizer.fingerprint() if self.tokenizer else None,
            "rejected": self.rejected.state() if self.rejected is not None else None,
            **self.notes,
        }
        private = {"data": self.stream.state(), "rng": torch.get_rng_state(), "scale": self.update.loss_scale.cpu()}
        held = self.flag.held() if self.flag is not None else contextlib.nullcontext()
        with held:
            save_checkpoint(
                self.run, self.step, self.model, self.optimizer, about, private, self.write_model, self.world,
                self.config.train.keep, self.update.ema,
            )  # fmt: skip
        self.mark += time.perf_counter() - start

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The model folder of this step, once its figures are on the disk."""
        if self.log is not None:
            self.log.settle()
        card = model_card(self.config, self.task.card(), self.encoder, self.step, self.figures)
        self.task.write(folder, self.model, self.task.exported(self.model, weights), card)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def stop_if_signalled(self, saved: int, now: bool) -> None:
        """After a signal on any rank, or too many bad samples: all ranks save and leave together (``now``: check, whatever the step)."""
        code, lost = self.flag.code if self.flag else 0, None
        bad = self.rejected is not None and self.rejected.too_many
        if self.world.size > 1:
            if self.step % self.check_every and not now:
                return
            lost = self.watched.lost() if self.watched is not None else None
            code = lost.exit_code if lost is not None else code
            stops = torch.tensor([float(code), float(bad)], device=self.world.device)
            code, bad = (int(value) for value in self.world.max(stops).tolist())
        if code or bad:
            if saved != self.step:
                self.save()
            self.end_if_too_many_bad()
        if lost is not None:
            raise self.without_worker(lost, self.step)
        if code:
            raise Interrupted(f"stopped at step {self.step}, saved; go on with: {self.command_to_go_on()}", code)

    def end_if_too_many_bad(self, restored: bool = False) -> None:
        """UsageError where more samples are bad than ``data.max_bad`` allows, on all ranks, unless the last step is done.

        ``restored``: known before the first step.
        """
        if self.rejected is None or not self.rejected.too_many or self.step >= self.config.train.steps:
            return
        where = "in this run so far" if restored else f"until step {self.step}, which is saved"
        raise UsageError(
            f"{self.rejected.line()}; {where}; with a larger limit: {self.command_to_go_on()} --data.max_bad N",
            option="data.max_bad",
            code="limit",
        )

    def is_over(self, end: float) -> bool:
        """Whether a time of ``time.perf_counter`` has passed, on any rank; looked at where a check syncs the device anyway."""
        if self.step % self.check_every:
            return False
        return bool(self.world.max(torch.tensor(float(time.perf_counter() >= end), device=self.world.device)))

    def command_to_go_on(self) -> str:
        """What a user types after an interruption."""
        return f"aimv2 {self.task.command} --run {shlex.quote(str(self.run))} --resume"

    def close(self) -> None:
        """Ends the data workers and the log, and puts the signal handlers back."""
        self.stream.close()
        # after a signal, impatient ones are held until the process ends
        if self.flag is not None and not self.flag.code:
            self.flag.restore()
        if self.log is not None:
            self.log.close()

    def restore(self, folder: Path, position: bool = True) -> None:
        """Goes on from a checkpoint folder, with its ``position`` in the data; before the first step only."""
        about = read_about(folder)
        private = load_checkpoint(
            folder, self.model, self.optimizer, self.world, self.config.data.workers, self.update.ema
        )
        if position:
            self.stream.restore(private["data"])
        if self.rejected is not None:
            self.rejected.restore(about.get("rejected"))
        torch.set_rng_state(private["rng"])
        self.update.loss_scale.copy_(private["scale"])
        self.step, self.seconds, self.figures = about["step"], about["seconds"], about["figures"]
        *window, self.window_steps = about["window"]
        self.window.copy_(torch.tensor(window, dtype=torch.float64))
        self.best.restore(self.step)
        every = self.config.eval.every
        if every and self.step % every == 0 and self.best.improves(self.figures):  # stopped between the two
            self.best.keep(self.step, self.figures)


def shards_held(data: HeldOut, world: World) -> bool:
    """Whether every rank holds something to validate on (they do or do not together)."""
    return bool(-world.max(torch.tensor(-float(len(data.keys) > 0), device=world.device)))


def memory_gb(device: torch.device) -> float:
    """Peak memory so far, 1e9 bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
