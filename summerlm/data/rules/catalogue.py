"""The names of all rules, for settings, `docs/data.md` and the ledger.

Flow: `sources` expands the names in a source's settings and hands those of texts by themselves
to `pipeline.Rules`; those that compare documents (`OF_THE_WHOLE`) become drop lists, made by
`duplicates.find_duplicates`.
"""

import difflib
from collections.abc import Iterable

from summerlm.core.errors import UsageError
from summerlm.data.rules import quality
from summerlm.data.rules.contamination import GRAM, SHORTEST
from summerlm.data.rules.duplicates import GRAM as SHINGLE
from summerlm.data.rules.duplicates import LIKENESS
from summerlm.data.rules.scrubbing import EMAIL, SECRET

OF_THE_WHOLE = {
    "exact-duplicates": "The same text, byte for byte, as an earlier document.",
    "near-duplicates": f"At least about {LIKENESS:.0%} of its runs of {SHINGLE} words and those of "
    "an earlier document are common to both.",
}

RULES: dict[str, str] = {
    **{name: rule.sentence for name, rule in quality.RULES.items()},
    **OF_THE_WHOLE,
    "contamination": f"Shares a run of {GRAM} words with an evaluation set, or a whole piece of "
    f"{SHORTEST} to {GRAM - 1}.",
    "emails": f"Mail addresses become {EMAIL}.",
    "secrets": f"Private keys and access tokens become {SECRET}.",
}
"""Name -> what it drops or changes, in the order in which rules are asked."""

GROUPS: dict[str, tuple[str, ...]] = {
    "gopher": tuple(quality.RULES),
    "gopher-quality": tuple(quality.QUALITY),
    "gopher-repetition": tuple(quality.REPETITION),
}
"""Names that stand for several rules."""


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Resolve the names of a source's settings.

    Args:
        names: Rules and groups, in any order.

    Returns:
        The rules, each once, in the order of `RULES`.

    Raises:
        UsageError: If a name is neither; the message gives the nearest.

    Example:
        >>> expand(["secrets", "exact-duplicates", "secrets"])
        ('exact-duplicates', 'secrets')
    """
    wanted: set[str] = set()
    for name in names:
        if name not in RULES and name not in GROUPS:
            (nearest,) = difflib.get_close_matches(name, [*RULES, *GROUPS], n=1, cutoff=0)
            raise UsageError(f'no rule "{name}"; did you mean {nearest}?')
        wanted.update(GROUPS.get(name, (name,)))
    return tuple(name for name in RULES if name in wanted)
