"""WILDS' tables in small: which images are of which split, and rows that are refused."""

from pathlib import Path

import pytest
from test_labelled import encoded, opened, put, refused, seen

from aimv2.data.images.decode import ImageError
from aimv2.data.images.opening import open_labelled

SPLITS = ("train", "val", "test")
CAMELYON = (  # row number, patient, node, x, y, tumor, slide, center, split
    *("0,004,4,3328,21792,1,0,0,0", "1,004,4,3200,22272,0,0,0,1", "2,010,1,64,96,0,5,1,0"),
    *("3,010,1,96,128,1,5,1,1", "4,051,2,640,960,1,30,2,0", "5,072,3,96,192,0,40,4,0"),
)


def table(path: Path, header: str, rows: tuple[str, ...], names: tuple[str, ...]) -> None:
    """A table, and an image of each row's number under each row's name."""
    put(path, "\n".join((header, *rows)) + "\n")
    for number, name in enumerate(names):
        put(path.parent / name, encoded(number))


def camelyon17(home: Path) -> None:
    cells = [row.split(",") for row in CAMELYON]
    names = tuple(
        f"patches/patient_{p}_node_{n}/patch_patient_{p}_node_{n}_x_{x}_y_{y}.png" for _, p, n, x, y, *_ in cells
    )
    table(home / "metadata.csv", ",patient,node,x_coord,y_coord,tumor,slide,center,split", CAMELYON, names)


def test_camelyon17(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hospital 1 is the split that the paper tests on, 2 is WILDS' own test; row 1 is its in-distribution validation."""
    camelyon17(tmp_path / "camelyon17_v1.0")
    for source in (tmp_path, tmp_path / "camelyon17_v1.0"):
        train, test = opened(source, "train"), opened(source, "test")
        assert (train.name, train.classes) == ("camelyon17", ("normal", "tumor"))
        assert [row[1:] for row in seen(train)] == [(1, 0), (0, 5)]
        assert [row[1:] for row in seen(test)] == [(0, 2), (1, 3)]
        assert train.keys[0] == "patches/patient_004_node_4/patch_patient_004_node_4_x_3328_y_21792.png"
        assert open_labelled(str(source), "val") is None
    assert "302,436 train images expected, 2 found in AIMV2's Camelyon17" in caplog.text
    assert "--dataset camelyon17: 34,904 test images expected, 2 found" in refused(tmp_path, "test", "Camelyon17")
    assert "is camelyon17 by its form (the table of WILDS' camelyon17)" in refused(tmp_path, "test", "pcam")


def test_rxrx1(tmp_path: Path) -> None:
    """Of the training experiments site 2 is WILDS' in-distribution test; ``val`` and ``test`` have both sites."""
    rows = (  # dataset, experiment, plate, well, site, sirna_id
        *(("train", "HEPG2-01", 1, "B02", 1, 2), ("train", "HEPG2-01", 1, "B02", 2, 2)),
        *(("train", "HUVEC-03", 4, "AA10", 1, 0), ("train", "RPE-02", 2, "C05", 1, 1)),
        *(
            ("val", "HEPG2-08", 3, "D11", 1, 1),
            ("val", "HEPG2-08", 3, "D11", 2, 1),
            ("test", "U2OS-05", 1, "E07", 2, 0),
        ),
    )
    lines = tuple(
        f"{e}_{p}_{w}_{s},{e}_{p}_{w},{e[:-3]},{d},{e},{p},{w},{s},treatment,s{label},{label}"
        for d, e, p, w, s, label in rows
    )
    names = tuple(f"images/{e}/Plate{p}/{w}_s{s}.png" for _, e, p, w, s, _ in rows)
    header = "site_id,well_id,cell_type,dataset,experiment,plate,well,site,well_type,sirna,sirna_id"
    table(tmp_path / "rxrx1_v1.0" / "metadata.csv", header, lines, names)
    train, test = opened(tmp_path, "train"), opened(tmp_path, "test")
    assert (train.name, train.classes, test.classes) == ("rxrx1", ("0", "1", "2"), ("0", "1", "2"))
    assert seen(train) == [(names[0], 2, 0), (names[2], 0, 2), (names[3], 1, 3)]
    assert seen(test) == [(names[4], 1, 4), (names[5], 1, 5)] and open_labelled(str(tmp_path), "val") is None
    said = refused(tmp_path, "train", "rxrx1")
    assert "--dataset rxrx1: 1,139 classes expected, 3 found; 40,612 train images expected, 3 found" in said


def test_fmow(tmp_path: Path) -> None:
    """An image is named by its row, sequestered ones included; ``val`` is of 2013 to 2015, ``train`` from before."""
    rows = (
        *("train,2012-12-31T23:59:59Z,zoo", "train,2013-01-01T00:00:00Z,zoo", "seq,2010-05-05T10:00:00Z,zoo"),
        *("val,2015-12-31T08:00:00Z,airport", "val,2012-06-01T08:00:00Z,airport", "val,2016-03-01T08:00:00Z,airport"),
        *("test,2016-01-01T00:00:00Z,zoo", "test,2014-01-01T00:00:00Z,zoo", "train,2003-07-01T00:00:00Z,airport"),
        'val,2013-01-01T00:00:00Z,"multi-unit_residential"',
        "train,2009-07-01T00:00:00Z,multi-unit_residential",
    )
    names = tuple(f"images/rgb_img_{number}.png" for number in range(len(rows)))
    table(tmp_path / "fmow_v1.1" / "rgb_metadata.csv", "split,timestamp,category", rows, names)
    train, test = opened(tmp_path, "train"), opened(tmp_path, "test")
    assert (train.name, train.classes) == ("fmow", ("airport", "multi-unit_residential", "zoo"))
    assert seen(train) == [(names[0], 2, 0), (names[8], 0, 8), (names[10], 1, 10)]
    assert seen(test) == [(names[3], 0, 3), (names[9], 1, 9)] and test.classes == train.classes
    said = refused(tmp_path, "test", "fMoW")
    assert "--dataset fmow: 62 classes expected, 3 found; 19,915 test images expected, 2 found" in said


def test_iwildcam(tmp_path: Path) -> None:
    """Not of the paper: all three splits keep their names."""
    rows = ("train,a.jpg,1", "train,b.jpg,0", "id_val,c.jpg,0", "val,d.jpg,1", "test,e.jpg,0", "id_test,f.jpg,1")
    names = tuple(f"train/{letter}.jpg" for letter in "abcdef")
    table(tmp_path / "metadata.csv", "split,filename,y", rows, names)
    parts = [seen(opened(tmp_path, split)) for split in SPLITS]
    assert parts == [[(names[0], 1, 0), (names[1], 0, 1)], [(names[3], 1, 3)], [(names[4], 0, 4)]]
    assert opened(tmp_path, "train").name == tmp_path.name and opened(tmp_path, "train").classes == ("0", "1")


def test_wrong_tables(tmp_path: Path) -> None:
    camelyon17(tmp_path)
    path = tmp_path / "metadata.csv"
    text = path.read_text()

    def said(found: str, instead: str) -> str:
        assert found in text
        put(path, text.replace(found, instead))
        return refused(tmp_path)

    assert "row 2 of metadata.csv has 4 cells, 9 expected" in said("1,004,4,3200,22272,0,0,0,1", "1,004,4,3200")
    assert "metadata.csv names patches/patient_005_node_4/" in said("0,004", "0,005")
    assert "label yes: a number expected" in said("21792,1,", "21792,yes,")
    assert "1 of 2 images of train have no label" in said("21792,1,", "21792,,")
    assert "label 2 of patches/patient_004_node_4" in said("21792,1,", "21792,2,")
    assert "no image in its train split" in said(text[text.index("\n0,") :], "\n")
    put(path, text.encode() + b"\x81\n")
    assert "is not UTF-8, and neither" in refused(tmp_path)
    put(path, text.replace(",center,", ",hospital,"))
    assert "one class ('patches')" in refused(tmp_path)  # some other table: class folders like any other
    put(path, f"\ufeff{text}\r\n\r\n".replace("\n2,", "\n\n2,"))  # blank lines are no rows
    data = opened(tmp_path, "train")
    assert len(data.labels) == 2
    (tmp_path / data.keys[1]).unlink()
    with pytest.raises(ImageError):
        data.image(1)
