"""A detector in training and in use: the head's predictions of every decoder layer, in one form for all heads.

Legend: B pictures, Q queries, C classes or tokens, T tokens of a text, h x w cells of a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.data.text.phrases import PAD
from aimv2.models.encoder import VisionEncoder


class Predictions(NamedTuple):
    """Of one layer of a head.

    Attributes:
        logits: [B, Q, C]: of classes, of the tokens of the text, or of masks [B, Q, classes + 1], the last one nothing.
        boxes: [B, Q, 4], centre x, centre y, width, height, relative to the square; None of masks.
        masks: logits [B, Q, h, w]; None of boxes.
    """

    logits: Tensor
    boxes: Tensor | None = None
    masks: Tensor | None = None


class Detector(nn.Module):
    """A model of transformers over an :class:`aimv2.Aimv2Backbone`; everything that touches a weight runs in ``forward``.

    Attributes:
        head: grounding, closed or masks.
        net: of transformers.
        scalars: names of the net's parameters that are numbers, held here as vectors of one value.
    """

    def __init__(self, head: str, net: Any) -> None:
        super().__init__()
        self.head, self.net = head, net
        self.scalars = vectors_of_scalars(net)

    @property
    def backbone(self) -> Any:
        """The backbone within the head's model."""
        if self.head == "masks":
            return self.net.model.pixel_level_module.encoder
        inner = self.net.model.backbone
        return inner.model if self.head == "closed" else inner.conv_encoder.model

    @property
    def encoder(self) -> VisionEncoder:
        return self.backbone.encoder

    def text_tower(self) -> nn.Module | None:
        """The BERT of a head that reads words."""
        return self.net.model.text_backbone if self.head == "grounding" else None

    def block_lists(self) -> list[nn.ModuleList]:
        """Blocks of the encoder, of the text tower and of the head: what is sharded and recomputed one by one."""
        inner = self.net.model
        if self.head == "grounding":
            return [self.encoder.blocks, inner.text_backbone.encoder.layer, inner.encoder.layers, inner.decoder.layers]
        if self.head == "closed":
            return [self.encoder.blocks, inner.decoder.layers]
        return [self.encoder.blocks, inner.pixel_level_module.decoder.encoder.layers]

    def train(self, mode: bool = True) -> Detector:
        """As any module; batch norms keep their statistics, so that no picture depends on the others of its batch."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, batch: Batch) -> list[Predictions]:
        """Predictions of every layer, the last layer's last.

        Args:
            batch: pictures, and texts of a head that reads words, on the model's device.
        """
        pixels = self.encoder.normalize(batch.images)
        if self.head == "grounding":
            return self.grounded(pixels, batch.text)
        if self.head == "closed":
            found = self.net.model(pixels)
            layers = [
                Predictions(logits, boxes)
                for logits, boxes in zip(
                    found.intermediate_logits.unbind(1), found.intermediate_reference_points.unbind(1)
                )
            ]
            return [Predictions(found.enc_topk_logits, found.enc_topk_bboxes), *layers]
        found = self.net(pixels, output_auxiliary_logits=True)
        layers = [
            Predictions(one["class_queries_logits"], masks=one["masks_queries_logits"])
            for one in found.auxiliary_logits
        ]
        return [*layers, Predictions(found.class_queries_logits, masks=found.masks_queries_logits)]

    def grounded(self, pixels: Tensor, text: Tensor) -> list[Predictions]:
        """Of MM-Grounding-DINO: the proposals of its encoder, then its decoder layers.

        The model's own output has the last layer only, and of the proposals scores of another input than the one that they are chosen
        by and boxes without a gradient: neither could be learned from.
        """
        net, width = self.net, text.shape[1]
        mask = text != PAD
        found = net.model(pixel_values=pixels, input_ids=text, attention_mask=mask.long(), return_dict=True)
        best = found.enc_outputs_class[..., :width].amax(-1).topk(net.config.num_queries, 1).indices[..., None]

        def chosen(values: Tensor) -> Tensor:
            return values.gather(1, best.expand(-1, -1, values.shape[-1]))

        proposals = chosen(found.enc_outputs_coord_logits).sigmoid()
        layers = [Predictions(chosen(found.enc_outputs_class)[..., :width], proposals)]
        start = found.init_reference_points
        for number, hidden in enumerate(found.intermediate_hidden_states.unbind(1)):
            logits = net.class_embed[number](
                vision_hidden_state=hidden,
                text_hidden_state=found.encoder_last_hidden_state_text,
                text_token_mask=mask,
            )
            boxes = (net.bbox_embed[number](hidden) + torch.special.logit(start, eps=1e-5)).sigmoid()
            layers.append(Predictions(logits[..., :width], boxes))
            start = found.intermediate_reference_points[:, number]
        return layers

    def saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the net's own names and in its own shapes."""
        own = {key.removeprefix("net."): value for key, value in weights.items()}
        return own | {name: own[name].reshape(()) for name in self.scalars}

    def config_dict(self) -> dict[str, Any]:
        """Of the encoder; the whole configuration is transformers' own."""
        return {"encoder": self.encoder.config_dict()}


def vectors_of_scalars(net: nn.Module) -> list[str]:
    """Makes parameters that are numbers into vectors of one value, since FSDP2 shards no numbers; their names."""
    vectors: dict[int, nn.Parameter] = {}
    found = []
    for prefix, module in net.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.dim() == 0:  # two modules may share one
                vector = vectors.setdefault(
                    id(parameter), nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                )
                setattr(module, name, vector)
                found.append(f"{prefix}.{name}")
    return found


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] centre x, centre y, width, height -> left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)
