"""Many probes at once are many probes one by one: logits, gradients, and a whole training."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aimv2.batch import make_batch
from aimv2.evals.probe import ProbeSettings, fresh_sweep, predict, train_sweep
from aimv2.evals.probe_stream import FeatureStream, Order
from aimv2.models.probe_head import AttentiveProbe, EfficientProbe, ProbeSweep, Trial
from aimv2.train.schedule import learning_rate

KINDS = {"attentive": AttentiveProbe, "efficient": EfficientProbe}
TRIALS = [Trial(layer, lr, decay) for layer in ("last", "0") for lr in (1e-3, 1e-2) for decay in (0.05, 0.1)]


def sweep_and_singles(protocol: str) -> tuple[ProbeSweep, list[torch.nn.Module]]:
    """A sweep with different weights in each head, and plain probes with the same ones."""
    torch.manual_seed(0)
    sweep = ProbeSweep(24, 5, TRIALS, protocol, heads=4)
    singles = []
    for head in sweep.heads:
        single = KINDS[protocol](24, 5, 4)
        single.load_state_dict(copy.deepcopy(head.state_dict()), strict=False)
        singles.append(single)
    return sweep, singles


@pytest.mark.parametrize("protocol", KINDS)
def test_logits_and_gradients_are_those_of_single_probes(protocol: str) -> None:
    sweep, singles = sweep_and_singles(protocol)
    features = [torch.randn(6, 9, 24) * 3 + 1, torch.randn(6, 9, 24)]
    labels = torch.randint(5, (6,))
    logits = sweep.logits(features)
    assert logits.shape == (8, 6, 5)
    sum(F.cross_entropy(one, labels) for one in logits).backward()
    for g, (single, trial) in enumerate(zip(singles, TRIALS)):
        wanted = single(features[("last", "0").index(trial.layer)])
        torch.testing.assert_close(logits[g], wanted, rtol=1e-5, atol=1e-5)
        F.cross_entropy(wanted, labels).backward()
        mine = dict(sweep.heads[g].named_parameters())
        for name, parameter in single.named_parameters():
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    sweep.eval()
    for single in singles:
        single.eval()
    torch.testing.assert_close(sweep.logits(features)[0], singles[0](features[0]), rtol=1e-5, atol=1e-5)


def test_the_efficient_probe_is_the_published_one() -> None:
    """Written out query by query: softmax of q.x / sqrt(D), averages of the query's own slice of the values."""
    torch.manual_seed(1)
    probe = EfficientProbe(12, 3, heads=4).eval()
    x = torch.randn(2, 7, 12)
    values = x @ probe.value.weight.t()
    parts = []
    for q in range(4):
        weights = torch.softmax(x @ probe.query[0, q] / 12**0.5, dim=1)  # [B, N]
        parts.append((weights[..., None] * values[..., 3 * q : 3 * q + 3]).sum(1))
    pooled = torch.cat(parts, 1) / (1 + 1e-6) ** 0.5  # batch norm that has seen nothing
    torch.testing.assert_close(probe(x), pooled @ probe.linear.weight.t() + probe.linear.bias, rtol=1e-5, atol=1e-5)


def test_training_a_sweep_is_training_each_head_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Two epochs in the one loop against a plain loop: rate, decay, clipping and order of each head."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6, 24)).astype(np.float32), rng.integers(0, 3, 40)
    settings = ProbeSettings(rates=(1e-3, 3e-2), decays=(0.1,), epochs=3, warmup=1.0, batch_size=8, heads=4, clip=0.5)
    sweep = fresh_sweep(24, 3, settings, seed=4, device=torch.device("cpu"))
    start = copy.deepcopy(sweep.heads[1].state_dict())
    stream = FeatureStream([[features]], labels, 8, seed=4)
    train_sweep(sweep, stream, 40, settings, 4, tmp_path / "run", torch.device("cpu"), "")
    single = AttentiveProbe(24, 3, 4)
    single.load_state_dict(start, strict=False)
    decayed = [single.key.weight, single.value.weight, single.linear.weight]
    plain = [single.query, single.linear.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    from aimv2.config.schema import OptimConfig

    schedule = OptimConfig(lr=3e-2, min_lr=1e-5, warmup=5)
    for step in range(15):
        rows = np.sort(Order(40, 8, 4).rows(step)[1])
        loss = F.cross_entropy(single(torch.from_numpy(features[rows])), torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(single.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 15, schedule)
        optimizer.step()
    for name, value in sweep.heads[1].state_dict().items():
        torch.testing.assert_close(value, single.state_dict()[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("protocol", KINDS)
def test_separable_features_are_told_apart(protocol: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Classes that differ along one direction of one token: every image right, on images that were not trained on."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 600)
    features = rng.normal(size=(600, 5, 32)).astype(np.float32)
    features[np.arange(600), rng.integers(0, 5, 600), labels] += 12
    settings = ProbeSettings(protocol=protocol, rates=(1e-3, 1e-2), decays=(0.05,), epochs=25, batch_size=50)
    sweep = fresh_sweep(32, 4, settings, seed=0, device=torch.device("cpu"))
    stream = FeatureStream([[features[:400]]], labels[:400], 50, seed=0)
    train_sweep(sweep, stream, 400, settings, 0, tmp_path / "run", torch.device("cpu"), "")
    right = (predict(sweep, iter([[torch.from_numpy(features[400:])]])) == labels[400:]).mean(1)
    assert right.max() == 1.0, right


def test_a_sweep_knows_batches_of_features() -> None:
    sweep, _ = sweep_and_singles("attentive")
    features = torch.randn(3, 2, 9, 24)
    batch = make_batch(None, [[]] * 3, None, 0, features=features)
    assert torch.equal(sweep(batch), sweep.logits([features[:, 0], features[:, 1]]))
