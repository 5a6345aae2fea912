"""What a configuration comes to, before anything is trained.

Flow: the command `plan` prints what `plan` returns.
"""

from typing import Any

from summerlm.core.errors import UsageError
from summerlm.core.hardware import find_accelerator
from summerlm.plan.count import flops_per_token, parameters
from summerlm.recipes.settings import Settings, derive


def plan(
    settings: Settings,
    hardware: str | None = None,
    count: int = 8,
    mfu: float = 0.4,
    price: float | None = None,
) -> dict[str, Any]:
    """Count what a run consists of, and what it takes on given hardware at a stated MFU.

    Args:
        settings: The run's settings.
        hardware: Name in the table of accelerators, or None.
        count: How many of them.
        mfu: Share of their dense bf16 peak that is reached, from 0 to 1.
        price: Dollars a device-hour; None = the table's, where it has one.

    Returns:
        Parameters before and after padding the vocabulary, FLOPs a token (forward and backward,
        causal attention counted once), context, steps, tokens; `days` and `dollars` are None
        without hardware, `dollars` also without a price.

    Raises:
        UsageError: If the hardware is unknown or the MFU no share.
    """
    derived = derive(settings)
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu {mfu:g}: should be above 0 and at most 1")
    days = dollars = None
    if hardware is not None:
        device = find_accelerator(hardware)
        flops = derived.tokens * flops_per_token(settings.model)
        hours = flops / (count * mfu * device.peak_flops) / 3600
        days = hours / 24
        price = device.price if price is None else price
        dollars = None if price is None else hours * count * price
    return {
        "parameters": parameters(settings.model),
        "parameters_padded": parameters(settings.model, padded=True),
        "flops_per_token": flops_per_token(settings.model),
        "context": settings.model.context,
        "steps": derived.steps,
        "tokens": derived.tokens,
        "days": days,
        "dollars": dollars,
    }
