"""Options of ``objective.name=instruct``, apart from those of other tasks: only its own configuration holds them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from aimv2.config.apart import check_least, refuse_own_training
from aimv2.config.objective import refuse_features, refuse_layer_decay
from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.config.schema import Config

TABLE_C1: dict[str, Any] = {  # of the section optim, LLaVA's column
    "lr": 1e-5, "min_lr": 0.0, "start_lr": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.01, "decay": "torch", "clip": 1.0,
}  # fmt: skip
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."  # Table C2


@dataclass
class InstructTaskOptions:
    """Answers about images, through a language model (AIMV2, section 5.6).

    Args:
        freeze: keep the encoder frozen; false trains it too
        connector_scale: learning rate of the connector relative to the language model's (Table C1: 8)
        encoder_scale: learning rate of the encoder relative to the language model's, with objective.freeze=false
        row_tokens: most tokens of a conversation, those of its images included; null: the context of the language model
        long_rows: what becomes of longer conversations: skip = left out; cut = they end there, where images and an answer remain
        caption_prompt: question of samples that have captions and no conversation
        length_window: batches from which conversations of similar length are put together; 0 or 1: as they come
        pack: conversations share rows, each with positions and attention of its own; loss and gradient stay the same
    """

    OPTIM: ClassVar[dict[str, Any]] = TABLE_C1
    DATA: ClassVar[dict[str, Any]] = {"max_bad": None}
    UNREAD: ClassVar[tuple[str, ...]] = (
        "data.tokenizer", "data.vocab_size", "data.max_tokens", "data.pack", "data.crop_scale", "data.crop_ratio", "data.areas",
        "data.flip", "eval.prefixes", "eval.captions", "model",
    )  # fmt: skip

    freeze: bool = True
    connector_scale: float = 8.0
    encoder_scale: float = 0.1
    row_tokens: int | None = None
    long_rows: Literal["skip", "cut"] = "skip"
    caption_prompt: str = CAPTION_PROMPT
    length_window: int = 8
    pack: bool = False

    @staticmethod
    def check(config: Config) -> None:
        """Raises UsageError for values out of range and for options of other models."""
        objective = cast(InstructTaskOptions, config.objective)
        low = {"connector_scale": 0.0, "encoder_scale": 0.0, "row_tokens": 2, "length_window": 0}
        check_least(objective, low)
        if not objective.caption_prompt.strip():
            raise UsageError(
                "objective.caption_prompt is empty; a question is expected", option="objective.caption_prompt"
            )
        refuse_features(config)
        refuse_layer_decay(config, True)
        refuse_own_training(config, "trains the model of init as it is")


OPTIONS = InstructTaskOptions
