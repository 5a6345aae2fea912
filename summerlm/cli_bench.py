"""The subcommand that measures: `summerlm bench`.

Flow: `cli` puts `bench` into its table.
"""

from typing import Annotated

import typer
from rich.console import Console

from summerlm.cli_options import Config, Json, Overrides, write_facts
from summerlm.core.runtime import starting


def bench(
    config: Config,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="step, parts, data, checkpoint or generation; may be repeated."),
    ] = None,
    to: Json = None,
) -> None:
    """Measure here: tokens/s and MFU of a step, where its time goes, loader, saves, generation."""
    with starting():
        from summerlm.core.failing import one_voice
        from summerlm.recipes.benching import bench as recipe
        from summerlm.recipes.benching import show

    with one_voice():
        figures = recipe(config, overrides or [], only or [], Console(stderr=True))
        if figures is not None and write_facts(figures, to):
            Console().print(show(figures))
