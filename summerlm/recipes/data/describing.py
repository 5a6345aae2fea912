"""What the data commands found, laid out for people.

Flow: `cli_data` prints what `checking` and `judging` return. Tables fit into 80 columns.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

UNITS = ("", "K", "M", "B", "T")


def show_check(facts: Mapping[str, Any], console: Console) -> None:
    """Print what `checking.check_data` returns.

    Args:
        facts: What it returns.
        console: Where to.
    """
    console.print(_overview(facts))
    for source in facts["sources"]:
        console.print()
        console.print(Text(source["name"], "bold"), Text(_identity(source)), sep=": ")
        for line in _details(source):
            console.print(Padding(line, (0, 0, 0, 2), expand=False))
    console.print()
    for problem in facts["problems"]:
        console.print(Text(f"problem: {problem}", "red"))
    count = len(facts["problems"]) + sum(len(source["problems"]) for source in facts["sources"])
    warnings = sum(len(source["warnings"]) for source in facts["sources"])
    if facts["ok"]:
        console.print(Text(f"nothing is wrong; warnings: {warnings}", "green"))
    else:
        words = "1 problem" if count == 1 else f"{count} problems"
        console.print(Text(f"{words}; exit code {facts['exit_code']}", "red"))


def _overview(facts: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("\nsource", overflow="fold", min_width=12)
    for heading in (
        *("\nrows", "mean\ntokens", "longest\ntokens"),
        *("bytes a\ntoken", "tokens\nan epoch", "tokens\nto train", "\nepochs"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in facts["sources"]:
        spread = source["tokens_per_document"] or {}
        state = "red" if source["problems"] else "yellow" if source["warnings"] else ""
        table.add_row(
            Text(source["name"], state),
            short(source["rows"]),
            short(spread.get("mean")),
            short(spread.get("longest")),
            _decimal(source["bytes_per_token"]),
            short(source["tokens"]),
            short(source["budget_tokens"]),
            _decimal(source["epochs"]),
        )
    return table


def _identity(source: Mapping[str, Any]) -> str:
    revision = f" at {source['revision'][:12]}" if source["revision"] else ""
    formats = f", {' '.join(source['formats'])}" if source["formats"] else ""
    size = f", {source['files']:,} files, {short(source['bytes'])}B" if source["files"] else ""
    return f"{source['origin']}{revision}{formats}{size}, column {source['column']}"


def _details(source: Mapping[str, Any]) -> Iterator[Text]:
    terms = f"; terms: {source['terms']}" if source["terms"] else ""
    yield Text(f"licence: {source['licence'] or 'none'}{terms}")
    if source["sample"] is not None:
        yield Text.assemble("begins: ", (source["sample"], "dim"))
    if drawn := source["rows_drawn"]:
        yield Text(
            f"{drawn:,} rows drawn: {source['documents']:,} documents"
            + "".join(_shares(", without text", source["no_text"], drawn))
            + "".join(_shares(", left out", source["dropped"], drawn))
            + "".join(_shares(", changed", source["changed"], drawn))
        )
    for warning in source["warnings"]:
        yield Text(f"warning: {warning}", "yellow")
    for problem in source["problems"]:
        yield Text(f"problem: {problem}", "red")


def _shares(what: str, counts: Mapping[str, int], of: int) -> Iterator[str]:
    if counts:
        told = ", ".join(f"{reason} {count / of:.1%}" for reason, count in counts.items())
        yield f"{what}: {told}"


def show_report(facts: Mapping[str, Any], console: Console) -> None:
    """Print what `judging.report_rules` returns.

    Args:
        facts: What it returns.
        console: Where to.
    """
    console.print(Text("* enabled; each rule is counted by itself, the total once", "dim"))
    for name, found in facts["evaluation_sets"].items():
        short_ones = f", {found['too_short']:,} too short to be found" if found["too_short"] else ""
        console.print(f"evaluation set {name}: {found['items']:,} items{short_ones}", markup=False)
    for source in facts["sources"]:
        console.print()
        documents = source["documents"]
        console.print(
            Text(source["name"], "bold"),
            f"{source['rows_drawn']:,} rows drawn, {documents:,} texts; the enabled rules drop "
            f"{source['dropped']:,} ({_percent(source['dropped'], documents)})",
            sep=": ",
            highlight=False,
        )
        for rule in source["rules"]:
            if rule["documents"] or rule["enabled"]:
                _show_rule(rule, documents, console)
        idle = [r["rule"] for r in source["rules"] if not r["documents"] and not r["enabled"]]
        if not facts["evaluation_sets"]:
            idle.remove("contamination")  # a note says that it wasn't looked for
        if idle:
            words = Text(f"nothing: {', '.join(idle)}", "dim")
            console.print(Padding(words, (0, 0, 0, 2), expand=False))
    console.print()
    for note in facts["notes"]:
        console.print(Text(f"note: {note}", "yellow"))


def _show_rule(rule: Mapping[str, Any], documents: int, console: Console) -> None:
    places = f", {rule['changes']:,} times" if rule["changes"] else ""
    console.print(
        f"{'*' if rule['enabled'] else ' '} {rule['rule']:<38}{rule['effect']:<8}"
        f"{rule['documents']:>8,}  {_percent(rule['documents'], documents):>7}{places}",
        markup=False,
        highlight=False,
    )
    for example in rule["examples"][:1]:
        words = Text(example, "dim", no_wrap=True, overflow="ellipsis")
        console.print(Padding(words, (0, 0, 0, 4), expand=False))


def show_contamination(facts: Mapping[str, Any], console: Console) -> None:
    """Print what `contamination.find_contamination` returns.

    Args:
        facts: What it returns.
        console: Where to.
    """
    for line in _contamination_lines(facts):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _contamination_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    for source in facts["sources"]:
        whole = "all" if source["rows_drawn"] == source["rows"] else f"of {source['rows']:,}"
        yield (
            f"source {source['name']}: {source['rows_drawn']:,} rows drawn ({whole}), "
            f"{source['documents_with_items']:,} of {source['documents']:,} texts share a run of "
            "words with an item"
        )
    for task in facts["tasks"]:
        short = f", {task['too_short']:,} too short to be found" if task["too_short"] else ""
        where = ", ".join(f"{name} {count:,}" for name, count in task["by_source"].items() if count)
        yield ""
        yield (
            f"{task['task']}: {task['found']:,} of {task['items']:,} items ({task['share']:.2%})"
            f"{': ' if where else ''}{where}{short}"
        )
        for example in task["examples"]:
            place = f"{example['source']}, {example['file']}, row {example['row']}"
            yield f"  item {example['item']}, {place}: {example['words']}"
        for name, figure in task["accuracy"].items():
            parts = [f"{_said(figure[which])} of {which} items" for which in ("all", "clean")]
            yield f"  {name}: {'; '.join(parts)}"
        if task["found"] and task["evaluation_sets"]:
            sets = ", ".join(f'"{name}"' for name in task["evaluation_sets"])
            yield f"  the rule contamination drops such texts: data.evaluation_sets = [{sets}]"


def _said(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "nothing (0)"
    error = "" if figure["error"] is None else f" ± {figure['error']:.4f}"
    return f"{figure['value']:.4f}{error} ({figure['items']:,})"


def _percent(count: int, of: int) -> str:
    return f"{count / of:.2%}" if of else "-"


def short(count: float | None) -> str:
    """Write a count in at most six characters.

    Args:
        count: A count of at least 0; None = unknown.

    Returns:
        For instance "812", "36.4K" or "-".

    Example:
        >>> short(812), short(36_412), short(999_960), short(4_800_000_000), short(None)
        ('812', '36.4K', '1.0M', '4.8B', '-')
    """
    if count is None:
        return "-"
    for unit in UNITS:
        if round(count, 1) < 1000 or unit == UNITS[-1]:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
