"""The rate over the token budget, as pure functions of tokens.

Flow: `train` asks `rate_factor` before each step and hands the answer to
`build.OptimizerSet.set_rate`; `extendable_from` decides whether a finished run may go on.
"""

import math

from summerlm.optim.config import OptimConfig


def rate_factor(config: OptimConfig, tokens: int, budget_tokens: int) -> float:
    """Give the rate of one step as a share of the peak rate.

    A step takes the rate that the schedule reaches at the step's *end*: so the first step of a
    warm-up already moves, and the last step of the budget runs exactly at the floor. Beyond the
    budget the rate stays there. Where the warm-up is longer than what follows leaves room for,
    the lower of the two ramps holds.

    Args:
        config: Schedule, warm-up, cool-down and floor.
        tokens: Targets trained when the step is done: those before it and its own.
        budget_tokens: Targets of the whole run, at least 1.

    Returns:
        A number from 0 to 1; 0 only at `tokens` 0 of a warm-up, or where the floor is 0.

    Example:
        >>> wsd = OptimConfig(warmup_tokens=10, cooldown_fraction=0.2, floor_ratio=0.1)
        >>> [round(rate_factor(wsd, t, 100), 3) for t in (0, 5, 10, 80, 90, 100, 200)]
        [0.0, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    warm = min(1.0, tokens / config.warmup_tokens) if config.warmup_tokens else 1.0
    if config.schedule == "constant":
        return warm
    if config.schedule == "cosine":
        start, share = config.warmup_tokens, _cosine
    else:
        start, share = _cooldown_start(config, budget_tokens), _linear
    progress = (tokens - start) / max(1, budget_tokens - start)
    remaining = share(min(1.0, max(0.0, progress)))
    return min(warm, config.floor_ratio + (1 - config.floor_ratio) * remaining)


def extendable_from(config: OptimConfig, budget_tokens: int) -> int | None:
    """Say up to where a run's rates don't depend on its budget.

    Args:
        config: Schedule and cool-down.
        budget_tokens: Targets of the run as it was planned.

    Returns:
        The last count of trained targets whose checkpoint a run with a larger budget may continue
        as if it had been planned so: the end of the stable phase for wsd, the budget itself for
        constant, and None for cosine, which bends with the budget from the end of its warm-up.
    """
    if config.schedule == "cosine":
        return None
    return (
        budget_tokens if config.schedule == "constant" else _cooldown_start(config, budget_tokens)
    )


def _cooldown_start(config: OptimConfig, budget_tokens: int) -> int:
    return budget_tokens - math.ceil(config.cooldown_fraction * budget_tokens)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress
