"""Settings of saving."""

from pydantic import Field

from summerlm.core.config import Section


class CheckpointConfig(Section):
    """When a run is saved and how many saves are kept."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two saves; none saves at the stable phase's end, the run's, and on a signal."""
    keep_last: int = Field(default=2, ge=1)
    """Verified checkpoints that are kept, besides the best and the one to extend the run from."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints of steps divisible by this stay for good; none keeps no more than the last."""
