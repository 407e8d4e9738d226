"""FSDP2 over a mesh of ranks, ``replicate x shard``: the weights of a copy are divided over the ranks of a row.

Weights, gradients and AdamW state are fp32. In half precision our own blocks gather their weights in it, so that no kernel casts them
and half the bytes travel; what is outside of them (embeddings, positions, heads) is gathered in fp32. Gradients are summed in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from aimv2.config.schema import Config
from aimv2.io import say
from aimv2.models.layers import Block

if TYPE_CHECKING:
    from aimv2.train.parallel import Trainable

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # train.precision


def make_mesh(layout: tuple[int, int], device: torch.device) -> DeviceMesh:
    """Ranks by (copy, part); neighbours in rank, which are on one machine, hold the parts of one copy."""
    replicate, shard = layout
    with unset_fake_temporarily():  # its ranks are values, where a plan steps on tensors without any
        if replicate == 1:
            return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
        return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(model: Trainable, layout: tuple[int, int], config: Config, device: torch.device) -> None:
    """Divides a model block by block, in place; the last part of :func:`aimv2.train.parallel.parallelize`.

    Args:
        model: with real weights, equal on every rank; its blocks are compiled and wrapped for recomputation, where they are to be.
        layout: copies of the weights, and ranks of each.
        config: of the run.
        device: of this rank.
    """
    mesh, reshard = make_mesh(layout, device), config.parallel.reshard and layout[1] > 1
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = HALF.get(config.train.precision)
    for blocks in model.block_lists():
        for block in blocks:
            ours = half is not None and isinstance(getattr(block, "_checkpoint_wrapped_module", block), Block)
            policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False) if ours else plain
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        # within a trunk, all of whose blocks run; backwards torch prefetches by the order of the forward pass, across trunks
        for block, following in pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
    fully_shard(model, mesh=mesh, mp_policy=plain)  # type: ignore[call-overload]
    for module in sharded_modules(model):
        module.set_force_sum_reduction_for_comms(True)  # losses are divided by the count over all ranks
        module.set_gradient_divide_factor(1.0)


def sharded_modules(model: Any) -> list[FSDPModule]:
    """Its modules that gather weights."""
    return [module for module in cast(nn.Module, model).modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def gathered_in_fp32(model: nn.Module) -> Iterator[None]:
    """Blocks gather their weights as they are kept meanwhile: figures of a validation do not depend on ``train.precision``.

    A forward pass must have been before.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.reshard()
    try:
        states: list[Any] = [cast(Any, module)._get_fsdp_state() for module in modules]
        found = [p for state in states if state._fsdp_param_group for p in state._fsdp_param_group.fsdp_params]
        cast_ones = [p for p in found if p.param_dtype is not None]
        kept = [(p, p.param_dtype, p._unsharded_param, p.all_gather_outputs) for p in cast_ones]
    except AttributeError as error:  # what is tested here is torch 2.13
        say(
            f"this torch's FSDP2 is another one ({error}): validation gathers weights in half precision, so its figures differ a little"
        )
        cast_ones = []
    if not cast_ones:
        yield
        return
    for p in cast_ones:
        p.param_dtype, p.all_gather_outputs = None, []
        del p._unsharded_param
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
        for p, dtype, unsharded, outputs in kept:
            p.param_dtype, p._unsharded_param, p.all_gather_outputs = dtype, unsharded, outputs
