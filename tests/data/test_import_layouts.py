"""`data import` on small layouts of the forms that people have: what it says and which captions it finds, held in layouts.txt.

After a change that is meant: ``python tests/data/test_import_layouts.py`` writes layouts.txt anew; look at the difference.
"""

import base64
import gzip
import io
import json
import os
import re
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import put, run
from PIL import Image
from rich.console import Console
from shard_tars import tar_of, tar_of_links

from aimv2.commands.render import render_figures
from aimv2.data.images.decode import decode_image
from aimv2.data.passed import HEIF_READ
from aimv2.data.shards.format import read_samples
from aimv2.errors import UsageError

GOLDEN = Path(__file__).with_name("layouts.txt")
HEAD = "# What `data import` says of each layout, and the captions it finds; written by: python tests/data/test_import_layouts.py\n"
TEXTS = ("a red square", 'a "quoted" word', "café, crème", "two | bars")
Layout = Callable[[Path], dict[str, object] | None]
LAYOUTS: dict[str, Layout] = {}


def layout(make: Layout) -> Layout:
    """Registers what makes a layout in a folder; what it returns are options of the import, with ``source`` below the folder."""
    LAYOUTS[make.__name__.replace("_", " ")] = make
    return make


def square(number: int, format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (40 * number, 200 - 30 * number, 90)).save(out, format)
    return out.getvalue()


def photos(root: Path, names: str = "{}.jpg", count: int = 4) -> list[str]:
    """Images 0 to ``count``; their names."""
    listed = [names.format(number) for number in range(count)]
    for number, name in enumerate(listed):
        put(root / name, square(number))
    return listed


def members(count: int = 4, image: str = "jpg") -> list[tuple[str, bytes]]:
    """Members of a tar: an image and its caption each."""
    pairs = (((f"{n}.{image}", square(n)), (f"{n}.txt", TEXTS[n].encode())) for n in range(count))
    return [member for pair in pairs for member in pair]


def table(root: Path, cells: list[object], name: str = "train.parquet", **columns: object) -> None:
    pq.write_table(pa.table({"image": cells, "caption": list(TEXTS[: len(cells)]), **columns}), root / name)


# ---- tars ----


@layout
def tar_gz(root: Path) -> None:
    plain = tar_of(root / "plain", members())
    put(root / "00000.tar.gz", gzip.compress(plain.read_bytes()))
    plain.unlink()


@layout
def tar_with_hard_links(root: Path) -> None:
    links = {"4.jpg": (tarfile.LNKTYPE, "0.jpg"), "4.txt": (tarfile.LNKTYPE, "1.txt")}
    tar_of_links(root / "a.tar", {**links, "5.jpg": (tarfile.SYMTYPE, "/etc/hostname")}, members())


@layout
def tar_s_input_jpg(root: Path) -> None:
    tar_of(
        root / "a.tar",
        [*members(3, "input.jpg"), ("3.left.jpg", square(0)), ("3.right.jpg", square(1)), ("3.txt", b"x")],
    )


@layout
def tar_unsorted(root: Path) -> None:
    tar_of(root / "00000.tar", members())
    tar_of(root / "00001.tar", sorted(members(), key=lambda member: member[0].rpartition(".")[2]))


@layout
def tar_of_a_mac(root: Path) -> None:
    tar_of(root / "a.tar", [pair for name, body in members() for pair in ((f"._{name}", b"fork"), (name, body))])
    put(root / "._a.tar", b"fork")


@layout
def tars_with_dead_links(root: Path) -> None:
    tar_of(root / "train-0.tar", members())
    (root / "train-1.tar").symlink_to("/gone/train-1.tar")


@layout
def tar_names_that_lead_out(root: Path) -> None:
    tar_of(root / "a.tar", [(f"{'/data' if n[0] == '0' else '../..'}/{n}", body) for n, body in members(2)])


# ---- img2dataset ----


def downloaded(root: Path, image: Callable[[str, bytes], object]) -> None:
    """What img2dataset leaves besides images: texts, records, a table and statistics."""
    keys = [f"{n:09d}" for n in range(4)]
    for n, key in enumerate(keys[:3]):
        record = {
            "caption": TEXTS[n],
            "url": f"https://example.org/{n}.jpg",
            "key": key,
            "status": "success",
            "width": 16,
        }
        for name, body in (
            (f"{key}.jpg", square(n)),
            (f"{key}.txt", TEXTS[n].encode()),
            (f"{key}.json", json.dumps(record).encode()),
        ):
            image(name, body)
    stats = {
        "count": 4,
        "successes": 3,
        "failed_to_download": 1,
        "failed_to_resize": 0,
        "status_dict": {"success": 3, "HTTP 404": 1},
    }
    put(root / "00000_stats.json", json.dumps(stats))
    notes = {"url": keys, "key": keys, "status": ["success"] * 3 + ["failed_to_download"], "caption": list(TEXTS)}
    pq.write_table(pa.table(notes), root / "00000.parquet")


@layout
def img2dataset_files(root: Path) -> None:
    downloaded(root, lambda name, body: put(root / "00000" / name, body))


@layout
def img2dataset_webdataset(root: Path) -> None:
    found: list[tuple[str, bytes]] = []
    downloaded(root, lambda name, body: found.append((name, body)))
    tar_of(root / "00000.tar", found)


@layout
def img2dataset_parquet(root: Path) -> None:
    cells = {"jpg": [square(0), square(1), square(2), None], "status": ["success"] * 3 + ["failed_to_download"]}
    columns = {"url": ["https://example.org"] * 4, "key": list("0123"), "caption": list(TEXTS)}
    pq.write_table(pa.table({**columns, **cells}), root / "00000.parquet")
    put(root / "00000_stats.json", '{"count": 4, "successes": 3, "failed_to_download": 1}')


# ---- tables ----


@layout
def parquet_base64(root: Path) -> None:
    texts = [base64.b64encode(square(n)).decode() for n in range(3)]
    table(
        root, [texts[0], f"data:image/jpeg;base64,{texts[1]}", "\n".join(re.findall(".{1,76}", texts[2])), "no base64"]
    )


@layout
def parquet_structs(root: Path) -> None:
    put(root / "images/3.jpg", square(3))
    cells = [{"bytes": square(n), "path": f"{n}.jpg"} for n in range(3)]
    table(root, [*cells, {"bytes": None, "path": "images/3.jpg"}], source=["web"] * 4)


@layout
def parquet_lists(root: Path) -> None:
    cells = [{"bytes": square(n), "path": None} for n in range(4)]
    table(root, [[cells[0]], [cells[1]], [], cells[2:]])


@layout
def parquet_lists_of_base64(root: Path) -> None:
    table(root, [[base64.b64encode(square(n)).decode()] for n in range(4)])


@layout
def parquet_absolute_paths(root: Path) -> None:
    table(root, [*photos(root)[:2], str(root.parent / "elsewhere" / "2.jpg"), "https://example.org/3.jpg"])


# ---- folders ----


@layout
def junk_of_phones_and_a_NAS(root: Path) -> None:
    for name, text in zip(photos(root), TEXTS):
        put(root / f"{name[:-4]}.txt", text)
    for name in (
        "._0.jpg",
        ".DS_Store",
        "IMG_1.HEIC",
        "IMG_2.heic",
        "a.CR2",
        "b.dng",
        "@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg",
    ):
        put(root / name, square(0))
    for name in ("__MACOSX/._0.jpg", "clip.mp4", "drawing.svg", "README.md", ".git/config"):
        put(root / name, "x")
    (root / "dead.jpg").symlink_to("/gone/dead.jpg")
    (root / "loop").symlink_to(root)


@layout
def heic_only(root: Path) -> None:
    put(root / "a.heic", b"\0\0\0\x18ftypheic")
    put(root / "captions.csv", "image,caption\na.heic,a photo\n")


@layout
def heic_named_jpg(root: Path) -> None:
    photos(root, count=3)
    put(root / "3.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64)
    put(
        root / "captions.jsonl",
        "".join(json.dumps({"image": f"{n}.jpg", "caption": TEXTS[n]}) + "\n" for n in range(4)),
    )


@layout
def absolute_paths(root: Path) -> None:
    photos(root, "{}.jpg", 2)
    put(root / "captions.csv", f"image,caption\n{root}/0.jpg,inside\n../elsewhere/2.jpg,outside\n")


@layout
def absolute_paths_with_image_root(root: Path) -> dict[str, object]:
    photos(root, "{}.jpg", 2)
    names = [*photos(root.parent / "elsewhere"), "../elsewhere/2.jpg"]
    put(root / "captions.csv", "image,caption\n" + "".join(f"{name},caption {n}\n" for n, name in enumerate(names)))
    return {"image_root": str(root.parent / "elsewhere")}


@layout
def urls(root: Path) -> None:
    photos(root)
    put(root / "captions.csv", "image,caption\nhttps://example.org/0.jpg,a\nfile:///etc/1.jpg,b\n")


@layout
def links_inside_the_folder(root: Path) -> None:
    photos(root.parent / "store", count=3)
    (root / "linked").symlink_to(root.parent / "store")
    (root / "0.jpg").symlink_to(root.parent / "store" / "0.jpg")
    put(root / "captions.csv", "image,caption\n0.jpg,a link\nlinked/1.jpg,below a link\nlinked/2.jpg,too\n")


# ---- captions files and sidecars ----


def csv_of(names: list[str], mark: str = ",", head: tuple[str, str] = ("image", "caption"), quoted: bool = True) -> str:
    """A table of names and captions; quoted where a caption needs it."""
    plain = [
        f'"{text.replace(chr(34), 2 * chr(34))}"' if quoted and re.search(f'[{mark}"]', text) else text
        for text in TEXTS
    ]
    return "".join(f"{name}{mark}{text}\n" for name, text in [head, *zip(names, plain)])


@layout
def csv_cp1252(root: Path) -> None:
    put(root / "captions.csv", csv_of(photos(root)).encode("cp1252"))


@layout
def csv_with_BOM(root: Path) -> None:
    put(root / "captions.csv", csv_of(photos(root)).encode("utf-8-sig"))


@layout
def tsv_utf16(root: Path) -> None:
    put(root / "captions.tsv", csv_of(photos(root), "\t", quoted=False).encode("utf-16"))


@layout
def bars_with_quotes(root: Path) -> None:
    rows = "".join(f"{name}| {n}| {text}\n" for n, (name, text) in enumerate(zip(photos(root, count=3), TEXTS)))
    put(root / "results.csv", f'image_name| comment_number| comment\n{rows}0.jpg| 3| "an opening quote\n')


@layout
def csv_with_more_columns_and_short_rows(root: Path) -> None:
    photos(root)
    put(root / "captions.csv", "image,caption,license,author\n0.jpg,a,CC0,me\n1.jpg,b\n2.jpg\n3.jpg,c,CC0,me,more\n")


@layout
def csv_prompt(root: Path) -> None:
    put(root / "metadata.csv", csv_of(photos(root), head=("file_name", "prompt")))


@layout
def llava_json(root: Path) -> None:
    turns = lambda text: [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": text}]  # noqa: E731
    rows = [
        {"id": str(n), "image": name, "conversations": turns(TEXTS[n])}
        for n, name in enumerate(photos(root, "images/{}.jpg"))
    ]
    put(root / "llava.json", json.dumps(rows))


@layout
def jsonl_with_different_keys(root: Path) -> None:
    photos(root)
    rows = [
        {"image": "0.jpg", "caption": "a"},
        {"file_name": "1.jpg", "text": "b"},
        {"image": "2.jpg", "captions": ["c", "d"]},
    ]
    put(root / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, {"image": "3.jpg"}]))


@layout
def karpathy_json(root: Path) -> None:
    photos(root / "val2014", "COCO_{}.jpg")
    splits = ("train", "restval", "val", "test")
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_{n}.jpg",
            "split": splits[n],
            "cocoid": n,
            "sentences": [{"raw": TEXTS[n], "tokens": []}],
        }
        for n in range(4)
    ]
    put(root / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))


@layout
def caption_sidecars(root: Path) -> None:
    for name, text in zip(photos(root), TEXTS):
        put(root / f"{name[:-4]}.caption", text)


@layout
def photo_jpg_txt(root: Path) -> None:
    for name, text in zip(photos(root), TEXTS):
        put(root / f"{name}.txt", f"{text}\nof two lines" if name[0] == "0" else text)


@layout
def takeout(root: Path) -> None:
    for n, name in enumerate(photos(root, "IMG_{}.jpg")):
        about = {"title": name, "description": TEXTS[n] if n < 3 else "", "url": "https://example.org"}
        put(root / (f"{name}.json" if n % 2 else f"{name}.supplemental-metadata.json"), json.dumps(about))


@layout
def nfd_names(root: Path) -> None:
    for n, name in enumerate(("caf\u00e9", "cre\u0300me", "Zo\u00eb", "plain")):
        put(root / f"{unicodedata.normalize('NFD', name)}.JPG", square(n))
    names = (f"{unicodedata.normalize('NFC', name)}.jpg" for name in ("caf\u00e9", "cre\u0300me", "zo\u00eb", "plain"))
    put(root / "captions.csv", csv_of(list(names)))


@layout
def numbered_class_folders(root: Path) -> None:
    for n in range(12):
        put(root / str(n) / "a.jpg", square(n % 6))
    put(root / "classnames.txt", "".join(f"class {n}\n" for n in range(12)))


# ---- what it says ----


def said(make: Layout, place: Path) -> str:
    """The summary or the error of an import of a layout, and its captions and rejects."""
    root, out = place / "SRC", place / "OUT"
    root.mkdir()
    options = make(root) or {}
    lines = io.StringIO()
    try:
        result = run(root / str(options.pop("source", "")), out, **options)
        del result["seconds"]
        render_figures(Console(file=lines, width=200, highlight=False, markup=False, soft_wrap=True), result)
    except UsageError as error:
        print(f"error: {error}", file=lines)
    for tar in sorted(out.glob("*.tar")):
        for key, parts in read_samples(tar):
            red = decode_image(parts["jpg"]).getpixel((8, 8))[0]
            label = f" class {parts['cls'].decode()}" if "cls" in parts else ""
            captions = json.dumps(json.loads(parts["json"])["captions"], ensure_ascii=False)
            print(f"  {tar.name[:-11]} {key}: image {round(red / 40)}{label} {captions}", file=lines)
    if (out / "rejected.jsonl").exists():
        for row in map(json.loads, (out / "rejected.jsonl").read_text().splitlines()):
            print(f"  rejected {row['image']}: {row['reason']}", file=lines)
    text = lines.getvalue().replace(str(place.resolve()), "/PLACE").replace(str(place), "/PLACE")
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def golden() -> dict[str, str]:
    """{layout: what is said}."""
    parts = re.split(r"^## (.*)\n", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.rstrip("\n") + "\n" for name, text in zip(parts[1::2], parts[2::2])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tmp_path: Path) -> None:
    if HEIF_READ and "HEIC" in golden()[name]:
        pytest.skip("HEIC is read here, and these lines say that it is not")
    assert said(LAYOUTS[name], tmp_path) == golden()[name]


def test_all_layouts_are_held() -> None:
    assert list(golden()) == list(LAYOUTS) and GOLDEN.read_text().startswith(HEAD)


def write() -> None:
    """Writes what is said of every layout."""
    texts = [HEAD]
    for name, make in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as place:
            texts.append(f"## {name}\n{said(make, Path(os.path.realpath(place)))}")
    GOLDEN.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write())
