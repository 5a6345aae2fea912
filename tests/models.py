"""Models with their first weights, for tests: laid out as a run lays them out on one rank alone."""

from typing import Any

import torch

from summerlm.core.ranks import ALONE
from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Transformer
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out


def build(config: ModelConfig, *, seed: int, **parallel: Any) -> Transformer:
    """Make a model on the CPU, float32, in training mode; `parallel` are settings of that name."""
    own, cpu = ParallelConfig(**parallel), torch.device("cpu")
    return lay_out(config, own, ALONE, seed=seed, device=cpu, dtype=None).model
