"""Matrix products in fp8: twice the bf16 rate on devices that multiply it.

Flow: `layout.lay_out` asks `check_float8` before it makes anything, and calls `convert_blocks` on a
model without memory, before blocks are wrapped. Every linear of a block becomes torchao's: operands
are scaled by their largest magnitude, one factor a tensor, and rounded to fp8 (e4m3; gradients of
outputs e5m2) on their way into a product, which adds up in float32. Nothing else changes: weights
keep names, shapes and float32, so checkpoints are those of any other layout; embedding, head, norms
and attention stay as they were. A factor is made of what one rank multiplies at once, so losses
depend a little on ranks and micro-batches.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from summerlm.core.errors import UsageError
from summerlm.model.config import ModelConfig

MULTIPLE = 16  # of both sizes of every operand: what the devices' fp8 products take
NEEDED = "needs an NVIDIA GPU from compute capability 8.9 on (H100, H200) or an MI300"
CDNA3 = ("gfx94", "gfx95")  # AMD's architectures that multiply fp8: MI300, MI350


def check_float8(config: ModelConfig, device: torch.device, dtype: torch.dtype | None) -> None:
    """Refuse fp8 where it can't be, before anything is allocated.

    Args:
        config: The model's settings.
        device: Where products would run.
        dtype: Autocast's dtype, or None for float32.

    Raises:
        UsageError: If the device, the package, the precision or a size of the model is missing.
    """
    if (found := missing(device)) is not None:
        raise UsageError(f"parallel.float8 = true: {found}")
    if importlib.util.find_spec("torchao") is None:
        raise UsageError("parallel.float8 = true needs torchao: pip install 'summerlm[fp8]'")
    if dtype != torch.bfloat16:
        raise UsageError(
            "parallel.float8 = true replaces bfloat16 products: train.precision = 'float32' "
            "contradicts it"
        )
    heads = config.heads + 2 * config.kv_heads
    sizes = {
        "model.width": config.width,
        "model.heads * head_dim": config.heads * config.head_dim,
        "model.(heads + 2 kv_heads) * head_dim": heads * config.head_dim,
        "model.mlp_hidden": config.mlp_hidden,
        "model.context": config.context,  # rows of gradients: the inner size of a weight's gradient
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise UsageError(
                f"parallel.float8 = true: {name} ({size}) must be a multiple of {MULTIPLE}"
            )


def missing(device: torch.device) -> str | None:
    """Name what a device lacks for fp8 products.

    Args:
        device: Where products would run.

    Returns:
        What is needed and what is here; None where nothing is missing.
    """
    if device.type != "cuda":
        return f"{NEEDED}; this run is on {device.type}"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        able = properties.gcnArchName.startswith(CDNA3)
    else:
        able = (properties.major, properties.minor) >= (8, 9)
    return None if able else f"{NEEDED}; this is {properties.name}"


def convert_blocks(blocks: nn.ModuleList) -> None:
    """Make all linears of blocks multiply in fp8.

    Args:
        blocks: The model's blocks, changed in place; parameters stay the same objects.

    Source:
        Micikevicius et al. 2022, arXiv:2209.05433 (the formats); Peng et al. 2023,
        arXiv:2310.18313, section 2 (a factor a tensor).
    """
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-untyped]

    convert_to_float8_training(blocks, config=recipe())


def recipe() -> Any:
    """Give torchao's settings: factors made anew for each product, one a tensor."""
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig.from_recipe_name("tensorwise")
