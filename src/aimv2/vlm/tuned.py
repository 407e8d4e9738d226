"""A vision-language model in training: the answers' loss of a batch of conversations, and the folder that is saved.

Legend: B rows, T tokens, G images, R scored tokens, L width of the language model.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.errors import UsageError
from aimv2.features.pixels import quiet
from aimv2.interop import convert, layouts
from aimv2.interop.plain import open_plain
from aimv2.models.decoder import summed_cross_entropy
from aimv2.vlm.model import VisionLanguage, open_processor, open_vlm


class Answered(NamedTuple):
    """``loss``: summed cross-entropy of the scored tokens, fp32 []; ``right``: bool [R], whether each is the most likely one, or None."""

    loss: Tensor
    right: Tensor | None


class TunedVisionLanguage(VisionLanguage):
    """A :class:`VisionLanguage` whose forward pass gives the loss, with all that touches a weight within it."""

    @classmethod
    def opened(cls, source: str | Path) -> TunedVisionLanguage:
        """The model of a folder, in fp32.

        Raises:
            UsageError: see :func:`aimv2.vlm.model.open_vlm`.
        """
        given, _ = open_vlm(source)
        parts = (
            given.encoder,
            given.connector,
            given.language,
            given.head,
            given.image_id,
            given.features,
            given.newline,
        )
        return cls(*parts).float()

    def layers(self) -> nn.ModuleList:
        """The blocks of the language model.

        Raises:
            UsageError: it has no list of them.
        """
        depth = getattr(self.language.config, "num_hidden_layers", 0)
        lists = [part for part in self.language.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
        if not lists:
            kind = type(self.language).__name__
            raise UsageError(
                f"init: the blocks of its language model ({kind}) are no list", option="init", code="unsupported"
            )
        return lists[0]

    def block_lists(self) -> list[nn.ModuleList]:
        return [self.encoder.blocks, self.layers()]

    def forward(self, batch: Batch, targets: Tensor, look: bool = False) -> Answered:  # type: ignore[override]
        """The loss of the answers.

        Args:
            batch: conversations, on the model's device.
            targets: int64 [R], the scored tokens; -100 for padding.
            look: say which of them are right too.
        """
        x = self.embedded(batch)
        hidden = self.language(inputs_embeds=x, position_ids=batch.positions, use_cache=False).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, batch.token_rows - 1)  # a token is predicted at the place before it
        right = None
        if look:
            right = torch.cat([self.head(part).argmax(-1) for part in rows.split(1024)]) == targets
        return Answered(summed_cross_entropy(self.head, rows, targets), right)

    def embedded(self, batch: Batch) -> Tensor:
        """Token embeddings with the images' features in their places: [B, T, L]. The text is causal: padding at its end needs no mask."""
        x = self.language.get_input_embeddings()(batch.text)
        images, sizes = batch.images, batch.sizes
        if none := not len(images):  # all ranks run the same modules
            images = images.new_zeros(1, *images.shape[1:])
            sizes = [(images.shape[-2], images.shape[-1])]
        features = self.image_embeddings(self.cropped(images, sizes), torch.tensor(sizes)).to(x.dtype)
        if none:
            return x + 0 * features.sum()
        places = torch.nonzero_static(batch.text.flatten() == self.image_id, size=len(features)).flatten()
        return x.flatten(0, 1).index_copy(0, places, features).view_as(x)

    def cropped(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor | list[Tensor]:
        """Images as the encoder takes them: native ones [G, 3, S, S] as a list of [3, H, W]."""
        if self.encoder.config.image_size is not None:
            return images
        return [image[:, :height, :width] for image, (height, width) in zip(images, sizes)]


def linear_names(model: TunedVisionLanguage) -> list[str]:
    """Names of the linears in the blocks of the language model, as the language model has them.

    Raises:
        UsageError: there are none.
    """
    inside = {id(part) for part in model.layers().modules()}
    named = model.language.named_modules()
    found = [name for name, part in named if isinstance(part, nn.Linear) and id(part) in inside]
    if not found:
        kind = type(model.language).__name__
        raise UsageError(
            f"optim.lora: the language model of init ({kind}) has no linear layers in its blocks; leave it out",
            option="optim.lora",
            code="unsupported",
        )
    return found


class FolderWriter:
    """Writes folders like the one that a model is read from, in the dtype of its weights.

    Attributes:
        folder: that one.
        config: of transformers.
        generation: settings.
        processor: of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.processor = folder, open_processor(folder)
        self.config = open_plain("AutoConfig", folder)
        self.generation = open_plain("GenerationConfig", folder)

    def write(self, folder: Path, model: TunedVisionLanguage, weights: dict[str, Tensor]) -> None:
        """The folder of the ``weights`` of ``model``, by its names; the low-rank updates are merged in them already."""
        from transformers import AutoModelForImageTextToText

        dtype = self.config.dtype or torch.float32
        with torch.device("meta"):
            plain = AutoModelForImageTextToText.from_config(
                deepcopy(self.config),
                trust_remote_code=False,  # a copy: saving changes it
            )
        inner = plain.model
        names = {
            "language.": "model.language_model.",
            "connector.": "model.aligner." if hasattr(inner, "aligner") else "model.multi_modal_projector.",
            "head.": "lm_head.",
            "newline": "model.image_newline",
        }
        encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
        tower = "model.vision_tower." if hasattr(inner, "vision_tower") else "model.vision_model."
        rules = layouts.encoder_rules("transformers", model.encoder.config)
        state = {tower + key: value for key, value in convert.renamed(encoder, rules).items()}
        for key, value in weights.items():
            for ours, theirs in names.items():
                if key.startswith(ours):
                    state[theirs + key.removeprefix(ours)] = value
        plain.to(dtype=dtype).load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
        plain.tie_weights()
        plain.generation_config = self.generation
        with quiet():
            plain.save_pretrained(folder, max_shard_size="10TB")
            self.processor.save_pretrained(folder)
