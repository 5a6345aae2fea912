"""Recomputation: blocks that forget on the way forward and compute anew on the way back.

Flow: called by `layout.lay_out` while the model is built, before `compile.compile_blocks`, so that
a compiled graph holds the recomputation.

Shapes: B rows, T positions, D width.
"""

from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from summerlm.model.transformer import Block

aten = torch.ops.aten
KEPT = [  # what costs most to compute for its size; the rest is elementwise
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
]


def recompute_blocks(blocks: nn.ModuleList, what: Literal["selective", "full"]) -> None:
    """Make blocks keep less for the backward pass; values and gradients stay what they are.

    Args:
        blocks: The model's blocks, changed in place; names of parameters stay as they are.
        what: "full" keeps a block's input alone; "selective" also what products of matrices and
            torch's attention kernels gave; plain attention, which would keep its scores, is
            computed anew.

    Source:
        Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, section 4
        (what to keep).
    """
    forward = _kept_products if what == "selective" else _kept_input
    for block in blocks:
        # a method, not a closure: blocks then share one compiled graph, as their own forward does
        setattr(block, "forward", MethodType(forward, block))  # noqa: B010


def _kept_input(block: Block, *inputs: Any) -> Tensor:
    """Do what `Block.forward` does, (B, T, D), and keep its inputs."""
    result: Tensor = checkpoint(Block.forward, block, *inputs, use_reentrant=False)
    return result


def _kept_products(block: Block, *inputs: Any) -> Tensor:
    """Do what `Block.forward` does, (B, T, D), and keep its inputs and what `KEPT` gave."""
    contexts = partial(create_selective_checkpoint_contexts, KEPT)
    result: Tensor = checkpoint(
        Block.forward, block, *inputs, use_reentrant=False, context_fn=contexts
    )
    return result
