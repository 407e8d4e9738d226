"""kNN, linear and few-shot: against scikit-learn, torch's SGD, closed forms and hand counts; the verbs on real images."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from aimv2 import api, cli
from aimv2.commands.knn import KnnOptions
from aimv2.data.images.opening import open_labelled
from aimv2.errors import UsageError
from aimv2.evals import knn, linear, scores
from aimv2.evals.fewshot import C, Draw, normalised
from aimv2.evals.harness import open_labelled_splits
from aimv2.features.frozen import open_frozen
from features.test_embed import model_at

CPU = torch.device("cpu")
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "sea": (60, 160, 120)}


def clouds(count: int, classes: int = 4, width: int = 16, seed: int = 0, spread: float = 1.5) -> Any:
    """Overlapping clouds of points: features [count, width], labels [count]."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(0, classes, count)
    return (centres[labels] + spread * rng.normal(size=(count, width))).astype(np.float32), labels


def squares(folder: Path, counts: dict[str, int], noise: int = 60) -> str:
    """Class folders of noisy coloured squares, whose colours overlap."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shift = rng.normal(0, noise, 3)
                pixels = np.array(colour) + shift + rng.normal(0, 30, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{number:02}.png")
    return str(folder)


# scores


def test_scores_by_hand() -> None:
    labels, predicted = np.array([0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 0])
    assert scores.top1(predicted, labels) == 3 / 5
    assert scores.per_class(predicted, labels, 4) == [0.5, 1.0, None, 0.0]
    assert scores.confusion(predicted, labels, 4) == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (5, 10), (8734, 10000), (1, 1)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    wanted = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert scores.wilson(right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_interval_over_seeds_is_students() -> None:
    values = [0.5, 0.6, 0.55, 0.7]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert scores.over_seeds(values) == pytest.approx({"mean": 0.5875, "low": low, "high": high})
    losses = scores.over_seeds([2.0, 0.1])
    assert losses["low"] < 0 and losses["high"] > 1
    cut = scores.over_seeds([0.7, 1.0], fraction=True)
    assert cut["high"] == 1.0 and cut["low"] == 0.0 and cut["mean"] == pytest.approx(0.85)
    assert scores.over_seeds(values, fraction=True) == scores.over_seeds(values)
    assert scores.over_seeds([0.5]) == {"mean": 0.5, "low": None, "high": None}


# kNN


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_knn_is_scikit_learns(backend: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(knn, "SHELF", 70)  # several shelves and blocks, the last ones smaller
    monkeypatch.setattr(knn, "BLOCK", 33)
    (train, labels), (test, _) = clouds(300), clouds(100, seed=1)
    train[7] = 0
    ks = (1, 2, 5, 20, 100)
    got = knn.predict(train, labels, test, 4, knn.KnnSettings(ks, weights, 0.07, backend), CPU)
    for row, k in zip(got, ks):
        how: Any = "uniform" if weights == "uniform" else lambda distance: np.exp(-distance.astype(np.float64) / 0.07)
        reference = KNeighborsClassifier(k, metric="cosine", weights=how).fit(train, labels)
        np.testing.assert_array_equal(row, reference.predict(test))
    assert len({tuple(row) for row in got}) > 3  # the sweep's rows differ, so that equality says something


def test_knn_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equally near: the earlier image. Equal votes: the lower class."""
    monkeypatch.setattr(knn, "SHELF", 2)
    train = np.array([[2, 0], [0, 1], [1, 0], [4, 0], [8, 0]], dtype=np.float32)  # all but one point the same way
    labels = np.array([2, 3, 0, 1, 1])
    settings = knn.KnnSettings((1, 2, 3, 4, 5))
    got = knn.predict(train, labels, np.array([[1, 0]], dtype=np.float32), 4, settings, CPU)
    assert got[:, 0].tolist() == [2, 0, 0, 1, 1]
    columns = knn._top_columns(torch.tensor([[1.0, 5, 3, 3, 3], [9, 8, 7, 6, 5]]), 2)
    assert columns.tolist() == [[1, 2], [0, 1]]


def test_knn_memory_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "SHELF", 64)
    monkeypatch.setattr(knn, "BLOCK", 32)

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.seen = max(self.seen, tensor.numel())
            return out

    for count in (200, 1000):
        (train, labels), (test, _) = clouds(count), clouds(count, seed=1)
        with Largest() as largest:
            knn.predict(train, labels, test, 4, knn.KnnSettings((1, 5)), CPU)
        assert largest.seen <= max(64 * 32, 5 * count), largest.seen  # a block of cosines; the nearest five of each


# linear


@pytest.mark.parametrize("wanted", [0, 37, 48, 51, 96])
def test_search_finds_the_peak(wanted: int) -> None:
    asked: list[int] = []

    def score(step: int) -> float:
        asked.append(step)
        return -abs(step - wanted)

    found = linear.search(score)
    assert max(found, key=lambda step: found[step]) == wanted
    assert len(asked) == len(set(asked)) <= 15 and list(found) == sorted(asked)
    assert linear.peak([0.5, 0.9, 0.9, 0.9, 0.1]) == 2 and linear.peak([0.5, 0.9, 0.9]) == 1
    flat = linear.search(lambda step: 1.0)  # separable at any strength: C = 1
    assert linear.strength(list(flat)[linear.peak(list(flat.values()))]) == 1.0


def test_strength_is_clips_scale() -> None:
    assert [linear.strength(step) for step in (0, 48, 96)] == pytest.approx([1e-6, 1.0, 1e6])
    assert linear.strength(9) / linear.strength(1) == pytest.approx(10)


def test_hold_out_takes_a_fifth_of_each_class() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    kept, held = linear.hold_out(labels, 0)
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 2, 1, 0]
    assert sorted([*kept, *held]) == list(range(63))
    assert not np.array_equal(held, linear.hold_out(labels, 1)[1])
    with pytest.raises(UsageError, match="no class has two"):
        linear.hold_out(np.array([0, 1]), 0)


def test_sgd_is_torchs_and_rates_do_not_meet() -> None:
    x, labels = clouds(60)
    x, y = linear.Standard(x, CPU)(x), torch.from_numpy(labels)
    rates = (0.01, 0.3)
    weight, bias = linear.sgd(x, y, 4, rates, seed=0, epochs=12)  # 60 images: a step an epoch
    for number, rate in enumerate(rates):
        layer = torch.nn.Linear(16, 4)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for _ in range(12):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight[:, number].T, layer.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[number], layer.bias.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", ("lbfgs", "sgd"))
def test_separable_features_reach_everything(solver: str) -> None:
    train, val, test = (clouds(200, spread=0.1, seed=seed) for seed in range(3))
    if solver == "lbfgs":
        rows, best = linear.sweep_lbfgs(train, val, "last")
        fitted, converged = linear.logistic(*train, rows[best]["C"])
        assert converged and scores.top1(fitted.predict(test[0]), test[1]) == 1.0
    else:
        rows, best = linear.sweep_sgd(train, val, 4, 0, CPU, "last")
    assert rows[best]["selection_top1"] == 1.0


def test_sgd_finds_what_lbfgs_finds() -> None:
    train, val = clouds(600), clouds(400, seed=1)
    lbfgs, best = linear.sweep_lbfgs(train, val, "last")
    sgd, also = linear.sweep_sgd(train, val, 4, 0, CPU, "last")
    assert 0.6 < lbfgs[best]["selection_top1"] < 0.95
    assert abs(lbfgs[best]["selection_top1"] - sgd[also]["selection_top1"]) < 0.03


# few-shot


def test_draws_are_nested_readable_and_exact(tmp_path: Path) -> None:
    source = squares(tmp_path / "d", {"train": 8, "test": 1})
    (tmp_path / "d" / "train" / "sea" / "03.png").write_bytes(b"no image")
    data = open_labelled(source, "train")
    assert data is not None
    draw = Draw(data)
    broken = next(row for row, key in enumerate(data.keys) if "sea" in key and "03" in key)
    large, small = draw(7, 0), draw(2, 0)
    assert large.shape == (3, 7) and (small == large[:, :2]).all()
    assert (data.labels[large] == np.arange(3)[:, None]).all() and broken not in large
    assert len(np.unique(large)) == 21 and not np.array_equal(large, draw(7, 1))
    with pytest.raises(UsageError, match="--shots 8: class sea has 7 training images"):
        draw(8, 0)


def test_the_fixed_strength_is_msns() -> None:
    """At the solution the gradient of mean loss + 0.00025 / N / 2 * |W|^2 vanishes."""
    x, labels = clouds(20, seed=3)
    x = normalised(x).astype(np.float64)
    np.testing.assert_allclose((x.mean(1), np.linalg.norm(x, axis=1)), (np.zeros(20), np.ones(20)), atol=1e-6)
    weight = LogisticRegression(C=C, max_iter=10000, tol=1e-8, fit_intercept=False).fit(x, labels).coef_
    logits = x @ weight.T
    error = np.exp(logits - logits.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(20), labels] -= 1
    gradient = error.T @ x / 20 + 0.00025 / 20 * weight
    assert np.abs(gradient).max() < 1e-7 < np.abs(0.00025 / 20 * weight).max()


# the verbs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    model_at(folder / "m")
    squares(folder / "two", {"train": 12, "test": 8})
    squares(folder / "three", {"train": 12, "val": 8, "test": 8})
    return folder


def pooled(place: Path, data: str, split: Any, layer: str = "last") -> tuple[np.ndarray, np.ndarray]:
    """Features by hand, in one batch as the verbs have it: L-BFGS stops early enough to show their last bits."""
    frozen, images = open_frozen(str(place / "m")), open_labelled(str(place / data), split)
    assert images is not None and len(images.labels) <= 64
    seen = torch.from_numpy(np.stack([frozen.see(images.image(row)) for row in range(len(images.labels))]))
    return frozen(seen, [layer])[0].mean(1).numpy(), images.labels


def test_knn_on_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["knn", str(place / "m"), "--data", str(place / "two"), "--k", "1,5,20,50", "--baselines", "random,pixels"]
    assert cli.main([*words, "--out", str(place / "knn"), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    figures = result["figures"]
    train, test = pooled(place, "two", "train"), pooled(place, "two", "test")
    for row in figures["table"]:
        reference = KNeighborsClassifier(row["k"], metric="cosine").fit(*train)
        assert row == {"layer": "last", "k": row["k"], "test_top1": reference.score(*test)}
    assert [row["k"] for row in figures["table"]] == [1, 5, 20] and figures["k_left_out"] == [50]
    assert figures["chosen"] == [{"layer": "last", "k": 20}] and "no validation split" in figures["selected_on"]
    assert figures["top1"] == figures["table"][2]["test_top1"] > 0.4
    assert np.mean(list(figures["per_class"].values())) == pytest.approx(figures["top1"])
    assert set(figures["baselines"]) == {"random", "pixels"}
    raw = open_frozen(str(place / "m"))
    assert result["model"]["weights_sha256"] == raw.sha256 and result["verb"] == "knn"
    assert json.loads((place / "knn" / "result.json").read_text())["figures"] == figures
    # the tiny model's weights are those of its untrained twin: the baseline repeats the measurement
    assert figures["baselines"]["random"]["top1"] == figures["top1"]
    limited = api.knn(str(place / "m"), str(place / "two"), train_limit=30, out=str(place / "knn"), device="cpu")
    assert limited["data"]["train_images"] == 30  # other images have a cache of their own


def test_knn_chooses_on_the_validation_split(place: Path) -> None:
    figures = api.knn(str(place / "m"), str(place / "three"), k="1,3,9", layers="all", device="cpu")["figures"]
    table = figures["table"]
    assert [(row["layer"], row["k"]) for row in table] == [(a, k) for a in ("0", "1", "last") for k in (1, 3, 9)]
    best = max(table, key=lambda row: row["selection_top1"])
    assert figures["chosen"] == [{"layer": best["layer"], "k": best["k"]}]
    assert figures["selected_on"] == "validation split" and figures["top1"] == best["test_top1"]
    train, val = pooled(place, "three", "train", "1"), pooled(place, "three", "val", "1")
    assert table[4]["selection_top1"] == KNeighborsClassifier(3, metric="cosine").fit(*train).score(*val)
    assert list(figures["by_layer"]) == ["0", "1", "last"]


def test_linear_on_images(place: Path) -> None:
    result = api.linear(str(place / "m"), str(place / "three"), layers="1,last", device="cpu")
    figures = result["figures"]
    best = figures["chosen"][0]
    (x, y), val, test = (pooled(place, "three", split, best["layer"]) for split in ("train", "val", "test"))
    joined = np.concatenate([x, val[0]]), np.concatenate([y, val[1]])
    by_hand = LogisticRegression(C=best["C"], max_iter=1000).fit(*joined).score(*test)
    assert figures["top1"] == by_hand
    only_train = LogisticRegression(C=best["C"], max_iter=1000).fit(x, y).score(*val)
    row = next(row for row in figures["table"] if row["layer"] == best["layer"] and row["C"] == best["C"])
    assert row["selection_top1"] == only_train
    assert row["selection_top1"] == max(row["selection_top1"] for row in figures["table"])
    assert sum("test_top1" in row for row in figures["table"]) == 2  # once a layer
    assert figures["by_layer"][best["layer"]] == figures["top1"] and figures["selected_on"] == "validation split"
    assert result["protocol"]["refit_on"] == "training and validation images"
    low, high = figures["top1_interval"]
    assert low < figures["top1"] < high or figures["top1"] == high


def test_linear_by_sgd_holds_out_a_fifth(place: Path) -> None:
    words = (str(place / "m"), str(place / "two"))
    result = api.linear(*words, solver="sgd", baselines="pixels", device="cpu")
    figures = result["figures"]
    assert result["protocol"]["refit_on"] == "all training images"
    assert figures["selected_on"] == "6 training images held out"  # 2 of 12 in each of three classes
    assert [row["rate"] for row in figures["table"]] == list(linear.RATES)
    assert figures["chosen"][0]["rate"] in linear.RATES and figures["top1"] > 0.5
    assert figures["baselines"]["pixels"]["top1"] > 0.5


def test_fewshot_on_images(place: Path) -> None:
    result = api.fewshot(str(place / "m"), str(place / "two"), shots="1,5", seeds=3, seed=4, device="cpu")
    figures = result["figures"]
    assert result["seed"] == [4, 5, 6] and result["protocol"]["C"] == C
    assert [row["shots"] for row in figures["table"]] == [1, 5]
    data = open_labelled(str(place / "two"), "train")
    assert data is not None
    (x, y), (seen, labels) = pooled(place, "two", "train"), pooled(place, "two", "test")
    for row in figures["table"]:
        tops = []
        for seed in (4, 5, 6):
            rows = Draw(data)(row["shots"], seed).flatten()
            model = LogisticRegression(C=C, max_iter=1000, fit_intercept=False).fit(normalised(x[rows]), y[rows])
            tops.append(model.score(normalised(seen), labels))
        assert row["top1_by_seed"] == pytest.approx(tops, abs=1 / 24 + 1e-9)
        assert row["top1"] == pytest.approx(np.mean(row["top1_by_seed"]))
        half = stats.t.ppf(0.975, 2) * np.std(row["top1_by_seed"], ddof=1) / math.sqrt(3)
        assert row["top1_interval"][1] - row["top1"] == pytest.approx(half)
    assert figures["top1"] == figures["table"][1]["top1"] and figures["chosen"] == [{"layer": "last", "shots": 5}]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("knn M", "--data is missing"),
        ("knn M --data D --k 0", "--k 0: whole numbers, at least 1,"),
        ("knn M --data D --k 100", "--k 100: more than the 36 training images"),
        ("knn M --data D --weights cosine", "--weights cosine: one of uniform, distance is expected"),
        ("knn M --data D --temperature 0", "--temperature 0: above 0"),
        ("knn M --data D --pool attention", "--pool attention: "),
        ("knn M --data D --layers 7", "--layers 7"),
        ("knn M --data D --baselines noise", "--baselines noise: one of random, pixels"),
        ("linear M --data D --solver adam", "--solver adam: one of lbfgs, sgd"),
        ("linear M --data D --test-fraction 0.5", "has a test split; leave the option out"),
        ("fewshot M --data D --shots 13", "--shots 13: class green has 12 training images"),
        ("fewshot M --data D --seeds 0", "--seeds 0: at least 1"),
        ("linear M --data D --batch-size 0", "--batch-size 0: at least 1"),
        ("linear M --data D --train-limit 2", "--train-limit 2: an image per class (3) or more"),
        ("linear M --data D --train-limit -1", "--train-limit -1: at least 0"),
    ],
)
def test_wrong_use(place: Path, words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = {"M": str(place / "m"), "D": str(place / "two"), "D/train": str(place / "two" / "train")}
    assert cli.main([at.get(word, word) for word in words.split()]) == 2
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line


def test_class_folders_without_splits_are_measured_on_a_held_out_part(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same images for every command and run; of each class a fifth, and it is said."""
    words = {"data": str(place / "two" / "train"), "device": "cpu"}
    results = [
        api.knn(str(place / "m"), k="1,5", **words),
        api.linear(str(place / "m"), **words),
        api.fewshot(str(place / "m"), shots="1", seeds=1, **words),
        api.probe(str(place / "m"), epochs=1, rates="1e-3", decays="0.1", **words),
    ]
    said = "20% of each class's images (6), held out of training with seed 0"
    for result in results:
        assert result["protocol"]["test_split"] == said and result["data"]["split"] == "held-out"
        assert result["data"]["test_images"] == 6
    assert caplog.text.count(said) == 4
    options = KnnOptions(model="", data=words["data"])
    splits, again, other = (open_labelled_splits(options, seed) for seed in (0, 0, 1))
    assert splits.test.keys == again.test.keys != other.test.keys and splits.test.split == "held-out"
    assert np.bincount(splits.test.labels).tolist() == [2, 2, 2]
    assert not {*splits.test.keys} & {*splits.train.keys} and len(splits.train.keys) == 30
    halves = open_labelled_splits(replace(options, test_fraction=0.5), 0)
    assert np.bincount(halves.test.labels).tolist() == [6, 6, 6]
    with pytest.raises(UsageError, match="10 classes expected, 3 found"):
        open_labelled_splits(replace(options, dataset="cifar10"), 0)
