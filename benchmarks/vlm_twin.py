"""Frozen encoders under one small language model: which of them lets it answer questions about scenes.

    python benchmarks/vlm_twin.py OUT [--seeds 0,1,2] [--eyes aimv2,captions,image,contrastive,untrained,pixels] [--threads 1] [--smoke]

For each seed, under OUT/SEED: scenes with captions and questions (combinations of colour and shape are held out of everything that
learns), four encoders of one size and one number of pairs, a language model trained on the scenes' texts only, and for each encoder
`aimv2 vlm build`, `aimv2 vlm train`, `aimv2 vlm score` on validation scenes and on scenes of the held-out combinations. Each stage
is a folder: what is there is not made again, so a run that was interrupted goes on. Prints the tables of docs/vlm-twin.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EYES = ("aimv2", "captions", "image", "contrastive", "untrained", "pixels")
TARGETS = {"aimv2": "both", "captions": "text", "image": "image"}
KINDS = ("count", "colour", "shape", "where", "exists", "relation", "larger", "more")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Budget:
    """The same for every eye.

    Attributes:
        scenes: training scenes, with up to six questions each.
        pairs: steps of 128 pairs of each encoder that is trained.
        language: steps of the language model.
        epochs: of the questions under each eye.
        tested: scenes of each test set.
    """

    scenes: int = 20_000
    pairs: int = 1200
    language: int = 600
    epochs: int = 1
    tested: int = 1000


SMOKE = Budget(scenes=64, pairs=2, language=2, epochs=1, tested=16)


def fastest_threads() -> int:
    """1 or 2 threads, by trial: on a busy machine two may be many times slower than one."""
    import torch

    x, seconds = torch.randn(2048, 128), {}
    for count in (1, min(2, os.cpu_count() or 1)):
        torch.set_num_threads(count)
        rounds = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(50):
                (x @ x.T[:, :384]).relu_().sum()
            rounds.append(time.perf_counter() - begin)
        seconds[count] = statistics.median(rounds)
    return min(seconds, key=seconds.__getitem__)


class Twin:
    """One seed's stages."""

    def __init__(self, out: Path, seed: int, budget: Budget, threads: int) -> None:
        self.home, self.seed, self.budget, self.threads = out / str(seed), seed, budget, threads
        self.home.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> str:
        return str(self.home / name)

    def command(self, *words: str, log: str) -> str:
        """``aimv2 WORDS`` in a process of its own, its progress in a file; what it printed."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with (self.home / f"{log}.log").open("a") as progress:
            done = subprocess.run(
                [sys.executable, "-m", "aimv2", *words],
                env=environment,
                stderr=progress,
                stdout=subprocess.PIPE,
                text=True,
            )
        if done.returncode:
            raise SystemExit(f"aimv2 {' '.join(words)}: exit code {done.returncode}; see {self.path(log)}.log")
        return done.stdout

    def drawn(self, name: str, count: int, *words: str) -> None:
        """Scenes under OUT/SEED/name, drawn anew where an interruption left only some of them."""
        if not (self.home / name / "aimv2.json").is_file():
            shutil.rmtree(self.home / name, ignore_errors=True)
            self.command("data", "shapes", self.path(name), "--count", str(count), *words, log=name)

    def part(self, call: str) -> None:
        """A function of vlm_twin_parts.py, in a process of its own."""
        code = f"from pathlib import Path; import vlm_twin_parts as parts; parts.{call}"
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, check=True)

    # ---- what all eyes have in common ----

    def scenes(self) -> None:
        budget, seed = self.budget, str(self.seed)
        shape = ("--size", "64", "--objects", "3", "--object-size", "10,26", "--distractors", "0.3", "--questions", "6")
        held = ("--hold-out", "0.15", "--hold-out-seed", seed)
        for name, count, more in (
            ("learn", budget.scenes, ("--seed", seed)),
            ("unseen", budget.tested, ("--seed", str(self.seed + 1000), "--only-held-out", "true")),
        ):
            self.drawn(name, count, *shape, *held, *more)

    def language(self) -> None:
        if not (self.home / "llm" / "config.json").is_file():
            self.part(
                f"language_model(Path({self.path('learn')!r}), Path({self.path('llm')!r}), {self.budget.language}, {self.seed})"
            )

    def eye(self, name: str) -> str:
        """The folder or run of an encoder."""
        where, steps = self.home / f"eye-{name}", self.budget.pairs
        if name in TARGETS:
            if not (where / "summary.json").is_file():
                self.command(
                    *pretraining(where, self.path("learn"), TARGETS[name], steps, self.seed), log=f"eye-{name}"
                )
        elif name != "photos" and not (where / "config.json").is_file():
            learn, out = (f"Path({str(one)!r})" for one in (self.home / "learn", where))
            calls = {
                "contrastive": f"contrastive({learn}, {out}, {steps}, {self.seed})",
                "untrained": f"untrained({out}, {self.seed})",
                "pixels": f"raw_patches({out})",
            }
            self.part(calls[name])
        return str(where)

    # ---- an eye under the language model ----

    def tuned(
        self, name: str, label: str = "", build: Sequence[str] = (), learn: str = "learn", llm: str = "llm", epochs: int | None = None,
    ) -> str:  # fmt: skip
        """Builds and trains; the run of ``aimv2 vlm train``."""
        own = f"{name}{label}"
        vlm, run = self.path(f"vlm-{own}"), self.path(f"run-{own}")
        if not Path(vlm, "config.json").is_file():
            words = (
                self.eye(name),
                self.path(llm),
                vlm,
                "--seed",
                str(self.seed),
                *(build or ("--features", "post-norm")),
            )
            self.command("vlm", "build", *words, log=f"run-{own}")
        if not Path(run, "summary.json").is_file():
            words = instruction(vlm, run, self.path(learn), epochs or self.budget.epochs, self.seed)
            self.command(*words, log=f"run-{own}")
        return run

    def answers(
        self, name: str, label: str = "", build: Sequence[str] = (), learn: str = "learn", tests: dict[str, tuple[str, str]] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Builds, trains and scores; by test set (shards, split) the figures of ``aimv2 vlm score``."""
        run, found = self.tuned(name, label, build, learn), {}
        for test, (data, split) in (tests or {"seen": ("learn", "val"), "unseen": ("unseen", "train")}).items():
            file = self.home / f"score-{name}{label}-{test}.json"
            if not file.is_file():
                words = ("--data", self.path(data), "--split", split, "--limit", str(self.budget.tested))
                more = ("--json", "--earlier-turns", "false")
                file.write_text(self.command("vlm", "score", run, *words, *more, log=f"score-{name}{label}"))
            found[test] = json.loads(file.read_text())["figures"]
        return found


def pretraining(run: Path, data: str, targets: str, steps: int, seed: int, side: int = 32) -> list[str]:
    """The command that trains an encoder: the demo's model at the twin's budget."""
    resume = ["--resume"] if (run / "config.yaml").is_file() else []
    if resume:
        return ["pretrain", "--run", str(run), *resume]
    given = {
        "data.train": data,
        "data.vocab_size": 512,
        "data.workers": 0,
        "data.crop_scale": 1.0,
        "data.crop_ratio": "[1.0, 1.0]",
        "data.flip": 0.0,
        "model.name": "aimv2-tiny-patch8-32",
        "model.image_size": side,
        "objective.targets": targets,
        "optim.lr": 2e-3,
        "optim.warmup": max(steps // 12, 1),
        "train.steps": steps,
        "train.batch_size": 128 if steps > 2 else 16,
        "train.precision": "fp32",
        "train.compile": "off",
        "train.save_every": max(steps // 2, 1),
        "train.keep": 1,
        "eval.every": max(steps // 2, 1),
        "eval.samples": 500,
        "eval.probe": "false",
        "log.report": "false",
        "log.tensorboard": "false",
        "seed": seed,
    }
    return ["pretrain", "--run", str(run), *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def instruction(vlm: str, run: str, data: str, epochs: int, seed: int) -> list[str]:
    """The command that trains connector and language model."""
    if Path(run, "config.yaml").is_file():
        return ["vlm", "train", "--run", run, "--resume"]
    given = {
        "init": vlm,
        "run": run,
        "data.train": data,
        "data.workers": 0,
        "train.epochs": epochs,
        "train.batch_size": 32 if epochs > 1 else 16,
        "train.precision": "fp32",
        "optim.lr": 1e-3,  # of a language model of a million parameters
        "objective.connector_scale": 2.0,
        "log.report": "false",
        "log.tensorboard": "false",
        "seed": seed,
    }
    return ["vlm", "train", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


# ---- tables ----


def mean_of_kinds(figures: dict[str, Any], key: str) -> float:
    """Mean over the kinds of questions, 0..1, so that none counts for being asked more often."""
    return statistics.mean(kind[key] for kind in figures["kinds"].values())


def spread(values: Sequence[float]) -> str:
    """Mean in percent, and from two seeds on the standard error of the mean."""
    text = f"{100 * statistics.mean(values):.1f}"
    return text if len(values) < 2 else f"{text} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(found: dict[int, dict[str, dict[str, Any]]], eyes: Sequence[str]) -> str:
    """Markdown: every eye in the mean over kinds, then by kind.

    Args:
        found: figures by seed, eye and test set.
        eyes: rows.
    """
    seeds = sorted(found)
    lines = [row("eye", "seen", "unseen", "seen, text only", "seen, shuffled"), "|---|---|---|---|---|"]
    columns = (
        ("seen", "accuracy"),
        ("unseen", "accuracy"),
        ("seen", "text_only_accuracy"),
        ("seen", "shuffled_accuracy"),
    )
    for eye in eyes:
        cells = [spread([mean_of_kinds(found[seed][eye][part], key) for seed in seeds]) for part, key in columns]
        lines.append(row(eye, *cells))
    known = [found[seed][eyes[0]]["seen"] for seed in seeds]
    lines.append(
        row("most frequent answer", spread([mean_of_kinds(one, "majority_accuracy") for one in known]), "", "", "")
    )
    for part in ("seen", "unseen"):
        lines += ["", row(part, *KINDS), "|---" * (len(KINDS) + 1) + "|"]
        for eye in eyes:
            kinds = ([found[seed][eye][part]["kinds"][kind]["accuracy"] for seed in seeds] for kind in KINDS)
            lines.append(row(eye, *map(spread, kinds)))
        chance = ([found[seed][eyes[0]][part]["kinds"][kind]["chance"] for seed in seeds] for kind in KINDS)
        lines.append(row("chance", *map(spread, chance)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--eyes", default=",".join(EYES))
    parser.add_argument("--threads", type=int, help="by trial without it")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything")
    options = parser.parse_args()
    eyes, threads = options.eyes.split(","), options.threads or fastest_threads()
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in map(int, options.seeds.split(",")):
        twin = Twin(options.out.resolve(), seed, SMOKE if options.smoke else Budget(), threads)
        twin.scenes()
        twin.language()
        found[seed] = {}
        for eye in eyes:
            begin = time.time()
            found[seed][eye] = twin.answers(eye)
            accuracy = mean_of_kinds(found[seed][eye]["seen"], "accuracy")
            print(
                f"seed {seed}, {eye}: {100 * accuracy:.1f} in the mean over kinds, {time.time() - begin:,.0f} s",
                flush=True,
            )
    print("\n" + tables(found, eyes))


if __name__ == "__main__":
    main()
