"""What a task is, read from data: one small TOML file a task in the folder `tasks`.

Flow:
    1. `expand` turns names of tasks, parts (as mmlu_anatomy) and suites into `Task`s;
    2. `items` reads their rows, `templates` makes texts of them, `running` measures a model;
    3. `describe` lists all of them, with licences, for people and for the documentation.

A file holds definitions only: where the rows lie, the texts made of them as jinja templates, what
is measured. The texts are, to the byte, those of lm-eval, so that results can be compared.

Source:
    Gao et al., lm-evaluation-harness 0.4.13, https://github.com/EleutherAI/lm-evaluation-harness.
"""

import difflib
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from summerlm.core.config import validate
from summerlm.core.errors import UsageError
from summerlm.eval.definition import Suite, Task

_SUITES = "suites"  # the file that is no task's


@cache
def task_names() -> list[str]:
    """List the tasks that have a file, sorted."""
    names = (file.name for file in files(__package__).joinpath("tasks").iterdir())
    found = (name.removesuffix(".toml") for name in names if name.endswith(".toml"))
    return sorted(name for name in found if name != _SUITES)


@cache
def describe_suites() -> dict[str, Suite]:
    """Give the suites by name, in their file's order."""
    return {name: validate(Suite, values, f"suite {name}") for name, values in _read(_SUITES)}


def suite_names() -> list[str]:
    """List the suites."""
    return list(describe_suites())


@cache
def load_task(name: str) -> Task:
    """Read a task.

    Args:
        name: Its name; `mmlu_anatomy` or `mmlu_stem` is a part of `mmlu`, or a group of parts.

    Returns:
        The task.

    Raises:
        UsageError: If there is none of this name; the message names the nearest.
    """
    if name in task_names():
        return validate(Task, {"name": name, **dict(_read(name))}, f"task {name}")
    for whole in task_names():
        if name.startswith(f"{whole}_"):
            task = load_task(whole)
            part = name.removeprefix(f"{whole}_")
            groups = {part: task.parts[part]} if part in task.parts else {}
            groups = groups or ({part: (part,)} if part in task.part_names else {})
            if groups:
                return task.model_copy(update={"name": name, "parts": groups})
    raise _unknown(name)


def expand(names: Sequence[str]) -> list[Task]:
    """Read tasks and suites.

    Args:
        names: Names of tasks and suites, in any mixture.

    Returns:
        The tasks in order, each once.

    Raises:
        UsageError: If a name is none's; the message names the nearest.
    """
    suites = describe_suites()
    wanted = [task for name in names for task in (suites[name].tasks if name in suites else [name])]
    return [load_task(name) for name in dict.fromkeys(wanted)]


def describe() -> list[dict[str, str]]:
    """Tell of every task what the documentation lists: a row of text cells each."""
    rows = []
    for task in map(load_task, task_names()):
        shots = task.few_shot.count if task.few_shot else 0
        bundle = task.data.bundle
        rows.append(
            {
                "task": task.name,
                "what it asks": task.description,
                "rows": " ".join(filter(None, (task.data.repository, task.data.folder))),
                "split": task.data.split,
                "bundle's split": bundle.split if bundle else "",
                "shots": str(shots),
                "licence": task.licence,
                "source": task.source,
            }
        )
    return rows


def _read(name: str) -> list[tuple[str, Any]]:
    text = files(__package__).joinpath("tasks", f"{name}.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text).items())


def _unknown(name: str) -> UsageError:
    tasks = [load_task(whole) for whole in task_names()]
    parts = [f"{t.name}_{part}" for t in tasks for part in (*t.parts, *t.part_names) if part]
    known = [*task_names(), *suite_names()]
    near = difflib.get_close_matches(name, [*known, *parts], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return UsageError(f"no task or suite {name!r}; {hint}")
