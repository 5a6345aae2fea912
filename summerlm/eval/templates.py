"""A row of a data set -> the texts that a model is asked about, by a task's templates.

Flow:
    1. `render` makes an `Item` of a row: contexts, what may follow each, the right answer;
    2. `shots` draws the examples in front of each row, and writes them;
    3. `running` puts both together and asks the model.

Templates are jinja's, in its sandbox: they can't change what they are given or reach outside.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from jinja2.environment import TemplateExpression
from jinja2.sandbox import ImmutableSandboxedEnvironment

from summerlm.core.errors import UsageError
from summerlm.eval.definition import Task

SEED = 1234  # of the examples: lm-eval's own, so that both draw the same

_FAULTS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
)


class ItemError(UsageError):
    """A row that no item can be made of; who read the row says where it stands."""


@dataclass(frozen=True)
class Item:
    """A row as texts.

    Attributes:
        pairs: Context and continuation, one for each choice; of a cloze one; of what is generated
            the context alone, with the key as its continuation.
        choices: The choices by themselves, whose characters `acc_norm` divides by.
        answer: Index of the right choice; 0 where there is one pair.
        example: The row with its answer, as an example for another.
    """

    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    answer: int
    example: str


def render(task: Task, row: Mapping[str, Any], part: str = "") -> Item:
    """Make an item of a row.

    Args:
        task: The task; not of kind "text".
        row: Values by column.
        part: The part that the row is of, which templates see as `part`.

    Returns:
        The item, without examples in front.

    Raises:
        ItemError: If the row has no choices, an empty one, a key that is none of them, or if a
            template finds something else than it expects.
    """
    values = {"part": part, **row}
    prompt = task.prompt
    try:
        if task.kind == "choice":
            return _choice(task, values)
        context, target = _text(prompt.context, values), _text(prompt.target or "", values)
        example = f"{context}{prompt.delimiter}{target}{prompt.separator}"
        return Item(((context, target),), (target,), 0, example)
    except _FAULTS as error:
        raise ItemError(f"its texts can't be made: {error}") from error


def _choice(task: Task, values: Mapping[str, Any]) -> Item:
    prompt = task.prompt
    choices = _texts(prompt.contexts or prompt.choices or "", values)
    if not choices or not all(choices):
        raise ItemError("it has no choices" if not choices else "one of its choices is empty")
    answer = _index(prompt.answer or "", values, len(choices))
    if prompt.contexts:  # what follows is the same for all contexts
        follows = prompt.delimiter + _text(prompt.target or "", values)
        pairs = tuple((context, follows) for context in choices)
    else:
        context = _text(prompt.context, values)
        pairs = tuple((context, prompt.delimiter + choice) for choice in choices)
    return Item(pairs, choices, answer, "".join(pairs[answer]) + prompt.separator)


def describe_part(task: Task, part: str) -> str:
    """Give the text before all examples.

    Args:
        task: The task.
        part: The part.

    Returns:
        The text; empty where the task has none.
    """
    return _text(task.prompt.description, {"part": part})


def shots(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    pool: Sequence[Mapping[str, Any]],
    count: int,
    seed: int,
) -> list[list[int]]:
    """Choose the examples of each row; a row is never its own.

    Random examples are drawn row after row from one generator, as lm-eval draws them, so that the
    same seed gives the same examples there, for as many rows as are measured. Where lm-eval could
    draw the row itself (LAMBADA, whose only split is measured), this draws one more and drops it.

    Args:
        task: The task, which has examples.
        rows: The rows that are measured, in order.
        pool: The rows that examples come from.
        count: Examples a row.
        seed: Of the generator.

    Returns:
        For each row the places of its examples in the pool, in order.

    Raises:
        UsageError: If the pool has too few rows.
    """
    assert task.few_shot is not None
    spare = task.few_shot.spare or task.few_shot.split == task.data.split
    if count + spare > len(pool):
        raise UsageError(
            f"task {task.name}: {count} examples a row, and split {task.few_shot.split!r} has "
            f"{len(pool)} rows; ask for fewer"
        )
    generator, places, chosen = random.Random(seed), range(len(pool)), []
    for row in rows:
        if task.few_shot.sampler == "first":
            drawn = [place for place in range(min(count + 1, len(pool))) if pool[place] != row]
        else:
            drawn = generator.sample(places, count + spare)
            if any(pool[place] == row for place in drawn):
                drawn = [place for place in drawn if pool[place] != row]
                if len(drawn) < count:  # it stands in the pool more than once
                    others = [place for place in places if pool[place] != row]
                    drawn = generator.sample(others, count)
        chosen.append(drawn[:count])
    return chosen


@cache
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["regex_replace"] = lambda text, pattern, by: re.sub(pattern, by, text)
    return environment


@cache
def _template(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@cache
def _expression(text: str) -> TemplateExpression:
    return _environment().compile_expression(text, undefined_to_none=False)


def evaluate(expression: str, values: Mapping[str, Any]) -> Any:
    """Give an expression's value.

    Args:
        expression: The expression, in jinja's words.
        values: What its names mean.

    Returns:
        The value.

    Raises:
        ItemError: If it has none.
    """
    try:
        value = _expression(expression)(**values)
        if isinstance(value, jinja2.Undefined):
            raise ItemError(f"it has no {expression}")
        return value
    except _FAULTS as error:
        raise ItemError(f"its {expression} can't be found: {error}") from error


def _text(template: str, values: Mapping[str, Any]) -> str:
    return _template(template).render(**values)


def _texts(expression: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    found = evaluate(expression, values)
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise ItemError(f"its {expression} is no list of texts")
    return tuple(found)


def _index(expression: str, values: Mapping[str, Any], choices: int) -> int:
    try:
        index = _expression(expression)(**values)
    except ValueError:  # what .index() raises
        index = None
    except _FAULTS as error:
        raise ItemError(f"its answer can't be found: {error}") from error
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < choices:
        shown = ", ".join(f"{k} = {v!r}" for k, v in values.items() if k in expression)
        raise ItemError(f"its answer key is none of its {choices} choices ({shown})")
    return index
