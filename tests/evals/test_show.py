"""What the evaluation verbs print without --json: figures with their intervals, what was chosen, the sweep, baselines."""

import re
from pathlib import Path

import pytest
from test_classify import squares
from test_dense import DEPTH_SPLIT, SPLIT, draw, metres_of
from test_dense import model_at as patches_at
from test_match import class_folders, pair_at

from aimv2.cli import main
from features.test_embed import model_at


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    model_at(folder / "m")
    patches_at(folder / "patches")
    squares(folder / "data", {"train": 12, "val": 4, "test": 8})
    draw(folder / "masks", *SPLIT, counts=(12, 4))
    draw(folder / "metres", *DEPTH_SPLIT, to_map=metres_of, counts=(12, 4))
    pair_at(folder / "pair", {})
    class_folders(folder / "colours")
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("knn m --data data --k 1,3,9 --baselines random", ["chosen  ", "k  selection_top1", "baseline: random"]),
        ("linear m --data data --solver sgd --layers 0,last", ["by_layer 0", "rate  selection_top1"]),
        ("fewshot m --data data --shots 1,5 --seeds 2", ["shots  ", "chosen  "]),
        ("segment patches --data masks --epochs 1 --rates 1e-3,1e-2", ["miou ", "chosen ", "held_out_miou"]),
        ("depth patches --data metres --epochs 1 --rates 1e-2 --baselines pixels", ["rmse ", "rate 0.01", "baseline"]),
        ("zeroshot pair --data colours", ["top1 ", "chance"]),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_verb_prints_what_it_found(
    place: Path, words: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *rest = [str(place / word) if (place / word).exists() else word for word in words.split()]
    assert main([verb, *rest, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    squeezed = "\n".join(" ".join(line.split()) for line in printed.splitlines())
    for part in said:
        assert " ".join(part.split()) in squeezed, printed
    fractions = [
        line for line in squeezed.splitlines() if re.match("top1|by_layer|miou|pixel_acc|chance|delta1|top5 ", line)
    ]
    assert fractions and all(re.match(r"\S+ (\S+ )?\d+\.\d%(?!\d)", line) for line in fractions), (
        "percent with one decimal"
    )


def test_the_whole_grid_of_a_probe_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place / "m"), "--data", str(place / "data"), "--epochs", "1", "--batch-size", "18", "--seeds", "0,1"]
    assert main(["probe", *words, "--baselines", "pixels", "--device", "cpu", "--refit", "false"]) == 0
    printed = capsys.readouterr()
    titles = [line for line in printed.err.splitlines() if "18 heads" in line]
    assert [title.split(":")[0] for title in titles] == [
        f"{place / 'm'}, seed 0", f"{place / 'm'}, seed 1", "baseline pixels, seed 0", "baseline pixels, seed 1"
    ]  # fmt: skip
    losses = [float(found) for found in re.findall(r"^step \d+/2 loss ([\d.]+)", printed.err, re.MULTILINE)]
    assert (
        len(losses) == 8 and max(losses[0], losses[2]) < 3
    )  # three classes: about log 3 = 1.1 at first, not 14 times it
    assert "tokens/s" not in printed.err
    lines = [line.split() for line in printed.out.splitlines()]
    head = lines.index(["lr", "weight_decay", "selection_top1", "test_top1"])
    (said,) = (at for at, line in enumerate(lines) if line[:2] == ["*", "chosen:"])
    rows = lines[head + 1 : said]
    assert len(rows) == 18 and {row[0] for row in rows} >= {"0.0003", "0.03"}
    assert 1 <= sum(row[-1] == "*" for row in rows) <= 2  # the choice of each seed
    assert ["chosen", "layer", "last"] in [line[:3] for line in lines]
    for name in ("top1", "baseline:"):
        assert any(line[0] == name and "to" in line for line in lines if line)
