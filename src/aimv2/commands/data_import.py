"""``aimv2 data import``: captioned images, conversations or boxes of any form to shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aimv2.config.types import PathText, PositiveInt

EXAMPLES = """\
aimv2 data import photos shards/photos
aimv2 data import table.csv shards/mine --image-column file --val-fraction .05
aimv2 data import llava.json OUT --image-root images --conversations true
aimv2 data import instances_val2017.json OUT --image-root val2017 --boxes true"""
FIRST = (
    "captions image_column caption_column val_fraction max_side class_folders no_captions conversations boxes workers"
)


@dataclass(kw_only=True)
class DataImportOptions:
    """Convert captioned images, in whatever form they are, to WebDataset shards.

    Args:
        source: folder with a captions file, images with sidecars, COCO or LLaVA JSON, class folders, Parquet/Arrow, tars, or a
            datasets hub id; such a file itself
        out: folder for the shards; an interrupted import resumes and ends with the same shards
        captions: the captions file, if a folder has several
        image_column: image column of a table
        caption_column: caption column of a table, or key of the samples' JSON; one, or several as a,b; each is a caption field
        template: caption of a class folder; {} is the class
        split: split of a hub id, of a folder of tables, or of a captions file whose rows state one
        image_root: a folder outside the source, below which tables and captions files may name images
        val_fraction: fraction of the keys that becomes validation data
        val_list: file with the keys or file names of the validation data, one per line
        max_side: shrink images whose longer side is larger, pixels
        shard_size: samples per shard
        workers: number of processes; null: as many as there are cores, at most 8
        class_folders: use the names of the sub-folders as captions (see template), whatever other files there are; by default
            only if there are two or more and no file that may hold captions
        no_captions: take the images of a folder without captions (objective.targets=image trains on them)
        conversations: take whole conversations, about several images, one or none (`aimv2 vlm train` trains on them); by default the
            first answer is the caption
        boxes: take boxes, classes and phrases: COCO's JSON of instances (LVIS, Objects365, MDETR's), refs(...).p of RefCOCO, Flickr30k
            Entities, YOLO's data.yaml, ODVG, GQA's scene graphs (`aimv2 detect train` trains on them)
    """

    source: PathText
    out: PathText
    captions: PathText | None = None
    image_column: str | None = None
    caption_column: list[str] | str | None = None
    template: str = "a photo of a {}."
    split: str | None = None
    val_fraction: float = 0.0
    val_list: PathText | None = None
    max_side: int | None = None
    shard_size: int = 1000
    workers: PositiveInt | None = None
    class_folders: bool = False
    image_root: PathText | None = None
    no_captions: bool = False
    conversations: bool = False
    boxes: bool = False


def run(options: DataImportOptions) -> dict[str, Any]:
    from aimv2.data.shards.importing import import_data

    given = dict(vars(options))
    if given["workers"] is None:
        del given["workers"]
    return import_data(given.pop("source"), given.pop("out"), **given)
