"""What an import leaves out is counted, and labels of every form are read or counted."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import picture, run
from shard_tars import tar_of

from aimv2.data.shards.format import read_samples


def labels(out: Path) -> list[str | None]:
    tars = sorted(out.glob("train-*.tar"))
    return [parts["cls"].decode() if "cls" in parts else None for tar in tars for _, parts in read_samples(tar)]


def counted(result: dict) -> dict[str, int]:
    return {kind: about["number"] for kind, about in result["passed_over"].items()}


ODD = "labels that are no whole number from 0"


@pytest.mark.parametrize(
    ("cells", "read", "odd"),
    [
        ([True, False, None], ["1", "0", None], 0),
        (["cat", "2", ""], [None, "2", None], 1),
        ([1.5, 1.0, None], [None, "1", None], 1),
        ([-1, 3, 0], [None, "3", "0"], 1),
    ],
)
def test_labels_of_tables(tmp_path: Path, cells: list, read: list, odd: int) -> None:
    (tmp_path / "src").mkdir()
    rows = {"image": [picture(n) for n in range(3)], "caption": ["one", "two", "three"], "label": cells}
    pq.write_table(pa.table(rows), tmp_path / "src" / "t.parquet")
    result = run(tmp_path / "src", tmp_path / "out")
    assert labels(tmp_path / "out") == read and counted(result).get(ODD, 0) == odd


def test_labels_of_tars(tmp_path: Path) -> None:
    cells = [b"1.0\n", b"cat", b"-1", b"7"]
    members = [
        (f"{n}.{kind}", content)
        for n, cell in enumerate(cells)
        for kind, content in (("cls", cell), ("jpg", picture(n)), ("txt", b"words"))
    ]
    (tmp_path / "src").mkdir()
    tar_of(tmp_path / "src" / "0.tar", members)
    for shard_size in (1, 4):  # the counts of shards come together
        result = run(tmp_path / "src", tmp_path / f"out{shard_size}", shard_size=shard_size)
        assert labels(tmp_path / f"out{shard_size}") == ["1", None, None, "7"] and counted(result) == {ODD: 2}
    assert result["passed_over"][ODD]["examples"] == ["cat", "-1"]
