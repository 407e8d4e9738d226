"""AdamW is the paper's fully decoupled rule, written out; a broken step leaves everything as it was."""

import pytest
import torch
from torch import Tensor, nn

from aimv2.config.schema import OptimConfig
from aimv2.models.create import create_model
from aimv2.train.optim import make_optimizer, parameter_groups, step_if_finite
from aimv2.train.schedule import learning_rate


def tiny() -> nn.Module:
    options: dict = {"image_size": 12, "width": 16, "heads": 2, "hidden": 24, "depth": 1}
    options |= {"decoder_width": 16, "decoder_heads": 2, "decoder_hidden": 24, "decoder_depth": 1}
    return create_model("aimv2-tiny-patch4-32", decoder=True, seed=0, decoder_vocab_size=9, **options)


def test_groups_partition_the_model() -> None:
    model = tiny()
    decayed, plain = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in (decayed, plain)]
    assert sorted(groups[0] + groups[1]) == sorted(names.values())
    # AIMV2, Table A1: bias, norm, positions and BOS are not decayed, the text embedding table is
    kept = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "position", "bos")
    assert all(name.endswith(kept) for name in groups[1])
    assert not any(name.endswith(kept) for name in groups[0])
    assert "decoder.token_embed.weight" in groups[0] and "decoder.text_head.linear.weight" in groups[0]


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("decay", ["full", "torch"])
def test_twenty_steps_by_the_formula(decay: str) -> None:
    config = OptimConfig(lr=4e-3, min_lr=1e-5, warmup=5, weight_decay=5e-3, decay=decay)
    model = tiny()
    optimizer = make_optimizer(model, config)
    parameters = [*model.parameters()]
    decayed = {id(parameter) for parameter in parameter_groups(model)[0]["params"]}
    slow = [p.detach().double().clone() for p in parameters]
    first = [torch.zeros_like(p) for p in slow]
    second = [torch.zeros_like(p) for p in slow]
    for step in range(20):
        lr = learning_rate(step, 20, config)
        gradients(parameters, step)
        step_if_finite(optimizer, torch.tensor(0.0), lambda _, rate=lr: rate)
        for parameter, p, m, v in zip(parameters, slow, first, second):
            assert parameter.grad is not None
            g = parameter.grad.double()
            if id(parameter) in decayed:
                p *= 1 - config.weight_decay * (lr / config.lr if decay == "full" else lr)
            m += (1 - 0.9) * (g - m)
            v += (1 - 0.95) * (g * g - v)
            unbiased = v / (1 - 0.95 ** (step + 1))
            p -= lr * (m / (1 - 0.9 ** (step + 1))) / (unbiased.sqrt() + 1e-8)
    for parameter, p in zip(parameters, slow):
        torch.testing.assert_close(parameter.detach().double(), p, rtol=1e-6, atol=1e-6)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("done", [0, 3])
def test_a_broken_step_leaves_weights_and_moments(done: int) -> None:
    config = OptimConfig(warmup=0)
    models = [tiny(), tiny()]
    optimizers = [make_optimizer(model, config) for model in models]
    for model, optimizer in zip(models, optimizers):
        for step in range(done):
            gradients([*model.parameters()], step)
            step_if_finite(optimizer, torch.tensor(0.0), lambda _: 1e-3)
    model, optimizer = models[0], optimizers[0]
    before, weights = state_of(optimizer), [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    step_if_finite(optimizer, torch.tensor(1.0), lambda _: 1e-3)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    after = state_of(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(after, before)) if done else not any(a.any() for a in after)
    for model, optimizer in zip(models, optimizers):  # and the next good step is as if the broken one had never been
        gradients([*model.parameters()], 99)
        step_if_finite(optimizer, torch.tensor(0.0), lambda _: 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizers[0]), state_of(optimizers[1])))


def test_the_rate_is_that_of_the_step() -> None:
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.0))
    weights = [p.detach().clone() for p in model.parameters()]
    gradients([*model.parameters()], 0)
    step_if_finite(optimizer, torch.tensor(0.0), lambda _: 2e-5)  # Adam's first step moves every value by the rate
    for parameter, before in zip(model.parameters(), weights):
        torch.testing.assert_close((parameter - before).abs(), torch.full_like(before, 2e-5), rtol=2e-2, atol=0)


@pytest.mark.parametrize(("size", "lr", "wanted"), [("L", 1e-3, 0.1), ("H", 8e-4, 0.125), ("3B", 4e-4, 0.25)])
def test_strength_of_the_papers_decay(size: str, lr: float, wanted: float) -> None:
    groups = make_optimizer(tiny(), OptimConfig(lr=lr)).param_groups
    assert [group["weight_decay"] for group in groups] == [pytest.approx(wanted), 0.0]
    assert [group["betas"] for group in groups] == [(0.9, 0.95)] * 2
