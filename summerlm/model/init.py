"""The first weights: one table from parameter names to laws.

Flow: `build` makes a model without memory, gives it memory, then fills every parameter by the
law of its name. Each draws from a generator of its own, seeded by the run's seed and the name, so
that its values depend on no other parameter, on no order and on no number of ranks (the kind of
device decides which numbers a generator gives).
"""

import hashlib
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Transformer


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


def build(config: ModelConfig, *, seed: int, device: torch.device | str) -> Transformer:
    """Make a model with its first weights.

    Args:
        config: The model's settings.
        seed: Seed of all draws; the same seed gives the same weights.
        device: Where the weights live.

    Returns:
        The model, float32, in training mode.
    """
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter by its law.

    Args:
        model: The model to fill.
        seed: Seed of all draws.

    Raises:
        KeyError: If a parameter has no law.
    """
    table = laws(model.config)
    for name, parameter in model.named_parameters():
        law = next((law for pattern, law in table.items() if fnmatchcase(name, pattern)), None)
        if law is None:
            raise KeyError(f"parameter {name} has no law in summerlm.model.init.laws")
        if law.std == 0:
            parameter.fill_(law.mean)
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(parameter.device)
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            parameter.normal_(law.mean, law.std, generator=generator)
