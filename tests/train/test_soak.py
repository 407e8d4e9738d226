"""The soak test, short: two runs, broken at random by a fixed seed, end with the losses of undisturbed ones."""

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "long" / "soak.py"


def test_broken_runs_end_with_the_losses_of_undisturbed_ones(tmp_path: Path) -> None:
    words = ["--rounds", "2", "--ranks", "1,2", "--seed", "0", "--keep", str(tmp_path / "soak")]
    done = subprocess.run([sys.executable, str(SOAK), *words], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs ended with the losses of an undisturbed one" in done.stdout
