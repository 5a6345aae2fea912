"""When something happens during a run.

Flow: `recipes` lists hooks; after each step they run in that order.
"""

from collections.abc import Callable

from summerlm.train.loop import Event

Hook = Callable[[Event], None]


def every(steps: int | None, act: Hook, *, last_step: int | None = None) -> Hook:
    """Act after every n-th step, and after the last one if it is named.

    Args:
        steps: How often; None never acts but at the last step.
        act: What to do.
        last_step: The run's last step, if it should act there too.

    Returns:
        A hook that acts only when it is time.

    Example:
        >>> from types import SimpleNamespace
        >>> seen = []
        >>> hook = every(3, lambda event: seen.append(event.step), last_step=7)
        >>> for step in range(1, 8):
        ...     hook(SimpleNamespace(step=step))
        >>> seen
        [3, 6, 7]
    """

    def hook(event: Event) -> None:
        if (steps is not None and event.step % steps == 0) or event.step == last_step:
            act(event)

    return hook
