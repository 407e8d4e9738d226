"""Training samples of native resolution: mini-batches of one area each."""

from __future__ import annotations

from typing import Any

import torch
from megatron.energon import stateless

from aimv2.batch import Batch
from aimv2.data.stream.native import make_native_batch
from aimv2.data.stream.samples import PairEncoder


class NativePairEncoder(PairEncoder):
    """Collates mini-batches of one area each, as many images as the budget holds."""

    @stateless
    def batch_group_criterion(self, sample: dict[str, Any]) -> tuple[int, int]:
        assert self.view.native is not None
        return sample["area"], self.view.native.budget // sample["area"]

    @stateless
    def batch(self, samples: list[dict[str, Any]]) -> Batch:
        assert self.view.native is not None
        fresh, self.fresh = self.fresh, []
        return make_native_batch(
            [torch.from_numpy(sample["image"]) for sample in samples],
            [sample["tokens"] for sample in samples],
            [sample["prefix"] for sample in samples],
            self.view.native.patch,
            samples[0]["area"],
            [sample["__key__"] for sample in samples],
            fresh,
            [sample["label"] for sample in samples],
            [sample["source"] for sample in samples],
        )
