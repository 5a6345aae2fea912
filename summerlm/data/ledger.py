"""The account of what a run has trained on, by source.

Flow: `loader` counts every step; `train` adds the counts of each step it has made; the sums lie
in every checkpoint and, at the end, in the run's `ledger.json`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Counts:
    """What one source gave.

    Args:
        targets: Ids to predict, ignored ones (a BOS) included: T a row.
        documents: Documents that ended.
        bytes: UTF-8 bytes of text that the targets stand for.
        epochs: Epochs begun, by the lane that is furthest.
        dropped: Rows of the source that were passed over, by reason: no text, or a rule's name.
        changed: Times that a rule changed a text, by the rule's name.
    """

    targets: int = 0
    documents: int = 0
    bytes: int = 0
    epochs: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, later: "Counts") -> "Counts":
        """Account for what was given later as well."""
        return Counts(
            targets=self.targets + later.targets,
            documents=self.documents + later.documents,
            bytes=self.bytes + later.bytes,
            epochs=max(self.epochs, later.epochs),
            dropped=_sum(self.dropped, later.dropped),
            changed=_sum(self.changed, later.changed),
        )


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted({*a, *b})}


class Ledger:
    """Sums of the counts of all steps made.

    Args:
        sources: Names of the sources.
        state: Sums to go on from, as `state` gave them; None = nothing yet.

    Example:
        >>> ledger = Ledger(["web", "code"])
        >>> ledger.add({"web": Counts(targets=30, bytes=90)})
        >>> ledger.tokens, ledger.report()["sources"]["web"]["share"]
        (30, 1.0)
    """

    def __init__(
        self, sources: Iterable[str], state: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._sums = {name: Counts(**(state or {}).get(name, {})) for name in sources}

    def add(self, counts: Mapping[str, Counts]) -> None:
        """Account for one step.

        Args:
            counts: What each source gave to it.
        """
        for name, more in counts.items():
            self._sums[name] += more

    @property
    def tokens(self) -> int:
        """Targets of all sources together."""
        return sum(sums.targets for sums in self._sums.values())

    def state(self) -> dict[str, dict[str, Any]]:
        """Give the sums as JSON values, by source."""
        return {name: asdict(sums) for name, sums in self._sums.items()}

    def report(self) -> dict[str, Any]:
        """Give the sums with each source's share of all targets, as JSON values."""
        shares = {n: c.targets / max(self.tokens, 1) for n, c in self._sums.items()}
        sources = {name: {**sums, "share": shares[name]} for name, sums in self.state().items()}
        return {"tokens": self.tokens, "sources": sources}
