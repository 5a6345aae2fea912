"""Compilation, block by block: all blocks share one compiled graph.

Flow: called by `recipes` after the model is built, before the first step.
"""

import shutil

import torch
from torch import nn

from summerlm.core.errors import UsageError


def compile_blocks(blocks: nn.ModuleList, device: torch.device) -> None:
    """Compile every block in place; names of parameters stay as they are.

    One graph a block rather than one for the model: it compiles in a fraction of the time, and
    sharding and recomputation can wrap blocks without breaking it.

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
    for block in blocks:
        block.compile()
