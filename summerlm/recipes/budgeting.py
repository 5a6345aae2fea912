"""From money or time to settings: the model that a budget is best spent on.

Flow: the command `plan --fit` calls `fit_budget` and plans what it returns.
"""

import math
from typing import Any

from summerlm.core.config import differences
from summerlm.core.errors import UsageError
from summerlm.plan.count import parameters
from summerlm.plan.scaling import TOKENS_PER_PARAMETER, fit, least_flops
from summerlm.recipes.settings import Settings
from summerlm.recipes.terms import Terms

BUDGETS = ("dollars", "days")


def fit_budget(settings: Settings, terms: Terms, budget: str) -> dict[str, Any]:
    """Solve for size and tokens of a run by the compute-optimal rule.

    Args:
        settings: Settings whose proportions are kept; everything but size and tokens stays.
        terms: On which hardware, how well used, at which price.
        budget: "dollars=1000" or "days=3".

    Returns:
        `budget`; `overrides`, the settings that change as `key=value`; `toml`, the same as tables;
        `tokens_per_parameter`, and `rule`, what it should be; `note`, what was not solved for.

    Raises:
        UsageError: If the budget can't be read, or lacks hardware or a price, or no model of these
            proportions fits it.
    """
    terms.check()
    name, amount = _read(budget)
    devices = terms.devices()
    if devices is None:
        raise UsageError("--fit needs --hardware: what a budget buys depends on it")
    if name == "dollars" and devices.price is None:
        raise UsageError(f"--fit dollars needs --price: none is known of {terms.hardware}")
    flops = devices.flops_for(**{name: amount})
    try:
        fitted = fit(settings.model, flops)
    except ValueError as error:
        least = least_flops(settings.model)
        enough = f"; {name}={amount * least / flops:.2g} is enough" if flops < least else ""
        raise UsageError(f"--fit {budget}: {error}{enough}") from None
    changed = differences(settings.model, fitted.model)
    overrides = {f"model.{key}": value for key, (_, value) in changed.items()}
    overrides["train.budget_tokens"] = fitted.tokens
    return {
        "budget": budget,
        "parameters": parameters(fitted.model),
        "tokens_per_parameter": fitted.ratio,
        "rule": f"{TOKENS_PER_PARAMETER:g} tokens a parameter (arXiv:2203.15556)",
        "overrides": [f"{key}={value}" for key, value in overrides.items()],
        "toml": _as_toml(overrides),
        "note": _note(settings),
    }


def _note(settings: Settings) -> str:
    """Say what a budget leaves to whoever spends it."""
    batch, rate = settings.train.batch_tokens, settings.optim.peak_lr
    return (
        f"--fit solved for size and tokens alone: train.batch_tokens ({batch:,}), optim.peak_lr "
        f"({rate:g}) and optim.warmup_tokens ({settings.optim.warmup_tokens:,}) are the "
        "configuration's; look at them, for what is right at one size isn't at another"
    )


def _read(budget: str) -> tuple[str, float]:
    """Take a budget apart."""
    name, _, text = budget.partition("=")
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if name not in BUDGETS or math.isnan(amount):
        raise UsageError(f"--fit {budget!r}: write dollars=1000 or days=3, for instance")
    if not 0 < amount < math.inf:
        raise UsageError(f"--fit {budget}: the number should be above 0 and finite")
    return name, amount


def _as_toml(overrides: dict[str, Any]) -> str:
    lines: list[str] = []
    section = None
    for key, value in overrides.items():
        table, _, name = key.rpartition(".")
        if table != section:
            lines += ([""] if lines else []) + [f"[{table}]"]
            section = table
        lines.append(f"{name} = {value}")
    return "\n".join(lines)
