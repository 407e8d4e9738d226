"""What a model that sees no image can know: unigram and bigram entropies of captions, the yardstick of a text loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

START = -1


def unigram_loss(train: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]], vocab_size: int) -> float:
    """Cross-entropy of held-out tokens under the training tokens' frequencies (one added to each count).

    Args:
        train, held_out: captions as ids, end of text included.
        vocab_size: V.

    Returns:
        nats a token.
    """
    counts = Counter(token for caption in train for token in caption)
    total = sum(counts.values()) + vocab_size
    tokens = [token for caption in held_out for token in caption]
    return -sum(math.log((counts[token] + 1) / total) for token in tokens) / max(len(tokens), 1)


def bigram_loss(train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocab_size: int) -> float:
    """Cross-entropy under an interpolated bigram; its weight is the best of a few for the held-out tokens.

    Returns:
        nats a token.
    """
    single = Counter(token for caption in train for token in caption)
    pairs = Counter(pair for caption in train for pair in zip([START, *caption], caption))
    before = Counter(first for caption in train for first in [START, *caption[:-1]])
    total = sum(single.values()) + vocab_size
    scored = [pair for caption in held_out for pair in zip([START, *caption], caption)]

    def loss(weight: float) -> float:
        nats = 0.0
        for first, second in scored:
            pair = pairs[first, second] / before[first] if before[first] else 0.0
            nats -= math.log(weight * pair + (1 - weight) * (single[second] + 1) / total)
        return nats / max(len(scored), 1)

    return min(loss(step / 20) for step in range(1, 20))
