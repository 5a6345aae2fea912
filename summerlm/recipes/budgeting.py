"""From money or time to settings: the model that a budget is best spent on.

Flow: the command `plan --fit` calls `fit_budget` and plans what it returns.
"""

from typing import Any

from summerlm.core.config import differences
from summerlm.core.errors import UsageError
from summerlm.plan.count import parameters
from summerlm.plan.scaling import TOKENS_PER_PARAMETER, fit
from summerlm.recipes.planning import devices_of
from summerlm.recipes.room import Terms
from summerlm.recipes.settings import Settings

BUDGETS = ("dollars", "days")


def fit_budget(settings: Settings, terms: Terms, budget: str) -> dict[str, Any]:
    """Solve for size and tokens of a run by the compute-optimal rule.

    Args:
        settings: Settings whose proportions are kept; everything but size and tokens stays.
        terms: On which hardware, how well used, at which price.
        budget: "dollars=1000" or "days=3".

    Returns:
        `budget`; `overrides`, the settings that change as `key=value`; `toml`, the same as tables;
        `tokens_per_parameter`, and `rule`, what it should be.

    Raises:
        UsageError: If the budget can't be read, or lacks hardware or a price, or no model of these
            proportions fits it.
    """
    terms.check()
    name, _, text = budget.partition("=")
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if name not in BUDGETS or not 0 < amount < float("inf"):
        raise UsageError(f"--fit {budget!r}: write dollars=1000 or days=3, for instance")
    devices = devices_of(terms, None)
    if devices is None:
        raise UsageError("--fit needs --hardware: what a budget buys depends on it")
    if name == "dollars" and devices.price is None:
        raise UsageError(f"--fit dollars needs --price: none is known of {terms.hardware}")
    try:
        fitted = fit(settings.model, devices.flops_for(**{name: amount}))
    except ValueError as error:
        raise UsageError(f"--fit {budget}: {error}") from None
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
    }


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
