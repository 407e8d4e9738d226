"""torch.compile of the blocks: whether it works here, and what it is at before the first step, for whoever waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.callback import CallbackTrigger, callback_handler

from aimv2.batch import TEXT_BUCKET, Batch, make_batch, round_up
from aimv2.config.schema import TrainConfig
from aimv2.data.stream.draws import kept_patches
from aimv2.data.stream.samples import View
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.io import say
from aimv2.models.layers import Cache, Packed
from aimv2.progress import heartbeat
from aimv2.train.parallel import Trainable, blocks_of

if TYPE_CHECKING:
    from aimv2.train.step import TrainStep

RECOMPILE_LIMIT = 256  # above the number of buckets, so that kernels never depend on the history of shapes
COMPILING = "compiling the blocks, which may take minutes (train.compile off starts at once)"


def can_compile(device: torch.device) -> str | None:
    """None where torch.compile works here, else the reason in a line."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        return None
    except Exception as error:  # whatever the back end lacks: compiler, headers, Triton
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        return lines[0][:120] if lines else type(error).__name__


def compile_blocks(model: Trainable) -> None:
    """torch.compile of each block. Shapes are static, but for the decoder's packed rows, which are marked dynamic.

    Nothing turns dynamic by itself: kernels that depend on the history of shapes would make a resumed run differ.
    """
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 4 * RECOMPILE_LIMIT
    for blocks, index in blocks_of(model):
        block = getattr(blocks[index], "_checkpoint_wrapped_module", blocks[index])
        # the forward, not the call: FSDP2's hooks stay outside, and what they return is marked again
        block.forward = partial(run_compiled, torch.compile(block.forward))
    model.encoder.compiled = True


def run_compiled(
    forward: Callable[..., Tensor],
    x: Tensor,
    mask: Any = None,
    packed: Packed | None = None,
    keep: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """A compiled block. Packed rows differ from batch to batch: marked dynamic, one kernel serves them all."""
    if packed is not None and torch.is_grad_enabled():
        for rows in (x, packed.token_rows, keep, packed.spans and packed.spans.slots):
            if rows is not None:
                torch._dynamo.mark_dynamic(rows, 0)
    return forward(x, mask=mask, packed=packed, keep=keep, cache=cache)


def want_compile(config: TrainConfig, world: World) -> tuple[bool, str | None]:
    """Whether to compile, and a line for the user where the answer is not what ``auto`` hopes for."""
    if config.compile == "off":
        return False, None
    reason = can_compile(world.device)
    if reason is None:
        return True, None
    if config.compile == "on":
        raise UsageError(
            f"train.compile=on, but torch.compile does not work here ({reason}); use auto or off", code="unsupported"
        )
    return False, f"running eager: torch.compile does not work here ({reason})"


class CompileWatch:
    """What is compiled now.

    Attributes:
        graphs: compiled so far; a block's forward and backward count apart, and blocks of one shape share theirs.
        block: that ran last.
        shape: of the batch.
        backward: the backward pass is compiled.
    """

    def __init__(self) -> None:
        self.graphs, self.block, self.shape, self.backward = 0, "", "", False

    def next_shape(self, number: int, total: int, words: str) -> None:
        """The batches of another shape begin."""
        self.shape = f"shape {number} of {total} ({words})"

    def starts(self, about: Any) -> None:
        """Torch begins to compile."""
        self.backward = about.callback_trigger == CallbackTrigger.LAZY_BACKWARD

    def ends(self, about: Any) -> None:
        """Torch has compiled a graph."""
        self.graphs += 1

    def line(self) -> str:
        """What is compiled now, in words."""
        way = "backward" if self.backward else "forward"
        return f"compiling: {self.shape}, {self.block}, {way}, graphs done: {self.graphs}"


@contextlib.contextmanager
def watch_compile(model: Trainable) -> Iterator[CompileWatch]:
    """Says what is compiled in a block of code, from time to time. Nothing of it is left on the model."""
    watch = CompileWatch()

    def enters(name: str, block: nn.Module, given: Any) -> None:
        watch.block = name

    say(COMPILING)
    names = {id(module): name.removesuffix(".blocks") for name, module in model.named_modules()}  # type: ignore[attr-defined]
    hooks = [
        block.register_forward_pre_hook(
            partial(enters, f"{names[id(blocks)].replace('.', ' ')} block {at} of {len(blocks)}")
        )
        for blocks in model.block_lists()
        for at, block in enumerate(blocks, 1)
    ]
    callback_handler.register_start_callback(watch.starts)
    callback_handler.register_end_callback(watch.ends)
    try:
        with heartbeat(watch.line):
            yield watch
    finally:
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() has cleared them
            callback_handler.remove_start_callback(watch.starts)
            callback_handler.remove_end_callback(watch.ends)
        for hook in hooks:
            hook.remove()


def warm_up(
    step: TrainStep,
    pairs: int,
    max_tokens: int,
    view: View | None = None,
    shape: Callable[[int, int, str], None] = lambda number, total, words: None,
) -> None:
    """Compiles the kernels of every caption width (and area) before the first step, so that no step stalls later.

    Args:
        step: of the model.
        pairs: of a micro-batch on this rank.
        max_tokens: of a caption.
        view: of the training data; None: all of one size.
        shape: called before each shape with its number, how many there are, and what it is.
    """
    kept = [buffer.clone() for buffer in step.model.buffers()]  # a batch norm would learn from these zeros
    widths = range(TEXT_BUCKET, round_up(max_tokens, TEXT_BUCKET) + 1, TEXT_BUCKET) if step.task.reads_text() else [0]
    total = len(widths) * (1 if view is None or view.native is None else len(view.native.areas))
    number = 0
    for width in widths:
        text = [0] * min(width, max_tokens)
        for batch in blank_batches(step, pairs, text, view):
            number += 1
            shape(number, total, f"captions of up to {len(text)} tokens" if text else "images only")
            counts = torch.ones(len(step.objective.counts(batch)), dtype=torch.float64, device=step.world.device)
            with step.cast_once():
                step.backward(batch.to(step.world.device), counts)
            step.optimizer.zero_grad(set_to_none=True)
    for buffer, before in zip(step.model.buffers(), kept):
        buffer.copy_(before)


def blank_batches(step: TrainStep, pairs: int, text: list[int], view: View | None) -> Iterator[Batch]:
    """A batch of every shape that the view gives with captions of this length."""
    if view is None or view.native is None:
        size, patches = step.image_size, step.patches
        images, keep = torch.zeros(pairs, 3, size, size, dtype=torch.uint8), view.keep if view else 1.0
        kept = torch.arange(kept_patches(patches, keep)).expand(pairs, -1) if keep < 1 else None
        teacher = None
        if view and view.teacher:
            levels = torch.zeros(pairs, patches, view.teacher, dtype=torch.int8)
            teacher = levels, torch.zeros(pairs, patches, dtype=torch.float16)
        prefix = [max(patches // 2, 1)] * pairs
        yield make_batch(images, [text] * pairs, prefix, patches, kept=kept, teacher=teacher)
        return
    from aimv2.data.stream.native import make_native_batch

    patch = view.native.patch
    for area in view.native.areas:
        count = view.native.budget // area
        image = torch.zeros(3, patch, area * patch, dtype=torch.uint8)
        yield make_native_batch([image] * count, [text] * count, [max(area // 2, 1)] * count, patch, area)
