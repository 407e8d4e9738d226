"""Pre-training: next patch and next token (AIMV2, Figure 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aimv2.config.objective import PretrainTaskOptions
from aimv2.config.schema import Config
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.flops import step_flops
from aimv2.models.lora import add_lora, merge_lora
from aimv2.models.sizes import DecoderConfig, EncoderConfig, model_config
from aimv2.objectives import Objective
from aimv2.objectives.pretrain import PretrainObjective
from aimv2.tasks.held_out import HeldOut, validate_pairs
from aimv2.tasks.init_weights import fill_from, origin_of, take_constants, take_shape, tokenizer_of_init
from aimv2.tasks.task import CardText, Context, Task


class Pretrain(Task):
    """An encoder under a multimodal decoder."""

    options: ClassVar[type[Any]] = PretrainTaskOptions
    reads: ClassVar[tuple[str, ...]] = ("init", "optim.fresh_decoder", "optim.lora")
    figures: ClassVar[tuple[str, ...]] = ("val_text_loss", "val_perplexity", "val_pixel_loss*")
    cools = True
    no_captions = ", or train on images only with objective.targets=image"

    def check(self) -> None:
        if self.config.model.name != "auto":
            shapes(self.config, self.config.data.vocab_size)

    def reads_text(self) -> bool:
        return self.config.objective.targets != "image"

    def tokenizer_home(self) -> Path | None:
        return tokenizer_of_init(self.config)

    def encoder_config(self, vocab_size: int) -> EncoderConfig:
        if self.config.init is not None and self.config.model.name == "auto":
            take_shape(self.config)  # once: config.yaml keeps it
        return shapes(self.config, vocab_size)[0]

    def build(self, context: Context) -> AIMv2:
        """Random weights by ``seed``, under those of ``init``."""
        config, tokenizer = self.config, context.tokenizer
        if config.init is not None and not context.resuming and config.model.name == "auto":
            take_shape(config)
        model = build(*shapes(config, tokenizer.vocab_size if tokenizer else 1), config.seed)
        assert isinstance(model, AIMv2)
        if context.resuming:
            assert config.run is not None
            take_constants(model.encoder, origin_of(config.run).encoder)
        elif config.init is not None:
            fill_from(model, config.init, tokenizer, config)
        if config.optim.lora:
            add_lora(model.encoder, config.optim.lora, config.seed)
        return model

    def objective(self, model: nn.Module) -> Objective:
        return PretrainObjective(self.config.objective)

    def flops(self, model: nn.Module, pairs: float, patches: float, tokens: float) -> float:
        return step_flops(model, pairs, patches, tokens)

    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """Text and pixel losses; see :func:`aimv2.tasks.held_out.validate_pairs`."""
        assert isinstance(model, AIMv2)
        shape, patch = model.decoder.config, model.encoder.config.patch_size
        return validate_pairs(model, data, patch, self.config.eval.prefixes, world, shape.text, shape.pixels)

    def exported(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return merge_lora(weights) if self.config.optim.lora else weights

    def card(self) -> CardText:
        options = self.config.objective
        return CardText(
            "AIMV2 vision encoder with its multimodal decoder, pre-trained",
            f"{options.targets}, alpha {options.alpha:g}, {options.attention} attention",
            "`aimv2.load_model(FOLDER)` (encoder) or `aimv2.load_model(FOLDER, decoder=True)`",
        )

    def final_evaluation(
        self, run: Path, folder: Path, tokenizer: Tokenizer | None, device: torch.device
    ) -> dict[str, Any]:
        """See :func:`aimv2.evals.after_training.measure`."""
        from aimv2.evals.after_training import measure
        from aimv2.interop.load import load_model

        model = load_model(folder, decoder=True, device=device)
        assert isinstance(model, AIMv2)
        return measure(self.config, model, tokenizer, run)


def shapes(config: Config, vocab_size: int) -> tuple[EncoderConfig, DecoderConfig]:
    """Encoder and decoder of a run: the table's row, the config's changes, and what the objective needs."""
    given = {
        key: value
        for key, value in vars(config.model).items()
        if value is not None and key not in ("name", "projection") and not key.startswith("text_")
    }
    decoder = {key.removeprefix("decoder_"): value for key, value in given.items() if key.startswith("decoder_")}
    encoder = {key: value for key, value in given.items() if not key.startswith("decoder_")}
    objective = config.objective
    scored = objective.targets == "image" or (objective.targets == "both" and objective.alpha > 0)
    decoder |= {"pixels": scored, "text": objective.targets != "image"}  # no head that gets no gradient
    decoder |= {"vocab_size": vocab_size, "max_text": config.data.max_tokens}
    return model_config(config.model.name, decoder, **encoder)


TASK = Pretrain
