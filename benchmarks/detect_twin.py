"""Frozen encoders under one small detector: boxes of classes and phrases on scenes, with combinations that nothing learned from.

    python benchmarks/detect_twin.py OUT [--seeds 0,1,2] [--eyes aimv2,captions,image,untrained] [--threads 1] [--smoke]
    python benchmarks/detect_twin.py OUT --study windows [--seeds 0]     fine-tuned encoders, attention in windows (Table D2)

For each seed, under OUT/SEED: captioned scenes of 64 px with boxes and phrases (combinations of colour and shape are held out of everything
that learns), three encoders of one size and one number of pairs, and for each encoder `aimv2 detect train` and `aimv2 detect score` on
validation scenes and on scenes of the held-out combinations. Each stage is a folder: what is there is not made again, so a run that was
interrupted goes on. Prints the tables of docs/localise.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from aimv2.evals.detection.predictions import read_predictions
from aimv2.evals.detection.referring import precision_at_1
from aimv2.evals.detection.truth import read_truth

sys.path.insert(0, str(Path(__file__).parent))
from vlm_twin import TARGETS, Twin, fastest_threads, pretraining, row, spread

EYES = ("aimv2", "captions", "image", "untrained")
SIDE = 64  # pixels of scenes and encoders
SCENES = ("--size", "64", "--objects", "6", "--object-size", "9,18", "--distractors", "0.5")
PARTS: dict[str, tuple[str, Literal["train", "val"]]] = {"seen": ("learn", "val"), "unseen": ("unseen", "train")}
RELATIONS = (" left of ", " right of ", " above ", " below ")
FIGURES = {
    "AP": ("box", "ap"), "AP50": ("box", "ap50"), "P@1": ("phrases", "p_at_1"), "P@1, relations": ("relations", "p_at_1"),
}  # fmt: skip
WINDOWS = {"frozen": (), "fine-tuned": ("--objective.freeze", "false")}
SIDES = (0, 4, 2)  # of windows in patches, of a map of 8 x 8; 0: the whole map


@dataclass(frozen=True)
class Budget:
    """The same for every eye.

    Attributes:
        scenes: training scenes.
        pairs: steps of 128 pairs of each encoder that is trained.
        steps: of 16 scenes of each detector.
        tested: scenes of each test set.
    """

    scenes: int = 12_000
    pairs: int = 240
    steps: int = 900
    tested: int = 600


SMOKE = Budget(scenes=64, pairs=2, steps=2, tested=16)
WINDOWED = Budget(steps=200)  # of the study of windows, six detectors of one seed


class Eyes(Twin):
    """One seed's stages."""

    budget: Budget  # type: ignore[assignment]

    def scenes(self) -> None:
        budget, held = self.budget, ("--hold-out", "0.15", "--hold-out-seed", str(self.seed))
        for name, count, more in (
            ("learn", budget.scenes, ("--seed", str(self.seed))),
            ("unseen", budget.tested, ("--seed", str(self.seed + 1000), "--only-held-out", "true")),
        ):
            self.drawn(name, count, *SCENES, *held, *more)

    def eye(self, name: str) -> str:
        where = self.home / f"eye-{name}"
        if name in TARGETS:
            if not (where / "summary.json").is_file():
                words = pretraining(where, self.path("learn"), TARGETS[name], self.budget.pairs, self.seed, SIDE)
                self.command(*words, log=f"eye-{name}")
        elif not (where / "config.json").is_file():
            self.part(f"untrained(Path({str(where)!r}), {self.seed}, {SIDE})")
        return str(where)

    def found(self, name: str, label: str = "", more: Sequence[str] = ()) -> dict[str, Any]:
        """Trains a detector and scores it; by test set the figures of ``aimv2 detect score``."""
        run, found = self.path(f"detect-{name}{label}"), {}
        if not Path(run, "summary.json").is_file():
            words = detecting(self.eye(name), run, self.path("learn"), self.budget.steps, self.seed)
            again = ["detect", "train", "--run", run, "--resume"]
            self.command(
                *(again if Path(run, "config.yaml").is_file() else [*words, *more]), log=f"detect-{name}{label}"
            )
        for part, (data, split) in PARTS.items():
            file = self.home / f"score-{name}{label}-{part}.json"
            if not file.is_file():
                out = file.with_suffix("")
                shutil.rmtree(out, ignore_errors=True)
                words = ("detect", "score", run, "--data", self.path(data), "--split", split, "--out", str(out))
                result = json.loads(self.command(*words, "--json", log=f"score-{name}{label}"))
                truth = read_truth(self.path(data), split)
                rows = read_predictions(str(out / "predictions.json"), truth).phrases
                related = [one for one in truth.phrases if any(word in one[1] for word in RELATIONS)]
                result["figures"]["relations"] = precision_at_1(replace(truth, phrases=related), rows)
                file.write_text(json.dumps(result))
            found[part] = json.loads(file.read_text())["figures"]
        return found


def detecting(encoder: str, run: str, data: str, steps: int, seed: int) -> list[str]:
    """The command that trains a detector of classes and phrases on a frozen encoder."""
    given = {
        "init": encoder,
        "run": run,
        "data.train": data,
        "data.workers": 0,
        "objective.width": 64,
        "objective.encoder_layers": 1,
        "objective.decoder_layers": 2,
        "objective.queries": 12,
        "objective.pyramid": "[1,0.5]",
        "objective.zoom": "[0.8,1.25]",
        "optim.lr": 1e-3,
        "optim.clip": 1.0,
        "optim.warmup": max(steps // 10, 1),
        "train.steps": steps,
        "train.batch_size": 16,
        "train.precision": "fp32",
        "train.save_every": max(steps // 2, 1),
        "eval.every": max(steps // 2, 1),
        "eval.samples": 100,
        "log.report": "false",
        "log.tensorboard": "false",
        "seed": seed,
    }
    return ["detect", "train", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def figure(figures: dict[str, Any], title: str) -> float:
    """A figure of ``aimv2 detect score``, 0..1."""
    kind, key = FIGURES[title]
    return float(figures[kind].get(key, 0.0))


def tables(found: dict[str, list[dict[str, Any]]], first: str) -> str:
    """Markdown: a row for each key of ``found``, its figures by seed, on both test sets."""
    columns = [(part, title) for part in PARTS for title in FIGURES]
    lines = [row(first, *(f"{part}, {title}" for part, title in columns)), "|---" * (len(columns) + 1) + "|"]
    for name, seeds in found.items():
        lines.append(row(name, *(spread([figure(one[part], title) for one in seeds]) for part, title in columns)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--eyes", default=",".join(EYES))
    parser.add_argument("--study", choices=("eyes", "windows"), default="eyes")
    parser.add_argument("--threads", type=int, help="by trial without it")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything")
    options = parser.parse_args()
    whole = Budget() if options.study == "eyes" else WINDOWED
    threads, budget = options.threads or fastest_threads(), SMOKE if options.smoke else whole
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, options.seeds.split(",")):
        twin = Eyes(options.out.resolve(), seed, budget, threads)  # type: ignore[arg-type]
        twin.scenes()
        if options.study == "eyes":
            runs: dict[str, tuple[str, str, Sequence[str]]] = {eye: (eye, "", ()) for eye in options.eyes.split(",")}
        else:
            runs = {
                f"{form}, {f'windows of {side}' if side else 'whole map'}": (
                    "aimv2",
                    f"-{form}-{side}",
                    (*words, "--objective.window", str(side), "--objective.global_blocks", "2"),
                )
                for form, words in WINDOWS.items()
                for side in SIDES
            }
        for title, (eye, label, words) in runs.items():
            found.setdefault(title, []).append(twin.found(eye, label, words))
            print(f"seed {seed}, {title}: AP {100 * figure(found[title][-1]['seen'], 'AP'):.1f}", flush=True)
    print("\n" + tables(found, "eye" if options.study == "eyes" else "attention"))


if __name__ == "__main__":
    main()
