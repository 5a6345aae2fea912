"""Compilation, block by block: all blocks share one compiled graph.

Flow: called by `layout.lay_out` while the model is built, before it is sharded or copied.
"""

import shutil

import torch
import torch._dynamo
from torch import nn

from summerlm.core.errors import UsageError


def compile_blocks(blocks: nn.ModuleList, device: torch.device) -> None:
    """Compile every block in place; names of parameters stay as they are.

    One graph a block rather than one for the model: it compiles in a fraction of the time. What is
    compiled is the block's forward alone, so that the hooks that sharding hangs on the block run
    outside.

    Args:
        blocks: The model's blocks.
        device: Where they run.

    Raises:
        UsageError: If a CPU's blocks are to be compiled and there is no C++ compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise UsageError(
            "parallel.compile = true: no C++ compiler found; install g++ or clang, or set it false"
        )
    # it would cut a block's graph where a bucket of gradients is full: blocks are cut small already
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        setattr(block, "forward", torch.compile(block.forward))  # noqa: B010
