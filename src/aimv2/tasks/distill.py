"""Distillation: pre-training with a feature term to a frozen teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aimv2.config.objective import STORED, DistillTaskOptions
from aimv2.config.schema import Config
from aimv2.data.shards.format import MANIFEST
from aimv2.data.stream.samples import training_shards
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.features.teacher import Teacher
from aimv2.io import parse_json, read_file
from aimv2.models.distilled import Distiller
from aimv2.models.init import init_weights
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.objectives.distill import PROJECTED, DistillObjective
from aimv2.tasks.held_out import HeldOut, evaluating, held_out_batches, mean_loss
from aimv2.tasks.pretrain import Pretrain
from aimv2.tasks.task import CardText, Context

BATCH = 64  # held-out pairs in the models at once


class Distill(Pretrain):
    """A student under a decoder, and the teacher that its patch features are compared with."""

    options: ClassVar[type[Any]] = DistillTaskOptions
    cools = False
    figures = (*Pretrain.figures, "val_feature_loss")
    may_change = ("objective.teacher", "objective.teacher_image_mean", "objective.teacher_image_std")
    teacher: Teacher

    def models(self) -> dict[str, str]:
        teacher = self.config.objective.teacher
        return {} if teacher in (None, STORED) else {"teacher": teacher}

    def stored_width(self) -> int:
        return stored_teacher(self.config).width if self.config.objective.teacher == STORED else 0

    def build(self, context: Context) -> Distiller:
        """The student with the weights that pre-training would begin with, and its projection.

        Raises:
            UsageError: the patch grids differ, or the teacher is not the one that the run began with.
        """
        student, options = super().build(context), self.config.objective
        shape = student.encoder.config
        if shape.image_size is None:
            raise UsageError(
                f"model.name {shape.name}: a native student has no one patch grid to compare with a teacher's; give "
                "model.image_size",
                code="unsupported",
            )
        self.teacher = self.open_teacher(shape.image_size // shape.patch_size, context.world.device)
        check_teacher(self.config, self.teacher)
        check_grids(shape, shape.image_size, self.teacher)
        width = self.teacher.width if options.teacher_loss in PROJECTED else None
        model = Distiller(student, width, options.teacher_view == "whole")
        if model.to_teacher is not None:
            init_weights(model.to_teacher, self.config.seed + 1)  # the student's own weights are those of pre-training
        return model

    def open_teacher(self, grid: int, device: torch.device) -> Teacher:
        """The teacher of ``objective.teacher``; one that takes any size is opened for ``grid`` patches a side."""
        options = self.config.objective
        if options.teacher == STORED:
            return stored_teacher(self.config)
        assert options.teacher is not None
        from aimv2.features.pixels import read_stats
        from aimv2.features.teacher import open_teacher

        names = "objective.teacher_image_mean", "objective.teacher_image_std"
        stats = read_stats(options.teacher_image_mean, options.teacher_image_std, names)
        return open_teacher(options.teacher, device, grid, stats=stats, options=names)

    def objective(self, model: nn.Module) -> Objective:
        return DistillObjective(self.config.objective, self.teacher)

    def flops(self, model: nn.Module, pairs: float, patches: float, tokens: float) -> float:
        return super().flops(model, pairs, patches, tokens) + pairs * self.teacher.flops

    @torch.no_grad()
    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """Losses of pre-training, and ``val_feature_loss`` (mean of a patch, whole images) of a teacher that runs here; stored
        features are of training images only."""
        figures = super().validate(model, objective, data, world)
        assert isinstance(model, Distiller) and isinstance(objective, DistillObjective)
        if objective.teacher.run is not None:
            with evaluating(model):
                batches = held_out_batches(data, model.encoder.config.patch_size, BATCH, 1.0, model.decoder.config.text)
                figures["val_feature_loss"] = mean_loss(model, objective.whole, batches, world)
        return figures

    def exported(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(model, Distiller)
        return model.saved(super().exported(model, weights))

    def card(self) -> CardText:
        options, card = self.config.objective, super().card()
        return card._replace(
            what=f"{card.what} as the student of a frozen teacher",
            learned=f"{card.learned}; patch features of {Path(options.teacher or '').name} (weights {options.teacher_sha256}), "
            f"{options.teacher_loss} loss, weight {options.teacher_weight:g}, {options.teacher_view} view",
        )

    def about(self) -> dict[str, Any]:
        options = self.config.objective
        return {"teacher": options.teacher, "teacher_sha256": options.teacher_sha256}


def check_teacher(config: Config, teacher: Teacher) -> None:
    """Records the hash of the teacher's weights (once: config.yaml keeps it); raises UsageError where it differs."""
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
        f"{' or '.join(ways)}, or a teacher with {grid} x {grid} patches",
        code="mismatch",
    )


def stored_teacher(config: Config) -> Teacher:
    """The teacher that the manifests of the training shards describe.

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
    """The teacher's entry in the manifest of a folder of shards.

    Raises:
        UsageError: there are none.
    """
    try:
        about = parse_json(read_file(folder / MANIFEST)).get("teacher")
    except (OSError, ValueError, AttributeError):
        about = None
    if not isinstance(about, dict):
        raise UsageError(
            f"objective.teacher=stored: {folder} holds no features of a teacher ({MANIFEST} names none); make them with "
            "`aimv2 data teach TEACHER DATA OUT --views K`, or name a teacher that runs during training",
            code="missing",
        )
    return about


TASK = Distill
