"""Settings of execution: they change speed and memory, not what is trained."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from summerlm.core.config import Section
from summerlm.core.errors import UsageError


class ParallelConfig(Section):
    """How one step is executed."""

    micro_batch_rows: int | None = Field(default=None, ge=1)
    """Rows that go through the model at once; none takes the whole batch."""
    compile: bool = False
    """Compile each block, and the loss, with torch.compile; needs a C++ compiler on CPUs."""
    shard_ranks: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """Ranks that share one copy of weights and optimizer; 1 replicates, "all" shards over all."""
    recompute: Literal["selective", "full"] | None = None
    """What the backward pass computes anew to save memory: all but products, or all of a block."""
    memory: Literal["auto"] | None = None
    """Auto tries micro-batches and recomputation out as a run begins, and says what it takes."""
    attention: Literal["auto", "sdpa", "flash", "cudnn", "flash3", "plain"] = "auto"
    """Kernel of attention; auto takes plain products on CPUs, the fastest measured on GPUs."""
    float8: bool = False
    """Multiply in fp8 inside blocks, on GPUs that do so (H100, MI300); needs summerlm[fp8]."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest a rank may stay in one part of a step before the job ends, naming it; seconds."""

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        for name in ("micro_batch_rows", "recompute"):
            if self.memory == "auto" and getattr(self, name) is not None:
                raise ValueError(
                    f"memory = 'auto' chooses {name}, which is set too: set parallel.{name} = "
                    "'none', or leave memory out"
                )
        return self

    def shards(self, world: int) -> int:
        """Tell how many ranks share one copy.

        Args:
            world: Ranks of the job.

        Returns:
            `shard_ranks`, or all.

        Raises:
            UsageError: If they can't be dealt so.
        """
        shards = world if self.shard_ranks == "all" else self.shard_ranks
        if world % shards:
            raise UsageError(
                f"parallel.shard_ranks ({shards}) must divide the number of ranks ({world})"
            )
        return shards
