"""A stream that goes on for long holds no more than at its start."""

from __future__ import annotations

import gc
import tarfile
from pathlib import Path

import pytest

from aimv2.api import data_shapes
from aimv2.config.schema import DataConfig
from aimv2.data.stream.samples import TrainStream, View


def headers() -> int:
    gc.collect()
    return sum(isinstance(one, tarfile.TarInfo) for one in gc.get_objects())


def test_no_header_of_what_was_read_is_kept(tmp_path: Path) -> None:
    data_shapes(str(tmp_path / "scenes"), count=64)
    config = DataConfig(train=str(tmp_path / "scenes"), workers=0, shuffle_buffer=8)
    stream = TrainStream(config, View(32, 16), None, 16, 0)
    next(stream)
    before = headers()
    for _ in range(12):  # three passes over the shard
        next(stream)
    assert headers() <= before + 8
    stream.close()


def test_the_check_would_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.energon.flavors.webdataset.itar import ITarFile

    data_shapes(str(tmp_path / "scenes"), count=64)
    stream = TrainStream(DataConfig(train=str(tmp_path / "scenes"), workers=0), View(32, 16), None, 16, 0)
    monkeypatch.delattr(ITarFile, "members")
    next(stream)
    before = headers()
    for _ in range(12):
        next(stream)
    assert headers() > before + 100
    stream.close()
