"""What an evaluation found, laid out: tables for people, Markdown, and a list of what there is.

Flow: `cli_eval` prints what `evaluating.evaluate` returns. Tables fit into 80 columns.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from summerlm.eval.task import describe, describe_suites
from summerlm.recipes.eval_rows import HEADINGS, Section, sections

Facts = Mapping[str, Any]

MIN_WIDTH = 7  # of columns of numbers


def show(facts: Facts, console: Console) -> None:
    """Print what was found: a table a task on a terminal, a line a figure elsewhere.

    Args:
        facts: What `evaluating.evaluate` returns.
        console: Where to.
    """
    console.print(Text(describe_model(facts["model"]), "bold"), soft_wrap=True)
    found = sections(facts)
    width = max((len(row.name) for section in found for row in section.rows), default=0)
    for section in found:
        console.print()
        console.print(Text.assemble((section.task, "bold"), f": {section.how}"), soft_wrap=True)
        console.print(Text(section.data), soft_wrap=True)
        if console.is_terminal:
            console.print(_table(section, width))
        else:
            for line in _lines(section, width):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
        for note in section.notes:
            console.print(Text(f"note: {note}"), soft_wrap=not console.is_terminal)


def markdown(facts: Facts) -> str:
    """Write what was found as one Markdown table, whose rows stand for themselves.

    Args:
        facts: What `evaluating.evaluate` returns.

    Returns:
        The table, and the notes below it.
    """
    head = ("model", "task", "protocol", "shots", *HEADINGS, "data")
    lines = [_line(head), _line("---:" if h in HEADINGS[1:] else "---" for h in head)]
    model, notes = describe_model(facts["model"]), dict[str, list[str]]()
    for section in sections(facts):
        shots = "" if section.shots is None else str(section.shots)
        for row in section.rows:
            protocol = section.protocol if section.shots is not None else row.part
            figure = row.name if section.shots is not None else row.figure.replace("_", " ")
            cells = (figure, *row.cells[1:])
            lines.append(_line((model, section.task, protocol, shots, *cells, section.data)))
        for note in section.notes:
            notes.setdefault(note, []).append(section.task)
    below = [f"- {', '.join(tasks)}: {note}" for note, tasks in notes.items()]
    return "\n".join([*lines, "", *below]).rstrip() + "\n"


def describe_model(model: Facts) -> str:
    """Name a model with what a reader of its figures must know.

    Args:
        model: `model` of an evaluation's facts.

    Returns:
        One line.
    """
    return (
        f"{model['name']}, step {model['step']:,}: {model['tokens']:,} tokens trained, "
        f"{model['parameters']:,} parameters, context {model['context']:,}"
    )


def show_tasks(console: Console) -> None:
    """Print what tasks and suites there are, with where their rows lie and the licences.

    Args:
        console: Where to.
    """
    for row in describe():
        shots = f", {row['shots']}-shot" if row["shots"] != "0" else ""
        console.print(Text.assemble((row["task"], "bold"), f": {row['what it asks']}"))
        console.print(Text(f"  {row['rows']}, {row['split']}{shots}; licence: {row['licence']}"))
    console.print()
    for name, suite in describe_suites().items():
        console.print(Text.assemble("suite ", (name, "bold"), f": {suite.description}"))
        console.print(Text(f"  {', '.join(suite.tasks)}"))


def _table(section: Section, width: int) -> Table:
    """Lay figures out in the columns that any of them fills, names `width` wide."""
    cells = [HEADINGS, *(row.cells for row in section.rows)]
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"-"}]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for place, (heading, *_) in enumerate(columns):
        side: Any = "right" if place else "left"
        table.add_column(heading, justify=side, min_width=MIN_WIDTH if place else width)
    for row in zip(*(rest for _, *rest in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _lines(section: Section, width: int) -> Iterable[str]:
    """Write figures a line each, for files and other programs' eyes."""
    for row in section.rows:
        name, value, error, interval, chance, n = row.cells
        words = f"{section.task}  {name.ljust(width)}  {value} ± {error}"
        words += f"  95 %: {interval}" if interval != "-" else ""
        words += f"  chance {chance}" if chance != "-" else ""
        yield f"{words}  n {n}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
