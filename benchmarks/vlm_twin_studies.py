"""What the twin of benchmarks/vlm_twin.py shows besides its order of encoders, each a run of its own:

    python benchmarks/vlm_twin_studies.py OUT features [--seeds 0,1,2]     post-norm against pre-norm features
    python benchmarks/vlm_twin_studies.py OUT tiles [--seeds 0]            2 x 2 tiles on small objects
    python benchmarks/vlm_twin_studies.py OUT shots [--seeds 0]            0, 4 and 8 examples before a question
    python benchmarks/vlm_twin_studies.py OUT captions --photos flickr8k-1k   CIDEr next to the captions of the decoder

The first three use the stages of vlm_twin.py in OUT and make those that are missing. Prints the tables of docs/vlm-twin.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from vlm_twin import SMOKE, Budget, Twin, fastest_threads, mean_of_kinds, row, spread

SMALL = ("--size", "64", "--objects", "3", "--object-size", "3,8", "--distractors", "0.3", "--questions", "6")
HIDDEN = ("colour", "shape", "where")  # what the same question may mean; the examples tell
SHOTS = (0, 4, 8)
PROMPT = "Provide a one-sentence caption for the provided image."  # Table C2


def features(seeds: list[int], made: Callable[[int], Twin]) -> str:
    """Post-norm and pre-norm features of the same encoder under the same language model."""
    forms = {"post-norm": ("", ()), "pre-norm": ("-pre", ("--features", "pre-norm"))}
    cells: dict[str, list[list[float]]] = {form: [[], []] for form in forms}
    for seed in seeds:
        for form, (label, build) in forms.items():
            found = made(seed).answers("aimv2", label, build)
            for column, part in enumerate(("seen", "unseen")):
                cells[form][column].append(mean_of_kinds(found[part], "accuracy"))
    lines = [row("features", "seen", "unseen"), "|---|---|---|"]
    return "\n".join([*lines, *(row(form, *map(spread, columns)) for form, columns in cells.items())])


def tiles(seeds: list[int], made: Callable[[int], Twin]) -> str:
    """One small image against a thumbnail and four tiles, both with pre-norm features, on objects of 3 to 8 pixels."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        twin = made(seed)
        budget = twin.budget
        twin.drawn("small", budget.scenes, *SMALL, "--seed", str(seed))
        for form, build in {"one image": (), "2 x 2 tiles": ("--tiles", "2")}.items():
            label = "-small" if not build else "-tiles"
            given = build or ("--features", "pre-norm")
            found = twin.answers("aimv2", label, given, learn="small", tests={"small": ("small", "val")})
            cells.setdefault(form, []).append(found["small"])
    kinds = list(next(iter(cells.values()))[0]["kinds"])
    lines = [row("objects of 3 to 8 px", "mean", *kinds), "|---" * (len(kinds) + 2) + "|"]
    for form, figures in cells.items():
        whole = spread([mean_of_kinds(one, "accuracy") for one in figures])
        each = (spread([one["kinds"][kind]["accuracy"] for one in figures]) for kind in kinds)
        lines.append(row(form, whole, *each))
    return "\n".join(lines)


def shots(seeds: list[int], made: Callable[[int], Twin]) -> str:
    """One question whose meaning only the examples tell: the model was tuned on rows of up to nine images with such questions."""
    cells: dict[str, dict[int, list[float]]] = {kind: {count: [] for count in SHOTS} for kind in HIDDEN}
    for seed in seeds:
        twin = made(seed)
        budget, home = twin.budget, twin.home
        words = ("--size", "64", "--objects", "1", "--object-size", "10,26", "--questions", "1", "--seed", str(seed))
        twin.drawn("single", max(budget.scenes, 160), *words)  # five a row
        if not (home / "tasks").is_dir():
            twin.part(f"interleaved(Path({twin.path('single')!r}), Path({twin.path('rows')!r}), {seed})")
            twin.part(f"hidden_tasks(Path({twin.path('single')!r}), Path({twin.path('tasks')!r}), {budget.tested})")
        run = twin.tuned("aimv2", "-shots", (), "rows")
        out = home / "score-shots"
        words = ("--tasks", ",".join(f"hidden_{kind}" for kind in HIDDEN), "--include", twin.path("tasks"))
        given = ("--shots", ",".join(map(str, SHOTS)), "--controls", "false", "--out", str(out), "--json")
        found = json.loads(twin.command("vlm", "score", run, *words, *given, log="score-shots"))["figures"]["tasks"]
        for kind in HIDDEN:
            for count in SHOTS:
                cells[kind][count].append(found[f"hidden_{kind}"]["by_shots"][str(count)])
    lines = [row("what the examples name", *(f"{count} shots" for count in SHOTS)), "|---" * (len(SHOTS) + 1) + "|"]
    return "\n".join([*lines, *(row(kind, *(spread(cells[kind][count]) for count in SHOTS)) for kind in HIDDEN)])


def captions(seeds: list[int], made: Callable[[int], Twin], photos: Path, steps: int | None) -> str:
    """A captioner's own decoder against a language model on its frozen encoder; both learned from the same photographs."""
    cells: dict[str, list[float]] = {}
    for seed in seeds:
        twin = made(seed)
        if not (twin.home / "photos" / "aimv2.json").is_file():
            names = sorted({line.split(",", 1)[0] for line in (photos / "captions.txt").read_text().splitlines()[1:]})
            listed = twin.home / "val.txt"
            listed.write_text("\n".join(names[-100:]) + "\n")
            words = ("--captions", "captions.txt", "--val-list", str(listed))
            twin.command("data", "import", str(photos), twin.path("photos"), *words, log="photos")
        run, data = twin.home / "eye-photos", twin.path("photos")
        if not (run / "summary.json").is_file():
            given = ("--config", "flickr8k-tiny", "--data.train", data, "--run", str(run), "--seed", str(seed))
            more = (
                () if steps is None else ("--train.steps", str(steps), "--optim.warmup", "1", "--train.batch_size", "8")
            )
            again = ("--run", str(run), "--resume") if (run / "config.yaml").is_file() else (*given, *more)
            twin.command("pretrain", *again, log="eye-photos")
        if not (twin.home / "llm-photos" / "config.json").is_file():
            paths = f"Path({data!r}), Path({twin.path('llm-photos')!r})"
            twin.part(f"language_model({paths}, {max(twin.budget.language // 4, 1)}, {seed}, vocabulary=2048)")
        tuned = twin.tuned("photos", "", (), "photos", llm="llm-photos", epochs=10 if steps is None else 1)
        found = {}
        for name, words in {
            "decoder": (str(run),),
            "language model": (tuned, "--ask", PROMPT, "--max-tokens", "40"),
        }.items():
            file = twin.home / f"cider-{name.split()[0]}.json"
            if not file.is_file():
                file.write_text(twin.command("caption", *words, "--data", data, "--score", "--json", log="cider"))
            found[name] = json.loads(file.read_text())["figures"]
        for name, figures in found.items():
            for key in ("cider", "bleu4"):
                cells.setdefault(f"{name} {key}", []).append(figures[key])
    lines = [row("100 photographs", "CIDEr", "BLEU-4"), "|---|---|---|"]
    for name in ("decoder", "language model"):
        lines.append(row(name, spread(cells[f"{name} cider"]), spread(cells[f"{name} bleu4"])))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("study", choices=("features", "tiles", "shots", "captions"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--photos", type=Path, help="folder with images and captions.txt, of captions")
    parser.add_argument("--threads", type=int, help="by trial without it")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything")
    options = parser.parse_args()
    threads, budget = options.threads or fastest_threads(), SMOKE if options.smoke else Budget()

    def made(seed: int) -> Twin:
        twin = Twin(options.out.resolve(), seed, budget, threads)
        if options.study != "captions":
            twin.scenes()
            twin.language()
        return twin

    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.study == "captions":
        if options.photos is None:
            parser.error("captions: --photos FOLDER is needed, with images and captions.txt")
        print(captions(seeds, made, options.photos.resolve(), 2 if options.smoke else None))
    else:
        print({"features": features, "tiles": tiles, "shots": shots}[options.study](seeds, made))


if __name__ == "__main__":
    main()
