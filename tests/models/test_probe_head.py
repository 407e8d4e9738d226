"""The attentive probe against its formula (AIMV1, attentive probe)."""

import torch

from aimv2.models.probe_head import AttentiveProbe


def test_probe_by_formula() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(8, 3, heads=2).double()
    features = torch.randn(4, 5, 8, dtype=torch.float64) * 3 + 1
    mean, var = features.mean((0, 1)), features.var((0, 1), unbiased=False)
    x = (features - mean) / (var + 1e-6).sqrt()
    keys, values = x @ probe.key.weight.T, x @ probe.value.weight.T
    pooled = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (keys[..., head] @ probe.query[0, 0, head] / 2).softmax(-1)  # sqrt(head dim) = 2
        pooled.append((weights[..., None] * values[..., head]).sum(1))
    torch.testing.assert_close(probe(features), probe.linear(torch.cat(pooled, -1)))


def test_probe_size() -> None:
    width, classes = 128, 10
    probe = AttentiveProbe(width, classes)
    pool = probe.query.numel() + probe.key.weight.numel() + probe.value.weight.numel()
    assert pool == 2 * width**2 + width and probe.heads == 2
    assert sum(p.numel() for p in probe.parameters()) == pool + width * classes + classes
