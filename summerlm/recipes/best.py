"""The checkpoint of a run that is best by one figure: saved when it is measured, and kept.

Flow: `pretrain` makes one `Best` for each start of a run.
    1. `Watch` and `Rounds` show it each figure by `Best.see`;
    2. a step that measured better than every checkpoint there is, is saved by `Best.when_new`;
    3. `Best.states` tells each checkpoint what was measured, by which `Store.prune` keeps the best.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from summerlm.checkpoint.best import STATE, Measured
from summerlm.recipes.opening import Run
from summerlm.train.hooks import Hook
from summerlm.train.loop import Event


class Best:
    """Knows what was measured last of the figure that a run judges its checkpoints by.

    Args:
        run: The run; every rank has one, and shows it the same.
    """

    def __init__(self, run: Run) -> None:
        self._store, self._ranks = run.store, run.ranks
        self._metric = run.settings.evaluation.metric
        self._last: Measured | None = None

    def see(self, measured: Measured) -> None:
        """Take note of a figure, if it is the one and a number.

        Args:
            measured: Any figure of any step.
        """
        if measured.metric == self._metric and math.isfinite(measured.value):
            self._last = measured

    @property
    def states(self) -> dict[str, Callable[[], Any]]:
        """What gives checkpoints their part of the state; nothing where no figure is asked for."""
        return {} if self._metric is None else {STATE: self._state}

    def when_new(self, act: Hook) -> Hook:
        """Act after a step that measured better than every checkpoint there is.

        Args:
            act: What to do, for instance to save the step.

        Returns:
            A hook, for every rank, after those that measure.
        """

        def hook(event: Event) -> None:
            own = self._last
            if own is None or own.step != event.step:
                return
            if self._ranks.lead(partial(self._is_best, own)):
                act(event)

        return hook

    def _state(self) -> dict[str, Any] | None:
        return None if self._last is None else vars(self._last)

    def _is_best(self, own: Measured) -> bool:
        # a resumed run may judge by another figure than the one before it
        others = [one for one in self._store.best_first() if one.metric == own.metric]
        return not others or own.score > others[0].score
