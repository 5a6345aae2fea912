"""A task's rows -> items with examples in front of them, ready to be asked.

Flow: `running` asks for each `Part`; `read_items` reads it, `templates` makes its texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from summerlm.core.errors import UsageError
from summerlm.eval.definition import Task
from summerlm.eval.items import Items, Where, read_items
from summerlm.eval.templates import SEED, Item, ItemError, describe_part, render, shots


@dataclass(frozen=True)
class Part:
    """A part's items, each with the text in front of it.

    Attributes:
        name: The part's name; empty for a task of one.
        rows: Its rows, with where they are from.
        items: The items made of them.
        before: What stands in front of each: the task's description and the examples.
    """

    name: str
    rows: Items
    items: list[Item]
    before: list[str]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of all items, one after another."""
        return [pair for number in range(len(self.items)) for pair in self.pairs_of(number)]

    def pairs_of(self, number: int) -> list[tuple[str, str]]:
        """Give context and continuation for each choice of an item, with what stands in front."""
        before, item = self.before[number], self.items[number]
        return [(before + context, continuation) for context, continuation in item.pairs]


def count_examples(task: Task, few_shot: int | None) -> int:
    """Give the number of examples.

    Args:
        task: The task.
        few_shot: How many are asked for; None = the task's own number.

    Returns:
        The number.

    Raises:
        UsageError: If there can't be so many.
    """
    count = few_shot if few_shot is not None else task.few_shot.count if task.few_shot else 0
    if count < 0 or (count and task.few_shot is None):
        raise UsageError(f"task {task.name}: {count} examples can't be had")
    return count


def prepare(task: Task, name: str, where: Where, count: int, seed: int, limit: int | None) -> Part:
    """Read a part's rows and make items of them.

    Args:
        task: The task; not of kind "text".
        name: The part.
        where: Where rows are read from.
        count: Examples in front of each item.
        seed: Of the examples that are drawn.
        limit: Take the first so many rows; None = all.

    Returns:
        The part.

    Raises:
        UsageError: If rows can't be read, or one can't be used; the message has the row.
    """
    whole = read_items(task, task.data.split, where, name)
    cut = limit is not None and limit < len(whole)
    rows = Items(whole[:limit], {**whole.origin, "limit": limit if cut else None})
    items = _rendered(task, rows, name)
    before = [describe_part(task, name)] * len(items)
    if count:
        assert task.few_shot is not None
        pool = read_items(task, task.few_shot.split, where, name)
        drawn = shots(task, rows, pool, count, seed)
        wanted = sorted({place for places in drawn for place in places})
        made = _rendered(task, [pool[place] for place in wanted], name)
        examples = {place: item.example for place, item in zip(wanted, made, strict=True)}
        texts = ["".join(examples[place] for place in places) for places in drawn]
        before = [first + text for first, text in zip(before, texts, strict=True)]
        origin = {**rows.origin, "few_shot_split": pool.origin["split"]}
        rows = Items(rows, origin)
    return Part(name, rows, items, before)


def look(task: Task, where: Where, few_shot: int | None, limit: int | None) -> None:
    """Read all that measuring a task will read, so that what is wrong with it is known before.

    Args:
        task: The task.
        where: Where rows are read from; what it keeps is not read twice.
        few_shot: See `count_examples`.
        limit: See `prepare`.

    Raises:
        UsageError: If rows can't be read or used.
        SourceDownError: If they can't be fetched.
    """
    for part in task.part_names:
        if task.kind == "text":
            read_items(task, task.data.split, where, part)
        else:
            prepare(task, part, where, count_examples(task, few_shot), SEED, limit)


def _rendered(task: Task, rows: Sequence[dict[str, Any]], part: str) -> list[Item]:
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(render(task, row, part))
        except ItemError as error:
            shown = repr(row)
            shown = shown if len(shown) < 300 else f"{shown[:300]} ..."
            name = f"{task.name} {part}".strip()
            raise UsageError(f"task {name}: row {number}: {error}; the row: {shown}") from error
    return items
