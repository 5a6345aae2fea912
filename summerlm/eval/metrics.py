"""Figures of a task: what was right, how often, and how sure that is.

Flow: `running` gives log-likelihoods or texts of each item; the functions here make figures.

Source:
    lm-eval 0.4.13, lm_eval/api/metrics.py and lm_eval/api/task.py (process_results), whose
    definitions these are; what differs is said at its place.
"""

import math
import re
from collections.abc import Sequence

from summerlm.eval.definition import Extract, Generation
from summerlm.eval.results import Figure

INVALID = "[invalid]"  # stands for an answer that can't be found; it is no item's key


def best_choice(logprobs: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """Choose by likelihood; of equal ones the first.

    Args:
        logprobs: Log-likelihood of each choice.
        lengths: What each is divided by, for `acc_norm` the choice's characters; None = nothing.

    Returns:
        The choice's index.

    Example:
        >>> best_choice([-4.0, -6.0]), best_choice([-4.0, -6.0], [2, 6]), best_choice([-1.0, -1.0])
        (0, 1, 0)
    """
    scores = (
        logprobs if lengths is None else [p / n for p, n in zip(logprobs, lengths, strict=True)]
    )
    return max(range(len(scores)), key=scores.__getitem__)


def mean(values: Sequence[float], chance: float | None = None) -> Figure:
    """Average values, with the standard error of a mean over independent items.

    Args:
        values: One an item, at least one.
        chance: What guessing gives.

    Returns:
        The mean.
    """
    n = len(values)
    value = sum(values) / n
    spread = math.sqrt(sum((one - value) ** 2 for one in values) / (n - 1)) if n > 1 else None
    return Figure(value, None if spread is None else spread / math.sqrt(n), chance)


def pooled(parts: Sequence[Figure], sizes: Sequence[int], chance: float | None = None) -> Figure:
    """Put the means of parts together, as if all items were one set.

    Args:
        parts: Each part's mean.
        sizes: Each part's items.
        chance: What guessing gives.

    Returns:
        The mean weighted by size, with the error that is pooled over parts as lm-eval's
        `pooled_sample_stderr` does: differences between parts don't add to it.
    """
    total = sum(sizes)
    value = sum(part.value * size for part, size in zip(parts, sizes, strict=True)) / total
    if any(part.error is None for part in parts):
        return Figure(value, None, chance)
    squares = sum(
        (size - 1) * size * (part.error or 0.0) ** 2
        for part, size in zip(parts, sizes, strict=True)
    )
    return Figure(value, math.sqrt(squares / (total - len(parts)) / total), chance)


def perplexity(logprobs: Sequence[float]) -> Figure:
    """Give exp of the mean negative log-likelihood of items.

    Args:
        logprobs: One an item.

    Returns:
        The perplexity. Its error is that of the mean times the perplexity (the delta method),
        which needs no seed; lm-eval draws 100,000 resamples for nearly the same number.
    """
    found = mean(logprobs)
    value = math.exp(min(-found.value, 700.0))  # what a float can hold
    return Figure(
        value, None if found.error is None else value * found.error, higher_is_better=False
    )


def find_answer(text: str, how: Extract) -> str:
    """Find the answer in what a model wrote.

    Args:
        text: What it wrote.
        how: The pattern, and which match of it counts.

    Returns:
        The answer; `INVALID` where there is none.

    Example:
        >>> find_answer("He has 3 and 1,200.", Extract(pattern="([0-9][0-9,]*)", match=-1))
        '1,200'
    """
    found = re.findall(how.pattern, text)
    if not found:
        return INVALID
    match = found[how.match]
    groups = match if isinstance(match, tuple) else (match,)
    kept = [group for group in groups if group] if isinstance(match, tuple) else list(groups)
    return kept[0].strip() if kept else INVALID


def same_answer(answer: str, key: str, generation: Generation) -> bool:
    """Compare an answer with the key, whatever the case.

    Args:
        answer: What was found.
        key: The row's own answer, with how it is reached.
        generation: Says what is taken out of both before.

    Returns:
        Whether they are the same.
    """
    for pattern in generation.ignore:
        answer, key = re.sub(pattern, "", answer), re.sub(pattern, "", key)
    return answer.lower() == key.lower()
