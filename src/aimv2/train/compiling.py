"""What torch.compile is at before the first step, for whoever waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo.callback import CallbackTrigger, callback_handler

from aimv2.io import say
from aimv2.progress import heartbeat
from aimv2.train.parallel import Trainable

COMPILING = "compiling the blocks, which may take minutes (train.compile off starts at once)"


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
