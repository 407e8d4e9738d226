"""Options of ``objective.name=detect``, apart from those of other tasks: only its own configuration holds them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from aimv2.config.apart import check_least, refuse_own_training
from aimv2.config.objective import refuse_features, refuse_layer_decay
from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.config.schema import Config

OPTIM: dict[str, Any] = {  # ours: what detectors with queries are trained with
    "lr": 1e-4, "min_lr": 1e-6, "start_lr": 1e-6, "betas": (0.9, 0.999), "weight_decay": 1e-4, "decay": "torch", "clip": 0.1,
}  # fmt: skip
LEVELS = {"grounding": (2.0, 1.0, 0.5, 0.25), "closed": (2.0, 1.0, 0.5), "masks": (4.0, 2.0, 1.0, 0.5)}
QUERIES = {"grounding": 900, "closed": 300, "masks": 100}


@dataclass
class DetectTaskOptions:
    """Boxes of classes and phrases, by a head of transformers on a feature pyramid of the encoder (AIMV2, section 5.5).

    Args:
        head: grounding = MM-Grounding-DINO, for any words and phrases; closed = RT-DETRv2, for the classes of the data; masks =
            Mask2Former, masks of these classes
        freeze: keep the encoder frozen; false fine-tunes it
        image_size: pixels of a picture's longer side; null: the encoder's own, or 224 of a native one
        pyramid: cells per patch and side of each level of the feature pyramid; null: those that the head has at 16 px patches
        window: side in patches of the windows that the encoder's attention stays in (Table D2: 16, 24, 32); 0: the whole map
        global_blocks: with a window, how many blocks attend to the whole map
        width: of the head
        encoder_layers: layers of the head's encoder; null: 6, of closed 1
        decoder_layers: layers of its decoder; of grounding at least 2
        queries: most objects of a picture that the head can find; null: 900, of closed 300, of masks 100, or as many as the pyramid has
            cells
        text: grounding only, as the next four: a BERT of transformers, by folder or hub id, with its tokenizer; null: a small one,
            trained in the run, with a tokenizer of the data's words
        text_layers: of that small one
        text_scale: learning rate of the text tower relative to the head's
        phrases: of pictures with classes and phrases, the fraction of visits that learn phrases
        negatives: most absent classes next to those of a picture in its words; half of the visits have as many as there are
        encoder_scale: learning rate of the encoder relative to the head's, with objective.freeze=false or optim.lora
        zoom: smallest and largest size of a picture in training, relative to image_size; what is larger is cropped, unless phrases
            are learned
        keep_area: smallest part of a box that a crop must leave for the box to count
        threshold: of the score, from which on boxes are drawn; scores themselves do not depend on it
    """

    OPTIM: ClassVar[dict[str, Any]] = OPTIM
    DATA: ClassVar[dict[str, Any]] = {"max_bad": None}
    UNREAD: ClassVar[tuple[str, ...]] = (
        "data.tokenizer", "data.vocab_size", "data.pack", "data.crop_scale", "data.crop_ratio", "data.areas", "eval.prefixes",
        "eval.captions",
    )  # fmt: skip

    head: Literal["grounding", "closed", "masks"] = "grounding"
    freeze: bool = True
    image_size: int | None = None
    pyramid: tuple[float, ...] | None = None
    window: int = 0
    global_blocks: int = 4
    width: int = 256
    encoder_layers: int | None = None
    decoder_layers: int = 6
    queries: int | None = None
    text: str | None = None
    text_layers: int = 2
    text_scale: float = 1.0
    phrases: float = 0.5
    negatives: int = 85
    encoder_scale: float = 0.1
    zoom: tuple[float, float] = (0.5, 1.5)
    keep_area: float = 0.25
    threshold: float = 0.3

    @staticmethod
    def check(config: Config) -> None:
        """Raises UsageError for values out of range and for options of other models."""
        objective = cast(DetectTaskOptions, config.objective)
        low = {
            "image_size": 1, "window": 0, "global_blocks": 0, "width": 8, "encoder_layers": 1, "decoder_layers": 1, "queries": 1,
            "text_layers": 1, "text_scale": 0.0, "negatives": 0, "encoder_scale": 0.0,
        }  # fmt: skip
        check_least(objective, low)
        for key in ("phrases", "keep_area", "threshold"):
            if not 0 <= (value := getattr(objective, key)) <= 1:
                raise UsageError(f"objective.{key} must be between 0 and 1, got {value:g}", option=f"objective.{key}")
        small, large = objective.zoom
        if not 0.1 <= small <= large <= 4:
            raise UsageError(
                f"objective.zoom {[small, large]}: two numbers from 0.1 to 4 expected, the smaller one first",
                option="objective.zoom",
            )
        if objective.head == "grounding" and objective.decoder_layers < 2:
            raise UsageError(
                "objective.decoder_layers 1: MM-Grounding-DINO needs at least 2", option="objective.decoder_layers"
            )
        if objective.text is not None and objective.head != "grounding":
            raise UsageError(
                f"objective.text {objective.text}: objective.head={objective.head} reads no words; leave it out",
                option="objective.text",
                code="conflict",
            )
        refuse_features(config)
        refuse_layer_decay(config, objective.freeze, " unless objective.freeze is false")
        if config.optim.lora and not objective.freeze:
            raise UsageError(
                "optim.lora trains low-rank updates of a frozen encoder; leave objective.freeze=false out",
                option="optim.lora",
                code="conflict",
            )
        refuse_own_training(config, "trains a head of transformers")


OPTIONS = DetectTaskOptions
