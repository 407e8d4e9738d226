"""Tasks of lmms-eval, run through our model class: with the images, without any, and with those of other documents."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aimv2.config.types import split_words
from aimv2.distributed import World
from aimv2.errors import UsageError, first_line
from aimv2.evals.harness import Evaluation
from aimv2.evals.vlm.benchmarks import (
    BENCHMARKS,
    PREFIX,
    TABLE_8,
    check_ready,
    hub_parts,
    need_lmms_eval,
    place_of,
    task_names,
    write_tasks,
)  # fmt: skip
from aimv2.evals.vlm.score import about_vlm, lines_of, opened, processes, refuse_other_result
from aimv2.interop.hub import offline_if_unreachable
from aimv2.io import read_file
from aimv2.tables import TextTable

if TYPE_CHECKING:
    from aimv2.commands.vlm_score import VlmScoreOptions

CONTROLS = {"text only": "text_only", "shuffled images": "shuffled_images"}  # condition -> key of a result
EXAMPLES = 5  # documents of each task that a result keeps


def evaluate_tasks(options: VlmScoreOptions) -> dict[str, Any]:
    """Scores of tasks, one after another; what is missing is found before any is loaded.

    Raises:
        UsageError: lmms-eval is not installed, an unknown task, data that are not there, no vision-language model.
    """
    need_lmms_eval()
    assert options.tasks is not None
    with processes() as world, Evaluation("vlm score", options.out) as evaluation:
        manager, names = index(options.tasks, write_tasks(evaluation.scratch / "tasks"), options.include)
        configs = {name: config_of(manager, name) for name in names}
        of_hub = any(hub_parts(name, config) for name, config in configs.items())
        with offline_if_unreachable() if of_hub else contextlib.nullcontext("") as why:
            for name, config in configs.items():
                check_ready(name, config, why)
            evaluation.open_folder()
            protocol = {
                "name": "lmms-eval", "lmms_eval": version("lmms-eval"), "shots": list(options.shots), "decoding": "greedy",
                "examples": "turns of the conversation, of the training split" if max(options.shots) else None,
                "limit": options.limit or None, "controls": options.shots[0] if options.controls else None,
            }  # fmt: skip
            refuse_other_result(evaluation.out, options.vlm, protocol, "name", split_words(options.tasks))
            answerer = opened(options.vlm, options.device, options.batch_size, None, evaluation.out, world.rank)
            tasks = {name: loaded(manager, name, configs[name], bool(why)) for name in names}
        from aimv2.evals.vlm.lmms import CONDITIONS, Aimv2Vlm, check_shots

        for task in tasks.values() if max(options.shots) else ():
            check_shots(task, max(options.shots))
        model = Aimv2Vlm(answerer=answerer, seed=options.seed)
        scored = {name: about_task(name, task, configs[name]) for name, task in tasks.items()}
        with_score = [task for name, task in tasks.items() if scored[name]["metric"] != "submission"]
        for number, shots in enumerate(options.shots):
            model.shots = shots
            for condition in CONDITIONS if number == 0 and options.controls else CONDITIONS[:1]:
                model.condition, plainly = condition, condition == CONDITIONS[0]
                # a task may write its answers into a file: that of the first number of shots, with the images, stays
                home = evaluation.home if plainly and number == 0 else evaluation.scratch
                chosen = list(tasks.values()) if plainly else with_score
                found = run(model, manager, chosen, options.limit, home) if chosen else None
                notes = notes_of(model, world)
                for name in found["results"] if found is not None else ():
                    note(scored[name], name, found or {}, shots, condition, notes)
                if plainly:
                    sizes = {name: size["effective"] for name, size in found["n-samples"].items()} if found else None
                    check_some_fit(world.broadcast(sizes), model, notes["too_long"])
        figures: dict[str, Any] = {"tasks": scored}
        if set(names) >= {PREFIX + name for name in TABLE_8} and world.main:
            rows = [scored[PREFIX + name]["by_shots"] for name in TABLE_8]
            figures["mean_over_eight"] = {shots: sum(row[shots] for row in rows) / len(rows) for shots in rows[0]}
        if any(row["unit"] == "CIDEr" for row in scored.values()):
            from aimv2.evals.ptb import tokenise

            protocol["tokenizer"] = tokenise(["a"])[1]
        data = {"name": options.tasks, "dataset": None, "source": f"lmms-eval {version('lmms-eval')}", "split": None}
        about = about_vlm(options.vlm, answerer)
        if not world.main:
            evaluation.out = None
        return evaluation.result(protocol, about, data, figures, options.seed)


def index(given: str, ours: Path, include: str | None) -> tuple[Any, list[str]]:
    """lmms-eval's task manager, which knows the tasks of ``--tasks``, and their names; its own thousands only where they are needed.

    Raises:
        UsageError: an unknown task, a folder that is not there.
    """
    if include is not None and not Path(include).expanduser().is_dir():
        raise UsageError(f"--include {include}: no such folder", code="not-found")
    folders = [*([str(Path(include).expanduser())] if include else []), str(ours)]  # of equal names the first counts
    with quiet():
        from lmms_eval.tasks import TaskManager

        manager = TaskManager("ERROR", folders, include_defaults=False, model_name="aimv2_vlm")
        found = known(manager)
        with contextlib.suppress(UsageError):
            return manager, task_names(given, found)
        names = task_names(given, {*found, *their_names()})
        return TaskManager("ERROR", folders, model_name="aimv2_vlm"), names


def known(manager: Any) -> set[str]:
    """The tasks of a manager; groups are none."""
    return {name for name, about in manager.task_index.items() if about["type"] == "task"}


def their_names() -> set[str]:
    """The names of lmms-eval's own tasks, by a line of their files: its index of them takes most of a minute."""
    texts = (read_file(file).decode(errors="replace") for file in need_lmms_eval().rglob("*.yaml"))
    return {name for text in texts for name in re.findall(r"^task\s*:\s*[\"']?([\w.-]+)", text, re.MULTILINE)}


def config_of(manager: Any, name: str) -> dict[str, Any]:
    """The YAML of a task, includes resolved; functions are not imported."""
    from lmms_eval.utils import load_yaml_config

    try:
        return dict(load_yaml_config(manager.task_index[name]["yaml_path"], mode="simple"))
    except Exception as error:  # of YAML, of files
        raise unusable(name, error) from None


def unusable(name: str, error: BaseException) -> UsageError:
    """A task that can't be loaded."""
    inner = getattr(error, "last_attempt", None)  # of the library that tries again
    cause = error if inner is None else inner.exception() or error
    return UsageError(f"--tasks {name}: it can't be loaded ({first_line(cause)})", option="--tasks", code="unreadable")


def loaded(manager: Any, name: str, config: dict[str, Any] | None = None, offline: bool = False) -> Any:
    """A task with its data; ``offline``: data of the hub are read from the snapshot in its cache.

    Raises:
        UsageError: its data or its functions can't be loaded.
    """
    from lmms_eval.tasks import get_task_dict

    with quiet():
        try:
            moved = place_of(config["dataset_path"]) if offline and config and hub_parts(name, config) else None
            given = name if moved is None else {"task": name, "dataset_path": moved}
            return get_task_dict([given], manager, "simple")[name]
        except Exception as error:  # `datasets` and a task's own code raise anything
            raise unusable(name, error) from None


def run(model: Any, manager: Any, tasks: Sequence[Any], limit: int, home: Path) -> dict[str, Any] | None:
    """lmms-eval's result of tasks; None on all ranks but the first."""
    with quiet():
        from lmms_eval.evaluator import simple_evaluate

        return simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit or None,
            bootstrap_iters=0,
            distributed_executor_backend="torchrun",
            cli_args=SimpleNamespace(output_path=str(home), process_with_media=True, reasoning_tags=None),
        )


def notes_of(model: Any, world: World) -> dict[str, dict[str, int]]:
    """How many documents of each task were too long, and kept their images, in the latest run on all ranks."""
    found: dict[str, dict[str, set[int]]] = {"too_long": {}, "kept": {}}
    for part in world.gather({"too_long": model.too_long, "kept": model.kept}):
        for key, by_task in part.items():
            for name, rows in by_task.items():
                found[key].setdefault(name, set()).update(rows)
    return {key: {name: len(rows) for name, rows in by_task.items()} for key, by_task in found.items()}


def check_some_fit(sizes: dict[str, int], model: Any, too_long: dict[str, int]) -> None:
    """Raise UsageError, on all ranks, where not one document of any task fits the context; ``sizes``: documents by task."""
    if all(too_long.get(name) == size for name, size in sizes.items()):
        option = "--shots" if model.shots else "--tasks"
        given = f"--shots {model.shots}" if model.shots else f"--tasks {','.join(too_long)}"
        raise UsageError(f"{given}: not one document fits; {model.why}", option=option, code="limit")


def no_bar(*args: Any, **options: Any) -> Any:
    """A bar of tqdm that is never shown."""
    from tqdm import tqdm

    return tqdm(*args, **{**options, "disable": True})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lmms-eval without its log and its bars; ours is the progress that is shown."""
    from loguru import logger

    logger.remove()
    import lmms_eval.api.task
    import lmms_eval.evaluator
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    for module in (lmms_eval.api.task, lmms_eval.evaluator):
        module.tqdm = no_bar
    logger.remove()
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
        logger.remove()
        logger.add(sys.stderr, level="ERROR")


def about_task(name: str, task: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What stands next to a score: version, prompt, split, number of documents."""
    config, ours = task.config, BENCHMARKS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    stated = config.metadata if isinstance(config.metadata, dict) else next(iter(config.metadata or ()), {})
    return {
        "score": None, "by_shots": {}, "metric": ours.metric if ours else None, "unit": ours.unit if ours else None,
        "version": str(stated.get("version", task.VERSION)), "split": config.test_split or config.validation_split,
        "prompt": str(task.doc_to_text(task.task_docs[0])), "documents": len(task.task_docs), "source": given["dataset_path"],
        "max_tokens": (config.generation_kwargs or {}).get("max_new_tokens"), "note": ours.note if ours else "",
    }  # fmt: skip


def note(
    row: dict[str, Any], name: str, found: dict[str, Any], shots: int, condition: str, notes: dict[str, dict[str, int]]
) -> None:
    """Adds lmms-eval's figure of a task to its row."""
    ours = BENCHMARKS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    figures = {key.partition(",")[0]: value for key, value in found["results"][name].items() if "stderr" not in key}
    if ours is None and row["metric"] is None:
        row["metric"] = next((key for key, value in figures.items() if isinstance(value, int | float)), None)
    value = figures.get(row["metric"])
    score = value * (ours.scale if ours else 1) if isinstance(value, int | float) else None
    if condition in CONTROLS:
        row[CONTROLS[condition]] = score
        row["kept_images"] = notes["kept"].get(name, 0)
        return
    row.setdefault("too_long", {})[str(shots)] = notes["too_long"].get(name, 0)
    row["by_shots"][str(shots)] = score
    if len(row["by_shots"]) == 1:
        row |= {"score": score, "scored": found["n-samples"][name]["effective"]}
        row["samples"] = [
            {"document": one["doc_id"], "target": str(one["target"]), "written": one["filtered_resps"]}
            for one in found.get("samples", {}).get(name, [])[:EXAMPLES]
        ]


def render_tasks(result: dict[str, Any]) -> str:
    """Scores as text, 80 columns: percent, CIDEr and points with one decimal."""
    rows, shots = result["figures"]["tasks"], [str(number) for number in result["protocol"]["shots"]]
    keys = [*shots, *(key for key in CONTROLS.values() if any(key in row for row in rows.values()))]
    titles = {"text_only": "text only", "shuffled_images": "shuffled"}
    titles |= {number: f"{number} shots" if len(shots) > 1 or number != "0" else "score" for number in shots}
    table = TextTable(
        ["task", "metric", *(titles[key] for key in keys), "split", "version"],
        right=[titles[key] for key in keys],
        whole=["task"],
    )
    for name, row in rows.items():
        values = [row["by_shots"].get(key) if key in shots else row.get(key) for key in keys]
        cells = ["" if value is None else f"{value:.1f}" for value in values]
        table.rows.append([name, row["unit"] or row["metric"] or "", *cells, row["split"], row["version"]])
    lines = [f"{result['model']['name']}: {result['data']['source']}", table.to_text()]
    for number, mean in result["figures"].get("mean_over_eight", {}).items():
        lines.append(f"mean over the eight benchmarks of Table 8, {number} shots: {mean:.1f}")
    if len(shots) > 1 and result["protocol"]["controls"] is not None:
        lines.append(f"text only and shuffled: with {result['protocol']['controls']} shots")
    for name, row in rows.items():
        for number, count in row["too_long"].items():
            where = f"{name}, {number} shots" if len(shots) > 1 else name
            lines += [f"{where}: {line}" for line in lines_of(count, row["scored"], 0)]
        lines += [f"{name}: {line}" for line in lines_of(0, 0, row.get("kept_images", 0))]
    lines += [f"{name}: {row['note']}" for name, row in rows.items() if row["note"]]
    return "\n".join(lines)
