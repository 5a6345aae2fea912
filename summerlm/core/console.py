"""What a person sees of a run: a live bar, plain lines, tables of facts.

Flow: `ConsoleSink` is one of a `Recorder`'s sinks; commands print `facts_table`.
"""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text


class ConsoleSink:
    """Shows a run to a person: a live bar on a terminal, plain lines elsewhere.

    Args:
        console: Where to print.
        total_tokens: The run's budget, for the bar and the time left.
        every_steps: How often a plain line is printed.
    """

    def __init__(self, console: Console, total_tokens: int, every_steps: int) -> None:
        self._console = console
        self._every = every_steps
        self._total = total_tokens
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %  loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} tokens/s  {task.fields[left]} left"),
                console=console,
            )
            self._task = self._bar.add_task(
                "", total=total_tokens, step=0, loss="-", rate="-", left="-"
            )
            self._bar.start()

    def write(self, kind: str, fields: dict[str, Any], line: str | None) -> None:
        """Show one event."""
        if kind == "train":
            self._show_step(fields)
        elif line is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show_step(self, row: dict[str, Any]) -> None:
        speed = row["tokens_per_second"]
        left = format_seconds((self._total - row["tokens"]) / speed) if speed else "-"
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=row["tokens"],
                step=row["step"],
                loss=f"{row['loss']:.4f}",
                rate=f"{speed:,.0f}",
                left=left,
            )
        elif row["step"] == 1 or row["step"] % self._every == 0 or row["tokens"] >= self._total:
            self._console.print(
                f"step {row['step']:>6}  loss {row['loss']:.4f}  rate {row['lr']:.2e}  "
                f"norm {row['grad_norm']:.2f}  {speed:,.0f} tokens/s  {left} left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


class Stopwatch:
    """Measures how fast tokens go by, with a clock that never jumps.

    The speed is that of the last steps, so that compilation in the first one doesn't blur it.

    Args:
        window: How many steps the speed is averaged over.
    """

    def __init__(self, window: int = 20) -> None:
        self._window = window
        self._ticks = [(time.monotonic(), 0)]

    def tick(self, tokens: int) -> float:
        """Note that more tokens are done.

        Args:
            tokens: Tokens since the tick before.

        Returns:
            Tokens per second over the window.
        """
        self._ticks.append((time.monotonic(), self._ticks[-1][1] + tokens))
        self._ticks = self._ticks[-self._window - 1 :]
        (start, before), (now, done) = self._ticks[0], self._ticks[-1]
        return (done - before) / max(now - start, 1e-9)


def format_seconds(seconds: float) -> str:
    """Write a duration for people.

    Args:
        seconds: The duration, at least 0.

    Returns:
        For instance "42 s", "3 min 20 s" or "5 h 10 min".

    Example:
        >>> format_seconds(42.4), format_seconds(200), format_seconds(18600)
        ('42 s', '3 min 20 s', '5 h 10 min')
    """
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    """Lay facts out for a person.

    Args:
        title: The table's heading.
        facts: Values by name; numbers get thousands separators, None becomes a dash.

    Returns:
        A table that rich can print.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(format_value(value)))
    return table


def format_value(value: Any) -> str:
    """Write one plain value for people.

    Args:
        value: A number, text, None, list or table.

    Returns:
        One line.

    Example:
        >>> format_value(4581393408), format_value(1.44853), format_value(None)
        ('4,581,393,408', '1.449', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(inner)}" for key, inner in value.items())
    return str(value)
