"""Results beside the paper's tables: its numbers, one column a protocol, intervals, other tools' files, wrong use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from aimv2 import api
from aimv2.cli import main
from aimv2.data.datasets.registry import DATASETS
from aimv2.errors import UsageError
from aimv2.evals.compare import METRICS, paper, paper_cells
from aimv2.evals.result import make_result, write_result

MODEL = {"name": "runs/a", "kind": "ours", "weights_sha256": "0" * 64}
DATA = {"name": "cifar10", "dataset": "cifar10", "split": "test", "train_images": 50_000, "test_images": 10_000}
PROTOCOL = {"name": "attentive probe", "features": "augmented", "epochs": 100}


def stored(folder: Path, verb: str, protocol: dict[str, Any], figures: dict[str, Any], **data: Any) -> str:
    """A result as a measuring verb writes it."""
    folder.mkdir()
    write_result(folder, make_result(verb, protocol, MODEL, {**DATA, **data}, figures, 1.0))
    return str(folder)


def probed(folder: Path, **data: Any) -> str:
    figures = {
        "top1": 0.912,
        "top1_interval": [0.906, 0.9175],
        "baselines": {"random": {"top1": 0.5}, "pixels": {"top1": 0.4}},
    }
    return stored(folder, "probe", PROTOCOL, figures, **data)


def table_of(text: str) -> list[list[str]]:
    """Cells of the rows of the first Markdown table, the heads first."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if set(row[0]) != {"-"}]


def test_the_papers_numbers() -> None:
    numbers = paper()
    rows = [row for table in numbers["recognition"]["tables"] for row in table["rows"]]
    assert [len(table["rows"]) for table in numbers["recognition"]["tables"]] == [9, 12]
    assert {len(row) for row in rows} == {1 + 14} and len({row[0] for row in rows}) == 21
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["AIMv2 3B/14 448 px"] == [
        *(89.5, 85.9, 99.5, 94.5, 97.4, 89.0, 97.4, 96.7, 93.4, 89.9, 9.5, 98.9, 66.1, 74.8),
    ]
    assert by_name["MAE ViT-2B/14"][:4] == [82.2, 70.8, 97.5, 87.3]
    assert by_name["AIMv2 L/14 224 px"][-4:] == [5.6, 98.4, 60.7, 69.0]
    assert by_name["SigLIP So400m/14"][-1] == 72.3 and by_name["DINOv2 g/14"][1] == 83.0
    assert [tuple(row) for row in numbers["datasets"]["rows"]] == [
        (d.name, d.column, d.train, d.test, d.classes) for d in DATASETS.values()
    ]
    assert [row[1:] for row in numbers["resolution"]["rows"]] == [
        *([86.6, 84.8, None], [78.9, 87.9, None], [86.1, 87.1, 87.3]),
    ]
    assert dict(numbers["zeroshot"]["rows"])["AIMv2 L (12B/3B pairs)"] == 77.0 and len(numbers["zeroshot"]["rows"]) == 6
    cells = paper_cells("imagenet1k")
    assert len(cells) == 21 + 7 + 6 + 30 and {cell.source for cell in cells} == {
        *("AIMV2, Table 3", "AIMV2, Tables 3, B2", "AIMV2, Table 5", "AIMV2, Table 6", "efficient-probing"),
    }
    independent = {
        cell.protocol: cell.value for cell in cells if cell.source == "efficient-probing" and "L/14 224" in cell.model
    }
    assert independent == {"efficient probe": 85.9, "linear, sgd": 84.7, "kNN": 76.0}
    assert [cell.value for cell in paper_cells("infograph")][:2] == [50.2, 45.2]
    assert paper_cells("flickr8k-1k") == []


def test_a_protocol_is_a_column(tmp_path: Path) -> None:
    files = [
        probed(tmp_path / "probe"),
        stored(tmp_path / "knn", "knn", {"name": "kNN"}, {"top1": 0.803}),
        stored(tmp_path / "linear", "linear", {"name": "linear", "solver": "lbfgs"}, {"top1": 0.85}),
    ]
    result = api.compare(files, format="markdown")
    heads, *rows = table_of(result["text"])
    assert heads[1:-1] == ["attentive probe: top-1, %", "kNN: top-1, %", "linear, lbfgs: top-1, %"]
    assert rows[0] == ["runs/a", "91.2 (90.6-91.8)", "80.3", "85.0", "measured"]
    assert rows[1] == ["random encoder", "50.0", "", "", "baseline"] and rows[2][0] == "raw pixels"
    paper_rows = rows[3:]
    assert len(paper_rows) == 21 and all(row[2] == row[3] == "" for row in paper_rows)
    assert ["AIMv2 L/14 224 px", "99.1", "", "", "Tables 3, B2"] in paper_rows
    assert "compare within a column" in result["text"]
    assert {(cell["kind"], cell["protocol"]) for cell in result["table"]} == {
        *(("result", "attentive probe"), ("result", "kNN"), ("result", "linear, lbfgs")),
        *(("baseline", "attentive probe"), ("paper", "attentive probe")),
    }


def test_text_fits_80_columns_whatever_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"name": "a protocol with a name that goes on and on", "features": "cached", "epochs": 5}
    files = [probed(tmp_path / "probe", train_images=900), stored(tmp_path / "long", "probe", long, {"top1": 0.5})]
    for number in range(5):
        files.append(stored(tmp_path / f"m{number}", "knn", {"name": f"kNN {number}"}, {"top1": number / 10}))
    assert main(["compare", *files]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "90.6-91.8" in out and "SigLIP So400m/14" in out
    assert "10,000 test images, 10 classes" in out
    assert "trained on 900 images, the paper on 50,000 (Table B1)" in out
    assert "cached features: no augmentation" in out and "5 epochs" in out
    assert re.search(r"50\.0 \[1\]", out)
    assert main(["compare", *files, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["table"]) == 1 + 2 + 1 + 5 + 21


def test_two_results_of_a_column_are_two_rows(tmp_path: Path) -> None:
    files = [stored(tmp_path / f"{top}", "knn", {"name": "kNN"}, {"top1": top}) for top in (0.25, 0.5)]
    cells = json.loads(api.compare(files, format="json")["text"])
    assert [cell["value"] for cell in cells if cell["kind"] == "result"] == [25.0, 50.0]
    assert [cell["source"] for cell in cells if cell["kind"] == "result"] == files


def test_baselines_of_two_models_say_whose(tmp_path: Path) -> None:
    one = probed(tmp_path / "a")
    assert [row[-1] for row in table_of(api.compare([one], format="markdown")["text"])[2:4]] == ["baseline", "baseline"]
    file = Path(probed(tmp_path / "b")) / "result.json"
    file.write_text(file.read_text().replace("runs/a", "runs/b"))
    both = table_of(api.compare([one, str(file)], format="markdown")["text"])
    assert [row[-1] for row in both[3:7]] == ["baseline of runs/a"] * 2 + ["baseline of runs/b"] * 2


def test_every_kind_of_figure(tmp_path: Path) -> None:
    by_shots = [{"layer": "last", "shots": n, "top1": n / 10, "top1_interval": [None, None]} for n in (1, 5)]
    chosen = [{"layer": "last", "shots": 5}]
    other = {"name": "photos", "dataset": None}
    retrieval = {"text_to_image": {"R@1": 0.3, "R@1_interval": [0.2, 0.4], "R@1_chance": 0.01}}
    results = [
        stored(tmp_path / "f", "fewshot", {"name": "few-shot"}, {"top1": 0.5, "chosen": chosen, "table": by_shots}),
        stored(tmp_path / "r", "retrieve", {"name": "retrieval, likelihood", "candidates": 100}, retrieval, **other),
        stored(tmp_path / "s", "segment", {"name": "linear segment probe"}, {"miou": 0.4}, **other),
        stored(tmp_path / "d", "depth", {"name": "linear depth probe"}, {"rmse": 0.1234}, **other),
        stored(tmp_path / "c", "caption", {"name": "captions"}, {"cider": 1.1, "bleu4": 0.3}, **other),
    ]
    result = api.compare(results)
    assert result["datasets"] == ["cifar10", "photos"]
    got = {(c["protocol"], c["metric"], c["model"]): c["value"] for c in result["table"] if c["kind"] != "paper"}
    assert got == pytest.approx(
        {
            ("1-shot", "top-1, %", "runs/a"): 10,
            ("5-shot", "top-1, %", "runs/a"): 50,
            ("retrieval, likelihood, 100 candidates", "text to image R@1, %", "runs/a"): 30,
            ("retrieval, likelihood, 100 candidates", "text to image R@1, %", "chance"): 1,
            ("linear segment probe", "mIoU, %", "runs/a"): 40,
            ("linear depth probe", "RMSE, m", "runs/a"): 0.1234,
            ("captions", "CIDEr", "runs/a"): 110,
            ("captions", "BLEU-4", "runs/a"): 30,
        }
    )
    assert "photos (not one of the paper's)" in result["text"] and "0.123" in result["text"]
    only = api.compare(results, dataset="CIFAR-10")
    assert only["datasets"] == ["cifar10"] and "RMSE" not in only["text"]


def test_files_of_clip_benchmark(tmp_path: Path) -> None:
    about = {"dataset": "wds/imagenet1k", "model": "ViT-B-32", "pretrained": "openai", "language": "en"}
    zero, linear, found = (tmp_path / name for name in ("z.json", "l.json", "r.json"))
    zero.write_text(json.dumps({**about, "task": "zeroshot_classification", "metrics": {"acc1": 0.633, "acc5": 0.88}}))
    linear.write_text(json.dumps({**about, "task": "linear_probe", "metrics": {"lp_acc1": 0.75}}))
    metrics = {"image_retrieval_recall@1": 0.6, "text_retrieval_recall@1": 0.7, "image_retrieval_recall@5": 0.9}
    found.write_text(json.dumps({**about, "dataset": "flickr30k", "task": "zeroshot_retrieval", "metrics": metrics}))
    result = api.compare([str(path) for path in (zero, linear, found)])
    cells = [cell for cell in result["table"] if cell["kind"] == "result"]
    assert [(c["dataset"], c["model"], c["metric"], round(c["value"], 3)) for c in cells] == [
        ("imagenet1k", "ViT-B-32 openai", "top-1, %", 63.3),
        ("imagenet1k", "ViT-B-32 openai", "top-1, %", 75.0),
        ("flickr30k", "ViT-B-32 openai", "text to image R@1, %", 60.0),
        ("flickr30k", "ViT-B-32 openai", "image to text R@1, %", 70.0),
    ]
    zero_shot = {c["protocol"] for c in result["table"] if c["source"] in (str(zero), "AIMV2, Table 5")}
    assert len(zero_shot) == 1, "the paper's zero-shot column"
    assert cells[1]["protocol"] == "linear probe of CLIP_benchmark"
    assert "measured by CLIP_benchmark" in result["text"]
    zero.write_text(json.dumps({**about, "task": "captioning", "metrics": {}}))
    with pytest.raises(UsageError, match="task 'captioning' of CLIP_benchmark"):
        api.compare([str(zero)])


def test_plot(tmp_path: Path) -> None:
    from PIL import Image

    files = [probed(tmp_path / "p"), stored(tmp_path / "k", "knn", {"name": "kNN"}, {"top1": 0.8})]
    assert api.compare(files, plot=str(tmp_path / "all.png"))["plot"] == str(tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as image:
        assert image.size[0] > 600 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = probed(tmp_path / "good")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"format": "aimv2 result 0", "figures": {}}))
    hollow = tmp_path / "hollow.json"
    hollow.write_text(json.dumps({"format": "aimv2 result 1", "verb": "probe", "figures": {"top1": 1}}))
    nothing = stored(tmp_path / "nothing", "knn", {"name": "kNN"}, {"loss": 1.0})
    text = tmp_path / "text.json"
    text.write_text("no JSON")
    for words, said in (
        ([], "RESULTS: at least one result file"),
        ([old], "is 'aimv2 result 0', 'aimv2 result 1' expected; measure it again with this version"),
        ([text], "can't be read as a result file"),
        ([tmp_path / "none"], "can't be read as a result file"),
        ([hollow], "a part of the result is missing or of another form ('data')"),
        ([nothing], "no figure that is compared (top1, text_to_image.R@1"),
        ([good, "--dataset", "inat18"], "--dataset inat18: none of the results is on it (they are on cifar10)"),
        ([good, "--format", "markdwn"], "did you mean 'markdown'"),
        ([good, "--plot", tmp_path / "x.jpg"], "--plot"),
        ([good, "--plot", tmp_path / "none" / "x.png"], "in a folder that exists"),
    ):
        assert main(["compare", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err, err


def test_names_of_metrics_are_not_shared() -> None:
    assert len({name for name, _ in METRICS.values()}) == len(METRICS)


def test_a_run_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"`aimv2 report` compares runs") as error:
        api.compare([str(tmp_path / "run")])
    assert error.value.code == "missing"
    with pytest.raises(UsageError, match=r"no result\.json in this folder$"):
        api.compare([str(tmp_path / "empty")])
