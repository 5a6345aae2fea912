"""Marks in a profile: which part of a step the work between two moments belongs to.

Flow: `train`, `optim` and the recipe `profiling` put a `part` round what they do; where no profiler
runs, that costs microseconds. The recipe `breakdown` reads the marks of a trace.
"""

from torch.profiler import record_function

MARK = "part: "  # what the names of marks begin with, among everything else in a trace


def part(name: str) -> record_function:
    """Mark what is done inside as a part of a step.

    Args:
        name: For instance "data"; the innermost mark counts.

    Returns:
        What a `with` statement takes.
    """
    return record_function(MARK + name)
