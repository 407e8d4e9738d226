"""Nothing in a step waits for the device: it runs whole on tensors that have a shape and no values (torch's fake tensors),
where reading one value on the host raises."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from aimv2.batch import Batch, make_batch, split_batch
from aimv2.config.schema import Config
from aimv2.data.stream.native import make_native_batch, pack
from aimv2.distributed import World
from aimv2.features.teacher import Teacher
from aimv2.models.classifier import Classifier
from aimv2.models.create import create_model
from aimv2.models.distilled import Distiller
from aimv2.models.lit import LiTConfig, TextConfig, TunedLiT
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives.distill import DistillObjective
from aimv2.train import step as steps
from aimv2.train.step import TrainStep

SHAPE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
BOTH = {**SHAPE, **{f"decoder_{key}": value for key, value in SHAPE.items()}, "decoder_vocab_size": 20}
CAPTIONS = [[2, 5, 6, 1], [2, 7, 1], [2, 8, 9, 10, 11, 12, 1], [2, 1]]


def square(share: float = 1.0) -> Batch:
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    kept = torch.arange(int(16 * share)).expand(4, -1) if share < 1 else None
    return make_batch(images, CAPTIONS, [1, 14, 7, 3], 16, labels=[0, 1, 2, 0], kept=kept)


def native(packed: bool) -> Batch:
    images = [torch.zeros(3, 4 * rows, 4 * columns, dtype=torch.uint8) for rows, columns in ((2, 4), (1, 7))]
    batch = make_native_batch(images, CAPTIONS[:2], [3, 4], 4, 8)
    return pack([batch, batch]) if packed else batch


def pretrain(name: str = "aimv2-tiny-patch8-32") -> nn.Module:
    return create_model(name, True, 0, **BOTH)  # type: ignore[arg-type]


def lit(contrast: str) -> nn.Module:
    image = EncoderConfig("tiny", 32, 2, 2, 64, 8, 32, pool_heads=2)
    return TunedLiT(LiTConfig(image, TextConfig(24, 2, 2, 32, 20, 12, end=1), 16), contrast == "sigmoid")


def fake(module: nn.Module) -> nn.Module:
    """The same module with weights that have no values; to be called under a FakeTensorMode."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(value), value.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer)
        part.to = lambda device, part=part: part  # type: ignore
    return module


def without_values(batch: Batch, mode: FakeTensorMode) -> Batch:
    tensors = {name: mode.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    layout = batch.layout
    if layout is not None:
        layout = layout._replace(image_slots=mode.from_tensor(layout.image_slots), slots=mode.from_tensor(layout.slots))
    return replace(batch, **tensors, layout=layout)


def assert_no_wait(
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    batch: Batch,
    given: dict[str, Any],
    objective: Callable[[Config], Any] | None = None,
) -> Any:
    """Four steps on tensors without values; the model's and the objective's tensors too."""
    monkeypatch.setattr(steps, "fast_matmul", lambda device: None)  # tries products on the host, before any step
    config = Config()
    for key, value in {"train.precision": "fp32", "train.steps": 10, "optim.warmup": 1, **given}.items():
        part, name = key.split(".")
        assert hasattr(getattr(config, part), name), key
        setattr(getattr(config, part), name, value)
    parts = split_batch(batch, config.train.accumulate, 16) if config.train.accumulate > 1 else [batch]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = objective(config) if objective else None
        step = TrainStep(fake(model), config, World(0, 1, torch.device("cpu")), False, made)
        micro = [without_values(part, mode) for part in parts]
        for number in range(4):
            figures = step(micro, number)
    assert figures.norm.shape == () and len(figures.means) == len(figures.names)
    return figures


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pretraining(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"train.precision": precision, "train.accumulate": 2, "train.ema": 0.9, "optim.freeze_encoder": 2}
    assert_no_wait(monkeypatch, pretrain(), square(), given)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_and_rates_by_layer(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_wait(monkeypatch, pretrain(), square(), {"train.checkpointing": mode, "optim.layer_decay": 0.8})


def test_decoder_that_sees_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_wait(monkeypatch, pretrain(), square(0.5), {"objective.decoder_share": 0.5})


@pytest.mark.parametrize("packed", [False, True])
def test_native_resolution(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_wait(monkeypatch, pretrain("aimv2-tiny-patch4-native"), native(packed), {})


@pytest.mark.parametrize("loss", ["cosine", "l2", "relation"])
def test_distillation_from_a_live_teacher(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = create_model("aimv2-tiny-patch8-32", False, 9, **{**SHAPE, "width": 16}).eval()

    def objective(config: Config) -> DistillObjective:
        return DistillObjective(config.objective, Teacher("t", "", 32, 4, 16, fake(frozen)))

    given = {"objective.name": "distill", "objective.teacher": "t", "objective.teacher_loss": loss}
    assert_no_wait(
        monkeypatch, Distiller(pretrain(), None if loss == "relation" else 16, loss == "l2"), square(), given, objective
    )


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_locked_image_tuning(contrast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_wait(
        monkeypatch, lit(contrast), square(), {"objective.name": "contrastive", "objective.contrast": contrast}
    )


def test_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    image = EncoderConfig("tiny", 32, 2, 2, 64, 8, 32)
    assert_no_wait(
        monkeypatch, Classifier(image, 3, None), square(), {"objective.name": "probe", "objective.classes": 3}
    )


def test_what_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself: a step that reads one value on the host does not pass it."""
    adapt = TrainStep.adapt_scale
    monkeypatch.setattr(TrainStep, "adapt_scale", lambda self, broken: adapt(self, broken) if broken.item() else None)
    with pytest.raises(DataDependentOutputException):
        assert_no_wait(monkeypatch, pretrain(), square(), {"train.precision": "fp16"})
