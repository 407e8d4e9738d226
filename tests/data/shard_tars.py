"""Tars for tests of shards and of their index, and what energon reads through one."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def jpeg(gray: int = 100) -> bytes:
    out = io.BytesIO()
    Image.new("L", (16, 16), gray).save(out, "JPEG")
    return out.getvalue()


def samples(*keys: str, caption: str = "a gray square") -> list[tuple[str, dict[str, bytes]]]:
    return [(key, {"jpg": jpeg(), "txt": f"{caption} {key}".encode()}) for key in keys]


def tar_of(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar as other tools write it: names and order as given, time and owner set."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uid = len(content), 1_700_000_000, 1000
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_of_links(path: Path, links: dict[str, tuple[bytes, str]], members: list[tuple[str, bytes]]) -> Path:
    """Members, then links: {name: (type of the member, where it leads)}."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, (kind, target) in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")])


def energon_samples(index: Path, count: int) -> list[dict]:
    """What energon itself reads through an index, one epoch, no shuffling."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
        stateless,
    )

    @stateless
    def cook(sample: dict) -> dict:
        return dict(sample)

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]  # noqa: RUF012

        def batch(self, batch: list) -> list:
            return batch

        def encode_batch(self, batch: list) -> list:
            return batch

    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(index, split_part="train", worker_config=worker, batch_size=1, task_encoder=Encoder())
    found = [sample for batch in get_loader(dataset) for sample in batch]
    assert len(found) == count
    return found


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]
