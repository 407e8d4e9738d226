"""Benchmarks run and print one JSON object."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.long
def test_data_benchmark_runs() -> None:
    words = ["--workers", "1", "--rounds", "2", "--seconds", "0.5", "--images", "64"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "data.py"), *words], capture_output=True, text=True, check=True, timeout=300
    )
    result = json.loads(done.stdout)
    assert (result["workers"], result["rounds"], result["bad"]) == (1, 2, 0)
    assert result["images_per_s"] > 0 and result["plain_images_per_s"] > 0
    assert len(result["ratio_of_rounds"]) == 2
    assert result["ratio"] == pytest.approx(statistics.median(result["ratio_of_rounds"]), abs=1e-3)
    assert result["pixels_an_image"] == 500 * 375
    assert 30 < result["kilobytes_an_image"] < 200, "as heavy as photographs"


@pytest.mark.long
def test_native_training_benchmark_runs() -> None:
    words = ["--rounds", "1", "--areas", "3", "4", "--budget", "32", "--precision", "fp32"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "native_train.py"), *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["areas"], result["pairs"]) == ([8, 16], 6) and 40 < result["patches"] <= 64
    padding = result["share_of_padding"]
    assert 0 <= padding["strips"] < padding["padded"] < 1
    figures = result["fp32"]
    for path in ("strips", "strips_eager", "packed", "padded"):
        rate = figures[path]
        assert rate["pairs_per_s"] > 0 and rate["patches_per_s"] / rate["pairs_per_s"] == pytest.approx(
            result["patches"] / 6
        )
    packed, strips = figures["packed"]["pairs_per_s"], figures["strips_eager"]["pairs_per_s"]
    assert figures["packed_over_strips_eager"]["ratio"] == pytest.approx(packed / strips)  # one round


@pytest.mark.long
def test_step_benchmark_runs() -> None:
    words = ["--rounds", "1", "--steps", "1", "--checkpointing", "full", "selective"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "train_step.py"), *words],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object and nothing else
    assert (result["rounds"], result["steps_a_round"]) == (1, 1)
    assert result["allocator"] and isinstance(result["allocator"], str)
    for precision in ("fp32", "bf16"):
        figures = result[precision]
        assert figures["images_per_s"] > 0 and figures["plain_images_per_s"] > 0
        assert figures["ratio"] == pytest.approx(figures["images_per_s"] / figures["plain_images_per_s"])  # one round
        assert figures["ratio_of_rounds"] == [pytest.approx(figures["ratio"], abs=1e-3)]
        assert figures["memory_ratio"] == pytest.approx(figures["peak_memory_gb"] / figures["plain_peak_memory_gb"])
        assert 0.05 < figures["plain_peak_memory_gb"] < 100, "1e9 bytes"
        full, selective = (figures["checkpointing"][mode]["memory_ratio"] for mode in ("full", "selective"))
        assert full < selective < 1


@pytest.mark.long
def test_probe_sweep_benchmark_runs() -> None:
    words = ["--rounds", "1", "--model", "aimv2-tiny-patch8-32", "--images", "2", "--cached", "4"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "probe_sweep.py"), *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    seconds = result["seconds_a_step"]
    assert set(seconds) == {"cached_1", "cached_14", "cached_14_plain", "augmented_1", "augmented_14"}
    assert result["ratios"]["augmented_14_to_1"] == pytest.approx(seconds["augmented_14"] / seconds["augmented_1"])
    assert result["ratios"]["cached_14_to_1"] == pytest.approx(seconds["cached_14"] / seconds["cached_1"])


@pytest.mark.long
def test_windows_benchmark_runs() -> None:
    words = ["--model", "aimv2-tiny-patch8-32", "--depth", "2", "--side", "128", "--windows", "8", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "backbone_windows.py"), *words, "--train"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["grid"] == 16 and result["whole_map"]["times_faster"] == 1
    assert result["window_8"].keys() == result["whole_map"].keys()
    assert result["window_8"]["times_faster"] > 0
