"""``aimv2.Aimv2Backbone``: an AIMV2 encoder under every head of transformers that takes a backbone.

Legend: B images, h x w patch grid, D width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from aimv2.errors import UsageError
from aimv2.interop.backbone_config import MODEL_TYPE, Aimv2BackboneConfig
from aimv2.interop.model_folder import CONFIG
from aimv2.interop.shapes import read_json
from aimv2.models.encoder import VisionEncoder
from aimv2.models.groups import layer_of, parameter_groups
from aimv2.models.init import init_weights
from aimv2.models.layers import WRAPPER, dtype_of
from aimv2.models.lora import add_lora, merge_lora
from aimv2.models.pyramid import SimplePyramid, init_pyramid, run_blocks, spread


def is_backbone(folder: Any) -> bool:
    """Whether a local folder holds a saved :class:`Aimv2Backbone`."""
    path = Path(folder)
    return path.is_dir() and read_json(path / CONFIG).get("model_type") == MODEL_TYPE


class Aimv2Backbone(BackboneMixin, PreTrainedModel):
    """Feature maps or tokens of an AIMV2 encoder, as :class:`Aimv2BackboneConfig` says.

    Images of any size: learned positions are interpolated to the grid. Sides that are no multiple of the patch are padded with zeros at
    right and bottom; ``tokens`` and ``patches`` leave the rest out, as their heads count it.

    Attributes:
        encoder: the VisionEncoder.
        pyramid: its simple feature pyramid; None in other forms.
    """

    config_class = Aimv2BackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^pyramid\."]  # noqa: RUF012

    def __init__(self, config: Aimv2BackboneConfig) -> None:
        super().__init__(config)
        shape = config.shape
        self.encoder = VisionEncoder(shape)
        self.global_blocks = spread(config.global_blocks, shape.depth) if config.window else []
        self.pyramid: SimplePyramid | None = None
        self.num_features = [shape.width for _ in config.stage_names]
        if config.feature_form == "pyramid":
            scales = {
                name: scale for name, scale in zip(config.stage_names, config.scales) if name in config.out_features
            }
            self.pyramid = SimplePyramid(shape.width, config.pyramid_channels, scales)
            self.num_features = [config.pyramid_channels for _ in config.stage_names]
        self.gradient_checkpointing = False
        self.post_init()
        if config.weights is not None and not self.encoder.norm.weight.is_meta:  # on meta: from_pretrained fills it
            self.load_encoder(config.weights)

    def load_encoder(self, source: Any) -> None:
        """Copy the encoder's weights from MODEL, as :func:`aimv2.load_model` takes it.

        Raises:
            UsageError: nothing to load.
        """
        from aimv2.interop.card import encoder_in
        from aimv2.interop.load import load_model

        self.fill_encoder(encoder_in(load_model(source)))

    def fill_encoder(self, encoder: VisionEncoder) -> None:
        """Copy the weights of an encoder; its pooling head, if any, is left out.

        Raises:
            UsageError: an encoder of another shape.
        """
        for key in ("width", "depth", "heads", "hidden", "patch_size", "image_size"):
            given, own = (getattr(one.config, key) for one in (encoder, self.encoder))
            if given != own:
                raise UsageError(
                    f"weights: an encoder of {key} {given}, and the configuration has {own}; leave out its encoder",
                    option="weights",
                    code="mismatch",
                )
        state = encoder.state_dict()
        self.encoder.load_state_dict({key: value for key, value in state.items() if not key.startswith("head.")})

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, VisionEncoder):
            init_weights(module)
        elif isinstance(module, SimplePyramid):
            init_pyramid(module)

    def freeze_encoder(self) -> None:
        """Freeze the encoder; the pyramid still learns."""
        self.encoder.requires_grad_(False)

    def add_lora(self, rank: int, seed: int = 0) -> None:
        """Freeze the encoder but for LoRA of this rank on every linear of its blocks; see :func:`aimv2.models.lora.add_lora`.

        Raises:
            UsageError: peft is not installed.
        """
        self.freeze_encoder()
        add_lora(self.encoder, rank, seed)

    def merge_lora(self) -> None:
        """Add what LoRA learned to the encoder's own weights, in place; to be called before the model is saved."""
        merged = VisionEncoder(self.encoder.config)
        merged.load_state_dict(merge_lora(self.encoder.state_dict()))
        self.encoder = merged.to(self.encoder.norm.weight.device, dtype_of(self.encoder)).train(self.training)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the stages of ``out_features``.

        Args:
            pixel_values: normalised float or uint8 [B, 3, H, W].
            output_hidden_states: the embedded patches and every block's output too, [B, h * w, D] each.
            output_attentions: not available; ignored, as are further arguments.
            return_dict: False: a tuple.

        Returns:
            BackboneOutput with ``feature_maps``.

        Raises:
            UsageError: a window larger than the map.
        """
        encoder, config = self.encoder, self.config
        x, grid = self.embed(pixel_values)
        names, depth = config.stage_names, len(encoder.blocks)
        blocks = [depth] if self.pyramid is not None else [names.index(name) for name in config.out_features]
        wanted = range(depth) if output_hidden_states else [index - 1 for index in blocks if index]
        call = partial(checkpoint, use_reentrant=False) if self.gradient_checkpointing and self.training else None
        hidden = {0: x} | dict(
            zip([index + 1 for index in wanted],
                run_blocks(encoder.blocks, x, grid, wanted, config.window, self.global_blocks, call))
        )  # fmt: skip
        maps = [self.form(encoder.norm(hidden[index]), grid) for index in blocks]
        states = tuple(hidden.values()) if output_hidden_states else None
        found = BackboneOutput(
            feature_maps=tuple(maps if self.pyramid is None else self.pyramid(maps[0])), hidden_states=states
        )
        plain = return_dict is False or (return_dict is None and not config.return_dict)
        return found.to_tuple() if plain else found

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embedded patches with positions: [B, 3, H, W] -> [B, h * w, D], and (h, w)."""
        encoder, patch = self.encoder, self.encoder.config.patch_size
        x = encoder.normalize(images).to(dtype_of(encoder))
        right, bottom = -x.shape[3] % patch, -x.shape[2] % patch
        if (right or bottom) and self.config.feature_form in ("pyramid", "maps"):
            x = F.pad(x, (0, right, 0, bottom))
        return encoder.patch_embed(x), (x.shape[2] // patch, x.shape[3] // patch)

    def form(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normed patches [B, h * w, D] in the form of ``feature_form``; of the pyramid, the map that it starts from."""
        if self.config.feature_form == "tokens":
            return F.pad(x, (0, 0, 1, 0))
        return x if self.config.feature_form == "patches" else x.transpose(1, 2).unflatten(2, grid)


def optimizer_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for torch's AdamW of a model with an Aimv2Backbone in it: learning rates that fall from the last block to the patches.

    Args:
        model: a detector of transformers, or the backbone itself.
        lr: of everything after the blocks: norm, pyramid, head.
        weight_decay: of matrices and kernels; norms, biases and positions have none.
        layer_decay: each block's learning rate as a fraction of the next one's.

    Returns:
        groups with ``params``, ``lr`` and ``weight_decay``, every parameter that learns once.
    """
    scale: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, Aimv2Backbone):
            depth = len(module.encoder.blocks)
            for name, parameter in module.named_parameters():
                scale[id(parameter)] = layer_decay ** (depth + 1 - layer_of(WRAPPER.sub("", name), depth))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for kind, decay in zip(parameter_groups(model), (weight_decay, 0.0)):
        for parameter in kind["params"]:
            if parameter.requires_grad:
                groups.setdefault((lr * scale.get(id(parameter), 1.0), decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
