"""Sharding: each rank of a group holds some rows of every weight, and all rows while it needs them.

Flow: called by `layout.lay_out` while the model has no memory yet.

Shapes: R rows of a parameter, S ranks that share one copy of it.
"""

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from summerlm.core.parts import Part
from summerlm.model.transformer import Transformer


def shard(model: Transformer, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Shard a model from outside: each block by itself, the rest together.

    Blocks travel in the dtype of matrix products, half the bytes, and are forgotten after use. The
    rest, embedding, head and final norm, travels in float32, for the residual stream begins there,
    and stays until the backward pass, for the loss needs the head after the forward pass.
    Gradients are added up in float32, as sums.

    Args:
        model: The model, changed in place; names of parameters stay as they are.
        mesh: The ranks: shards, or replicas by shards.
        dtype: Autocast's dtype, or None for float32.
    """
    for module in (*model.blocks, model):
        policy = MixedPrecisionPolicy(
            param_dtype=None if module is model else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the residual stream stays float32
        )
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
        sharded = cast(FSDPModule, module)
        # plain sums: the one division, by the count of targets, is the step's
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def parts_of(model: nn.Module, shard: int, shards: int) -> dict[str, Part]:
    """Name the rows of each parameter that this rank holds.

    Args:
        model: The model, sharded or whole, with its memory.
        shard: Number of this rank among those that share a copy.
        shards: How many these are, S.

    Returns:
        The parts by the names of `named_parameters()`, of the parameters' own storage.
    """
    parts = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            parts[name] = Part.whole(parameter.detach())
            continue
        rows, size = parameter.shape[0], -(-parameter.shape[0] // shards)  # as torch.chunk cuts
        part = Part(parameter.to_local().detach(), min(shard * size, rows), tuple(parameter.shape))
        assert part.stop == min((shard + 1) * size, rows), f"{name}: rows {part.start}-{part.stop}"
        parts[name] = part
    return parts
