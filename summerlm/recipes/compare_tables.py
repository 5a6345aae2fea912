"""Several models side by side, laid out.

Flow: `cli_eval` prints what `comparing.compare` returns. Two models fit into 80 columns.
"""

import string
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from summerlm.recipes.eval_rows import decimals, number
from summerlm.recipes.eval_tables import describe_model

Facts = Mapping[str, Any]

SURE = 1.96  # standard errors that a difference must be beyond, to be marked


def show(compared: Facts, console: Console) -> None:
    """Print models side by side.

    Args:
        compared: What `compare` returns.
        console: Where to.
    """
    for letter, model in zip(string.ascii_uppercase, compared["models"], strict=False):
        console.print(Text.assemble((letter, "bold"), f"  {describe_model(model)}"))
    for task, rows in _by_task(compared):
        console.print()
        if console.is_terminal:
            console.print(Text(task, "bold"))
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
            for column, heading in enumerate(_headings(compared)):
                side: Any = "right" if column else "left"
                table.add_column(heading, justify=side, min_width=9 if column else 23)
            for row in rows:
                table.add_row(*_cells(row))
            console.print(table)
        else:
            for row in rows:
                names = zip(_headings(compared), _cells(row), strict=True)
                words = "  ".join(f"{h} {c}" if i else c for i, (h, c) in enumerate(names))
                line = f"{task}  {words}"
                console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print()
    for line in _legend(compared):
        console.print(Text(line))


def markdown(compared: Facts) -> str:
    """Write models side by side as a Markdown table.

    Args:
        compared: What `compare` returns.

    Returns:
        The table, with the models and what the columns mean.
    """
    models = zip(string.ascii_uppercase, compared["models"], strict=False)
    lines = [f"- {letter}: {describe_model(model)}" for letter, model in models]
    head = ("task", *_headings(compared))
    lines += ["", f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(head) - 2)}"]
    for task, rows in _by_task(compared):
        lines += [f"| {' | '.join((task, *_cells(row)))} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in _legend(compared))]) + "\n"


def _headings(compared: Facts) -> list[str]:
    letters = string.ascii_uppercase[: len(compared["models"])]
    further = [word for letter in letters[1:] for word in (f"{letter} - A", "error")]
    return ["figure", *letters, *further]


def _cells(row: Facts) -> list[str]:
    """Write a row; a difference that is better or worse beyond doubt is marked."""
    digits = max((decimals(value) for value in row["values"] if value is not None), default=0)
    cells = [row["figure"], *(number(value, digits) for value in row["values"])]
    for difference in row["differences"]:
        if difference is None:
            cells += ["-", "-"]
            continue
        value, error = difference["value"], difference["error"]
        sign = "" if value is None or value < 0 else "+"
        mark = ""
        if value is not None and error is not None and abs(value) > SURE * error:
            mark = " better" if (value > 0) == row["higher_is_better"] else " worse"
        doubt = "" if difference["paired"] or error is None else "?"
        cells += [f"{sign}{number(value, digits)}{mark}", f"{number(error, digits)}{doubt}"]
    return cells


def _by_task(compared: Facts) -> Iterator[tuple[str, list[Facts]]]:
    for task, rows in groupby(compared["rows"], key=lambda row: str(row["task"])):
        yield task, list(rows)


def _legend(compared: Facts) -> list[str]:
    """Say what the columns mean, and what besides the models differs."""
    found = [
        "error: of the difference, taken item by item or document by document; with ? from both "
        f"models' errors, as if on different items. better, worse: beyond {SURE} errors"
    ]
    for row in compared["rows"]:
        for letter, difference in zip(string.ascii_uppercase[1:], row["differences"], strict=False):
            if difference and difference["but"]:
                found.append(f"{row['task']}: A and {letter}: other {', '.join(difference['but'])}")
    return list(dict.fromkeys(found))
