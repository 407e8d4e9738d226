"""What a run learns: the one interface that the loop, the run folder and the report know of a task.

A task is one file here (``TASK = ITS_CLASS``), or an installed entry point of the group ``aimv2.tasks`` that names its class; its
losses are an objective. It is made anew for each run and may keep what it builds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from aimv2.config.schema import Config, OptimConfig
from aimv2.data.shards.format import Parts
from aimv2.data.stream.samples import View
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.interop.model_folder import write_model
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.tasks.held_out import HeldOut, read_held_out


@dataclass(frozen=True)
class Context:
    """What a model is built and fed with.

    Attributes:
        tokenizer: of the run; None where the task reads no captions.
        world: the ranks.
        resuming: the run folder holds a checkpoint, which fills the model later.
    """

    tokenizer: Tokenizer | None
    world: World
    resuming: bool = False


class CardText(NamedTuple):
    """A task's part of a model card: what the model is, what it learned from, how it is loaded."""

    what: str
    learned: str
    use: str


class Task(ABC):
    """A task with a model of its own; everything but ``build``, ``objective`` and ``validate`` has a default.

    Attributes:
        options: dataclass of its keys in the section ``objective``, with a static ``check(config)``: UsageError where values
            exclude each other. One that extends a built-in task's options reads those too.
        may_change: configuration keys that may differ when a run resumes.
        reads: of ``init``, ``optim.fresh_decoder``, ``optim.lora`` and ``data.features`` those that it honours; the others are
            refused.
        figures: names of what ``validate`` gives, ``*`` for any ending; (): known once it has run.
        cools: whether ``optim.schedule=cooldown`` may continue a run of it.
        start_text: token that its captions begin with, which a newly trained tokenizer gets; None: none.
        no_captions: end of the message where captions are missing.
        compiles: whether its blocks may be compiled.
        demo: whether it may train on the demo's scenes where no data are given.
        command: that goes on with its runs.
    """

    options: ClassVar[type[Any]]
    may_change: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    figures: ClassVar[tuple[str, ...]] = ()
    cools: ClassVar[bool] = False
    start_text: ClassVar[str | None] = None
    no_captions: ClassVar[str] = ""
    compiles: ClassVar[bool] = True
    demo: ClassVar[bool] = True
    command: ClassVar[str] = "pretrain"

    def __init__(self, config: Config) -> None:
        self.config = config

    # ---- before the run ----

    def check(self) -> None:  # noqa: B027
        """Raises UsageError where a new run can't start with these values, whatever its data are."""

    def check_world(self, world: World) -> None:  # noqa: B027
        """Raises UsageError where it can't run on so many ranks."""

    def check_samples(self, samples: Sequence[Parts]) -> None:  # noqa: B027
        """Raises UsageError where the first samples of the training data are not what it learns from."""

    def defaults(self, pairs: int, kind: Any, given: set[str]) -> dict[str, Any] | None:
        """Values of a run without a recipe on ``pairs`` samples; None: those of pre-training. See :mod:`aimv2.train.defaults`."""
        return None

    def reads_text(self) -> bool:
        """Whether it trains on captions."""
        return True

    def models(self) -> dict[str, str]:
        """Its options that name a model: ``{key in objective: value}``. Local paths become absolute, and are not cleared."""
        return {}

    def tokenizer_home(self) -> Path | None:
        """A folder whose tokenizer a new run takes; None: one is trained on the captions."""
        return None

    def ready(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer as captions are read with it."""
        return tokenizer

    def stored_width(self) -> int:
        """Width of the teacher's features that the training shards bring along; 0: none."""
        return 0

    def encoder_config(self, vocab_size: int) -> EncoderConfig:
        """Shape of the encoder that it would build, known without its weights: by default that of the section ``model``."""
        from aimv2.tasks.pretrain import shapes

        return shapes(self.config, vocab_size)[0]

    # ---- model and data ----

    @abstractmethod
    def build(self, context: Context) -> nn.Module:
        """The model with its first weights, equal on every rank."""

    @abstractmethod
    def objective(self, model: nn.Module) -> Objective:
        """The losses of a model that it built."""

    def view(self, encoder: EncoderConfig) -> View | None:
        """What it takes of a sample; None: as the options of the data say."""
        return None

    def stream(self, context: Context, model: nn.Module) -> Any:
        """Endless batches of another form than images and captions, restorable; None: the common stream."""
        return None

    def parameter_groups(self, model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]] | None:
        """Optimizer groups with ``params``, ``weight_decay``, ``scale`` and perhaps ``peak``; None: by kind, layer and encoder."""
        return None

    # ---- the step ----

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Clips the gradient to a norm of ``limit``; the norm before, []."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    def after_step(self, model: nn.Module) -> None:  # noqa: B027
        """Runs after each update, without waiting for the device."""

    def flops(self, model: nn.Module, pairs: float, patches: float, tokens: float) -> float | None:
        """FLOPs of a step of ``pairs`` images with ``patches`` patches each and ``tokens`` tokens in all; None: not known."""
        return None

    # ---- what comes of it ----

    def held_out(self, shards: Sequence[Path], view: View, tokenizer: Tokenizer | None, world: World) -> HeldOut:
        """The held-out samples of this rank, in memory."""
        count, tokens = self.config.eval.samples, self.config.data.max_tokens
        return read_held_out(shards, view, tokenizer, count, tokens, world.rank, world.size)

    @abstractmethod
    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """Figures on the held-out samples of all ranks, by name (``val_...``)."""

    def exported(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model folder keeps of the trained weights."""
        return weights

    def write(self, folder: Path, model: nn.Module, weights: dict[str, Tensor], card: str) -> None:
        """Writes the model folder; ``weights``: what :meth:`exported` gave."""
        write_model(folder, model.config_dict(), weights, card)  # type: ignore[operator]

    def card(self) -> CardText:
        """Its part of the model card."""
        name = self.config.objective.name
        return CardText(f"A model of objective.name={name}", name, "`aimv2.load_model(FOLDER)` (encoder)")

    def about(self) -> dict[str, Any]:
        """What ``summary.json`` says of where the model comes from, apart from data and seed."""
        return {}

    def final_evaluation(
        self, run: Path, folder: Path, tokenizer: Tokenizer | None, device: torch.device
    ) -> dict[str, Any]:
        """Figures of a finished run for ``summary.json``; on rank 0 only, outside the process group.

        Args:
            run: the run folder.
            folder: of the last model.
            tokenizer: of the run.
            device: where to evaluate.
        """
        return {}
