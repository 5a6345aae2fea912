"""The command `summerlm plan`: what a run comes to, before anything is spent.

Flow: `cli` adds it to its commands; it calls the recipes `planning` and, with --fit, `budgeting`;
`recipes.plan_tables` shows what they return.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from summerlm.cli_options import Config, Json, Overrides, write_facts
from summerlm.core.failing import INTERRUPTED
from summerlm.core.progress import PATIENCE_S
from summerlm.core.runtime import starting


def plan(
    config: Config,
    overrides: Overrides = None,
    hardware: Annotated[str | None, typer.Option(help="h200, h100, a100 or mi300x.")] = None,
    count: Annotated[int | None, typer.Option(help="How many of them; default 8.", min=1)] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the bf16 peak that is reached; default 0.4.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Dollars a device-hour.")] = None,
    fit: Annotated[
        list[str] | None,
        typer.Option(help="dollars=1000 or days=3: solve for size and tokens.", metavar="BUDGET"),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Make 20 real steps here, and correct by them.")
    ] = False,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Hours between failures of one device; default 50,677.")
    ] = None,
    bytes_per_token: Annotated[float, typer.Option(help="Bytes of text to a token.")] = 4.0,
    to: Json = None,
) -> None:
    """Compute a run's size, memory, time, money, saves and data, or solve for a budget."""
    with starting():
        from summerlm.core.config import read_settings
        from summerlm.core.errors import UsageError
        from summerlm.plan.cost import FAILURE_HOURS
        from summerlm.recipes.budgeting import fit_budget
        from summerlm.recipes.plan_tables import show_plan
        from summerlm.recipes.planning import plan as recipe
        from summerlm.recipes.settings import Settings
        from summerlm.recipes.terms import Terms

    if fit and len(fit) > 1:
        raise UsageError(f"--fit {' --fit '.join(fit)}: take one, a budget is dollars or days")
    if fit and probe:
        raise UsageError("--fit and --probe: take one; plan --probe the settings that --fit gives")
    hours = FAILURE_HOURS if mtbf_hours is None else mtbf_hours
    terms = Terms(hardware, count, mfu, price, hours, bytes_per_token)
    with _interruptible("making steps here" if probe else "counting memory"):
        settings = read_settings(Settings, config, overrides or [])
        fitted = fit_budget(settings, terms, fit[0]) if fit else None
        if fitted is not None:
            found = [*(overrides or []), *fitted["overrides"]]
            settings = read_settings(Settings, config, found)
        facts: dict[str, Any] = recipe(settings, terms, probing=probe)
    facts["fit"] = fitted
    if fitted is not None:
        facts["notes"].append(fitted.pop("note"))
    if write_facts(facts, to):
        show_plan(facts)


@contextmanager
def _interruptible(what: str) -> Iterator[None]:
    """Tell a person at a terminal who waits what is done; a Ctrl-C ends it in one line."""
    late = threading.Timer(PATIENCE_S, lambda: print(f"{what} ...", file=sys.stderr))
    late.daemon = True
    if sys.stderr.isatty():
        late.start()
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        late.cancel()
