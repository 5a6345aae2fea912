"""What the subcommands share: their common arguments, and how figures are shown.

Flow: `cli` and `cli_data` annotate their parameters with these, and call `show_facts`.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Config = Annotated[Path, typer.Argument(help="Settings file (TOML).", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change.", metavar="[section.key=value]...")
]
Run = Annotated[Path, typer.Argument(help="Run folder or checkpoint.", metavar="RUN")]
Json = Annotated[
    str | None, typer.Option("--json", help="Also write the figures there; - is stdout.")
]


def write_facts(facts: dict[str, Any], to: str | None) -> bool:
    """Write facts as JSON where that was asked for.

    Args:
        facts: JSON values by name.
        to: The file; `-` is stdout, None = nowhere.

    Returns:
        Whether a person wants to see them too; with `-` nothing else goes to stdout.
    """
    from summerlm.core.files import write_json

    if to == "-":
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return False
    if to is not None:
        write_json(Path(to), facts)
    return True


def show_facts(title: str, facts: dict[str, Any], to: str | None) -> None:
    """Print facts as a table, or write them as JSON.

    Args:
        title: The table's heading.
        facts: JSON values by name.
        to: As in `write_facts`.
    """
    from summerlm.core.console import facts_table

    if write_facts(facts, to):
        Console().print(facts_table(title, facts))
