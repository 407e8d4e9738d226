"""Options of the built-in tasks (section ``objective``), the rules among their values, and how a task is found by its name.

The options of the built-in tasks lie here and not with the tasks, since ``--help``, completion and chains read them without
torch, and since ``config.yaml`` holds those of all of them. A task that is not built in brings a dataclass of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.config.schema import Config

GROUP = "aimv2.tasks"  # of installed entry points; also the package of the built-in tasks
STORED = "stored"  # the teacher whose features lie next to the images


@dataclass
class PretrainTaskOptions:
    """Next patch and next token (AIMV2, Figure 1; its ablations, Table 9).

    Args:
        alpha: weight of the pixel loss relative to the text loss (Table 9c)
        targets: what is predicted: both; only image (AIMv1 style) or only text (Cap) (Table 9a)
        decoder_share: fraction of the image positions that the decoder gets, drawn for each sample; 1: all
        attention: encoder attention in training; bidirectional only with targets=text
    """

    alpha: float = 0.4
    targets: Literal["both", "image", "text"] = "both"
    decoder_share: float = 1.0
    attention: Literal["prefix", "bidirectional"] = "prefix"

    @staticmethod
    def check(config: Config) -> None:
        """Raises UsageError where the encoder would see the patches that it is to predict."""
        objective = config.objective
        refuse_features(config)
        if objective.attention == "bidirectional" and objective.targets != "text":
            raise UsageError(
                "objective.attention=bidirectional shows the patches to be predicted; it needs objective.targets=text, "
                f"got {objective.targets}",
                code="conflict",
            )


@dataclass
class ClassifyTaskOptions:
    """Classes through an attentive probe.

    Args:
        freeze: probe only: keep the encoder frozen; false fine-tunes all of it
        classes: probe only: number of classes; null: the largest label of the training shards + 1
        heads: probe only: attention heads of the probe; null: one per 64 values of the encoder's width
        smoothing: probe only: label smoothing
    """

    freeze: bool = True
    classes: int | None = None
    heads: int | None = None
    smoothing: float = 0.0

    @staticmethod
    def check(config: Config) -> None:
        """Raises UsageError for a frozen encoder that nobody names and for options of a decoder."""
        objective = config.objective
        refuse_features(config)
        if config.init is None and objective.freeze:
            raise UsageError(
                "objective.name=probe trains a head on a frozen encoder: --init MODEL says which", code="missing"
            )
        refuse_decoder_options(config, "; objective.freeze leaves the encoder as it is")
        refuse_layer_decay(config, objective.freeze, " unless objective.freeze is false")


@dataclass
class ContrastiveTaskOptions:
    """Images and captions in one space (LiT).

    Args:
        contrast: contrastive only: softmax = each pair among all of the batch, both ways (CLIP; temperature 0.07 at
            first); sigmoid = each image with each text by itself (SigLIP, arXiv 2303.15343; scale 10, bias -10 at first);
            the scale is learned, at most 100
    """

    contrast: Literal["softmax", "sigmoid"] = "softmax"

    @staticmethod
    def check(config: Config) -> None:
        """Raises UsageError for options of a decoder and for accumulation."""
        refuse_decoder_options(config)
        refuse_layer_decay(config, True)
        if config.train.accumulate > 1:
            raise UsageError(
                "objective.name=contrastive compares each pair with the whole batch: train.accumulate "
                f"{config.train.accumulate} would lose most of the others; use 1, and train.checkpointing=full where memory is "
                "short",
                code="conflict",
            )


@dataclass
class DistillTaskOptions(PretrainTaskOptions):
    """Pre-training and a feature term to a frozen teacher.

    Args:
        teacher: distill only, as the next six: any model that gives patch features (released name, hub id, folder, RUN,
            a transformers vision model by folder or hub id, timm:NAME); stored: the features that `aimv2 data teach` wrote
            next to the images
        teacher_weight: weight of the feature term relative to the text loss
        teacher_loss: cosine = 1 - cosine of the student's patch features, through a learned projection, and the teacher's;
            l2 = their mean squared error, the teacher's after a layer normalisation of each patch; relation = mean squared
            difference of the two patch-to-patch cosine matrices, without a projection
        teacher_view: which features of the student: prefix = those of the same forward pass, under prefix attention, at no
            cost; whole = those of a second forward pass in which all patches attend to each other
        teacher_image_mean: pixel mean of a transformers or timm teacher, by channel (red, green, blue, of pixels in 0 to 1); null: as its
            preprocessor_config.json says
        teacher_image_std: pixel std, as teacher_image_mean
        teacher_sha256: hash of the teacher's weights; null: recorded at the start of the run, which resumes with no other
    """

    teacher: str | None = None
    teacher_weight: float = 1.0
    teacher_loss: Literal["cosine", "l2", "relation"] = "cosine"
    teacher_view: Literal["prefix", "whole"] = "prefix"
    teacher_image_mean: tuple[float, float, float] | None = None
    teacher_image_std: tuple[float, float, float] | None = None
    teacher_sha256: str | None = None

    @staticmethod
    def check(config: Config) -> None:
        """Raises UsageError where the teacher is missing, or pixels are described of one that does not run."""
        PretrainTaskOptions.check(config)
        objective = config.objective
        if objective.teacher is None:
            raise UsageError(
                "objective.name=distill needs a teacher: objective.teacher MODEL says which", code="missing"
            )
        described = objective.teacher_image_mean is not None or objective.teacher_image_std is not None
        if described and objective.teacher == STORED and not config.resume:
            raise UsageError(
                "objective.teacher_image_mean and objective.teacher_image_std are for an objective.teacher that runs during training, "
                f"got objective.teacher={objective.teacher}; leave them out",
                code="conflict",
            )


BUILT_IN: dict[str, type[Any]] = {
    "pretrain": PretrainTaskOptions,
    "probe": ClassifyTaskOptions,
    "contrastive": ContrastiveTaskOptions,
    "distill": DistillTaskOptions,
}
APART = ("instruct", "detect")  # built-in too; only their own runs hold these options: OPTIONS of aimv2.config.NAME
MODULES = {"probe": "classify"}  # of tasks whose file has another name


@dataclass
class _Name:
    name: Literal["pretrain", "probe", "contrastive", "distill"] = "pretrain"


@dataclass
class ObjectiveConfig(DistillTaskOptions, ContrastiveTaskOptions, ClassifyTaskOptions, PretrainTaskOptions, _Name):
    """What the model learns (AIMV2, Figure 1; its ablations, Table 9).

    Args:
        name: pretrain = next patch and next token; probe = the class (.cls) through an attentive probe;
            contrastive = a text tower tuned to the frozen encoder (LiT); distill = pretrain and a
            feature term to a frozen teacher
    """


# ---- rules that several tasks share ----


def refuse_decoder_options(config: Config, instead: str = "") -> None:
    """Raises UsageError for options of a start from another model that need a decoder."""
    for key in ("fresh_decoder", "freeze_encoder", "lora"):
        if getattr(config.optim, key):
            raise UsageError(
                f"optim.{key} is for an encoder under a decoder, got objective.name={config.objective.name}{instead}",
                code="conflict",
            )


def refuse_features(config: Config) -> None:
    """Raises UsageError for stored features of images under a task that trains the encoder, or crops and flips."""
    if config.data.features is not None:
        raise UsageError(
            f"data.features is for objective.name=contrastive, got objective.name={config.objective.name}",
            code="conflict",
        )


def refuse_layer_decay(config: Config, frozen: bool, unless: str = "") -> None:
    """Raises UsageError for ``optim.layer_decay`` of a frozen encoder; a resumed run has been through this."""
    if config.optim.layer_decay != 1 and frozen and not config.resume:
        raise UsageError(
            f"optim.layer_decay {config.optim.layer_decay:g}: the encoder of objective.name={config.objective.name} does not "
            f"learn{unless}; set optim.layer_decay 1",
            code="conflict",
        )


def foreign_options(config: Config) -> dict[str, str]:
    """Options of other tasks that are not at their default: option -> the task that has it."""
    own = {field.name for field in dataclasses.fields(options_of(config.objective.name))}
    return {
        field.name: task
        for task, options in reversed(BUILT_IN.items())  # the first task that has an option names it
        for field in dataclasses.fields(options)
        if field.name not in own and getattr(config.objective, field.name) != field.default
    }


def refuse_foreign(config: Config) -> None:
    """Raises UsageError for an option of another task that is not at its default."""
    for option, task in foreign_options(config).items():
        raise UsageError(
            f"objective.{option} {getattr(config.objective, option)} is for objective.name={task}, got "
            f"objective.name={config.objective.name}; leave it out",
            code="conflict",
        )


def refuse_unread(config: Config) -> None:
    """Raises UsageError for a shared option that only a task can honour and an installed one does not name in ``reads``."""
    name = config.objective.name
    if name in BUILT_IN:  # these check it themselves
        return
    given = {"init": config.init, "data.features": config.data.features}
    given |= {f"optim.{key}": getattr(config.optim, key) for key in ("fresh_decoder", "lora")}
    for key, value in given.items():
        if value and key not in find_task(name).reads:
            raise UsageError(
                f"{key} {value}: the task objective.name={name} does not read it; leave it out",
                option=key,
                code="conflict",
            )


# ---- tasks by name ----


def find_task(name: str) -> Any:
    """The class of a task: that of ``aimv2.tasks.NAME``, or of an installed entry point; None where there is none."""
    if not isinstance(name, str) or name in MODULES.values():  # the file of a task that has another name
        return None
    module = f"{GROUP}.{MODULES.get(name, name)}"
    if name.isidentifier() and importlib.util.find_spec(module) is not None:
        return getattr(importlib.import_module(module), "TASK", None)
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    for point in entry_points(group=GROUP, name=name):
        return point.load()
    return None


def options_of(name: str) -> type[Any]:
    """The options dataclass of a task; its ``check(config)`` says which values go together.

    Raises:
        UsageError: no such task.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in APART:
        return importlib.import_module(f"aimv2.config.{name}").OPTIONS
    task = find_task(name)
    if task is None:
        raise UsageError(f"objective.name {name}: one of {', '.join([*BUILT_IN, *APART])} expected", code="unknown")
    return task.options
