"""How far a long piece of work has come, for a person who waits.

Flow: stations call a `Progress` now and then; recipes hand them `progress_bar`, which shows
nothing for the first two seconds.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much

PATIENCE_S = 2.0  # before anything is shown
LINE_EVERY_S = 10.0  # where there is no terminal


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Progress]:
    """Show work on stderr: a bar a piece of work on a terminal, a line now and then elsewhere.

    Args:
        console: Where to show it; None = stderr.

    Yields:
        What the work calls.
    """
    console = console or Console(file=sys.stderr)
    start = time.monotonic()
    if not console.is_terminal:
        yield _Lines(console, start)
        return
    bar = Bar(console=console)
    task_of: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in task_of:
            task_of[what] = bar.add_task(what, total=total, visible=False)
        late = time.monotonic() - start > PATIENCE_S
        bar.update(task_of[what], completed=done, total=total, visible=late)

    with bar:
        yield show


class _Lines:
    """Prints a line about a piece of work at most every `LINE_EVERY_S` seconds."""

    def __init__(self, console: Console, start: float) -> None:
        self._console, self._next = console, start + PATIENCE_S

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY_S
            share = f"{done / total:.0%}" if total else "-"
            self._console.print(f"{what}: {share}", markup=False, highlight=False)
