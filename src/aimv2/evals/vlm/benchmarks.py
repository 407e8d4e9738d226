"""The benchmarks of Tables 7 and 8 as task files of lmms-eval, and what has to be there before one is loaded.

A file in ``tasks`` includes lmms-eval's own and states what Table C2 does: prompt, split, metric, length of an answer.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError, nearest
from aimv2.io import read_file

VERSION = "0.7.3"  # of lmms-eval that the task files were written for
INSTALL = f"pip install 'aimv2[vlm]' && pip install --no-deps lmms-eval=={VERSION}"
PREFIX = "aimv2_"
LOCAL = (
    "parquet",
    "json",
    "csv",
    "arrow",
    "imagefolder",
    "text",
    "pandas",
)  # builders of `datasets` that read local files
GQA_IMAGES = "lmms-lab-encoder/GQA", "val_balanced_images"  # of the hub: its questions are another configuration
JAVA_TASKS = ("coco", "textcaps", "nocaps", "flickr30k")  # lmms-eval's own captioning: its scorers are Java programs


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper.

    Attributes:
        printed: its column's name in Table 7, or in Table 8's list.
        metric: of lmms-eval, which is the score.
        unit: of the score.
        scale: what lmms-eval's figure is multiplied by.
        split: of the task file.
        note: where it is not what the paper says, or the paper does not say.
    """

    printed: str
    metric: str
    unit: str
    scale: float
    split: str
    note: str = ""


BENCHMARKS = {
    "vqav2": Benchmark("VQAv2", "exact_match", "VQA accuracy, %", 100, "val"),
    "gqa": Benchmark("GQA", "exact_match", "accuracy, %", 100, "val", "balanced questions; the paper says val only"),
    "okvqa": Benchmark("OKVQA", "exact_match", "VQA accuracy, %", 100, "val"),
    "textvqa": Benchmark("TextVQA", "exact_match", "VQA accuracy, %", 100, "val", "without OCR tokens in the prompt"),
    "docvqa": Benchmark("DocVQA", "anls", "ANLS, %", 100, "val", "the paper's is of the test split"),
    "infovqa": Benchmark("InfoVQA", "anls", "ANLS, %", 100, "val", "the paper's is of the test split"),
    "chartqa": Benchmark("ChartQA", "relaxed_overall", "relaxed accuracy, %", 100, "test"),
    "scienceqa": Benchmark("SciQA", "exact_match", "accuracy, %", 100, "test", "questions with an image"),
    "coco": Benchmark("COCO", "coco_CIDEr", "CIDEr", 100, "val", "COCO 2017 val: this split is ours, the paper says val only"),
    "textcaps": Benchmark("TextCaps", "textcaps_CIDEr", "CIDEr", 100, "val"),
    "nocaps": Benchmark("NoCaps", "nocaps_CIDEr", "CIDEr", 100, "val"),
    "seed": Benchmark("SEED", "seed_image", "accuracy, %", 100, "test", "questions on images"),
    "mme": Benchmark("MMEp", "mme_perception_score", "points of 2000", 1, "test"),
    "vizwiz": Benchmark("VizWiz", "exact_match", "VQA accuracy, %", 100, "val", "lmms-eval's prompt: of Table 8 only"),
    "docvqa_test": Benchmark("DocVQA", "submission", "a file to submit", 1, "test"),
    "infovqa_test": Benchmark("InfoVQA", "submission", "a file to submit", 1, "test"),
}  # fmt: skip
TABLE_8 = ("coco", "nocaps", "textcaps", "vqav2", "textvqa", "vizwiz", "gqa", "okvqa")


def need_lmms_eval() -> Path:
    """The folder of lmms-eval's tasks.

    Raises:
        UsageError: it is not installed; says both commands, since an extra can't leave out what a package requires.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"--tasks needs the package lmms_eval: {INSTALL}", option="--tasks", code="missing")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def write_tasks(folder: str | Path) -> Path:
    """Writes the task files into a folder, for ``lmms_eval --include_path``; the place of lmms-eval's own goes into each.

    Raises:
        UsageError: lmms-eval is not installed.
    """
    theirs, out = need_lmms_eval(), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(files("aimv2.evals.vlm").joinpath("tasks").iterdir(), key=lambda file: file.name):
        (out / file.name).write_text(file.read_text("utf-8").replace("lmms_eval/tasks/", f"{theirs}/"), "utf-8")
    return out


def task_names(given: str, known: Collection[str]) -> list[str]:
    """``"gqa,textvqa"`` -> aimv2_gqa, ...; other names are tasks of ``known``.

    Raises:
        UsageError: an unknown name; the nearest is said.
    """
    names = []
    for word in dict.fromkeys(word.strip() for word in given.split(",") if word.strip()):
        name = PREFIX + word if PREFIX + word in known else word
        if name not in known:
            words = [*BENCHMARKS, *known]
            raise UsageError(
                f"--tasks {word}: no such task; of Tables 7 and 8 there are {', '.join(BENCHMARKS)}, others have the names of "
                f"lmms-eval's or of the files in --include{nearest(word, words)}",
                option="--tasks",
                code="unknown",
            )
        names.append(name)
    if not names:
        raise UsageError("--tasks: at least one task is expected", option="--tasks")
    return names


def hub_parts(name: str, config: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The data sets of the hub that a task reads, each with its configuration; none where its data are on this machine."""
    source = str(config.get("dataset_path"))
    if source in LOCAL or (config.get("dataset_kwargs") or {}).get("load_from_disk") or Path(source).exists():
        return []
    return [(source, config.get("dataset_name")), *([GQA_IMAGES] if name == f"{PREFIX}gqa" else [])]


def check_ready(name: str, config: dict[str, Any], unreachable: str = "") -> None:
    """Raise UsageError where a task's data or programs are not there; nothing is loaded, and nothing is waited for.

    Args:
        name: of the task.
        config: its YAML, includes resolved.
        unreachable: why the hub can't be reached; "" where it can.
    """
    if not name.startswith(PREFIX) and name.startswith(JAVA_TASKS) and shutil.which("java") is None:
        raise UsageError(
            f"--tasks {name}: its scorers are Java programs and there is no java here; install one (apt install "
            f"default-jre-headless), or use {PREFIX}coco, {PREFIX}textcaps or {PREFIX}nocaps",
            option="--tasks",
            code="missing",
        )
    source, options = str(config.get("dataset_path")), config.get("dataset_kwargs") or {}
    if source in LOCAL or options.get("load_from_disk"):
        given = [options.get("data_files"), options.get("data_dir")] if source in LOCAL else source
        for path in paths_in(given):
            if "*" not in path and "://" not in path and not Path(path).exists():
                raise UsageError(f"--tasks {name}: {path} does not exist", option="--tasks", code="not-found")
    for source, part in hub_parts(name, config) if unreachable else ():
        if not cached(source, part):
            from huggingface_hub import constants

            raise UsageError(
                f"--tasks {name}: the data set {source}{f', {part},' if part else ''} is not in the cache and the hub can't be reached "
                f"({unreachable}); on a machine with network run `hf download --repo-type dataset {source}`, then copy its folder "
                f"datasets--{source.replace('/', '--')} to {constants.HF_HUB_CACHE}, or set HF_HOME to a cache that has it",
                option="--tasks",
                code="not-found",
            )


def paths_in(value: Any) -> list[str]:
    """All texts in nested lists and dicts."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [path for each in inner for path in paths_in(each)]


def snapshot_of(source: str) -> Path | None:
    """The folder of a data set in the hub's cache: of its main branch, else the newest."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}"
    main = home / "refs" / "main"
    if main.is_file() and (folder := home / "snapshots" / read_file(main).decode().strip()).is_dir():
        return folder
    return max(home.glob("snapshots/*"), key=lambda folder: folder.stat().st_mtime, default=None)


def place_of(source: str) -> str:
    """Where `datasets` finds a data set without the hub: its snapshot, else its name, by which it knows those that it has built."""
    return str(snapshot_of(source) or source)


def cached(source: str, part: str | None = None) -> bool:
    """Whether the hub's cache, or that of `datasets`, holds a configuration of a data set, as far as their files' names tell."""
    from datasets import config, load_dataset_builder
    from datasets.naming import camelcase_to_snakecase

    if (folder := snapshot_of(source)) is not None:
        try:
            return bool(load_dataset_builder(str(folder), part))
        except Exception:  # of `datasets`: no such configuration, none of its files
            return False
    owner, _, name = source.rpartition("/")
    built = Path(config.HF_DATASETS_CACHE) / f"{owner}{'___' * bool(owner)}{camelcase_to_snakecase(name)}"
    return any(built.glob(f"{part or '*'}/*/*"))
