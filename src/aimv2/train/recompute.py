"""Recomputation of blocks in the backward pass (``train.checkpointing``): of all that they keep, or of what is cheap.

Selective keeps the outputs of matmuls and attention kernels. Norms, activations, attention by two matmuls and the last matmul of a
block, whose output nothing in the block needs, are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from aimv2.train.parallel import Trainable

MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def recompute_blocks(model: Trainable, mode: str) -> None:
    """Lets each block recompute in the backward pass, in place.

    Args:
        model: with its blocks as they are.
        mode: ``full`` or ``selective``.
    """
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(
        logging.ERROR
    )  # a word on in-place operators, of which blocks have none
    for blocks in model.block_lists():
        for index, block in enumerate(blocks):
            if mode == "full":
                blocks[index] = checkpoint_wrapper(block, preserve_rng_state=False)
            else:  # inside of what is compiled, so that the compiler decides with the policy
                block.forward = selective(block.forward)


def selective(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which keeps for its backward pass what :func:`policy` says."""

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    return recomputed


def contexts() -> Any:
    """Context managers of the forward pass and of the recomputation."""
    return create_selective_checkpoint_contexts(policy)


def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps outputs of attention kernels and of matmuls, those that narrow (a block's last one) excepted."""
    kept = op in KERNELS or (op in MATMULS and args[-1].shape[-1] >= args[-2].shape[-1])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
