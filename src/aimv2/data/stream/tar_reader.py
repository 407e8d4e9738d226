"""How energon reads a sample of a tar here: what is broken costs its sample, and a tar that is cut the samples that it lost."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from typing import Any

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.itar import ITarFile, ITarSamplePointer
from megatron.energon.flavors.webdataset.itar_reader import ITarReader
from megatron.energon.source_info import SourceInfo

from aimv2.data.stream.rejected import CUT, UNREAD


class _ReadMembers(list[tarfile.TarInfo]):
    """A list of tar headers that stays empty.

    Energon keeps tars open and reads samples by offset; ``tarfile`` would keep the header of every read while the tar is
    open, some kilobytes per sample, without bound in a data set of few shards.
    """

    def append(self, member: tarfile.TarInfo) -> None:
        pass


def read_sample(
    reader: ITarReader[Any],
    pointer: ITarSamplePointer,
    restore_index: str | int,
    entry_match_fn: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """In the place of energon's own: the parts of a sample by extension; :data:`UNREAD` says why there are none.

    Raises:
        ValueError: another sample than the index says.
    """
    shard, parts, names, key, why = reader.tar_filenames[pointer.tar_file_id], dict[str, bytes](), list[str](), "", ""
    try:
        with reader._open_itarfile(pointer.tar_file_id) as tar:
            tar.offset = pointer.byte_offset
            while tar.offset < pointer.byte_offset + pointer.byte_size:
                member = tar.next()
                if member is None:
                    why = CUT
                    break
                found = split_name_re.match(member.name or "")
                if not member.isfile() or skip_meta_re.match(member.name) or found is None:
                    continue
                name, extension = found.groups()
                if key and name != key:
                    raise Misplaced(f"Inconsistent sample base name: {key} vs {name}")
                key = name
                content = tar.extractfile(member)
                data = b"" if content is None else content.read()
                if len(data) < member.size:
                    why = CUT
                    break
                if not extension.startswith("__"):  # energon's own names
                    parts[extension] = data
                    names.append(member.name)
    except Misplaced:
        raise
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}"
    except (tarfile.TarError, EOFError, ValueError, OverflowError):
        why = CUT
    if not parts and not why:
        why = "no member that can be read"
    about = SourceInfo(dataset_path=reader.base_path, index=restore_index, shard_name=shard, file_names=tuple(names))
    sample: dict[str, Any] = {
        "__key__": key or f"sample {restore_index}",
        "__shard__": shard,
        "__restore_key__": ("Webdataset", restore_index),
        "__sources__": (about,),
    }
    return {**sample, UNREAD: why} if why else {**sample, **parts}


class Misplaced(ValueError):
    """The index and the tar are not of each other."""


def read_by_our_rules() -> None:
    """Lets every reader of energon in this process, and in data workers forked from it, read so."""
    ITarReader._get_item_by_sample_pointer = read_sample
    # tarfile sets and fills this attribute in every tar that energon opens
    ITarFile.members = property(lambda _: _ReadMembers(), lambda _, value: None)
