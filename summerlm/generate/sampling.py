"""One token out of the scores of all.

Flow: `engine` checks a request by `check_sampling`, then calls `sample` for each new token.

Shapes: B rows, V vocabulary, k candidates.
"""

import math

import torch
from torch import Tensor

from summerlm.core.errors import UsageError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse values that mean nothing.

    Args:
        temperature: See `sample`.
        top_k: See `sample`.
        top_p: See `sample`.

    Raises:
        UsageError: If a value lies outside its range or is no number.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature = {temperature}: should be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k = {top_k}: should be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p = {top_p}: should be above 0 and at most 1")


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Draw one token a row.

    The `top_k` likeliest tokens stay; of these, at this temperature, the fewest likeliest whose
    probabilities reach `top_p`, and always the likeliest of all.

    Args:
        logits: Scores, (B, V), float32.
        temperature: Divides the scores; 0 takes the likeliest token.
        top_k: How many tokens stay at most; None, or more than V, keeps all.
        top_p: Probability that the kept tokens reach together, in (0, 1]; None keeps all.
        generator: Where chance comes from, on the device of `logits`.

    Returns:
        Ids, (B,), int64.

    Raises:
        UsageError: If a value lies outside its range or is no number.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    V = logits.shape[-1]
    scores, ids = logits.topk(min(top_k or V, V))  # (B, k) each, likeliest first
    # from the best score down: a tiny temperature gives -inf at worst, never inf - inf or 0 / 0
    divisor = max(temperature, torch.finfo(scores.dtype).tiny)
    probabilities = ((scores - scores[:, :1]) / divisor).softmax(-1)
    if top_p is not None:
        likelier = probabilities.cumsum(-1) - probabilities  # sum of those before each
        probabilities = probabilities.where(likelier < top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return ids.gather(-1, choice)[:, 0]
