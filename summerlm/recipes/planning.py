"""What a configuration comes to, before anything is trained.

Flow: the command `plan` prints what `plan` returns.
"""

from typing import Any

from summerlm.plan.count import flops_per_token, parameters
from summerlm.recipes.settings import Settings, derive


def plan(settings: Settings) -> dict[str, Any]:
    """Count what a run consists of.

    Args:
        settings: The run's settings.

    Returns:
        Parameters before and after padding the vocabulary, FLOPs a token (forward and backward,
        causal attention counted once), context, steps, tokens; `days` and `dollars` are None, for
        they need hardware, which this version doesn't model.
    """
    derived = derive(settings)
    return {
        "parameters": parameters(settings.model),
        "parameters_padded": parameters(settings.model, padded=True),
        "flops_per_token": flops_per_token(settings.model),
        "context": settings.model.context,
        "steps": derived.steps,
        "tokens": derived.tokens,
        "days": None,
        "dollars": None,
    }
