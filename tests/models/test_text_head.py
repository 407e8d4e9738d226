"""The vocabulary head in chunks: the same loss and gradients, never all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aimv2.models.decoder import CHUNK_ROWS, IGNORED, TextHead

WIDTH, VOCAB = 8, 40


class LargestLogits(TorchDispatchMode):
    """Watches every tensor that any operation makes: the most rows of VOCAB columns seen at once."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == VOCAB and value.shape[0] != WIDTH:
                self.rows = max(self.rows, value.shape[0])
        return out


def setting(rows: int) -> tuple[TextHead, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, VOCAB, (rows,))
    targets[torch.rand(rows) < 0.2] = IGNORED
    return TextHead(WIDTH, VOCAB), torch.randn(rows, WIDTH), targets


@pytest.mark.parametrize("rows", [1, 100, 2 * CHUNK_ROWS, 2 * CHUNK_ROWS + 1, 3 * CHUNK_ROWS])
def test_equals_the_plain_loss(rows: int) -> None:
    head, inputs, targets = setting(rows)
    results = []
    for fast in (True, False):
        x = inputs.clone().requires_grad_()
        if fast:
            loss = head(x, targets)
        else:
            real = targets != IGNORED
            loss = -F.linear(x, head.linear.weight)[real].log_softmax(-1).gather(1, targets[real][:, None]).sum()
        assert loss.shape == () and loss.dtype == torch.float32
        results.append([loss, *torch.autograd.grad(loss, [x, head.linear.weight])])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "largest"), [(2 * CHUNK_ROWS, 2 * CHUNK_ROWS), (3 * CHUNK_ROWS + 7, CHUNK_ROWS)])
def test_logits_never_exist_whole_for_many_rows(rows: int, largest: int) -> None:
    head, inputs, targets = setting(rows)
    with LargestLogits() as watch:
        head(inputs.requires_grad_(), targets).backward()
    assert watch.rows == largest


@pytest.mark.parametrize(("rows", "kept"), [(2 * CHUNK_ROWS, True), (3 * CHUNK_ROWS, False)])
def test_no_logits_wait_for_the_backward_pass(rows: int, kept: bool) -> None:
    head, inputs, targets = setting(rows)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        head(inputs.requires_grad_(), targets)
    assert any(len(shape) == 2 and shape[0] >= CHUNK_ROWS and shape[1] == VOCAB for shape in shapes) == kept


def test_bf16_products_still_give_an_fp32_loss() -> None:
    head, inputs, targets = setting(3 * CHUNK_ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(inputs, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head(inputs, targets), rtol=1e-2, atol=0)


def test_logits_without_targets() -> None:
    head, inputs, _ = setting(5)
    torch.testing.assert_close(head(inputs), inputs @ head.linear.weight.T)
