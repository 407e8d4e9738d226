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
