"""Runs that are broken on purpose, at random: each must end with the losses of one that nothing happened to.

    python tests/long/soak.py [--minutes 30] [--rounds N] [--ranks 1,2] [--seed 0] [--faults NAMES]

Each round starts a tiny run, breaks it one to three times (signals, killed processes, damaged files), resumes it after each fault, and lets
it end. Prints a line for each round and the totals; exits with 1 where a loss differs, a process hangs, or a traceback is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aimv2.train.log import read_metrics
from aimv2.train.sealing import step_folders
from runs import exact, options, scenes

STEPS, EVERY = 160, 20
LONGEST = 240.0  # seconds that a start may take to its end
HARMLESS = {0, 75, 129, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT}


@dataclass
class Start:
    """A process, or a launcher with its ranks, that trains in a run folder."""

    run: Path
    ranks: int
    process: subprocess.Popen[bytes]
    log: Path

    def children(self) -> list[int]:
        """Processes below it, the nearest first."""
        found, waiting = [], [self.process.pid]
        while waiting:
            number = waiting.pop(0)
            with contextlib.suppress(OSError):
                below = [int(one) for one in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
                found += below
                waiting += below
        return found

    def trainers(self) -> list[int]:
        """The ranks."""
        return [self.process.pid] if self.ranks == 1 else self.children()[: self.ranks]

    def workers(self) -> list[int]:
        """Data workers of all ranks."""
        return [one for one in self.children() if one not in self.trainers()]

    def at(self, step: int) -> bool:
        """Waits for a line of metrics of ``step``; False where the process ended before."""
        began = time.monotonic()
        while self.process.poll() is None:
            if last_step(self.run) >= step or time.monotonic() - began > LONGEST:
                return True  # where it hangs, what waits for its end says so
            time.sleep(0.01)
        return False

    def ended(self) -> int | None:
        """Its exit code; None where it does not end, and is killed with all its group."""
        try:
            return self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None


def send(number: int) -> Callable[[Start, random.Random], None]:
    """A signal to everything of the run's group, as a terminal sends it."""

    def act(start: Start, _: random.Random) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(start.process.pid, number)

    return act


def kill_one(start: Start, rng: random.Random) -> None:
    """One rank, without warning."""
    with contextlib.suppress(OSError, IndexError):
        os.kill(rng.choice(start.trainers()), signal.SIGKILL)


def kill_launcher(start: Start, _: random.Random) -> None:
    """The launcher, or the only rank; the ranks end with it."""
    ranks = start.trainers()
    start.process.kill()
    start.process.wait()
    deadline = time.monotonic() + LONGEST
    while any(Path(f"/proc/{number}/cmdline").exists() for number in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def kill_worker(start: Start, rng: random.Random) -> None:
    """A data worker, without warning."""
    with contextlib.suppress(OSError, IndexError):
        os.kill(rng.choice(start.workers()), signal.SIGKILL)


def damage(run: Path, rng: random.Random) -> None:
    """A file of the newest checkpoint: cut, emptied, gone, or one bit flipped; the one before it stays good."""
    folders = step_folders(run)
    if len(folders) < 2:
        return
    file = rng.choice(sorted(path for path in folders[-1][1].rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    kind = rng.choice(("cut", "empty", "gone", "bit"))
    if kind == "gone":
        file.unlink()
    elif kind == "bit" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if kind == "cut" else b"")


def half_saved(run: Path, _: random.Random) -> None:
    """What a save leaves that was killed."""
    if folders := step_folders(run):
        shutil.copytree(
            folders[-1][1] / "model", run / "checkpoints" / ".aside-step-9999999" / "model", dirs_exist_ok=True
        )


def spoil_figures(run: Path, rng: random.Random) -> None:
    """Lines of metrics.jsonl that are none, and half of a last one."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(rng.choice((b'{"step": 3, "los', b"\xff\xfe\n", b"[]\n", b"\n\n")))


def newest_gone(run: Path, _: random.Random) -> None:
    """The newest checkpoint, whole."""
    folders = step_folders(run)
    if len(folders) > 1:
        shutil.rmtree(folders[-1][1])


WHILE_IT_RUNS: dict[str, Callable[[Start, random.Random], None]] = {
    "SIGINT": send(signal.SIGINT), "SIGTERM": send(signal.SIGTERM), "SIGHUP": send(signal.SIGHUP), "SIGKILL": send(signal.SIGKILL),
    "rank-killed": kill_one, "launcher-killed": kill_launcher, "worker-killed": kill_worker,
}  # fmt: skip
WHILE_IT_LIES: dict[str, Callable[[Path, random.Random], None]] = {
    "checkpoint-damaged": damage, "half-saved": half_saved, "figures-spoiled": spoil_figures, "newest-gone": newest_gone,
}  # fmt: skip


@dataclass
class Soak:
    """What happened so far."""

    home: Path
    data: Path
    rng: random.Random
    faults: list[str]
    tried: Counter[str] = field(default_factory=Counter)
    problems: dict[int, list[str]] = field(default_factory=dict)  # by round
    rounds: int = 0
    lost: int = 0

    def start(self, run: Path, ranks: int, resume: bool) -> Start:
        words = ["pretrain", "--run", str(run), "--resume"]
        if not resume:
            words = options(
                self.data,
                run,
                train__steps=STEPS,
                train__save_every=EVERY,
                train__keep=3,
                data__workers=1,
                optim__warmup=10,
            )
        launch = [sys.executable, "-m", "aimv2", *words]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            launch = [sys.executable, *torchrun, "-m", "aimv2", "--", *words]
        log = run.with_suffix(".log")
        with log.open("ab") as out:
            process = subprocess.Popen(
                launch, stdout=out, stderr=out, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        return Start(run, ranks, process, log)

    def problem(self, text: str) -> None:
        self.problems.setdefault(self.rounds, []).append(text)

    def undisturbed(self, ranks: int) -> Path:
        run = self.home / f"undisturbed-{ranks}"
        if not run.exists() and (code := self.start(run, ranks, False).ended()) != 0:
            raise SystemExit(f"the undisturbed run ended with {code}; see {run}.log")
        return run

    def round(self, ranks: int) -> None:
        """A run with one to three faults, held to the undisturbed one."""
        whole, run = self.undisturbed(ranks), self.home / f"round-{self.rounds}"
        chosen = [self.rng.choice(self.faults) for _ in range(self.rng.randint(1, 3))]
        reached = 0
        for number, fault in enumerate(chosen):
            reached = self.fault(run, ranks, fault, number > 0, reached)
        code = self.start(run, ranks, True).ended()
        if code != 0:
            self.problem(f"the last start ended with {code}")
        elif exact(run) != exact(whole):
            self.problem("other losses")
        if found := tracebacks(run.with_suffix(".log").read_text(errors="replace")):
            self.problem(f"{found[0]} in {run}.log")
        print(f"round {self.rounds}, {ranks} ranks, {', '.join(chosen)}: {self.lost} steps again so far", flush=True)
        self.rounds += 1

    def fault(self, run: Path, ranks: int, fault: str, resume: bool, reached: int) -> int:
        """Starts or resumes, breaks, and waits for the end; the last step that has figures."""
        self.tried[fault] += 1
        start = self.start(run, ranks, resume)
        if start.at(self.rng.randint(min(reached + 1, STEPS - 1), STEPS - 1)):
            act = WHILE_IT_RUNS.get(fault, WHILE_IT_RUNS["SIGTERM"])
            act(start, self.rng)
        if (code := start.ended()) is None:
            self.problem(f"{fault}: it hangs")
        elif ranks == 1 and code not in HARMLESS:
            self.problem(f"{fault}: exit code {code}")
        if fault in WHILE_IT_LIES:
            WHILE_IT_LIES[fault](run, self.rng)
        before = last_step(run)
        saved = step_folders(run)
        self.lost += max(before - (saved[-1][0] if saved else 0), 0)
        return before


def tracebacks(text: str) -> list[str]:
    """Last lines of the tracebacks in a log, without those that torchrun prints of itself when it is signalled or a rank ends."""
    found = re.findall(
        r"Traceback \(most recent call last\):\n(?:.*\n)*?(\w[\w.]*(?:Error|Exception|Interrupt|Exit).*)", text
    )
    return [line for line in found if not line.startswith("torch.distributed.elastic.")]


def last_step(run: Path) -> int:
    """The last step that has figures, 0 without any."""
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")[0]), default=0)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rounds", type=int, help="at most so many")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join([*WHILE_IT_RUNS, *WHILE_IT_LIES]))
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which stay there")
    given = parser.parse_args(words)
    home = given.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    home.mkdir(parents=True, exist_ok=True)
    soak = Soak(home, scenes(home / "scenes"), random.Random(given.seed), given.faults.split(","))
    ranks, end = [int(one) for one in given.ranks.split(",")], time.monotonic() + 60 * given.minutes
    while time.monotonic() < end and (given.rounds is None or soak.rounds < given.rounds):
        soak.round(ranks[soak.rounds % len(ranks)])
    for number, problems in soak.problems.items():
        print(f"round {number}: {'; '.join(problems)}")
    print(
        f"{soak.rounds} runs, {sum(soak.tried.values())} faults: {', '.join(f'{name} {n}' for name, n in sorted(soak.tried.items()))}"
    )
    print(
        f"{soak.rounds - len(soak.problems)} of {soak.rounds} runs ended with the losses of an undisturbed one; {soak.lost} steps again"
    )
    if given.keep is None and not soak.problems:
        shutil.rmtree(home)
    return int(bool(soak.problems))


if __name__ == "__main__":
    sys.exit(main())
