"""Processes find their device."""

import pytest
import torch

from aimv2.distributed import join_world
from aimv2.errors import UsageError


def test_more_processes_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"LOCAL_RANK 2 .* shows 2 GPU.*--nproc-per-node 2"):
        join_world()
