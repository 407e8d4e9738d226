"""AIMv2: a vision encoder pre-trained with a multimodal autoregressive objective (arXiv 2411.14402).

Objective. A pair is one sequence, I image patches followed by the caption tokens. A prefix length M ~ Uniform{1, .., I - 1}
is drawn per sample. At each image position from M on the model predicts the next patch (squared error on per-patch normalised
pixels); at [BOS] and each caption token it predicts the next token (cross-entropy, end of text included). The loss is
``L_text + 0.4 * L_pixel`` (section 2.1, Table 9c); it lives in :mod:`aimv2.objectives.pretrain`.

Parts.
    VisionEncoder: prefix attention in pre-training (bidirectional within the prefix, causal after it), bidirectional
        afterwards; the only part that downstream tasks use (:mod:`aimv2.models.encoder`).
    MultimodalDecoder: one linear projection of the features, then causal attention over patches and caption; a linear head
        for pixels and one for the vocabulary (:mod:`aimv2.models.decoder`).

Differences from the released training code, all by design.
    Targets are selected by length: end of text is a target. There, padding and end of text share an id that the loss ignores.
    Losses are summed and divided once by the global count. There, each rank averages over its own tokens first.
    Prefix lengths depend on (seed, key, worker, visit). There, every worker and rank draws from a generator seeded with 0.
    Validation scores fixed prefixes. There, full attention leaves no patch to score and the loss is 0 / 0.
    Pixel targets and losses are fp32. There, FSDP's policy rounds the images to bf16 first.
    An image of another size is an error. There, positions are sliced and the result is silently wrong.
    Captions are packed, and the last block and the heads run at scored positions only: same values, less arithmetic.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.errors import UsageError
from aimv2.models.decoder import MultimodalDecoder, Prediction
from aimv2.models.encoder import VisionEncoder, not_images
from aimv2.models.sizes import DecoderConfig, EncoderConfig


class CaptionTokenizer(Protocol):
    """The part of a tokeniser that captioning uses."""

    eos_id: int

    def decode(self, ids: list[int]) -> str: ...


class AIMv2(nn.Module):
    """A vision encoder with prefix attention under a causal multimodal decoder (AIMV2, Figure 1)."""

    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.encoder = VisionEncoder(encoder)
        self.decoder = MultimodalDecoder(decoder, encoder)
        self.tokenizer: CaptionTokenizer | None = None  # set by whoever loads the model

    def block_lists(self) -> list[nn.ModuleList]:
        """Transformer blocks, one list per trunk."""
        trunks = [self.decoder.get_submodule(name) for name in ("trunk", "pixel_trunk") if hasattr(self.decoder, name)]
        return [self.encoder.blocks, *(trunk.blocks for trunk in trunks)]  # type: ignore[list-item]

    def forward(self, batch: Batch, text_targets: Tensor | None = None, bidirectional: bool = False) -> Prediction:
        """Predict the next patch and the next token.

        Args:
            batch: images, captions, prefix lengths, scored rows.
            text_targets: see :meth:`MultimodalDecoder.forward`.
            bidirectional: full attention over all patches (Cap with full attention, Table 9a).

        Raises:
            TypeError: images in place of a batch.
        """
        if isinstance(batch, Tensor):
            raise TypeError(
                "a batch of pairs (aimv2.batch.make_batch) is expected, got a tensor: .encoder(images) gives features, "
                ".caption(images) texts"
            )
        features = self.encoder.forward_batch(batch, bidirectional)
        return self.decoder(features, batch, text_targets)

    def caption(
        self,
        images: Tensor,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        beams: int = 1,
        seed: int = 0,
        tokenizer: CaptionTokenizer | None = None,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Generate one caption per image, in evaluation mode; see :func:`aimv2.models.generate.generate`.

        Args:
            images: uint8 or normalised float [B, 3, H, W].
            max_tokens: maximum length, end of text included; None: the decoder's limit.
            temperature: 0 is greedy decoding.
            top_p: probability mass to sample from, in (0, 1].
            beams: beam width; 1 is no beam search.
            seed: sampling seed.
            tokenizer: replaces the model's own.
            repetition_penalty: above 1 makes tokens that are written already less likely.

        Raises:
            TypeError: images that are no tensor.
            ValueError: options out of range, no text head.
            UsageError: no tokeniser.
        """
        from aimv2.models.generate import generate

        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise UsageError(
                "the model has no tokenizer (its folder held none): give tokenizer=, or load a RUN, which has one",
                code="missing",
            )
        if not isinstance(images, Tensor):
            raise not_images(images)
        images = images.to(next(self.parameters()).device)
        limit = self.decoder.config.max_text if max_tokens is None else max_tokens
        was_training = self.training
        self.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                ids = generate(
                    self, images, tokenizer.eos_id, limit, temperature, top_p, beams, seed,
                    repetition_penalty=repetition_penalty,
                )  # fmt: skip
        finally:
            self.train(was_training)
        return [tokenizer.decode(caption) for caption in ids]

    def config_dict(self) -> dict[str, Any]:
        """Contents of ``config.json``: encoder and decoder."""
        return {"encoder": self.encoder.config_dict(), "decoder": asdict(self.decoder.config)}
