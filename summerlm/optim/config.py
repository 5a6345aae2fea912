"""Settings of the optimizer and of the schedule of its rate.

Flow: read by `groups.parameter_groups`, `build.build_optimizer` and `schedule.rate_factor`.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from summerlm.core.config import Section


class OptimConfig(Section):
    """How gradients become weights, and how the rate runs over the token budget."""

    name: Literal["adamw", "muon"] = "muon"
    """"adamw" for every parameter, or "muon" for the hidden matrices and AdamW for the rest."""
    peak_lr: float = Field(default=1e-3, gt=0)
    """Highest rate: of every parameter under adamw, of the hidden matrices under muon."""
    adam_lr: float | None = Field(default=None, gt=0)
    """Highest rate of what AdamW trains beside muon; none = `peak_lr`. Refused under adamw."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: share of the old mean gradient that a step keeps."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: share of the old mean squared gradient that a step keeps."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the root of the mean squared gradient, in units of the gradient."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Share of a weight that a step at rate 1 takes away; it scales with the current rate."""
    decay_all: bool = False
    """Whether norms, biases, embeddings and LayerScale decay too, as in the original recipe."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon: share of the old mean gradient that a step keeps."""
    newton_schulz_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Muon: arithmetic of the iteration; float32 repeats across layouts, bfloat16 is faster."""
    schedule: Literal["cosine", "wsd", "constant"] = "wsd"
    """Shape of the rate after the warm-up; "wsd" is warm-up, stable, decay."""
    warmup_tokens: int = Field(default=0, ge=0)
    """Targets over which the rate rises linearly from 0 to its peak."""
    cooldown_fraction: float = Field(default=0.4, gt=0, le=1)
    """wsd: last share of the token budget, over which the rate falls linearly."""
    floor_ratio: float = Field(default=0.05, ge=0, le=1)
    """cosine and wsd: final rate as a share of the peak."""

    @model_validator(mode="after")
    def _check_adam_lr(self) -> Self:
        if self.name == "adamw" and self.adam_lr is not None:
            raise ValueError("adam_lr goes with name = 'muon'; under adamw set peak_lr alone")
        return self
