"""The commands `summerlm checkpoint ...`: list, verify, prune and roll back a run's checkpoints.

Flow: `cli` adds `checkpoint` to the command line; each command calls one recipe.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from summerlm.cli_options import Json, Run, write_facts

checkpoint = typer.Typer(help="Look after a run's checkpoints.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")]


@checkpoint.command(name="list")
def checkpoint_list(run: Folder, to: Json = None) -> None:
    """Tell which checkpoints there are, by their manifests alone."""
    from summerlm.recipes.checkpoints import list_checkpoints, show_list

    facts = list_checkpoints(run)
    if write_facts(facts, to):
        show_list(run, facts, Console())


@checkpoint.command(name="verify")
def checkpoint_verify(run: Run, to: Json = None) -> None:
    """Read every byte of every checkpoint; ends with 3 where one is damaged."""
    from summerlm.recipes.checkpoints import show_verified, verify_checkpoints

    facts = verify_checkpoints(run)
    if write_facts(facts, to):
        show_verified(facts, Console())
    raise typer.Exit(facts["exit_code"])


@checkpoint.command(name="prune")
def checkpoint_prune(
    run: Folder,
    keep_last: Annotated[
        int | None,
        typer.Option(help="How many stay; default checkpoint.keep_last of the run.", min=1),
    ] = None,
    leftovers: Annotated[
        bool, typer.Option("--leftovers", help="Delete branches and damaged ones set aside too.")
    ] = False,
) -> None:
    """Delete old checkpoints as the run itself would; only whole ones count as kept."""
    from summerlm.recipes.checkpoints import prune_checkpoints

    for line in prune_checkpoints(run, keep_last, leftovers):
        print(line)


@checkpoint.command(name="rollback")
def checkpoint_rollback(
    run: Folder,
    to_step: Annotated[int, typer.Option(help="The step to go on after.", min=0)],
) -> None:
    """Go on from an earlier step: later checkpoints move to a folder beside."""
    from summerlm.recipes.checkpoints import roll_back

    for line in roll_back(run, to_step):
        print(line)
