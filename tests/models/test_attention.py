"""Every way to attend gives what the plain way gives, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.models.layers import Attention, Block, Cache, inline_attention, prefix_attention_mask
from aimv2.models.masks import causal_mask, prefix_mask
from aimv2.train.compiling import can_compile

BATCH, HEADS, LENGTH, HEAD_DIM = 3, 2, 24, 8
WIDTH = HEADS * HEAD_DIM
PREFIX = torch.tensor([1, 7, 23])


def assert_near(got: Tensor, wanted: Tensor, what: str, limit: float = 1e-5) -> None:
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert error < limit, f"{what}: {error:.1e}"


def with_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """Output, and the gradient of a fixed projection of it for each input."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out, *torch.autograd.grad((out * pull).sum(), leaves)]


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_inline_equals_plain(prefix: Tensor | None) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM) for _ in range(3)]
    mask = causal_mask(LENGTH) if prefix is None else prefix_mask(prefix, LENGTH)[:, None]
    plain = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), *qkv)
    inline = with_gradients(lambda q, k, v: inline_attention(q, k, v, prefix), *qkv)
    for got, wanted, what in zip(inline, plain, ("output", "q", "k", "v")):
        assert_near(got, wanted, what)


def block_and_input() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block(WIDTH, HEADS, 40), torch.randn(BATCH, LENGTH, WIDTH)


def block_results(block: Block, x: Tensor, mask: object) -> list[Tensor]:
    weights = [*block.parameters()]
    x = x.clone().requires_grad_()
    out = block(x, mask)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out, *torch.autograd.grad((out * pull).sum(), [x, *weights])]


def assert_compiled_equals_eager(backend: str, masks: list) -> None:
    block, x = block_and_input()
    for mask in masks:
        plain = block_results(block, x, mask)
        fast = prefix_attention_mask(PREFIX, LENGTH, compiled=True) if isinstance(mask, Tensor) else mask
        torch._dynamo.reset()
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        for at, (got, wanted) in enumerate(zip(block_results(compiled, x, fast), plain)):
            assert_near(got, wanted, f"result {at}")
    torch._dynamo.reset()


def test_traced_block_equals_eager() -> None:
    assert_compiled_equals_eager("aot_eager", [prefix_attention_mask(PREFIX, LENGTH, compiled=False), "causal"])


def test_compiled_block_equals_eager() -> None:
    if reason := can_compile(torch.device("cpu")):
        pytest.skip(f"torch.compile does not work here: {reason}")
    assert_compiled_equals_eager("inductor", [prefix_attention_mask(PREFIX, LENGTH, compiled=False)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on CUDA only")
def test_flex_block_equals_eager() -> None:
    torch.manual_seed(0)
    block, x = Block(256, 2, 64).cuda(), torch.randn(BATCH, 256, 256, device="cuda")
    prefix = torch.tensor([1, 100, 255], device="cuda")
    plain = block_results(block, x, prefix_attention_mask(prefix, 256, compiled=False))
    fast = prefix_attention_mask(prefix, 256, compiled=True)
    assert not isinstance(fast, Tensor)
    for at, (got, wanted) in enumerate(zip(block_results(torch.compile(block), x, fast), plain)):
        assert_near(got, wanted, f"result {at}", 1e-3)


def test_the_form_of_the_mask() -> None:
    eager = prefix_attention_mask(PREFIX, LENGTH, compiled=False)
    assert isinstance(eager, Tensor) and torch.equal(eager[:, 0], prefix_mask(PREFIX, LENGTH))
    assert prefix_attention_mask(PREFIX, LENGTH, compiled=True) is PREFIX  # on a CPU: no mask at all is stored


def bool_tensors_kept(backend: str | None) -> int:
    """Elements of the largest bool tensor kept for the backward pass of inline attention."""
    largest = 0

    def note(value: Tensor) -> Tensor:
        nonlocal largest
        if value.dtype == torch.bool:
            largest = max(largest, value.numel())
        return value

    torch._dynamo.reset()
    function = inline_attention if backend is None else torch.compile(inline_attention, backend=backend)
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        out = function(q, k, v, PREFIX)
    out.sum().backward()
    torch._dynamo.reset()
    return largest


def test_compiled_inline_attention_keeps_no_mask() -> None:
    assert bool_tensors_kept(None) == BATCH * LENGTH * LENGTH  # eager does: the count can fail
    assert bool_tensors_kept("aot_eager") < BATCH * LENGTH * LENGTH


def test_cache_equals_one_go() -> None:
    torch.manual_seed(0)
    attention = Attention(WIDTH, HEADS)
    qkv = torch.randn(2, 7, 3 * WIDTH)
    wanted = attention.attend(qkv, "causal")
    cache = Cache()
    parts = [attention.attend_cached(part, cache) for part in qkv.split([4, 1, 2], 1)]
    assert_near(torch.cat(parts, 1), wanted, "cached")
    cache.select(torch.tensor([1, 1, 0]))
    assert cache.key is not None and cache.key.shape == (3, HEADS, 7, HEAD_DIM)
    assert torch.equal(cache.key[0], cache.key[1]) and not torch.equal(cache.key[0], cache.key[2])


def test_fused_projections_are_in_the_stated_order() -> None:
    block, x = block_and_input()
    q, k, v = (F.linear(x, part) for part in block.attn.qkv.weight.chunk(3))
    heads = [value.view(BATCH, LENGTH, HEADS, HEAD_DIM).transpose(1, 2) for value in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
    assert_near(block.attn.attend(block.attn.qkv(x), "causal"), wanted, "attention")
    gate, up = (F.linear(x, part) for part in block.mlp.gate_up.weight.chunk(2))
    assert_near(block.mlp(x), F.linear(F.silu(gate) * up, block.mlp.down.weight), "SwiGLU")
