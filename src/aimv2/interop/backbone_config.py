"""``aimv2.Aimv2BackboneConfig``: what transformers keeps of an AIMV2 backbone. Imports no torch."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from aimv2.errors import UsageError, nearest
from aimv2.models.sizes import DecoderConfig, EncoderConfig, check_config, model_config

MODEL_TYPE = "aimv2_backbone"
FORMS = ("pyramid", "maps", "tokens", "patches")
SCALES = (4, 2, 1, 0.5, 0.25)  # cells of a level per patch and side
STRIDES = ("feat_strides", "feature_strides")  # where the configurations of heads keep the strides that they need


class Aimv2BackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Which encoder, and which feature maps of it.

    Args:
        encoder: shape of the encoder: a name of :func:`aimv2.list_models`, an EncoderConfig or a dictionary of its values. Its weights
            are random, as transformers has it, until ``from_pretrained`` or ``weights`` gives some.
        weights: MODEL as :func:`aimv2.load_model` takes it (released name, hub id, folder, file, RUN), instead of ``encoder``: shape and
            weights are read from there wherever a new model is built.
        feature_form: ``pyramid``, maps [B, C, h * scale, w * scale] from the last block; ``maps``, [B, D, h, w] of chosen blocks;
            ``tokens``, [B, 1 + h * w, D] of chosen blocks, the first all zeros, for heads that drop a class token; ``patches``,
            [B, h * w, D] of chosen blocks. All after the encoder's last norm.
        scales: of the pyramid: cells per patch and side of each level, 4 to 0.25, each half the one before. Strides in pixels are the
            patch size over them.
        pyramid_channels: C.
        window: side in patches of the windows that attention stays in, such as 16, 24 or 32 (AIMV2, Table D2); 0: the whole map.
        global_blocks: with a window, how many blocks attend to the whole map, evenly spread, or their indices.
        image_size: side of the images, or [height, width], for heads and exports that need a fixed one; None: the encoder's own.
        out_features: stages to return: of the pyramid ``stage1``, the finest, to ``stage4`` (default: all), otherwise ``stem`` and
            ``stage1`` to ``stageN``, the outputs of the blocks (default: the last).
        out_indices: the same stages by number.

    Raises:
        UsageError: an unknown encoder or form, scales that do not halve, a window larger than the map of ``image_size``.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        encoder: str | dict[str, Any] | EncoderConfig | None = None,
        weights: Any = None,
        feature_form: str = "pyramid",
        scales: Sequence[float] = (4, 2, 1, 0.5),
        pyramid_channels: int = 256,
        window: int = 0,
        global_blocks: int | Sequence[int] = 4,
        image_size: int | Sequence[int] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.weights = None if weights is None else str(weights)
        self.encoder = asdict(_shape(encoder, self.weights))
        self.feature_form, self.scales, self.pyramid_channels = feature_form, list(scales), pyramid_channels
        self.window, self.image_size = window, image_size
        self.global_blocks = global_blocks if isinstance(global_blocks, int) else list(global_blocks)
        self._check()
        if feature_form == "pyramid" and out_features is None and out_indices is None:
            out_indices = [*range(len(self.scales))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        kwargs.pop("format", None)
        for key in kwargs:  # transformers keeps whatever it does not know
            if close := difflib.get_close_matches(
                key, inspect.signature(Aimv2BackboneConfig.__init__).parameters, 1, 0.8
            ):
                raise UsageError(f"{key}: no such key; did you mean '{close[0]}'?", option=key, code="unknown")
        super().__init__(**kwargs)

    def _check(self) -> None:
        if self.feature_form not in FORMS:
            raise UsageError(
                f"feature_form {self.feature_form!r}: one of {', '.join(FORMS)} expected"
                f"{nearest(str(self.feature_form), FORMS)}",
                option="feature_form",
            )
        halves = all(after * 2 == before for before, after in pairwise(self.scales))
        if not self.scales or not halves or not {*self.scales} <= {*SCALES}:
            known = ", ".join(map(str, SCALES))
            raise UsageError(f"scales {self.scales}: some of {known}, one after another, expected", option="scales")
        for name, least in (("pyramid_channels", 1), ("window", 0)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise UsageError(f"{name} {value!r}: a whole number of at least {least} expected", option=name)
        if self.window and self.image_size is not None:
            from aimv2.models.pyramid import check_window

            check_window(self.window, [side // self.encoder["patch_size"] for side in self.sides])

    @property
    def stage_names(self) -> list[str]:
        """The levels of the pyramid, finest first; else the embedded patches and the outputs of the blocks."""
        if self.feature_form == "pyramid":
            return [f"stage{level}" for level, _ in enumerate(self.scales, 1)]
        return ["stem", *(f"stage{block}" for block in range(1, self.num_hidden_layers + 1))]

    @property
    def shape(self) -> EncoderConfig:
        """The encoder's own configuration."""
        stored = {**self.encoder, "mean": tuple(self.encoder["mean"]), "std": tuple(self.encoder["std"])}
        return EncoderConfig(**stored)

    @property
    def sides(self) -> list[int]:
        """[height, width] of the images; 16 patches a side where nothing says so."""
        side = self.image_size or self.encoder["image_size"] or 16 * self.encoder["patch_size"]
        return [side, side] if isinstance(side, int) else list(side)

    # names that heads look up
    @property
    def hidden_size(self) -> int:
        return self.encoder["width"]

    @property
    def num_hidden_layers(self) -> int:
        return self.encoder["depth"]

    @property
    def num_attention_heads(self) -> int:
        return self.encoder["heads"]

    @property
    def patch_size(self) -> Any:
        side = self.encoder["patch_size"]
        return [side, side] if self.feature_form == "patches" else side

    @property
    def strides(self) -> list[float]:
        """Pixels per cell of each map that is returned; of tokens, per patch."""
        side = self.encoder["patch_size"]
        if self.feature_form != "pyramid":
            return [side for _ in self.out_features]
        return [side / self.scales[self.stage_names.index(name)] for name in self.out_features]

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it: also the configuration of one of our model folders, so that everything else here opens it."""
        return {"format": "aimv2", **super().to_dict()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration whose values ``kwargs`` override, checked as a whole."""
        known = inspect.signature(cls.__init__).parameters.keys()
        given = {key: kwargs.pop(key) for key in [*kwargs] if key in known}
        stored = dict(config_dict)
        if {*given} & {"feature_form", "scales", "encoder", "weights", "out_features", "out_indices"}:
            stored |= {"out_features": None, "out_indices": None}
        return super().from_dict(stored | given, **kwargs)


def _shape(encoder: Any, weights: str | None) -> EncoderConfig:
    """The encoder's shape, without a pooling head, which no feature map needs."""
    if isinstance(encoder, dict):
        encoder = EncoderConfig(**{**encoder, "mean": tuple(encoder["mean"]), "std": tuple(encoder["std"])})
    if encoder is None and weights is not None:
        from aimv2.interop.load import encoder_shape

        encoder = encoder_shape(weights)
    if encoder is None or isinstance(encoder, str):
        encoder = model_config(encoder or "aimv2-large-patch14-224")[0]
    check_config(encoder, DecoderConfig())
    return replace(encoder, pool_heads=0)


def scales_of(strides: Sequence[float], patch: int) -> list[float]:
    """Scales of a pyramid whose strides are the nearest to those that a head needs: 8, 16 and 32 px at patches of 14 give 2, 1, 0.5.

    Args:
        strides: pixels per cell of each level, each twice the one before.
        patch: patch side in pixels.

    Raises:
        UsageError: strides that no pyramid of this encoder has.
    """
    scales = [2.0 ** round(math.log2(patch / stride)) for stride in strides]
    if not {*scales} <= {*SCALES}:
        raise UsageError(
            f"strides {[*strides]}: a pyramid of patches of {patch} px has those from {patch / SCALES[0]:g} to "
            f"{patch / SCALES[-1]:g} px; give the head other strides, or take an encoder of another patch size",
            option="strides",
            code="mismatch",
        )
    return [int(scale) if scale >= 1 else scale for scale in scales]


def check_head(head: Any, backbone: Aimv2BackboneConfig) -> None:
    """Check that a backbone has the levels that a head needs.

    Args:
        head: configuration of a model of transformers; one that states no strides takes what there is.
        backbone: its backbone's.

    Raises:
        UsageError: strides that the pyramid lacks.
    """
    strides = next((list(found) for name in STRIDES if (found := getattr(head, name, None))), None)
    if strides is None:
        return
    wanted = scales_of(strides, backbone.encoder["patch_size"])
    levels = [backbone.encoder["patch_size"] / stride for stride in backbone.strides]
    if backbone.feature_form != "pyramid" or levels != wanted:
        raise UsageError(
            f"{head.model_type} needs maps of strides {strides} px, and the backbone gives {backbone.feature_form} of "
            f"{', '.join(f'{stride:g}' for stride in backbone.strides)} px; give it feature_form='pyramid', scales={wanted}",
            option="scales",
            code="mismatch",
        )
