"""The first weights: one table from parameter names to laws.

Flow: `parallel.layout.lay_out` makes a model without memory, gives it memory, and has `fill` fill
what this rank holds of every parameter, by the law of its name. Each parameter draws from a
generator of its own, seeded by the run's seed and the name, so that its values depend on no
other parameter, on no order and on no number of ranks (the kind of device decides which numbers a
generator gives).
"""

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from summerlm.core.parts import Part
from summerlm.model.config import ModelConfig


class Law(NamedTuple):
    """Independent normal values; a standard deviation of zero makes a constant."""

    mean: float
    std: float


def laws(config: ModelConfig) -> dict[str, Law]:
    """Give the law of every parameter.

    Args:
        config: The model's settings.

    Returns:
        Laws by name pattern; the first pattern that fits a name counts.
    """
    weights = Law(0.0, config.init_std)
    # both branches of every block write to one stream: keep its variance from growing with depth
    outputs = Law(0.0, config.init_std * (2 * config.layers) ** -0.5)
    if config.zero_init_outputs:
        outputs = Law(0.0, 0.0)
    return {
        "embedding.weight": weights,
        "head.weight": weights,
        "blocks.*.attention.qkv.weight": weights,
        "blocks.*.attention.output.weight": outputs,
        "blocks.*.mlp.gate_up.weight": weights,
        "blocks.*.mlp.down.weight": outputs,
        "blocks.*.mlp.*.bias": Law(0.0, 0.0),
        "blocks.*_scale.weight": Law(config.layer_scale or 0.0, 0.0),
        "*norm.weight": Law(1.0, 0.0),
    }


def fill(parts: Mapping[str, Part], config: ModelConfig, seed: int) -> None:
    """Fill the rows of each parameter that this rank holds with the values of the whole model's.

    Args:
        parts: The parameters' rows, by name; written in place.
        config: The model's settings.
        seed: Seed of all draws.

    Raises:
        KeyError: If a parameter has no law.
    """
    table = laws(config)
    for name, part in parts.items():
        law = next((law for pattern, law in table.items() if fnmatchcase(name, pattern)), None)
        if law is None:
            raise KeyError(f"parameter {name} has no law in summerlm.model.init.laws")
        if law.std == 0:
            part.tensor.fill_(law.mean)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(part.tensor.device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        # whole even where a rank keeps few rows of it: what a generator gives depends on the size
        whole = (
            part.tensor if part.tensor.shape == part.shape else part.tensor.new_empty(part.shape)
        )
        whole.normal_(law.mean, law.std, generator=generator)
        if whole is not part.tensor:
            part.tensor.copy_(whole[part.start : part.stop])
