"""The command ``pretrain``: configuration -> checks -> run -> figures."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import aimv2
from aimv2.config.load import check_keys, parse, provenance, read_recipe
from aimv2.config.schema import Config, get_value, leaf_keys, to_dict
from aimv2.data.stream.samples import training_samples, validation_shards
from aimv2.distributed import World, join_world, leave_world
from aimv2.errors import UsageError, need
from aimv2.features.fingerprint import file_hash
from aimv2.interop.model_folder import WEIGHTS, checkpoints, read_best
from aimv2.io import parse_json, read_file, say, write_aside
from aimv2.tasks import task_of
from aimv2.tasks.task import Context
from aimv2.train import defaults, prepare
from aimv2.train.best import check_best
from aimv2.train.checkpoint import read_about
from aimv2.train.cooldown import carry_on, cooldown_of, point_of
from aimv2.train.interrupt import Interrupted
from aimv2.train.loop import Trainer
from aimv2.train.parallel import layout_of
from aimv2.train.schedule import learning_rate

DEMO = Path(__file__).with_name("demo.yaml")
DEMO_SCENES = 20_000
AUTO = "auto"  # of resume


def launch(recipe: str | None, given: dict[str, Any], dry_run: bool, print_config: bool) -> dict[str, Any]:
    """See :func:`aimv2.api.pretrain`."""
    started = time.perf_counter()
    base = read_recipe(recipe) if recipe else {}
    check_keys(given, "on the command line", base)
    prepare.check_length(given, "on the command line")
    if not given.get("resume"):
        prepare.check_length(base, f"in --config {recipe}")
    try:
        if given.get("resume") == AUTO:
            from aimv2.train.same_run import start_or_go_on

            recipe, base, given = start_or_go_on(recipe, base, given)
        options = parse({**base, **given})
        if options.resume:
            return resume(options, {**base, **given}, started, dry_run, print_config)
        if options.accept_data:
            raise UsageError(
                "--accept-data goes with --resume: a new run has no data that could have changed; leave it out"
            )
        recipe, base = recipe_of(options, recipe, base, given)
        if wants_demo(options, recipe):
            return demo(given, started, dry_run, print_config)
        return pretrain(recipe, base, given, started, dry_run, print_config)
    finally:
        leave_world()


def recipe_of(
    options: Config, recipe: str | None, base: dict[str, Any], given: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The file under the command line, and its values: a recipe, or the run that a cooldown continues."""
    cooled = options.init if recipe is None and options.optim.schedule == "cooldown" else None
    if cooled and (options.data.train is None or point_of(cooled)):  # else any model on the user's data
        return cooldown_of(cooled, given)
    return recipe, base


def wants_demo(options: Config, recipe: str | None) -> bool:
    """Whether neither values nor data are given."""
    nothing = recipe is None and options.data.train is None and not os.environ.get("AIMV2_DATA")
    return nothing and task_of(options).demo


def pretrain(
    recipe: str | None, base: dict[str, Any], given: dict[str, Any], started: float, dry_run: bool, print_config: bool
) -> dict[str, Any]:
    """A new run on the user's data, from a recipe or from defaults that fit the data."""
    config = parse({**base, **given})
    run = None if dry_run or print_config else prepare.check_run_folder(config)
    prepare.locate_data(config)
    if recipe is not None and print_config:  # a recipe can be read before there are data
        if config.data.train is not None or "train.steps" in given:
            prepare.settle_length(config, given, scaled=False)
        return describe_config(config, provenance(base, given, recipe))
    config, base = settle(config, recipe, base, given)
    for line in prepare.remarks(config):
        say(line)
    if print_config:
        return describe_config(config, provenance(base, given, "auto"))
    most = None if recipe is None else defaults.most_visits(given)  # without a recipe settle has said it
    if run is None:
        from aimv2.train.trial import try_one_step

        return try_one_step(config, most)
    prepare.check_overwrite(config, run)
    return start(config, run, started, "optim.warmup" in given, most)


def settle(
    config: Config, recipe: str | None, base: dict[str, Any], given: dict[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """A run's values, checked against the first samples of its data; without a recipe they fit the data, or a line says how not.

    Returns:
        the configuration, and the values below the given ones.
    """
    samples, pairs = prepare.first_samples(config, 64), 0
    if recipe is None:
        pairs = training_samples(config.data)
        task, kind = task_of(config), defaults.kind_here()
        own = task.defaults(pairs, defaults.KINDS[kind], set(given))
        if own is None:
            known = config.init is not None and config.model.name == "auto"
            encoder = task.encoder_config(config.data.vocab_size) if known else None
            base = defaults.defaults_for(samples, pairs, kind, config, set(given), encoder)
            if config.init is not None:
                del base["model.name"], base["data.vocab_size"]  # those of init
        else:
            base = {**own, "objective.name": config.objective.name}
        config = parse({**base, **given})
        prepare.locate_data(config)
    scaled = recipe is None and "optim.warmup" not in given
    prepare.settle_length(config, given, scaled)
    for line in defaults.too_many_visits(config, pairs, defaults.VISITS) if recipe is None else ():
        say(line)
    base |= {"train.steps": config.train.steps} | ({"optim.warmup": config.optim.warmup} if scaled else {})
    (task := task_of(config)).check()
    task.check_samples(samples)
    prepare.check_captions(samples, config)
    prepare.check_labels(samples, config)
    return config, base


def demo(given: dict[str, Any], started: float, dry_run: bool, print_config: bool) -> dict[str, Any]:
    """The demo: captioned scenes, drawn into the run folder."""
    from aimv2.train.together import on_first

    base = read_recipe(DEMO)
    config = parse({**base, **given})
    if print_config:
        return describe_config(config, provenance(base, given, "demo"))
    task = task_of(config)  # mistakes come before anything is drawn or cleared
    task.check()
    task.encoder_config(config.data.vocab_size)
    if config.data.tokenizer != "auto":
        prepare.load_tokenizer(config.data.tokenizer)
    if dry_run:
        from aimv2.train.trial import try_one_step

        with tempfile.TemporaryDirectory() as scratch:
            config.data.train = draw_scenes(config, Path(scratch) / "data")
            prepare.locate_data(config)
            prepare.settle_length(config, given, scaled=False)
            return try_one_step(config)
    run = prepare.check_run_folder(config)
    world, out = join_world(), run / "data"

    def draw() -> None:
        if out.exists() and not prepare.is_demo_data(out):
            raise UsageError(
                f"--run {run}: {out} is in the way of the demo's scenes; choose another folder", code="exists"
            )
        prepare.clear_run(run)
        shutil.rmtree(out, ignore_errors=True)  # scenes of a run that never began
        draw_scenes(config, run / ".scenes-aside")
        (run / ".scenes-aside").rename(out)

    on_first(world, draw, out)
    config.overwrite, config.data.train = False, str(out)
    prepare.locate_data(config)
    prepare.settle_length(config, given, scaled=False)
    try:
        return start(config, run, started)
    except UsageError:
        if world.main and not prepare.holds_run(run):
            shutil.rmtree(out, ignore_errors=True)
            if not any(run.iterdir()):
                run.rmdir()
        raise


def draw_scenes(config: Config, out: Path) -> str:
    """The demo's shards."""
    from aimv2.data.scenes import write_scenes

    shutil.rmtree(out, ignore_errors=True)
    say(f"drawing {DEMO_SCENES} captioned scenes")
    write_scenes(str(out), DEMO_SCENES, size=32, seed=config.seed)
    return str(out)


def build_trainer(
    config: Config, run: Path, world: World, known: Path | None = None, resuming: bool = False
) -> Trainer:
    """Everything that a run needs, checked and built in memory; ``known`` holds the tokenizer of a resumed run."""
    layout_of(config.parallel, world.size)
    validated = bool(validation_shards(config.data))
    task = task_of(config)
    figures = task.figures
    if config.eval.knn:
        from aimv2.tasks.knn import KNN, check_knn

        check_knn(config)
        figures = (*figures, KNN) if figures else figures
    check_best(config, validated, figures)
    if not validated:
        say("no validation split (val-* or test-* shards, or data.val): the run will not be validated")
    if config.log.wandb:
        need("wandb", "wandb", "log.wandb")
    task.check_world(world)
    tokenizer = prepare.get_tokenizer(config, known, world)
    model = task.build(Context(tokenizer, world, resuming))
    compiled, line = False, None
    if task.compiles and config.train.compile != "off":
        from aimv2.train.compiling import want_compile  # torch's compiler

        compiled, line = want_compile(config.train, world)
    if config.data.pack and compiled:  # rows of ever new lengths
        compiled, line = False, "running eager: packed rows (data.pack) have a new length each step"
    if line:
        say(line)
    return Trainer(config, model, tokenizer, run, world, compiled, task=task)


def start(
    config: Config, run: Path, started: float, keep_warmup: bool = False, most: int | None = None
) -> dict[str, Any]:
    """A new run; ``keep_warmup``: the user has given optim.warmup; ``most`` visits of a pair, beyond which a line says so."""
    from aimv2.train.before import check_machine
    from aimv2.train.lock import one_writer
    from aimv2.train.outlook import beyond, expected_step
    from aimv2.train.same_run import note_run
    from aimv2.train.together import on_first

    world = join_world()
    trainer = build_trainer(config, run, world)
    flops = trainer.task.flops(trainer.model, *expected_step(config, trainer.encoder))
    samples = getattr(trainer.stream, "samples", None)  # of the common stream
    visits = defaults.too_many_visits(config, samples, most) if most and samples else ()
    for line in (*visits, *beyond(config, trainer.model, flops, world.device, world.size)):
        say(line)
    check_machine(trainer)
    carry_on(config, trainer.model, trainer.optimizer, world, keep_warmup)
    with one_writer(run, world, config.take_over):

        def begin() -> None:
            if config.overwrite:
                prepare.clear_run(run)
            prepare.open_run(run, config, trainer.tokenizer)
            note_run(trainer)

        on_first(world, begin, run)
        return finish(trainer, started, 0.0)


def resume(options: Config, given: dict[str, Any], started: float, dry_run: bool, print_config: bool) -> dict[str, Any]:
    """Resumes the run in the folder; of a finished one returns the summary."""
    if not options.run:
        raise UsageError("--resume needs --run, the folder of the run", code="missing")
    if dry_run:
        raise UsageError("--dry-run tries a new run; leave --resume out")
    if options.overwrite:
        raise UsageError("--resume continues a run and --overwrite removes it; give one of them", code="conflict")
    run = Path(options.run)
    config = prepare.resumed_values(run, given)
    config.run, config.resume, config.take_over, config.accept_data = str(run), False, False, False
    if print_config:
        return describe_config(config, provenance(prepare.stored_values(run), given, str(run / prepare.CONFIG)))
    from aimv2.train.before import check_machine
    from aimv2.train.lock import one_writer
    from aimv2.train.relayout import take_layout
    from aimv2.train.same_run import check_edits, check_never_saved, mend_figures, moved_data_are_given, same_data
    from aimv2.train.sealing import newest_is_whole

    summary = read_summary(run)
    if summary is not None and summary.get("step") == config.train.steps and newest_is_whole(run):
        mend_figures(run, config.train.steps)
        say(f"the run in {run} is finished")
        return summary
    world = join_world()
    with one_writer(run, world, options.take_over):
        prepare.drop_damaged(run, world)
        if saved := checkpoints(run):
            edited = check_edits(run, config, read_about(saved[-1][1]))
            take_layout(config, "data.workers" in (*given, *edited), saved[-1][1], world)
        trainer = moved_data_are_given(
            lambda: build_trainer(config, run, world, prepare.known_tokenizer(run), bool(saved))
        )
        found = prepare.find_resume(run, config, trainer.tokenizer)
        valid = same_data(trainer, found, options.accept_data)
        check_machine(trainer)
        if found is not None:
            trainer.restore(found, valid)
            say(f"going on from step {trainer.step}")
        else:
            check_never_saved(run)
            say(f"no checkpoint in {run}: starting again at step 0")
            carry_on(config, trainer.model, trainer.optimizer, world, keep_warmup=True)
        return finish(trainer, started, trainer.seconds)


def finish(trainer: Trainer, started: float, before: float) -> dict[str, Any]:
    """Trains, evaluates, reports and writes the summary.

    Once training is over the ranks leave the process group, and all but the first return: nobody waits while it evaluates.

    Args:
        trainer: everything built.
        started: when this start began, of ``time.perf_counter``.
        before: seconds that earlier starts of the run trained for.

    Returns:
        the summary; on other ranks than the first ``run`` and ``step`` only.
    """
    from aimv2.train.together import said

    config, run, world = trainer.config, trainer.run, trainer.world
    parameters, inside = count(trainer.model), count(trainer.unwrapped().encoder)
    log = trainer.open_log()
    try:
        log.say(f"run {run}: {parameters / 1e6:.1f}M parameters, steps {trainer.step} to {config.train.steps}")
        trainer.train()
    finally:
        trainer.close()
    result: dict[str, Any] = {"run": str(run), "step": trainer.step}
    if trainer.step < config.train.steps:
        return {**result, "stopped_at": trainer.step, "seconds": trainer.seconds}
    world.barrier()
    leave_world()
    if not world.main:
        return result
    folder = checkpoints(run)[-1][1] / "model"
    result |= trainer.figures
    if config.eval.best is not None:
        result["best"] = read_best(run)
    again = f"training is done, the evaluation at its end is not: {trainer.command_to_go_on()}"
    try:
        with said(run, again):
            result |= trainer.task.final_evaluation(run, folder, trainer.tokenizer, world.device)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {again}", 130) from None
    result |= {"parameters": parameters, "encoder_parameters": inside}
    result |= {"seconds": before + time.perf_counter() - started, "train_seconds": trainer.seconds}
    result |= about_run(config, folder / WEIGHTS)
    with said(run / "summary.json", again):
        write_aside(run / "summary.json", json.dumps(result, indent=1) + "\n")
    if config.log.report:
        from aimv2.report.write import after_run

        say(f"writing the report of {run} (log.report)")
        if path := after_run(run, world.device, say):
            result["report"] = path
            with contextlib.suppress(OSError):  # the summary without this line stands
                write_aside(run / "summary.json", json.dumps(result, indent=1) + "\n")
    return result


def about_run(config: Config, weights: Path) -> dict[str, Any]:
    """Provenance of a result: data, seed, weights, machine, versions, command."""
    from aimv2.commit import git_state

    data = to_dict(config)["data"]
    return {
        "data": data["train"],
        "val_data": data["val"] or "val-* or test-* next to the training shards",
        "seed": config.seed,
        **task_of(config).about(),
        "weights_sha256": file_hash(weights),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + ("" if not torch.cuda.is_available() else ", CUDA"),
        "version": aimv2.__version__,
        "torch": torch.__version__,
        **({"git": state} if (state := git_state()) else {}),
        "command": shlex.join(["aimv2", *sys.argv[1:]]),
    }


def read_summary(run: Path) -> dict[str, Any] | None:
    """``summary.json`` of a finished run; None without one, and where it is damaged, which a line says: the run's end is done again."""
    path = run / "summary.json"
    try:
        summary = parse_json(read_file(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict):
        say(f"{path} can't be read: it is written again at the end of the run")
        return None
    return summary


def count(model: torch.nn.Module) -> int:
    """Parameters of the model that is saved: low-rank updates (optim.lora) are merged."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)


# ---- before the run ----


def rate_curve(config: Config, points: int = 11) -> list[dict[str, float]]:
    """The learning rate at evenly spaced steps, the first and the last among them."""
    steps = config.train.steps
    at = sorted({round(i * (steps - 1) / (points - 1)) for i in range(points)} | {min(config.optim.warmup, steps - 1)})
    return [{"step": step, "lr": learning_rate(step, steps, config.optim)} for step in at]


def describe_config(config: Config, sources: dict[str, str]) -> dict[str, Any]:
    """The effective configuration, where each value came from, and the learning-rate curve."""
    values = {key: get_value(config, key) for key in leaf_keys(type(config))}
    if isinstance(config.data.train, list):
        values["data.train"] = to_dict(config)["data"]["train"]
    if config.data.train is not None and sources["data.train"] == "default":
        sources["data.train"] = "$AIMV2_DATA"
    return {"config": values, "from": sources, "learning_rate": rate_curve(config)}
