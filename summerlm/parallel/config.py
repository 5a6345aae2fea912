"""Settings of execution: they change speed and memory, not what is trained."""

from pydantic import Field

from summerlm.core.config import Section


class ParallelConfig(Section):
    """How one step is executed."""

    micro_batch_rows: int | None = Field(default=None, ge=1)
    """Rows that go through the model at once; none takes the whole batch."""
    compile: bool = False
    """Compile each block with torch.compile; needs a C++ compiler on CPUs."""
