"""What benchmarks share: children on chosen cores, spread of repeats, origin of figures.

Flow: a benchmark starts each side of a comparison as a `Child`, asks it for slices of work in
turn, sums up with `spread`, and writes one object with `circumstances` beside its figures. Those
that measure settings in parts share their arguments (`argument_parser`), the way through the parts
(`measure_parts`) and their table (`show`).
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from child import Child
from rich.console import Console
from rich.table import Table

from summerlm.core.errors import SummerError
from summerlm.core.figures import circumstances, spread
from summerlm.core.files import write_json

__all__ = [
    "ONE_CORE",
    "ONE_THREAD",
    "Child",
    "argument_parser",
    "circumstances",
    "measure_parts",
    "show",
    "spread",
]

# one thread of everything, for all sides alike: the unit is a core
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

ONE_CORE = {max(os.sched_getaffinity(0))}  # where single-core figures are taken


def argument_parser(what: str, preset: str, parts: Sequence[str]) -> argparse.ArgumentParser:
    """Make the arguments of a benchmark that measures settings in parts.

    Args:
        what: What it measures, for its help.
        preset: The settings that it measures by default.
        parts: Names of its parts.

    Returns:
        The parser; further arguments may follow.
    """
    config = Path(__file__).parent.parent / "configs" / f"{preset}.toml"
    parser = argparse.ArgumentParser(description=f"Measure {what}; see the file's head.")
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--quick", action="store_true", help="see that it runs; no figures to use")
    only = "measure this part alone; may be given again"
    parser.add_argument("--only", action="append", choices=parts, help=only)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


class Bench(Protocol):
    """One run of a benchmark in parts."""

    def measure(self, part: str) -> dict[str, Any]:
        """Measure a part; gives its figures by name."""


def measure_parts(figures: dict[str, Any], parts: Iterable[str], make: Callable[[], Bench]) -> None:
    """Measure one part after the other.

    Args:
        figures: Takes what each gives.
        parts: Their names.
        make: Makes what measures them.

    Raises:
        SystemExit: If something is wrong with settings or data; the message is one line.
    """
    try:
        bench = make()
        for part in parts:
            print(f"measuring {part} ...", file=sys.stderr, flush=True)
            figures |= bench.measure(part)
    except SummerError as error:
        raise SystemExit(f"error: {error}") from None


def show(
    figures: Mapping[str, Any], lines: Iterable[tuple[str, Any]], to: Path | None = None
) -> None:
    """Print figures as a table, a line each with the spread of its repeats, and write them.

    Args:
        figures: All of them, with their `circumstances`.
        lines: Name and value, or spread of values, of each line.
        to: The file that gets the figures; None = none.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column(figures["hardware"]["processor"], no_wrap=True)
    columns = ("median", "lowest", "highest")
    for name in columns:
        table.add_column(name, justify="right")
    for name, value in lines:
        values = value if isinstance(value, Mapping) else {"median": value}
        cells = (values.get(key) for key in columns)
        table.add_row(name, *("" if cell is None else _number(cell) for cell in cells))
    Console().print(table)
    if to:
        write_json(to, dict(figures))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
