"""Settings of training."""

from typing import Literal

import torch
from pydantic import Field

from summerlm.core.config import Section
from summerlm.core.errors import UsageError
from summerlm.core.hardware import supports_bf16


class TrainConfig(Section):
    """What is trained for how long, and in which numbers."""

    budget_tokens: int = Field(default=1_000_000, ge=1)
    """Targets to train on; rounded up to whole steps."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Targets of one step; a multiple of `model.context`."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm that is left as it is; none never clips."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser in the loss."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of matrix products under autocast; auto is bfloat16 where hardware multiplies it."""
    loss_chunk_tokens: int = Field(default=2048, ge=1)
    """Targets whose logits are in memory at once."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps in a row that are skipped, not finite or beyond limits; one more stops the run."""
    on_spike: Literal["stop", "skip", "rollback"] | None = None
    """A spike of loss or gradient ends the run, is skipped, or takes it back; none lets it pass.
    Limits come of the steps before: the first 32 have none."""


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """Decide the dtype of autocast.

    Args:
        config: The settings.
        device: Where the step runs.

    Returns:
        `torch.bfloat16`, or None for plain float32 without autocast.

    Raises:
        UsageError: If a GPU without bfloat16 is asked for it.
    """
    if config.precision == "auto":
        return torch.bfloat16 if supports_bf16(device) else None
    if config.precision == "float32":
        return None
    if device.type == "cuda" and not supports_bf16(device):
        raise UsageError("train.precision = 'bfloat16': this GPU has none; use 'float32'")
    return torch.bfloat16  # on any CPU: slow without hardware support, but what was asked for
