"""How often a run will read each of its sources, known before its first step.

Flow: `opening` calls `check_epochs`; `checking` shows `predicted_epochs` of every source.

An epoch ends lane by lane: lanes hold about equal text where a source has many units, and differ
where it has few, so that a source's first lane may begin its next epoch before the mean does.
"""

from collections.abc import Sequence

from summerlm.core.errors import UsageError
from summerlm.data.sources import Source
from summerlm.recipes.data.probing import probe
from summerlm.recipes.settings import Settings, derive
from summerlm.tokenizer.tokenizer import Tokenizer

TOLERANCE = 0.1  # of a prediction
ROWS = 200  # drawn of a source, as `data check` does


def check_epochs(settings: Settings, sources: Sequence[Source], tokenizer: Tokenizer) -> list[str]:
    """Refuse a budget for which a source with `max_epochs` has too little text.

    Args:
        settings: The run's settings.
        sources: Its opened sources; only those with `max_epochs` are read.
        tokenizer: Its tokenizer.

    Returns:
        A line for each source that may just reach its `max_epochs`.

    Raises:
        UsageError: If a source would exceed its `max_epochs` by more than the prediction's error.
        SourceDownError: If a source can't be read.
    """
    lines = []
    for source in sources:
        most = settings.data.sources[source.name].max_epochs
        if most is not None:
            found = probe(source, tokenizer, ROWS)
            epochs = predicted_epochs(settings, source.name, found.source_tokens)
            if line := judge_epochs(source.name, epochs, most):
                if epochs > most * (1 + TOLERANCE):
                    raise UsageError(line)
                lines.append(line)
    return lines


def predicted_epochs(settings: Settings, name: str, tokens: float) -> float:
    """Predict how often a run reads a source.

    Args:
        settings: The run's settings.
        name: The source.
        tokens: Its tokens of an epoch.

    Returns:
        Epochs at the run's budget; infinite for a source without tokens.
    """
    return source_budget(settings, name) / tokens if tokens else float("inf")


def source_budget(settings: Settings, name: str) -> float:
    """Compute how many of a run's tokens a source gives, by its weight."""
    weights = {name: source.weight for name, source in settings.data.sources.items()}
    return derive(settings).tokens * weights[name] / sum(weights.values())


def judge_epochs(name: str, epochs: float, most: int | None) -> str | None:
    """Compare a prediction with a source's limit.

    Args:
        name: The source.
        epochs: Predicted epochs.
        most: Its `max_epochs`; None = no limit.

    Returns:
        A line for people; None where the limit is out of reach.

    Example:
        >>> judge_epochs("books", 0.8, 1)
        >>> judge_epochs("books", 1.05, 1)
        'source books: about 1.05 epochs at this budget, max_epochs = 1: training may stop early'
    """
    if most is None or epochs <= most * (1 - TOLERANCE):
        return None
    told = f"source {name}: about {epochs:.3g} epochs at this budget, max_epochs = {most}"
    if epochs <= most * (1 + TOLERANCE):
        return f"{told}: training may stop early"
    return (
        f"{told}: it would stop early; give the source more text or a lower weight, allow more "
        "epochs, or lower train.budget_tokens"
    )
