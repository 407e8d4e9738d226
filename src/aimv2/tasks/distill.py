"""The stage ``distill``: pre-training with a feature term to a frozen teacher, which whoever starts the run has opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2.config.schema import Config
from aimv2.data.shards.format import MANIFEST
from aimv2.data.stream.samples import training_shards
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.features.teacher import Teacher
from aimv2.models.distilled import Distiller
from aimv2.models.init import init_weights
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.objectives.distill import PROJECTED, DistillObjective
from aimv2.tasks import pretrain
from aimv2.tasks.held_out import HeldOut, held_out_batches, mean_loss

STORED = "stored"  # the teacher whose features lie beside the images
BATCH = 64  # held-out pairs in the models at once


def build(
    config: Config, tokenizer: Tokenizer | None, resuming: bool, open_teacher: Callable[[int], Teacher]
) -> tuple[Distiller, DistillObjective]:
    """The student, with the weights that pre-training would begin with, its projection, and the objective.

    Args:
        config, tokenizer, resuming: see :class:`aimv2.tasks.Stage`.
        open_teacher: patches a side of the student -> the teacher; one that sees any size is opened for these.

    Raises:
        UsageError: the patch grids differ, or the teacher is not the one that the run began with.
    """
    student = pretrain.build_model(config, tokenizer, resuming)
    shape, options = student.encoder.config, config.objective
    if shape.image_size is None:
        raise UsageError(
            f"model.name {shape.name}: a native student has no one patch grid to compare with a teacher's; give "
            "model.image_size"
        )
    teacher = (
        stored_teacher(config) if options.teacher == STORED else open_teacher(shape.image_size // shape.patch_size)
    )
    check_teacher(config, teacher)
    check_grids(shape, shape.image_size, teacher)
    width = teacher.width if options.teacher_loss in PROJECTED else None
    model = Distiller(student, width, options.teacher_view == "whole")
    if model.to_teacher is not None:
        init_weights(model.to_teacher, config.seed + 1)  # the student's own weights are those of pre-training alone
    return model, DistillObjective(options, teacher)


@torch.no_grad()
def validate(model: nn.Module, objective: Objective, data: HeldOut, config: Config, world: World) -> dict[str, float]:
    """Losses of pre-training, and of a teacher that runs along ``val_feature_loss`` of whole images (mean of a patch); features
    are stored for training images alone."""
    figures = pretrain.validate(model, objective, data, config, world)
    assert isinstance(model, Distiller) and isinstance(objective, DistillObjective)
    if objective.teacher.run is None:
        return figures
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        batches = held_out_batches(data, model.encoder.config.patch_size, BATCH, 1.0, model.decoder.config.text)
        figures["val_feature_loss"] = mean_loss(model, objective.whole, batches, world)
    model.train(was_training)
    return figures


def check_teacher(config: Config, teacher: Teacher) -> None:
    """Notes the hash of the teacher's weights (once: config.yaml keeps it); raises UsageError where it is another one's."""
    known = config.objective.teacher_sha256
    if known is not None and known == teacher.former and teacher.changed:
        raise UsageError(f"objective.teacher {teacher.name}: {teacher.changed}")
    if known is not None and known not in (teacher.sha256, teacher.former):
        raise UsageError(
            f"objective.teacher {teacher.name} has weights {teacher.sha256[:12]}, objective.teacher_sha256 says "
            f"{known[:12]}; give the teacher that the run began with"
        )
    config.objective.teacher_sha256 = known or teacher.sha256


def check_grids(student: EncoderConfig, size: int, teacher: Teacher) -> None:
    """Raises UsageError where patches of student (``size`` pixels a side) and teacher differ, saying how to match them."""
    grid = size // student.patch_size
    if grid == teacher.grid:
        return
    ways = [f"model.image_size={teacher.grid * student.patch_size}"]
    if size % teacher.grid == 0:
        ways.append(f"model.patch_size={size // teacher.grid}")
    raise UsageError(
        f"objective.teacher {teacher.name} sees {teacher.grid} x {teacher.grid} patches ({teacher.image_size} px), the student "
        f"{grid} x {grid} ({size} px, patches of {student.patch_size}); the grids must be equal: use "
        f"{' or '.join(ways)}, or a teacher with {grid} x {grid} patches"
    )


def stored_teacher(config: Config) -> Teacher:
    """What the manifests of the training shards say of the features that lie in them.

    Raises:
        UsageError: shards without, of different teachers, or with views that the run's options do not describe.
    """
    folders = {shard.parent for shards in training_shards(config.data) for shard in shards}
    found = {folder: read_teacher(folder) for folder in sorted(folders)}
    first, about = next(iter(found.items()))
    for folder, other in found.items():
        if other["sha256"] != about["sha256"]:
            raise UsageError(
                f"objective.teacher=stored: {first} holds features of {about['name']} ({about['sha256'][:12]}), {folder} of "
                f"{other['name']} ({other['sha256'][:12]}); one teacher is expected"
            )
        for key in ("crop_scale", "crop_ratio", "flip"):
            given = getattr(config.data, key)
            if other[key] != (list(given) if isinstance(given, tuple) else given):
                raise UsageError(
                    f"objective.teacher=stored: the views in {folder} were drawn with {key} {other[key]}, data.{key} is "
                    f"{given}; set data.{key} to theirs, or make views of your own with `aimv2 data teach`"
                )
    return Teacher(about["name"], about["sha256"], about["image_size"], about["grid"], about["width"], None)


def read_teacher(folder: Path) -> dict[str, Any]:
    """The manifest's words on the teacher of a folder of shards.

    Raises:
        UsageError: there are none.
    """
    try:
        about = json.loads((folder / MANIFEST).read_text()).get("teacher")
    except (OSError, ValueError, AttributeError):
        about = None
    if not isinstance(about, dict):
        raise UsageError(
            f"objective.teacher=stored: {folder} holds no features of a teacher ({MANIFEST} names none); make them with "
            "`aimv2 data teach TEACHER DATA OUT --views K`, or name a teacher that runs along"
        )
    return about
