"""How a person sees a plan: a table for each group of figures, with units.

Flow: `cli_plan` hands `show_plan` what it would write as JSON.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from summerlm.core.console import facts_table, format_seconds, format_value

TABLES = ("basis", "memory", "fits", "probe", "checkpoint", "fit")
TITLES = {"basis": "days and dollars rest on"}
SHARES = ("mfu", "share_of_limit", "lost_share")
UNKNOWN = {  # what a figure is missing for
    "days": "unknown: needs --hardware or --probe",
    "tokens_per_second": "unknown: needs --hardware or --probe",
    "every_steps": "unknown: needs --hardware or --probe",
    "failures_in_the_run": "unknown: needs --hardware or --probe",
    "dollars": "unknown: needs --price and --hardware or --probe",
    "price": "unknown: needs --price",
    "price_from": "nowhere",
    "recompute": "nothing",
    "share_of_limit": "unknown: needs --hardware",
    "mfu": "unknown: no peak is known of what is here",
    "peak_flops_per_second": "unknown",
    "source": "this machine",
}


def show_plan(facts: Mapping[str, Any]) -> None:
    """Print a plan: the figures, then a table for each group of them, then notes.

    Args:
        facts: What `recipes.planning.plan` returns, and `fit`.
    """
    console = Console()
    plain = {k: v for k, v in facts.items() if k not in (*TABLES, "data", "notes")}
    console.print(facts_table("plan", readable(plain)))
    for name in TABLES:
        if facts[name] is not None:
            table = {key: value for key, value in facts[name].items() if key != "toml"}
            if (table.get("every_steps") or 0) > facts["steps"]:
                table["every_steps"] = "longer than the run"
            console.print(facts_table(TITLES.get(name, name), readable(table)))
    data = {name: readable(source) for name, source in facts["data"].items()}
    console.print(facts_table("data", data))
    if facts["fit"] is not None:
        print(f"\n{facts['fit']['toml']}")
    for line in facts["notes"]:
        console.print(Text(f"note: {line}"), soft_wrap=True)


def readable(table: Mapping[str, Any]) -> dict[str, Any]:
    """Write figures with the units that people read.

    Args:
        table: JSON values by name, which says the unit.

    Returns:
        The same without the units in names: bytes as memory's units, seconds and days as
        durations, FLOPs by powers of ten, shares in %, lists in one line; for None what it means.

    Example:
        >>> readable({"total_flops": 2.4e18, "lost_share": 0.0123, "save_seconds": 75.0})
        {'total flops': '2.40e+18 FLOPs', 'lost share': '1.23 %', 'save': '1 min 15 s'}
        >>> readable({"days": 0.5, "recompute": None, "total_bytes": 2**30})
        {'days': '0.5 (12 h 00 min)', 'recompute': 'nothing', 'total': '1.0 GiB'}
    """
    return dict(_shown(name, value) for name, value in table.items())


def _shown(name: str, value: Any) -> tuple[str, Any]:
    """Write one figure: its name and its value."""
    label = name.replace("_", " ")
    if value is None:
        return label, UNKNOWN.get(name, "-")
    if isinstance(value, list):
        return label, " ".join(map(str, value))
    if isinstance(value, bool | str):
        return label, value
    if name in SHARES:
        return label, f"{100 * value:.3g} %"
    if name == "days":
        return label, f"{format_value(value)} ({_duration(86_400 * value)})"
    if name == "total_flops":
        return label, f"{value:.2e} FLOPs"
    if name.endswith("flops_per_second"):
        return label.removesuffix(" per second"), f"{value / 1e12:,.4g} TFLOP/s"
    if name.endswith("_seconds"):
        return label.removesuffix(" seconds"), _duration(value)
    if name.endswith("bytes"):
        return label.removesuffix("bytes").rstrip() or "size", format_bytes(value)
    return label, value


def _duration(seconds: float) -> str:
    """Write seconds for people, short ones to three digits."""
    return f"{seconds:.3g} s" if seconds < 60 else format_seconds(seconds)


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
