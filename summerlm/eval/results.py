"""What a model reached: figures of a task, with what was chosen for every item.

Flow: `metrics` makes each `Figure`, `running` a `TaskResult` of them; reports and comparisons take
its facts.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

CHOSEN = {"acc": "chosen", "acc_norm": "chosen_norm"}  # whose answers a figure counts


@dataclass(frozen=True)
class Figure:
    """A measured value.

    Attributes:
        value: The value.
        error: Its standard error; None where there are fewer than two items.
        chance: What guessing gives; None where that means nothing.
        higher_is_better: Which way is up.
        low: Lower end of a 95 % interval, where one was drawn by a bootstrap.
        high: Its upper end.
    """

    value: float
    error: float | None
    chance: float | None = None
    higher_is_better: bool = True
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """What a model reached in a task, or a part of one.

    Attributes:
        task: The task's name.
        protocol: How it was measured.
        items: Items measured; of text its documents or blocks.
        few_shot: Examples in front of each.
        figures: What was measured, by name.
        parts: The same of each part; of text, of each protocol.
        chosen: Index of the likeliest choice of each item; of a cloze 1 where every token was the
            likeliest, else 0.
        chosen_norm: The same with likelihoods divided by characters, where that is measured.
        answers: The right index of each item; of a cloze 1.
        logprobs: Log-likelihoods of each item's continuations, in nats; of several parts only
            with the parts.
        written: What was written for each item.
        seconds: How long it took.
        data: What was measured: see `Items.origin`; `truncated` counts continuations whose
            context lost its beginning because the model reads less; `seed`, and
            `limit`, the items or documents measured of each part that has more; else None.
        notes: What a reader must know to compare it.
    """

    task: str
    protocol: str
    items: int
    few_shot: int
    figures: dict[str, Figure]
    parts: dict[str, "TaskResult"] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)
    chosen_norm: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Give all of it as plain values for JSON; what is no finite number is null."""
        facts: dict[str, Any] = _plain(asdict(self))
        return facts


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
