"""Which items of tasks stand in the training mixture, and what a model reaches without them.

Flow: the command `data contamination` calls `find_contamination`, and prints by
`show_contamination` what that returns.
    1. `Suite` reads the rows of all tasks, and makes a `ContaminationIndex` of them;
    2. `Search` draws texts of each source, cleaned as for training, and notes whose runs they have;
    3. `clean_accuracy` counts what a model got right, without the items that were found.

Limits: those of the index, so that a reworded item isn't found; of a source only the rows drawn are
looked at, so that what is found is the least there is, and all of it where a source is drawn whole;
and training may read less of a source than it has. An item counts by what its task reads of its
row, in a piece of 13 words, or a whole one of 8 to 12.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from summerlm.core.errors import UsageError
from summerlm.core.progress import Progress, progress_bar
from summerlm.data.lock import read_lock
from summerlm.data.opening import open_source
from summerlm.data.rules.contamination import ContaminationIndex, item_pieces
from summerlm.data.shards.rows import Dropped
from summerlm.data.shards.transfer import Transfer
from summerlm.data.sources import Source
from summerlm.eval.definition import Task
from summerlm.eval.items import Items, Where, read_items
from summerlm.eval.metrics import mean
from summerlm.eval.results import CHOSEN
from summerlm.eval.task import expand
from summerlm.recipes.data.judging import dialogue_words
from summerlm.recipes.data.locking import lock_path
from summerlm.recipes.data.probing import draw
from summerlm.recipes.settings import Settings

EXAMPLES = 3  # of a task


@dataclass(frozen=True)
class Example:
    """An item that stands in a document.

    Attributes:
        item: Its number among the task's rows, from 0.
        words: A run that both have, normalised.
        source: The document's source.
        file: Its file.
        row: Its row in the file, from 0.
    """

    item: int
    words: str
    source: str
    file: str
    row: int


class Suite:
    """The rows of tasks, and what finds them.

    Args:
        tasks: The tasks.
        where: Where their rows are read.

    Attributes:
        rows: The rows of each part of each task, by the task's name.
        index: Finds them; a task is an evaluation set, its rows are numbered over all its parts.
    """

    def __init__(self, tasks: Sequence[Task], where: Where) -> None:
        self.rows: dict[str, list[Items]] = {}
        for task in tasks:
            parts = (read_items(task, task.data.split, where, part) for part in task.part_names)
            self.rows[task.name] = list(parts)
        self.index = ContaminationIndex(
            (task.name, item_pieces([_value(row, column) for column in task.data.columns]))
            for task in tasks
            for part in self.rows[task.name]
            for row in part
        )

    def evaluation_sets(self, task: str) -> list[str]:
        """Name a task's files as `data.evaluation_sets` does; none that are not of a repository."""
        origins = [part.origin for part in self.rows[task]]
        return [
            f"hub:{origin['repository']}/{file}"
            for origin in origins
            if origin["origin"] in ("hub", "mirror")
            for file in origin["files"]
        ]


class Search:
    """Looks for the items of a suite in sources.

    Args:
        index: Finds them.

    Attributes:
        found: The sources that have each item, by task and number.
        examples: The first items found, by task.
        sources: What was drawn of each source, JSON values.
    """

    def __init__(self, index: ContaminationIndex) -> None:
        self._index = index
        self.found: defaultdict[str, defaultdict[int, set[str]]]
        self.found = defaultdict(lambda: defaultdict(set))
        self.examples: defaultdict[str, list[Example]] = defaultdict(list)
        self.sources: list[dict[str, Any]] = []

    def look(self, source: Source, documents: int, progress: Progress) -> None:
        """Draw rows of a source and look at their texts.

        Args:
            source: The source.
            documents: Rows to draw.
            progress: Called now and then.
        """
        count: Counter[str] = Counter()
        for drawn in draw(source, documents, progress):
            for number, row in zip(drawn.numbers, drawn.rows, strict=True):
                count["rows_drawn"] += 1
                text = row if isinstance(row, Dropped) else source.clean(row)[0]
                if isinstance(text, Dropped):
                    continue
                words = dialogue_words(text) if source.chat else text
                shared = self._index.items_in(words)
                count["documents"] += 1
                count["documents_with_items"] += bool(shared)
                for (task, item), run in shared.items():
                    if item not in self.found[task] and len(self.examples[task]) < EXAMPLES:
                        file, _, place = source.find(drawn.unit, number)
                        self.examples[task].append(Example(item, run, source.name, file, place))
                    self.found[task][item].add(source.name)
        self.sources.append({"name": source.name, "rows": sum(source.units), **count})


def find_contamination(
    settings: Settings,
    names: Sequence[str],
    documents: int,
    where: Where,
    results: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Look for items of tasks in the texts of a run.

    Args:
        settings: The run's settings.
        names: Tasks and suites.
        documents: Rows to draw of each source.
        where: Where the tasks' rows are read.
        results: What `evaluating.evaluate` gave for the same tasks; None = no accuracies.

    Returns:
        JSON values: `sources` (`rows`, `rows_drawn`, `documents`, `documents_with_items`) and
        `tasks`, each with its `items`, those `too_short` to be found, those `found` and their
        `share`, `by_source`, `examples`, `evaluation_sets` (by which a rule drops the texts) and
        `accuracy` by figure, of `all` items and of the `clean` ones.

    Raises:
        UsageError: If a task is unknown, its rows or a source can't be read, or the results are of
            other rows.
        DataChangedError: If the data differ from the run's lock.
        SourceDownError: If a source can't be read.
    """
    suite = Suite(expand(names), where)
    reached = {result["task"]: result for result in (results or {}).get("results", ())}
    for task, parts in suite.rows.items():
        if task in reached:
            _refuse_other_rows(reached[task], parts)
    data = settings.data
    transfer = Transfer(data.stall_timeout_s, data.deadline_s)
    path = lock_path(settings)
    lock = {entry["name"]: entry for entry in (read_lock(path) if path.exists() else [])}
    search = Search(suite.index)
    with progress_bar() as progress:
        for name in data.sources:
            source = open_source(name, data, data.lanes, transfer, lock.get(name), progress)
            search.look(source, documents, progress)
    return {
        "sources": search.sources,
        "tasks": [
            _task_facts(task, suite, search, reached.get(task), list(data.sources))
            for task in suite.rows
        ],
    }


def _task_facts(
    task: str,
    suite: Suite,
    search: Search,
    result: Mapping[str, Any] | None,
    sources: Sequence[str],
) -> dict[str, Any]:
    parts, found = suite.rows[task], search.found[task]
    items = sum(map(len, parts))
    return {
        "task": task,
        "items": items,
        "too_short": suite.index.too_short[task],
        "found": len(found),
        "share": len(found) / items,
        "by_source": {name: sum(name in of for of in found.values()) for name in sources},
        "examples": [asdict(example) for example in search.examples[task]],
        "evaluation_sets": suite.evaluation_sets(task),
        "accuracy": {} if result is None else clean_accuracy(result, parts, found),
    }


def clean_accuracy(
    result: Mapping[str, Any], parts: Sequence[Sequence[Any]], found: Iterable[int]
) -> dict[str, dict[str, Any]]:
    """Count what a model got right, of all items measured and of those that were not found.

    Args:
        result: A task's `TaskResult.facts`.
        parts: The rows of the task's parts, in their order.
        found: Numbers of the items that stand in the mixture, over all parts.

    Returns:
        By figure `all` and `clean`, each with `items`, `value` and `error`; value and error are
        None where no item is left. Empty for a task without choices.
    """
    dirty, figures = set(found), {}
    measured = list(result["parts"].values()) if result["parts"] else [result]
    for figure, chosen in CHOSEN.items():
        right: dict[int, float] = {}
        before = 0
        for part, rows in zip(measured, parts, strict=False):
            pairs = zip(part[chosen], part["answers"], strict=False)
            right |= {before + n: float(one == other) for n, (one, other) in enumerate(pairs)}
            before += len(rows)
        if right:
            clean = [value for item, value in right.items() if item not in dirty]
            figures[figure] = {"all": _summed(list(right.values())), "clean": _summed(clean)}
    return figures


def _summed(right: Sequence[float]) -> dict[str, Any]:
    if not right:
        return {"items": 0, "value": None, "error": None}
    figure = mean(right)
    return {"items": len(right), "value": figure.value, "error": figure.error}


def _refuse_other_rows(result: Mapping[str, Any], parts: Sequence[Items]) -> None:
    """Refuse results that were reached on other rows than those that are looked for."""
    measured = list(result["parts"].values()) if len(parts) > 1 else [result]
    theirs = [part["data"].get("rows_sha256") for part in measured]
    if theirs != [part.origin["rows_sha256"] for part in parts]:
        raise UsageError(
            f"the results of {result['task']} are of other rows than those read here; evaluate the "
            "model again, with the same mirror or bundle"
        )


def _value(row: Any, column: str) -> Any:
    """Take a column of a row, or a key below it after a dot."""
    return reduce(lambda value, key: value[key], column.split("."), row)
