"""What watches a run's numbers.

Flow: `loop` tells the guard of every step; its state is part of the checkpoint.
"""

from summerlm.core.errors import DivergedError


class SkipGuard:
    """Counts steps that were skipped for a non-finite loss or gradient.

    Args:
        max_in_a_row: Skipped steps in a row that are borne.
        state: What `state` gave, for a resumed run.
    """

    def __init__(self, max_in_a_row: int, state: dict[str, int] | None = None) -> None:
        self._max = max_in_a_row
        self.in_a_row = state["in_a_row"] if state else 0
        self.total = state["total"] if state else 0

    def see(self, ok: bool) -> None:
        """Take note of one step.

        Args:
            ok: Whether it was finite, so that its update was made.
        """
        self.in_a_row = 0 if ok else self.in_a_row + 1
        self.total += not ok

    def check(self, step: int) -> None:
        """Stop a run that has diverged, after its last step is on record.

        Args:
            step: Number of the step seen last.

        Raises:
            DivergedError: If too many steps in a row were not finite.
        """
        if self.in_a_row > self._max:
            raise DivergedError(
                f"step {step}: loss or gradient not finite for {self.in_a_row} steps in a row; "
                "lower optim.peak_lr, or look at incidents.jsonl for where it began"
            )

    def state(self) -> dict[str, int]:
        """Give the counts, for the checkpoint."""
        return {"in_a_row": self.in_a_row, "total": self.total}
