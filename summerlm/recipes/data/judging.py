"""What each rule would do to each source, enabled or not, on rows drawn from all over it.

Flow: the command `data report` prints `describing.show_report` of what `report_rules` returns.
    1. `draw` gives rows of a source, before any rule;
    2. each rule judges every text by itself (`Rules.failing`, `SCRUBBERS`, `ContaminationIndex`),
       so that a text may count for several; what the enabled ones drop together is the total;
    3. `find_duplicates` compares the texts drawn of all sources with one another. Copies outside
       of the sample aren't seen, so the whole of the data has more.
"""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from summerlm.core.progress import Progress, progress_bar
from summerlm.data.config import SourceConfig
from summerlm.data.hygiene import Evaluation, open_evaluation
from summerlm.data.lock import read_lock
from summerlm.data.opening import open_source
from summerlm.data.rules.catalogue import OF_THE_WHOLE, RULES, expand
from summerlm.data.rules.duplicates import Document, find_duplicates
from summerlm.data.rules.pipeline import TOO_LONG, TOO_SHORT, Rules
from summerlm.data.rules.scrubbing import EMAIL, SCRUBBERS, SECRET
from summerlm.data.shards.rows import Dropped
from summerlm.data.shards.transfer import Transfer
from summerlm.data.sources import Source
from summerlm.recipes.data.locking import lock_path
from summerlm.recipes.data.probing import draw, one_line
from summerlm.recipes.settings import Settings

EXAMPLES = 2  # of a rule and source
EXAMPLE = 100  # characters
CONTAMINATION = "contamination"
APART = {*OF_THE_WHOLE, CONTAMINATION}  # need more than the text
MOST_BYTES = 200_000_000  # of text of a source; a sample of long documents ends there


@dataclass
class Found:
    """What one rule does to the texts of a source.

    Attributes:
        documents: Texts that it drops or changes.
        changes: Replacements that it makes in them.
        examples: Beginnings of the first such texts.
    """

    documents: int = 0
    changes: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, changes: int = 0) -> None:
        """Count one more text."""
        self.documents += 1
        self.changes += changes
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


def report_rules(settings: Settings, documents: int) -> dict[str, Any]:
    """Judge rows of every source by every rule.

    Args:
        settings: The run's settings.
        documents: Rows to draw of each source.

    Returns:
        JSON values: `notes` on rules that can't be applied, `evaluation_sets`, and `sources`, each
        with its `rows_drawn`, `documents`, `dropped` (by the enabled rules) and `rules`.

    Raises:
        UsageError: If a source's settings don't fit its files.
        DataChangedError: If the data differ from the run's lock.
        SourceDownError: If a source can't be read.
    """
    data = settings.data
    transfer = Transfer(data.stall_timeout_s, data.deadline_s)
    path = lock_path(settings)
    lock = {entry["name"]: entry for entry in (read_lock(path) if path.exists() else [])}
    evaluation = open_evaluation(data, transfer) if data.evaluation_sets else None
    with progress_bar() as progress:
        judged = [
            SourceJudge(
                open_source(name, data, data.lanes, transfer, lock.get(name), progress),
                config,
                evaluation,
            )
            for name, config in data.sources.items()
        ]
        notes = _find_duplicates(judged, documents, progress)
    notes += [incident["reason"] for incident in transfer.take_incidents()]
    if evaluation is None:
        notes.append("contamination isn't looked for: data.evaluation_sets is empty")
    return {
        "notes": notes,
        "evaluation_sets": {} if evaluation is None else _describe_sets(evaluation),
        "sources": [judge.facts() for judge in judged],
    }


class SourceJudge:
    """Judges texts of one source by every rule.

    Args:
        source: The source.
        config: Its settings.
        evaluation: The evaluation sets, or None.
    """

    def __init__(self, source: Source, config: SourceConfig, evaluation: Evaluation | None) -> None:
        self.name = source.name
        self._source, self._evaluation = source, evaluation
        self.enabled = set(expand(config.rules))
        self.enabled |= {TOO_SHORT} if config.min_characters else set()
        self.enabled |= {TOO_LONG} if config.max_characters else set()
        self._rules = Rules(
            [name for name in RULES if name not in APART],
            None,
            config.min_characters,
            config.max_characters,
        )
        self._found = {name: Found() for name in (TOO_SHORT, TOO_LONG, *RULES)}
        self._rows = 0
        self._no_text = 0
        self._examples: list[str] = []  # of each text, in the order of `texts`
        self._dropped: set[int] = set()  # texts that the enabled rules drop

    def texts(self, count: int, progress: Progress) -> Iterator[str]:
        """Draw rows and judge their texts one by one.

        Args:
            count: Rows to draw.
            progress: Called now and then.

        Yields:
            The texts.
        """
        size = 0
        for drawn in draw(self._source, count, progress):
            for row in drawn.rows:
                self._rows += 1
                if isinstance(row, Dropped):
                    self._no_text += 1
                    continue
                text = dialogue_words(row) if self._source.chat else row
                self._judge(text)
                yield text
                size += len(text.encode())
                if size > MOST_BYTES:
                    return

    def _judge(self, text: str) -> None:
        number, example = len(self._examples), one_line(text, EXAMPLE)
        self._examples.append(example)
        for name in self._rules.failing(text):
            self._drop(name, number, example)
        if self._evaluation is not None and (overlap := self._evaluation.index.hit(text)):
            shared = f"{overlap.words} ({overlap.evaluation_set})"
            self._drop(CONTAMINATION, number, one_line(shared, EXAMPLE))
        for name, scrub in SCRUBBERS.items():
            changed, changes = scrub(text)
            if changes:
                self._found[name].add(_around(changed, (EMAIL, SECRET)), changes)

    def _drop(self, rule: str, number: int, example: str) -> None:
        self._found[rule].add(example)
        if rule in self.enabled:
            self._dropped.add(number)

    def add_duplicates(self, rule: str, numbers: Iterable[int]) -> None:
        """Count texts that repeat others of the sample.

        Args:
            rule: Which of the rules on duplicates finds them.
            numbers: The texts, by their place in what `texts` gave.
        """
        for number in map(int, numbers):
            self._drop(rule, number, self._examples[number])

    def facts(self) -> dict[str, Any]:
        """Tell what was found, as JSON values."""
        return {
            "name": self.name,
            "rows_drawn": self._rows,
            "without_text": self._no_text,
            "documents": len(self._examples),
            "dropped": len(self._dropped),
            "rules": [
                {
                    "rule": name,
                    "enabled": name in self.enabled,
                    "effect": "changes" if name in SCRUBBERS else "drops",
                    "documents": found.documents,
                    "changes": found.changes,
                    "examples": found.examples,
                }
                for name, found in self._found.items()
                if name in RULES or name in self.enabled
            ],
        }


def _find_duplicates(judged: list[SourceJudge], count: int, progress: Progress) -> list[str]:
    """Judge all texts, and compare them with one another; give notes on what couldn't be."""
    near = importlib.util.find_spec("rensa") is not None
    documents = (
        Document(judge.name, number, text, near)
        for judge in judged
        for number, text in enumerate(judge.texts(count, progress))
    )
    lists = find_duplicates(documents, progress=progress)
    for judge in judged:
        judge.add_duplicates("exact-duplicates", lists.exact.get(judge.name, ()))
        judge.add_duplicates("near-duplicates", lists.near.get(judge.name, ()))
    return [] if near else ["near-duplicates aren't looked for: pip install 'summerlm[dedup]'"]


def dialogue_words(dialogue: str) -> str:
    """Give what the turns of a dialogue say, which is what rules look at.

    Args:
        dialogue: The dialogue, as a source gives it.

    Returns:
        A turn a line.
    """
    return "\n".join(words for _, words in json.loads(dialogue))


def _describe_sets(evaluation: Evaluation) -> dict[str, Mapping[str, int]]:
    index = evaluation.index
    return {
        name: {"items": items, "too_short": index.too_short[name]}
        for name, items in index.items.items()
    }


def _around(text: str, marks: Iterable[str]) -> str:
    """Show a text around the first of some marks in it."""
    first = min(place for mark in marks if (place := text.find(mark)) >= 0)
    start = max(first - EXAMPLE // 2, 0)
    return one_line(text[start : start + EXAMPLE], EXAMPLE)
