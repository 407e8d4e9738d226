"""Breaks twenty lines of src one at a time, in a copy, and prints the test that fails for each; exits with 1 where none does.

    python tests/long/break_lines.py [NUMBER ...]

A text must occur exactly once in all of src, so that a line that was moved is found and one that was rewritten is noticed. Each
break names the test files that should find it: the whole suite twenty times would take hours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# (text in src, what stands there instead, test files)
BREAKS = [
    ("position[None, :] <= position[:, None]", "position[None, :] < position[:, None]", "models/test_masks.py"),
    ("(position < prefix_len[:, None])", "(position <= prefix_len[:, None])", "models/test_masks.py"),
    ("x.permute(0, 2, 4, 3, 5, 1)", "x.permute(0, 2, 4, 5, 3, 1)", "models/test_positions.py"),
    ("column.sin(), column.cos(), row", "row.sin(), column.cos(), row", "models/test_positions.py"),
    ("probs.cumsum(-1) - probs >= top_p", "probs.cumsum(-1) >= top_p", "models/test_generate.py"),
    ("ended |= token == eos_id", "ended &= token == eos_id", "models/test_generate.py"),
    ("(position >= prefix_len[:, None] - 1)", "(position >= prefix_len[:, None])", "test_batch.py"),
    ("place[chosen] + 1", "place[chosen]", "test_batch.py"),
    ("int(text) if text.isdigit() else -1", "int(text) if text.isdigit() else 0", "data/test_labelled.py"),
    ('f"{seed}|{key}|{worker}|{index}"', 'f"{seed}|{key}|{index}"', "train/test_golden.py"),
    ("* (1 + math.cos(math.pi * t)) / 2", "* (1 + math.cos(math.pi * t / 2)) / 2", "train/test_schedule.py"),
    ("(peak - config.start_lr) * step / warmup", "peak * step / warmup", "train/test_schedule.py"),
    ("strength /= config.lr", "strength *= config.lr", "train/test_optim.py"),
    ("self.own, 1 - self.decay)", "self.own, self.decay)", "train/test_ema.py"),
    ("world.sum(sums) / counts.clamp(min=1)", "sums / counts.clamp(min=1)", "train/test_ranks.py"),
    (
        "broken = ~torch.isfinite(torch.cat([means, norm[None]]))",
        "broken = torch.zeros(3) > 0",
        "train/test_wrong_use.py",
    ),
    ("        aside.rename(final)\n", "        shutil.copytree(aside, final)\n", "train/test_resume.py"),
    ('"both": config.alpha,', '"both": 1.0,', "objectives/test_ablations.py train/test_ablation_runs.py"),
    ("half = z / (1 + square / n)", "half = z / (1 - square / n)", "evals/test_classify.py"),
    ("int((ranks < k).sum())", "int((ranks <= k).sum())", "evals/test_match.py"),
]


def broken(copy: Path, old: str, new: str) -> Path:
    """Applies one break to the copy; the file."""
    holders = [path for path in (copy / "src").rglob("*.py") if old in path.read_text()]
    times = sum(path.read_text().count(old) for path in holders)
    if times != 1:
        sys.exit(f"{old!r} occurs {times} times in src, expected once; mend BREAKS in {Path(__file__).name}")
    holders[0].write_text(holders[0].read_text().replace(old, new))
    return holders[0]


def first_failure(copy: Path, files: str) -> str | None:
    """The first test that fails in the copy; None where all pass."""
    given = [f"tests/{name}" for name in files.split()]
    env = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *given]
    done = subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


def main() -> int:
    numbers = [int(word) for word in sys.argv[1:]] or range(1, len(BREAKS) + 1)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".*_cache"))
        for number in numbers:
            old, new, files = BREAKS[number - 1]
            path = broken(copy, old, new)
            test = first_failure(copy, files)
            path.write_text((ROOT / path.relative_to(copy)).read_text())
            missed += test is None
            line = (ROOT / path.relative_to(copy)).read_text().partition(old)[0].count("\n") + 1
            where = f"{path.relative_to(copy)}:{line}"
            print(f"{number:2} {where}: {test or 'NO TEST FAILS'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
