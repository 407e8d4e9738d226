"""The page of a run and of several: every section with what it must show, nothing from elsewhere, watched to its end."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from aimv2 import api
from aimv2.cli import main
from aimv2.errors import UsageError
from aimv2.report import write
from aimv2.report.blocks import Section, Shot, Strip
from aimv2.report.charts import LEFT, RIGHT, WIDTH, Line, Panel, draw
from aimv2.report.facts import own_results, result_rows
from aimv2.report.images import colour, fit, mask_after
from aimv2.report.page import LARGEST, Page, render
from aimv2.report.runs import differences, find_results, read_run
from runs import command, metrics, scenes, train

PICTURES = ("batch", "next-patch", "rollout", "captions", "features", "attention", "neighbours")


class Parsed(HTMLParser):
    """What stands in a page, by section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.inside, self.images, self.texts = "", dict[str, list[str]](), dict[str, str]()
        self.links, self.lines, self.refresh = list[str](), dict[str, list[str]](), ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.links += [given[key] for key in ("src", "href", "srcset", "action", "data") if key in given]
        if tag == "section":
            self.inside = given["id"]
        if tag == "img":
            self.images.setdefault(self.inside, []).append(given["src"])
        if tag == "polyline":
            self.lines.setdefault(self.inside, []).append(given["points"])
        if given.get("http-equiv") == "refresh":
            self.refresh = given["content"]

    def handle_data(self, data: str) -> None:
        self.texts[self.inside] = self.texts.get(self.inside, "") + data

    def pictures(self, section: str) -> list[np.ndarray]:
        """The section's images, decoded."""
        found = [src.partition(",") for src in self.images[section]]
        assert all(head.startswith("data:image/") for head, _, _ in found)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(tail)))) for _, _, tail in found]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("report") / "scenes", 40)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that drew its report itself."""
    folder = tmp_path_factory.mktemp("report") / "run"
    train(data, folder, train__steps=4, eval__every=2, log__report=True)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Parsed:
    return Parsed(run / "report.html")


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """The run as it was before its first checkpoint."""
    folder = tmp_path / "young"
    folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, folder)
    return folder


# ---- one run ----


def test_a_run_draws_its_report_and_says_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((run / "summary.json").read_text())["report"] == str(run / "report.html")
    assert main(["pretrain", "--run", str(run), "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run / 'report.html'}"


def test_the_page_names_no_place(page: Parsed, run: Path, data: Path) -> None:
    """Paths are relative to the run; others are their last part."""
    for place in (str(run), str(data), str(run.parent), str(Path.home())):
        assert place not in page.html
    assert data.name in page.texts["configuration"]


def test_the_page_stands_alone(page: Parsed) -> None:
    assert len(page.html.encode()) < LARGEST
    assert page.links and all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"https?://|url\(|@import|<script", page.html)
    assert not page.refresh
    assert "prefers-color-scheme: dark" in page.html and "width=device-width" in page.html


def test_curves_hold_every_line_of_metrics(run: Path, page: Parsed) -> None:
    told = metrics(run)
    trained = sum("lr" in line for line in told)
    counts = [len(points.split()) for points in page.lines["curves"]]
    assert counts.count(trained) >= 6  # loss, its two terms, learning rate, gradient, throughput
    assert counts.count(sum("val_text_loss" in line for line in told)) >= 3
    for name in ("Text loss", "Pixel loss", "Learning rate", "Gradient norm", "Throughput", "held out"):
        assert name in page.texts["curves"]


def test_every_section_of_pictures_is_drawn(run: Path, page: Parsed) -> None:
    for name in PICTURES:
        drawn = page.pictures(name)
        assert len({one.tobytes() for one in drawn}) > 3, name
        assert any(one.std() > 5 for one in drawn), name
        sheet = np.asarray(Image.open(run / "report" / f"{name}.png"))
        assert sheet.shape[0] > 128 and sheet.std() > 5
    assert (run / "report" / "curves.png").is_file()
    assert "left-out" not in page.texts
    assert len(page.pictures("next-patch")) == 6 * 7  # given and predicted at three prefixes, and the truth
    given, predicted, *_, truth = page.pictures("next-patch")[:7]
    assert given.shape == predicted.shape == truth.shape == (32, 32, 3)
    assert np.array_equal(predicted[:8, :16], truth[:8, :16])  # 10% of 16 patches: two
    assert not np.array_equal(predicted[:8, 16:], truth[:8, 16:])
    assert np.array_equal(given[:8, :16], truth[:8, :16]) and set(given[8:].ravel()) == {150, 172}


def test_tokens_are_the_captions_with_their_losses(run: Path, page: Parsed) -> None:
    text = " ".join(page.texts["batch"].split())
    assert re.search(r"prefix \d+ of 16 patches", text)
    assert len(re.findall(r"\d\.\d", text)) > 50
    assert "reference: a " in page.texts["captions"] and "%" in page.texts["captions"]


def test_configuration_machine_and_versions(run: Path, page: Parsed) -> None:
    rows = page.html[page.html.index('id="configuration"') :]
    assert re.search(r'<tr class="marked"><th scope="row">model.depth</th><td>2</td>', rows)
    assert re.search(r'<tr><th scope="row">optim.clip</th><td>1</td>', rows)
    summary = json.loads((run / "summary.json").read_text())
    for key in ("machine", "version", "torch", "weights_sha256"):
        assert summary[key] in page.texts["machine"]


def test_intervals_stand_beside_shares(run: Path) -> None:
    told = read_run(run)
    told.summary.update(probe_top1=0.5, probe_top1_random=0.1, probe_test_images=100)
    row = own_results(told)[0]
    assert row[1:] == ("50.0%", "40.4% to 59.6%", "untrained encoder 10.0% (5.5% to 17.4%)")  # Wilson, by hand
    figures = {"top1": 0.25, "top1_interval": [0.2, 0.3], "baselines": {"untrained encoder": {"top1": 0.1}}}
    rows = result_rows("probe", {"verb": "probe", "data": {"dataset": "eurosat"}, "figures": figures})
    assert rows == [("probe on eurosat: top-1", "25.0%", "20.0% to 30.0%", "untrained encoder 10.0%")]


def test_results_within_the_run_are_found(unfinished: Path) -> None:
    for place in ("probe", "data/other"):
        (unfinished / place).mkdir(parents=True)
        (unfinished / place / "result.json").write_text('{"verb": "knn", "figures": {"top1": 0.5}}')
    assert [place for place, _ in find_results(unfinished)] == ["probe"]
    api.report([str(unfinished)])
    assert "knn on probe: top-1" in Parsed(unfinished / "report.html").texts["results"]


# ---- runs of which not all can be drawn ----


def test_a_run_without_a_checkpoint_shows_its_curves(unfinished: Path) -> None:
    result = api.report([str(unfinished)])
    assert result["sections"] == ["curves", "configuration", "machine"]
    assert set(result["left_out"]) == {*PICTURES, "results"}
    page = Parsed(unfinished / "report.html")
    assert page.texts["left-out"].count("the run has no checkpoint yet") == len(PICTURES)
    assert page.lines["curves"]


def test_images_alone(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", train__steps=1, optim__warmup=1, objective__targets="image")
    result = api.report([str(tmp_path / "run")], images=2)
    assert list(result["left_out"]) == ["captions"] and "no text head" in result["left_out"]["captions"]
    assert len(Parsed(tmp_path / "run" / "report.html").pictures("rollout")) == 2 * 3


@pytest.mark.parametrize("name", ["probe", "contrastive"])
def test_encoders_without_a_decoder(name: str, data: Path, run: Path, tmp_path: Path) -> None:
    more = {"model.text_width": 32, "model.text_depth": 1, "model.text_heads": 2, "model.text_hidden": 64}
    if name == "probe":
        more = {}
    given = {key.replace(".", "__"): value for key, value in more.items()}
    train(data, tmp_path / "run", train__steps=1, optim__warmup=1, objective__name=name, init=str(run), **given)
    result = api.report([str(tmp_path / "run")], images=2)
    assert list(result["left_out"])[:3] == ["next-patch", "rollout", "captions"]
    assert f"objective.name={name} has no decoder" in result["left_out"]["rollout"]
    assert {"batch", "features", "attention", "neighbours"} <= set(result["sections"])


def test_data_that_moved_leave_the_curves(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    tree = yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())
    tree["data"]["train"] = str(tmp_path / "gone")
    (tmp_path / "moved" / "config.yaml").write_text(yaml.safe_dump(tree))
    result = api.report([str(tmp_path / "moved")], images=1)
    assert "gone" in result["left_out"]["features"] and "curves" in result["sections"]


def test_a_report_that_fails_does_not_fail_the_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "report")
    (tmp_path / "run" / "report").write_text("in the way")
    said: list[str] = []
    assert write.after_run(tmp_path / "run", write.torch.device("cpu"), said.append) is None
    assert len(said) == 1 and said[0].startswith("no report: ") and "\n" not in said[0]


# ---- several runs ----


def test_differences_of_two_runs(data: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(data, other, train__steps=2, optim__lr=1e-3, model__hidden=96)
    found = dict(differences([read_run(run), read_run(other)]))
    assert found["optim.lr"] == ["0.002", "0.001"] and found["model.hidden"] == ["64", "96"]
    assert set(found) == {"optim.lr", "model.hidden", "train.steps", "eval.every", "log.report"}
    result = api.report([str(run), str(other)], out=str(tmp_path / "both.html"), images=2)
    page = Parsed(tmp_path / "both.html")
    assert result["sections"][:4] == ["curves", "figures", "differences", "beside"]
    assert "optim.lr" in page.texts["differences"] and "optim.eps" not in page.texts["differences"]
    assert page.texts["curves"].count("other") >= 6
    assert len(page.pictures("beside")) == 2 * 5  # the image; of each run a prediction and features
    same = differences([read_run(run), read_run(run)])
    assert same == []


# ---- watched ----


def test_watching_ends_with_the_run(run: Path, unfinished: Path) -> None:
    done: list[dict] = []
    thread = threading.Thread(target=lambda: done.append(api.report([str(unfinished)], watch=0.2)), daemon=True)
    thread.start()
    page = unfinished / "report.html"
    wait_for(page.is_file)
    assert Parsed(page).refresh == "0.2" and not done
    written = page.stat().st_mtime_ns
    wait_for(lambda: page.stat().st_mtime_ns != written)
    shutil.copytree(run / "checkpoints", unfinished / "checkpoints")
    shutil.copy(run / "summary.json", unfinished)
    thread.join(120)
    assert done and set(PICTURES) < set(done[0]["sections"]) and done[0]["left_out"] == {}
    assert not Parsed(page).refresh


def test_watching_gives_up_on_a_run_that_stands_still(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "IDLE", 0.0)
    (unfinished / "metrics.jsonl").write_text("")  # nothing told yet: waited for
    assert api.report([str(unfinished)], watch=0.01)["sections"] == ["configuration", "machine"]
    assert not Parsed(unfinished / "report.html").refresh


def test_watching_ends_at_a_signal(unfinished: Path) -> None:
    with subprocess.Popen(
        command("report", str(unfinished), "--watch", "30"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            wait_for((unfinished / "report.html").is_file, 60)
            time.sleep(0.2)
            started.send_signal(signal.SIGINT)
            out, err = started.communicate(timeout=30)
        finally:
            started.kill()
    assert (started.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "stopped" and "Traceback" not in err
    assert not Parsed(unfinished / "report.html").refresh


def wait_for(ready, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- mistakes ----


def test_mistakes(run: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (unfinished / "metrics.jsonl").write_text('{"step"')
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "empty")], "a run folder (with config.yaml) is expected"),
        ([str(unfinished)], "no metrics yet"),
        ([], "at least one run folder is expected"),
        ([str(run), "--images", "0"], "--images 0: at least 1 expected"),
        ([str(run), "--out", "page.pdf"], "--out page.pdf"),
        ([str(run), "--watch", "0"], "--watch 0: seconds above 0 expected"),
        ([str(run), "--device", "no-such"], "no-such"),
    ):
        assert main(["report", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.startswith("error: ") and err.count("\n") == 1


# ---- parts ----


def test_a_page_of_many_photographs_shrinks_until_it_fits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    shots = [Shot(np.roll(noise, at, 0)) for at in range(100)]
    html = render(Page("many", "", [], [Section("a", "a", "", [Strip("", shots)])]))
    assert 1_000_000 < len(html.encode()) < LARGEST and html.count("<img") == 100


def test_text_of_a_run_is_not_markup() -> None:
    html = render(Page("<script>x</script>", "", [], [Section("a", "<b>", "", [], "because <i>")]))
    assert "<script>x" not in html and "&lt;i&gt;" in html


def test_a_curve_lies_where_its_values_say() -> None:
    svg = draw(Panel("p", [Line("a", [0, 50, 100], [0.0, 1.0, 2.0])]), 100).svg
    points = [tuple(map(float, one.split(","))) for one in re.search(r'points="([^"]+)"', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 == LEFT and x2 == WIDTH - RIGHT and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 > y1 > y2 and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    wide = draw(Panel("p", [Line("a", [1, 2, 3], [1.0, 10.0, 100.0])], log=True), 3)
    points = [tuple(map(float, one.split(","))) for one in re.search(r'points="([^"]+)"', wide.svg)[1].split()]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.1) and "logarithmic" in wide.svg
    long = draw(Panel("p", [Line("a", range(5000), [float(x) for x in range(5000)])]), 5000).svg
    assert len(re.search(r'points="([^"]+)"', long)[1].split()) == 400
    broken = draw(Panel("p", [Line("a", [0, 1, 2], [1.0, float("nan"), 2.0])]), 2).svg
    assert "nan" not in broken


def test_colours_and_sizes() -> None:
    shown = colour(np.array([[0.0, 0.5, 1.0, 2.0]]), 0, 1)
    assert shown[0].tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37], [253, 231, 37]]
    assert colour(np.ones((2, 2))).tolist() == [[[68, 1, 84]] * 2] * 2
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(fit(small, 4), small.repeat(2, 0).repeat(2, 1))
    assert fit(np.zeros((100, 50, 3), np.uint8), 20).shape == (20, 10, 3)
    hidden = mask_after(np.zeros((4, 4, 3), np.uint8), 1, 2)
    assert (hidden[:2, :2] == 0).all() and (hidden[2:] > 100).all() and (hidden[:2, 2:] > 100).all()


def test_a_folder_and_a_name_for_the_page(unfinished: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert api.report([str(unfinished)], out=str(tmp_path / "there"), images=1)["report"] == str(
        tmp_path / "there" / "report.html"
    )
    assert api.report([str(unfinished)], out=str(tmp_path / "new" / "a.html"), images=1)["pictures"] == str(
        tmp_path / "new" / "a"
    )
    with pytest.raises(UsageError, match="can't be written"):
        api.report([str(unfinished)], out=str(tmp_path / "new" / "a.html" / "b.html"), images=1)
