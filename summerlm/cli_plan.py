"""The command `summerlm plan`: what a run comes to, before anything is spent.

Flow: `cli` adds it to its commands; it calls the recipes `planning` and, with --fit, `budgeting`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from summerlm.cli_options import Config, Json, Overrides, write_facts

TABLES = ("memory", "fits", "probe", "checkpoint", "fit")


def plan(
    config: Config,
    overrides: Overrides = None,
    hardware: Annotated[str | None, typer.Option(help="h200, h100, a100 or mi300x.")] = None,
    count: Annotated[int, typer.Option(help="How many of them.", min=1)] = 8,
    mfu: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.4,
    price: Annotated[float | None, typer.Option(help="Dollars a device-hour.")] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="dollars=1000 or days=3: solve for size and tokens.", metavar="BUDGET"),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Make 20 real steps here, and correct by them.")
    ] = False,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Hours between failures of one device; default 50,678.")
    ] = None,
    bytes_per_token: Annotated[float, typer.Option(help="Bytes of text to a token.")] = 4.0,
    to: Json = None,
) -> None:
    """Compute a run's size, memory, time, money, saves and data, or solve for a budget."""
    from summerlm.core.config import read_settings
    from summerlm.core.errors import UsageError
    from summerlm.plan.cost import FAILURE_HOURS
    from summerlm.recipes.budgeting import fit_budget
    from summerlm.recipes.planning import plan as recipe
    from summerlm.recipes.room import Terms
    from summerlm.recipes.settings import Settings

    if fit is not None and probe:
        raise UsageError("--fit and --probe: take one; plan --probe the settings that --fit gives")
    hours = FAILURE_HOURS if mtbf_hours is None else mtbf_hours
    terms = Terms(hardware, count, mfu, price, hours, bytes_per_token)
    settings = read_settings(Settings, config, overrides or [])
    fitted = None if fit is None else fit_budget(settings, terms, fit)
    if fitted is not None:
        found = [*(overrides or []), *fitted["overrides"]]
        settings = read_settings(Settings, config, found)
    facts = recipe(settings, terms, probing=probe)
    facts["fit"] = fitted
    if write_facts(facts, to):
        _show(facts)


def _show(facts: Mapping[str, Any]) -> None:
    """Print a plan for a person: the figures, then a table for each group of them."""
    from summerlm.core.console import facts_table

    console = Console()
    data, lines = facts["data"], facts["notes"]
    plain = {k: v for k, v in facts.items() if k not in (*TABLES, "data", "notes")}
    console.print(facts_table("plan", plain))
    for name in TABLES:
        if facts[name] is not None:
            table = {key: value for key, value in facts[name].items() if key != "toml"}
            console.print(facts_table(name, _readable(table)))
    console.print(facts_table("data", {name: _readable(source) for name, source in data.items()}))
    if facts["fit"] is not None:
        print(f"\n{facts['fit']['toml']}")
    for line in lines:
        console.print(Text(f"note: {line}"), soft_wrap=True)


def _readable(table: Mapping[str, Any]) -> dict[str, Any]:
    """Write bytes in the units of memory, and lists in one line."""
    shown: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, list):
            shown[name] = " ".join(map(str, value))
        elif name.endswith("bytes") and isinstance(value, int):
            shown[name.removesuffix("bytes").rstrip("_") or "size"] = format_bytes(value)
        else:
            shown[name] = value
    return shown


def format_bytes(size: int) -> str:
    """Write a number of bytes for people.

    Args:
        size: Bytes.

    Returns:
        In MiB, or in GiB or TiB where it has many.

    Example:
        >>> format_bytes(0), format_bytes(3 * 2**20), format_bytes(18_328_596_480)
        ('0 MiB', '3 MiB', '17.1 GiB')
    """
    for unit, power in (("TiB", 40), ("GiB", 30)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    mib = size / 2**20
    return f"{mib:.1f} MiB" if 0 < mib < 10 and mib % 1 else f"{mib:.0f} MiB"
