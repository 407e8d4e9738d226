"""Caption generation: greedy, sampling or beam search, with a key-value cache.

Legend: B images, I patches, V vocabulary, K beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aimv2.models.layers import Cache

if TYPE_CHECKING:
    from aimv2.models.aimv2 import AIMv2


class _NextToken:
    """Logits of the next token, from caches or (reference path) by a full forward pass each time."""

    def __init__(self, model: AIMv2, features: Tensor, cached: bool, penalty: float = 1.0) -> None:
        self.model, self.features, self.penalty = model, features, penalty
        self.caches: list[Cache] | None = model.decoder.new_caches() if cached else None
        if self.caches is not None:
            model.decoder.read_image(features, self.caches)

    def logits(self, written: Tensor) -> Tensor:
        """int64 [B, t] tokens so far -> fp32 [B, V] logits of the next."""
        if self.caches is None:
            logits = self.model.decoder.full_logits(self.features, written)[:, -1].float()
        else:
            last = written[:, -1] if written.shape[1] else None
            logits = self.model.decoder.next_logits(last, written.shape[1], len(self.features), self.caches).float()
        return logits if self.penalty == 1 else penalize(logits, written, self.penalty)

    def select(self, rows: Tensor) -> None:
        """Continue with samples ``rows``, repeats allowed."""
        self.features = self.features[rows]
        for cache in self.caches or ():
            cache.select(rows)


def penalize(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Logits with those of tokens that are written already divided by ``penalty`` (negative ones multiplied).

    The repetition penalty of CTRL (arXiv 1909.05858, section 4.1), as `transformers` has it.

    Args:
        logits: fp32 [B, V].
        written: int64 [B, t].
        penalty: above 0; 1 changes nothing.
    """
    there = logits.gather(1, written)
    return logits.scatter(1, written, torch.where(there > 0, there / penalty, there * penalty))


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row: the most likely at temperature 0, else nucleus sampling.

    Args:
        logits: fp32 [B, V].
        temperature: at least 0.
        top_p: probability mass to sample from, in (0, 1].
        generator: random generator for sampling.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    outside = probs.cumsum(-1) - probs >= top_p  # mass before a token: the most likely one always stays
    sampled = torch.multinomial(probs.masked_fill(outside, 0), 1, generator=generator)
    return order.gather(-1, sampled)[:, 0]


@torch.no_grad()
def generate(
    model: AIMv2,
    images: Tensor,
    eos_id: int,
    max_tokens: int = 77,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int = 0,
    cached: bool = True,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """Generate captions as token ids, each up to and including end of text (or ``max_tokens``).

    Args:
        model: with a text head, in evaluation mode.
        images: uint8 or normalised float [B, 3, H, W], on the model's device.
        eos_id: end-of-text id.
        max_tokens: 1..max_text of the decoder.
        temperature: 0 is greedy decoding.
        top_p: probability mass to sample from, in (0, 1].
        beams: beam width; above 1 beam search by mean log-probability (temperature must be 0). A caption that is cut at
            ``max_tokens`` is taken only where none has ended.
        seed: sampling seed.
        cached: False runs a full forward pass for each token (reference path).
        repetition_penalty: above 1 makes tokens that are written already less likely, see :func:`penalize`.

    Raises:
        ValueError: options out of range, or a model without a text head.
    """
    limit = model.decoder.config.max_text
    if not model.decoder.config.text:
        raise ValueError("this model has no text head (it was trained with objective.targets=image)")
    if not 1 <= max_tokens <= limit:
        raise ValueError(f"max_tokens must be 1 to {limit}, got {max_tokens}")
    if temperature < 0 or not 0 < top_p <= 1 or beams < 1:
        raise ValueError(
            f"temperature >= 0, 0 < top_p <= 1 and beams >= 1 are expected, got {temperature}, {top_p}, {beams}"
        )
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be above 0 (1: none), got {repetition_penalty}")
    if beams > 1 and temperature:
        raise ValueError(f"beam search does not sample: temperature must be 0 with beams {beams}, got {temperature}")
    next_token = _NextToken(model, model.encoder(images), cached, repetition_penalty)
    if beams > 1:
        return _beam_search(next_token, len(images), eos_id, max_tokens, beams)
    generator = torch.Generator(images.device).manual_seed(seed)
    written = torch.zeros(len(images), 0, dtype=torch.int64, device=images.device)
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    while written.shape[1] < max_tokens and not bool(ended.all()):
        token = pick(next_token.logits(written), temperature, top_p, generator)
        token = token.masked_fill(ended, eos_id)
        written = torch.cat([written, token[:, None]], 1)
        ended |= token == eos_id
    return [_until_end(row, eos_id) for row in written.tolist()]


def _until_end(ids: Sequence[int], eos_id: int) -> list[int]:
    return list(ids[: ids.index(eos_id) + 1]) if eos_id in ids else list(ids)


def _beam_search(next_token: _NextToken, samples: int, eos_id: int, max_tokens: int, beams: int) -> list[list[int]]:
    """Beam search with ``beams`` hypotheses per image; the best finished caption by mean log-probability wins.

    A long repetition has a better mean than any caption that ends: what is cut at ``max_tokens`` competes only where none ended.
    """
    device = next_token.features.device
    written = torch.zeros(samples, 0, dtype=torch.int64, device=device)
    scores = torch.zeros(samples, 1, device=device)  # [B, K]
    best: list[tuple[float, list[int]]] = [(float("-inf"), []) for _ in range(samples)]
    cut = list(best)
    for length in range(1, max_tokens + 1):
        logs = next_token.logits(written).log_softmax(-1).view(samples, scores.shape[1], -1)
        vocabulary = logs.shape[-1]
        total = (scores[:, :, None] + logs).flatten(1)  # [B, K * V]
        scores, places = total.topk(min(2 * beams, total.shape[1]), dim=1)
        parents, tokens = places // vocabulary, places % vocabulary
        rows = parents + torch.arange(samples, device=device)[:, None] * (logs.shape[1])
        open_, chosen = [], []
        for sample in range(samples):
            alive: list[int] = []
            for at in range(scores.shape[1]):
                prefix = written[rows[sample, at]].tolist()
                score = scores[sample, at].item() / length
                ended = int(tokens[sample, at]) == eos_id
                if ended or length == max_tokens:
                    found = best if ended else cut
                    if score > found[sample][0]:
                        found[sample] = (score, [*prefix, int(tokens[sample, at])])
                elif len(alive) < beams:
                    alive.append(at)
            alive += [alive[-1] if alive else 0] * (beams - len(alive))
            open_.append(scores[sample, alive])
            chosen += [(int(rows[sample, at]), int(tokens[sample, at])) for at in alive]
        # stop once no open hypothesis could win even if all its further tokens had probability 1
        if all(bool((o.max() / max_tokens) < b[0]) for o, b in zip(open_, best)):
            break
        scores = torch.stack(open_)
        kept = torch.tensor([row for row, _ in chosen], device=device)
        next_token.select(kept)
        new = torch.tensor([token for _, token in chosen], device=device)
        written = torch.cat([written[kept], new[:, None]], 1)
    return [ended or ids for (_, ended), (_, ids) in zip(best, cut)]
