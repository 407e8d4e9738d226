"""The feature term against plain numbers, where its gradient goes, and its independence of how pairs are grouped."""

import numpy as np
import pytest
import torch

from aimv2.batch import Batch, make_batch, split_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.features.teacher import Teacher, resize
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.distilled import Distiller
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.objectives.distill import LOSSES, PROJECTED, DistillObjective
from aimv2.objectives.pretrain import PretrainObjective
from aimv2.tasks.distill import check_grids
from aimv2.train.optim import parameter_groups

PATCHES, VOCAB, WIDTH, OTHER = 9, 11, 16, 24


def student() -> AIMv2:
    options: dict = {"image_size": 12, "width": WIDTH, "heads": 2, "hidden": 24, "depth": 2}
    options |= {"decoder_width": 16, "decoder_heads": 2, "decoder_hidden": 24, "decoder_depth": 1}
    model = create_model("aimv2-tiny-patch4-32", True, 0, decoder_vocab_size=VOCAB, decoder_max_text=30, **options)
    assert isinstance(model, AIMv2)
    return model


def teacher_encoder(size: int = 12, patch: int = 4) -> VisionEncoder:
    options: dict = {"image_size": size, "patch_size": patch, "width": OTHER, "heads": 3, "hidden": 32, "depth": 2}
    encoder = create_model("aimv2-tiny-patch4-32", False, 5, **options)
    assert isinstance(encoder, VisionEncoder)
    return encoder.eval()


def teacher_of(encoder: VisionEncoder) -> Teacher:
    config = encoder.config
    assert config.image_size is not None
    return Teacher("t", "0" * 64, config.image_size, config.image_size // config.patch_size, config.width, encoder)


def distiller(loss: str, view: str = "prefix", width: int = OTHER) -> Distiller:
    model = Distiller(student(), width if loss in PROJECTED else None, view == "whole")
    if model.to_teacher is not None:
        init_weights(model.to_teacher, 1)
    return model


def pairs(count: int = 4) -> Batch:
    drawn = torch.randint(0, 256, (4, 3, 12, 12), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    captions = [[5, 0, 3, 1], [1], [], [2, 2, 0, 9, 10, 1]]
    return make_batch(drawn[:count], captions[:count], [1, 4, 8, 3][:count], PATCHES)


def config(loss: str, **more: object) -> ObjectiveConfig:
    return ObjectiveConfig(name="distill", teacher="t", teacher_loss=loss, **more)  # type: ignore[arg-type]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def by_hand(loss: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The sum over patches, one patch at a time; ``ours`` is projected for cosine and l2."""
    total = 0.0
    for b in range(len(ours)):
        for i in range(PATCHES):
            if loss == "cosine":
                total += 1 - cosine(ours[b, i], theirs[b, i])
            elif loss == "l2":
                wanted = (theirs[b, i] - theirs[b, i].mean()) / np.sqrt(theirs[b, i].var() + 1e-6)
                total += np.mean((ours[b, i] - wanted) ** 2)
            else:
                both = [
                    (cosine(ours[b, i], ours[b, j]) - cosine(theirs[b, i], theirs[b, j])) ** 2 for j in range(PATCHES)
                ]
                total += np.mean(both)
    return total


@pytest.mark.parametrize("view", ["prefix", "whole"])
@pytest.mark.parametrize("loss", LOSSES)
def test_terms_by_hand(loss: str, view: str) -> None:
    model, encoder, batch = distiller(loss, view), teacher_encoder(), pairs()
    objective = DistillObjective(config(loss, teacher_weight=2.5), teacher_of(encoder))
    terms = objective(model, batch)
    with torch.no_grad():
        ours = model.encoder(batch.images, batch.prefix_len if view == "prefix" else None)
        if model.to_teacher is not None:
            ours = ours @ model.to_teacher.weight.T + model.to_teacher.bias
        theirs = encoder(batch.images)
    assert terms["feature"][0].item() == pytest.approx(
        by_hand(loss, ours.double().numpy(), theirs.double().numpy()), rel=1e-4
    )
    assert terms["feature"][1].item() == 4 * PATCHES
    plain = PretrainObjective(ObjectiveConfig())(student(), batch)
    assert {name: value.item() for name, (value, _) in terms.items() if name != "feature"} == {
        name: value.item() for name, (value, _) in plain.items()
    }
    assert objective.weights == {"text": 1.0, "pixel": 0.4, "feature": 2.5}
    assert {name: count.item() for name, count in objective.counts(batch).items()} == {
        name: count.item() for name, (_, count) in terms.items()
    }


@pytest.mark.parametrize("view", ["prefix", "whole"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_reaches_student_and_projection_and_never_the_teacher(loss: str, view: str) -> None:
    model, encoder = distiller(loss, view), teacher_encoder()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    terms = DistillObjective(config(loss), teacher_of(encoder))(model, pairs())
    terms["feature"][0].backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached == name.startswith(("encoder.", "to_teacher.")), name
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    ours = {id(p) for group in parameter_groups(model) for p in group["params"]}
    assert not ours & {id(p) for p in encoder.parameters()}
    assert not any("teacher" in key and not key.startswith("to_teacher.") for key in model.state_dict())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    model, batch = distiller("relation", "whole"), pairs()
    teacher = teacher_of(model.encoder)
    assert DistillObjective(config("relation"), teacher)(model, batch)["feature"][0].item() == pytest.approx(
        0, abs=1e-9
    )
    same = distiller("cosine", "whole", WIDTH)
    assert same.to_teacher is not None
    with torch.no_grad():
        same.to_teacher.weight.copy_(torch.eye(WIDTH))
        same.to_teacher.bias.zero_()
    loss = DistillObjective(config("cosine"), teacher)(same, batch)["feature"][0]
    assert loss.item() == pytest.approx(0, abs=1e-5)
    prefix = DistillObjective(config("relation"), teacher)(distiller("relation"), batch)["feature"][0]
    assert prefix.item() > 1e-3, "under prefix attention the student sees less"


def test_saved_weights_are_those_of_an_aimv2() -> None:
    model = distiller("cosine")
    saved = model.saved(model.state_dict())
    assert saved.keys() == student().state_dict().keys() < model.state_dict().keys()
    assert model.config_dict() == student().config_dict()
    assert all(torch.equal(value, student().state_dict()[key]) for key, value in saved.items())


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_change_nothing(loss: str) -> None:
    model, objective = distiller(loss), DistillObjective(config(loss), teacher_of(teacher_encoder()))
    whole = objective(model, pairs())
    for parts in (2, 4):
        cut = [objective(model, part) for part in split_batch(pairs(), parts, PATCHES)]
        for name in whole:
            assert sum(terms[name][0].item() for terms in cut) == pytest.approx(whole[name][0].item(), rel=1e-5)
            assert sum(int(terms[name][1]) for terms in cut) == int(whole[name][1])


def test_teacher_of_another_size_sees_resized_images_and_its_own_normalisation() -> None:
    encoder, batch = teacher_encoder(24, 8), pairs()
    encoder.mean.fill_(0.25)
    got = teacher_of(encoder).features(batch)
    big = torch.nn.functional.interpolate(batch.images.float(), (24, 24), mode="bicubic", antialias=True)
    big = big.round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(resize(batch.images, 24), big) and resize(batch.images, 12) is batch.images
    with torch.no_grad():
        wanted = encoder((big.float() / 255 - encoder.mean) / encoder.std)
    torch.testing.assert_close(got, wanted)
    assert got.shape == (4, PATCHES, OTHER) and not got.is_inference() and not got.requires_grad


def test_autocast_keeps_the_loss_in_fp32() -> None:
    model, objective = distiller("cosine"), DistillObjective(config("cosine"), teacher_of(teacher_encoder()))
    exact = objective(model, pairs())["feature"][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective(model, pairs())["feature"][0]
    assert half.dtype == torch.float32 and half != exact
    assert half.item() == pytest.approx(exact.item(), rel=0.03)


def test_a_misfit_says_how_to_match() -> None:
    shape = student().encoder.config  # 12 px, patches of 4: 3 x 3
    check_grids(shape, 12, teacher_of(teacher_encoder(24, 8)))
    with pytest.raises(ValueError, match=r"sees 6 x 6 patches.*3 x 3.*model\.image_size=24 or model\.patch_size=2"):
        check_grids(shape, 12, teacher_of(teacher_encoder(24, 4)))
    with pytest.raises(ValueError, match=r"5 x 5.*use model\.image_size=20, or a teacher with 3 x 3"):
        check_grids(shape, 12, teacher_of(teacher_encoder(20, 4)))
