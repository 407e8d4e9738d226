"""Batch, epochs and grid of a probe by the number of images; what is said of a sweep; the best head learns from all images."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.commands.probe import ProbeOptions, run
from aimv2.data.images.labelled import equal_parts
from aimv2.errors import UsageError
from aimv2.evals import probe, probe_result, probe_run
from aimv2.evals.probe import DECAYS as PAPER_DECAYS
from aimv2.evals.probe import RATES as PAPER_RATES
from aimv2.evals.probe import ProbeSettings
from aimv2.evals.probe_auto import (
    AUTOMATIC,
    DECAYS,
    RATES,
    SMALL,
    STAYING,
    complaints,
    fitted,
    folds_of,
    steps_of_epoch,
)
from aimv2.evals.probe_result import ProbeWork
from aimv2.evals.probe_run import Outcome, SweepAnswer, SweepPlan, surest
from aimv2.evals.probe_start import start_linear
from aimv2.evals.probe_stream import FeatureStream, join_features
from aimv2.features.ragged import Ragged
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.probe_head import Trial
from aimv2.models.sizes import EncoderConfig


def steps(settings: ProbeSettings, images: int) -> int:
    return settings.epochs * steps_of_epoch(images, settings.batch_size)


@pytest.mark.parametrize("images", [1, 7, 16, 20, 100, 239, 300, 1078, 1347, 5000, 7240, 12_345, 50_000, 1_281_167])
def test_there_are_enough_steps_for_any_number_of_images(images: int) -> None:
    found = fitted(ProbeSettings(), images, AUTOMATIC)
    assert steps(found, images) >= 500 and found.epochs >= 50
    assert found.batch_size == images or (16 <= found.batch_size <= 512 and found.batch_size <= images)
    assert steps(found, images) <= 1500 or found.batch_size == 512
    rates = (STAYING, *RATES) if images <= SMALL else RATES
    assert (found.rates, found.decays, found.start) == (rates, DECAYS, "linear" if images <= SMALL else "random")
    assert max(RATES) > max(PAPER_RATES)


def test_the_formula_by_example() -> None:
    """As docs/evaluate.md states it."""
    table = {80: (16, 100), 240: (16, 50), 800: (32, 50), 1078: (64, 50), 4000: (256, 50), 50_000: (512, 50)}
    for images, wanted in table.items():
        found = fitted(ProbeSettings(), images, AUTOMATIC)
        assert (found.batch_size, found.epochs) == wanted, images
    docs = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    for images, (batch, epochs) in table.items():
        assert f"| {images:,} | {batch} | {epochs} |" in docs, images


@pytest.mark.parametrize("name", AUTOMATIC)
def test_an_explicit_option_wins_alone(name: str) -> None:
    given: dict[str, Any] = {"epochs": 7, "batch_size": 33, "rates": (0.5,), "decays": (0.25,), "start": "random"}
    rest = tuple(one for one in AUTOMATIC if one != name)
    found = fitted(ProbeSettings(**{name: given[name]}), 1078, rest)
    whole = fitted(ProbeSettings(), 1078, AUTOMATIC)
    assert getattr(found, name) == given[name]
    for other in rest:
        if (name, other) == ("epochs", "batch_size"):  # fewer visits, a smaller batch
            assert found.batch_size == 16
        elif (name, other) == ("start", "rates"):
            assert found.rates == RATES
        else:
            assert getattr(found, other) == getattr(whole, other), other


@pytest.mark.parametrize(("images", "batch"), [(40, 16), (640, 32), (5120, 256), (12_000, 256)])
def test_the_probe_after_training_fits_a_few_images_too(
    images: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ProbeSettings] = []
    monkeypatch.setattr(probe, "train_sweep", lambda *words, **_: seen.append(words[3]))
    labels = torch.arange(images) % 2
    probe.train_probe([torch.zeros(images, 1, 16)], labels, torch.zeros(2, 1, 16), torch.tensor([0, 1]))
    assert seen[0].batch_size == batch


def works(monkeypatch: pytest.MonkeyPatch, **options: Any) -> ProbeWork:
    """What the command passes on."""
    seen: list[ProbeWork] = []
    monkeypatch.setattr(probe_result, "evaluate_probe", lambda _, work: seen.append(work) or {})
    run(ProbeOptions(model="m", data="d", **options))
    return seen[0]


def test_named_data_keep_the_papers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    named = works(monkeypatch, dataset="cifar10", epochs=20)
    assert named.automatic == () and not named.refit
    assert named.settings == ProbeSettings(epochs=20) and named.settings.batch_size == 512
    assert (named.settings.rates, named.settings.decays) == (PAPER_RATES, PAPER_DECAYS)
    free = works(monkeypatch, epochs=20, decays=(0.1,))
    assert free.automatic == ("batch_size", "rates", "start") and free.refit
    assert not works(monkeypatch, select="test").refit and not works(monkeypatch, features="augmented").refit
    assert works(monkeypatch, dataset="cifar10", refit=True).refit and not works(monkeypatch, refit=False).refit
    with pytest.raises(UsageError) as error:
        ProbeOptions(model="m", start="linear", protocol="efficient")
    assert (error.value.option, error.value.code) == ("--start", "conflict")
    for kept in ({"protocol": "efficient"}, {"augmented": True}):  # these have no linear start
        assert fitted(ProbeSettings(**kept), 100, AUTOMATIC).start == "random"
    with pytest.raises(UsageError) as error:
        ProbeOptions(model="m", select="test", refit=True)
    assert (error.value.option, error.value.code) == ("--refit", "conflict")


def test_the_help_names_the_grids() -> None:
    text = " ".join((inspect.getdoc(ProbeOptions) or "").split())
    for grid in (PAPER_RATES, RATES, DECAYS, PAPER_DECAYS):
        assert (
            ",".join(
                np.format_float_positional(v, trim="-") if v >= 0.05 else f"{v:.0e}".replace("e-0", "e-") for v in grid
            )
            in text
        )


def said(scores: list[float], losses: np.ndarray) -> list[str]:
    settings = ProbeSettings(rates=(1e-3, 1e-2, 1e-1), decays=(0.1,))
    tops = np.array(scores)
    return complaints(settings, int(tops.argmax()), tops, np.repeat(losses[:, None], 3, 1), 10)


def test_what_another_option_may_improve_is_said() -> None:
    flat = np.full(40, 0.5)
    assert said([0.5, 0.9, 0.6], flat) == []
    (highest,) = said([0.5, 0.8, 0.9], flat)
    assert "0.1, is the highest" in highest and "--rates" in highest
    (lowest,) = said([0.9, 0.8, 0.5], flat)
    assert "0.001, is the lowest" in lowest and "--rates" in lowest
    assert said([0.5, 0.9, 0.9], flat) == [], "a value inside the grid does as well"
    (falls,) = said([0.5, 0.9, 0.6], np.linspace(2.3, 0.1, 40))
    assert "still falls" in falls and "--epochs" in falls
    (risen,) = said([0.5, 0.9, 0.6], np.linspace(0.5, 2.3, 40))
    assert "has risen" in risen and "--rates" in risen
    assert "has risen" in said([0.5, 0.9, 0.6], np.append(flat, np.nan))[0]
    assert said([0.5, 0.9, 0.6], flat[:0]) == [], "another process has trained the heads"


def test_a_few_images_rank_heads_by_their_loss() -> None:
    """Three of 40 images more are chance, not at 4,000."""
    labels = np.zeros(40, np.int64)
    predicted = np.ones((3, 40), np.int64)
    for head, right in enumerate((20, 17, 8)):
        predicted[head, :right] = 0
    loss = np.array([1.5, 1.1, 1.0])
    assert surest(Outcome(predicted, labels, loss)) == 1
    assert surest(Outcome(predicted.repeat(100, 1), labels.repeat(100), loss)) == 0
    diverged = np.array([1.5, np.nan, 1.0])
    assert surest(Outcome(predicted, labels, diverged)) == 0, "not a number is no low loss"
    rates = [(1e-2, 5.0), (1e-3, 0.1), (1e-5, 0.1)]  # and decays of heads that start as a linear classifier
    assert surest(Outcome(predicted, labels, loss), rates) == 1, "12 of 40 less are no chance, 3 of 40 are"
    assert surest(Outcome(predicted[:2], labels, loss[:2]), [(1e-3, 0.1), (1e-3, 5.0)]) == 0, (
        "of equal rates the lowest decay"
    )
    assert surest(Outcome(predicted.repeat(100, 1), labels.repeat(100), loss), rates) == 0


def test_accuracy_by_layer_is_of_the_heads_that_the_rule_prefers() -> None:
    """Of layer a the first head is right more often, by chance; the second has the lower loss, and fails on the test images."""
    labels = np.zeros(40, np.int64)
    predicted = np.ones((4, 40), np.int64)
    for head, right in enumerate((20, 17, 30, 8)):
        predicted[head, :right] = 0
    select = Outcome(predicted, labels, np.array([1.5, 1.1, 0.9, 1.0]))
    test = Outcome(np.array([[0], [1], [0], [0]]), np.zeros(1, np.int64), np.zeros(4))
    trials = [Trial(layer, lr, 0.1) for layer in "ab" for lr in (1.0, 2.0)]
    answer = SweepAnswer(select, test, 2, test.of_heads([2]), np.zeros((0, 4)))
    assert probe_result.by_layer(ProbeSettings(layers=("a", "b")), trials, [answer], refit=True) == {"a": 0.0, "b": 1.0}
    assert probe_result.by_layer(ProbeSettings(layers=("a", "b")), trials, [answer], refit=False) == {
        "a": 1.0,
        "b": 1.0,
    }


def test_a_few_images_are_all_held_out_in_turn() -> None:
    assert [folds_of(images) for images in (5, 300, 1249, 1250, 2500, 4999, 5000, 50_000)] == [5, 5, 5, 4, 2, 2, 1, 1]
    labels = np.repeat([0, 1, 2], [23, 3, 11])
    parts = equal_parts(labels, 0, 5)
    assert sorted(np.concatenate(parts)) == list(range(37)) and {len(part) for part in parts} == {7, 8}
    by_class = np.array([np.bincount(labels[part], minlength=3) for part in parts])
    assert (by_class.max(0) - by_class.min(0)).max() == 1
    assert len(equal_parts(np.zeros(3, np.int64), 0, 5)) == 3
    with pytest.raises(UsageError, match="two training images"):
        equal_parts(np.arange(4), 0, 5)


def test_joined_features_are_those_of_both() -> None:
    whole = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
    joined = join_features([whole[:4], whole[4:5], whole[5:]])
    assert len(joined) == 10
    for rows in ([0, 3, 4, 9], [4], [5, 6], list(range(10))):
        assert np.array_equal(joined[np.array(rows)], whole[rows]), rows
    assert all(np.array_equal(joined[row], whole[row]) for row in range(10))
    lengths, rows = [2, 1, 3, 1], np.arange(21, dtype=np.float16).reshape(7, 3)
    ragged = join_features([Ragged(rows[:3], np.array(lengths[:2])), Ragged(rows[3:], np.array(lengths[2:]))])
    one = Ragged(rows, np.array(lengths))
    labels = np.arange(4)
    first, second = (next(FeatureStream([[part]], labels, 4, 0)) for part in (ragged, one))
    assert torch.equal(first.features, second.features) and torch.equal(first.image_len, second.image_len)


def test_a_result_says_what_followed_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs given, the rest automatic; the best head learns again, from the held-out images too."""
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 220)), ("red", (220, 50, 40))):
        for split, count in (("train", 40), ("test", 10)):
            (folder := tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    model = tmp_path / "m"
    convert(build(EncoderConfig("tiny", 32, 1, 2, 48, 8, 16), None, seed=0).eval(), model, "safetensors")
    learnt: list[tuple[int, int]] = []
    real = SweepPlan.train

    def counts(self: SweepPlan, splits: Any, what: str) -> Any:
        learnt.append((sum(len(split.labels) for split in splits), len(self.settings.trials())))
        return real(self, splits, what)

    monkeypatch.setattr(SweepPlan, "train", counts)
    strengths: list[Any] = []
    monkeypatch.setattr(probe_run, "start_linear", lambda *words: strengths.append(words[3]) or start_linear(*words))
    result = api.probe(str(model), str(tmp_path / "data"), epochs=2, device="cpu")
    protocol, figures = result["protocol"], result["figures"]
    heads = (1 + len(RATES)) * len(DECAYS)
    linear = api.linear(str(model), str(tmp_path / "data"), device="cpu")
    assert strengths == [(linear["figures"]["chosen"][0]["C"],)] * 6, "that of the linear classifier, chosen once"
    assert learnt == [(64, heads)] * 5 + [(80, 1)] and result["data"]["train_images"] == 80
    assert protocol["automatic"] == {"options": ["batch_size", "rates", "decays", "start"], "images": 64}
    assert (protocol["batch_size"], protocol["epochs"], protocol["steps"]) == (16, 2, 8)
    assert (
        protocol["start"] == "linear"
        and tuple(protocol["rates"]) == (STAYING, *RATES)
        and tuple(protocol["decays"]) == DECAYS
    )
    assert (protocol["refit_on"], protocol["refit_steps"]) == ("all training images", 2 * (80 // 16))
    assert protocol["chosen_by"].startswith("lowest rate, then lowest decay, within two standard errors")
    assert figures["selected_on"] == protocol["selected_on"] == "80 training images, held out in 5 turns"
    assert len(figures["table"]) == heads and figures["top1"] > 0.5
    titles = [line for line in capsys.readouterr().err.splitlines() if "steps of" in line]
    assert len(titles) == 6 and "8 steps of 16 images (2 epochs of 64)" in titles[0]
