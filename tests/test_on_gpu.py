"""``benchmarks/on_gpu.py``: the call that a GPU is given, tried on whatever is here; wheels for a machine without network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import on_gpu
from gpu_parts import PARTS, Part

ROOT = Path(__file__).parents[1]


def call(*words: str, limit: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)


def test_parts_are_written_one_by_one(tmp_path: Path) -> None:
    done = call("--smoke", "--parts", "device,attention", "--out", str(tmp_path / "figures"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    assert list(result["parts"]) == ["device", "attention"] and result["smoke"] and not result["left_out"]
    assert result["parts"]["device"]["bf16_tflop_per_s"] > 0
    (ways,) = (value for value in result["parts"]["attention"].values() if isinstance(value, dict))
    assert ways["SDPA, boolean mask"] > 0
    text = (tmp_path / "figures.md").read_text()
    assert (
        "## attention" in text and "these figures mean nothing" in text and f"{ways['SDPA, boolean mask']:,.4g}" in text
    )


@pytest.mark.long
def test_every_part_runs(tmp_path: Path) -> None:
    done = call("--smoke", "--out", str(tmp_path / "figures"), limit=900)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert list(parts) == list(PARTS)
    assert parts["step"]["eager"]["times_plain"] > 0 and parts["sizes"]["tiny"]["fraction_of_peak"] > 0
    assert parts["checkpoint"]["mean_feature_here"] == pytest.approx(
        parts["checkpoint"]["mean_feature_on_cpu"], rel=1e-3
    )
    assert parts["checkpoint"]["steps_in_all"] == 6 and parts["scenes"]["bf16"]["loss"] > 0


def test_a_part_that_fails_or_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Part(PARTS["step"].run, "never done so soon", 1, 1)
    assert on_gpu.run_part("step", late, True, 0.2) == {"failed": "not done after 0 s"}
    monkeypatch.setattr(on_gpu.sys, "executable", "/bin/false")
    assert on_gpu.run_part("step", late, True, 60) == {"failed": "exit code 1"}


def test_what_no_longer_fits_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "run_part", lambda *given: {"figure": 1.0})
    monkeypatch.setattr(
        sys, "argv", ["on_gpu.py", "--seconds", "50", "--parts", "step,device", "--out", str(tmp_path / "out")]
    )
    assert on_gpu.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["parts"]) == ["device"] and "100 s expected, 45 s were left" in result["left_out"]["step"]
    assert "## Not run" in (tmp_path / "out.md").read_text()


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    done = call("--parts", "stp", "--out", str(tmp_path / "figures"))
    assert done.returncode == 2 and "--parts stp: one of device, step" in done.stderr.splitlines()[-1]
    if not torch.cuda.is_available():
        done = call("--out", str(tmp_path / "figures"))
        assert done.returncode == 2 and "no GPU" in done.stderr.splitlines()[-1]


def test_wheels_of_what_is_needed() -> None:
    words = [sys.executable, str(ROOT / "tools" / "wheels.py"), "OUT", "--list"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    names = {line.partition("==")[0] for line in done.stdout.splitlines()}
    assert {"safetensors", "megatron-energon", "tokenizers"} <= names
    assert not {"torch", "transformers", "aimv2", "nvidia-cublas", "sympy"} & names
