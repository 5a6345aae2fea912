"""Which checkpoint of a run measured best, by what each says of itself.

Flow: while a run trains, `recipes.suites` puts a `Measured` into the state of every checkpoint;
`best_first` reads them back for `Store.prune`, which keeps the best one that verifies, and for
whoever wants its name. Nothing points at the best one, so that nothing can point at another.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from summerlm.checkpoint.manifest import DamagedError, check_file, read_manifest
from summerlm.core.errors import NoCheckpointError
from summerlm.core.files import read_json

STATE = "measured"  # its key in a checkpoint's JSON state


@dataclass(frozen=True)
class Measured:
    """What a run measured of the one figure that it judges its checkpoints by.

    Attributes:
        step: After which step.
        metric: Name of the figure.
        value: The figure, finite.
        higher_is_better: Whether a larger one is better.
    """

    step: int
    metric: str
    value: float
    higher_is_better: bool

    @property
    def score(self) -> float:
        """The figure so turned that a larger one is better."""
        return self.value if self.higher_is_better else -self.value


def best_first(folders: Iterable[Path]) -> list[Measured]:
    """Order checkpoints by what was measured after their own step.

    Args:
        folders: Checkpoints of one run; of each the state alone is verified.

    Returns:
        Those that were measured by the figure of the newest that was, the best one first and of
        equal ones the earliest; empty where none was.
    """
    found = []
    for folder in folders:
        try:
            check_file(folder, "state.json", read_manifest(folder))
        except (DamagedError, NoCheckpointError):
            continue
        state = read_json(folder / "state.json")
        # a state also has what was measured some steps before: that is not this checkpoint's
        if (own := state.get(STATE)) is not None and own["step"] == state["step"]:
            found.append(Measured(**own))
    newest = max(found, key=lambda own: own.step, default=None)
    alike = [own for own in found if newest is not None and own.metric == newest.metric]
    return sorted(alike, key=lambda own: (-own.score, own.step))
