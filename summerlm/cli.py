"""The command `summerlm`: a table from subcommands to recipes.

Flow: parses arguments, imports what the subcommand needs (torch takes seconds), calls one recipe,
and turns a `SummerError` into one line and its exit code. `cli_data` has the commands on data.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from summerlm.cli_bench import bench
from summerlm.cli_checkpoint import checkpoint
from summerlm.cli_data import data
from summerlm.cli_eval import compare, evaluate
from summerlm.cli_options import Config, Json, Overrides, Run, show_facts
from summerlm.cli_plan import plan
from summerlm.core.errors import UsageError, explain
from summerlm.core.runtime import (
    die_with_launcher,
    end_process,
    settle_exit_code,
    spin_briefly,
    starting,
)

app = typer.Typer(
    name="summerlm",
    help="Pretrain your own language model, measure it, and complete text with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
tokenizer = typer.Typer(help="Learn, look at and use tokenizers.", no_args_is_help=True)
app.command()(plan)
app.command()(bench)
app.command(name="eval")(evaluate)
app.command()(compare)
app.add_typer(data, name="data")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(tokenizer, name="tokenizer")

TokenizerName = Annotated[
    str, typer.Option("--tokenizer", help='"mistral-v3", or a tokenizer.json.')
]


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Minutes of training.", min=0.1)] = 4.0,
    folder: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
) -> None:
    """Train on this machine's Python library, measure against 5-gram and xz, complete text."""
    with starting():
        from summerlm.recipes.demo import demo as recipe

    raise typer.Exit(recipe(folder, minutes, Console()))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings and stop.")] = False,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks to start on this machine, by torchrun's agent.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="With --nproc: how often failed ranks are started again.", min=0)
    ] = 0,
) -> None:
    """Train a run, or go on with it where it stopped."""
    with starting():
        from summerlm.core.config import dump_toml, read_settings
        from summerlm.core.failing import one_voice
        from summerlm.recipes.settings import Settings

    with one_voice():
        if max_restarts and nproc is None:
            raise UsageError("--max-restarts needs --nproc: without it there is no launcher")
        settings = read_settings(Settings, config, overrides or [])
        if show:
            print(dump_toml(settings), end="")
            return
        if nproc is not None:
            with starting():
                from summerlm.recipes.launching import launch
            code = launch(settings, [str(config), *(overrides or [])], nproc, max_restarts)
        else:
            with starting():
                from summerlm.recipes.pretrain import pretrain
            code = settle_exit_code(pretrain(settings, Console()))
    raise typer.Exit(code)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="Text to complete.")],
    max_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this share of mass.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Complete a prompt, printing as it goes."""
    import summerlm

    lm = summerlm.load(run)
    pieces = lm.stream(
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html: curves, samples, settings, environment."""
    from summerlm.recipes.report import write_report

    print(write_report(run))


@tokenizer.command(name="encode")
def tokenizer_encode(
    text: Annotated[str, typer.Argument(help="Text to encode.")],
    name: TokenizerName = "mistral-v3",
) -> None:
    """Print a text's ids as a JSON list, without BOS and EOS."""
    from summerlm.tokenizer.registry import load_tokenizer

    print(json.dumps(load_tokenizer(name).encode(text)))


@tokenizer.command(name="decode")
def tokenizer_decode(
    ids: Annotated[str, typer.Argument(help="JSON list of ids.")],
    name: TokenizerName = "mistral-v3",
) -> None:
    """Print the text of a JSON list of ids."""
    from summerlm.tokenizer.registry import load_tokenizer

    try:
        values = json.loads(ids)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UsageError(f"{ids!r}: write the ids as a JSON list, for instance [1, 733]")
    print(load_tokenizer(name).decode(values))


@tokenizer.command(name="show")
def tokenizershow_facts(name: TokenizerName = "mistral-v3", to: Json = None) -> None:
    """Print a tokenizer's size, special tokens and fingerprint."""
    from summerlm.tokenizer.registry import load_tokenizer

    found = load_tokenizer(name)
    facts = {
        "vocabulary": found.vocabulary,
        "bos": found.bos,
        "eos": found.eos,
        "specials": found.specials,
        "fingerprint": found.fingerprint,
    }
    show_facts("tokenizer", facts, to)


@tokenizer.command(name="train")
def tokenizer_train(
    text: Annotated[list[str], typer.Argument(help="Text files, folders or globs.")],
    out: Annotated[Path, typer.Option(help="Folder that gets tokenizer.json.")],
    vocabulary: Annotated[int, typer.Option(help="Entries, special tokens included.")] = 32_768,
) -> None:
    """Learn a byte-level BPE from text files."""
    from summerlm.recipes.evaluating import read_documents
    from summerlm.tokenizer.learn import learn_bpe

    learnt = learn_bpe(read_documents(text), vocabulary)
    learnt.save(out)
    print(f"{out / 'tokenizer.json'}: {learnt.vocabulary} entries, {learnt.fingerprint[:12]}")


def main() -> None:
    """Run the command and exit with its code; a user's mistake is one line on stderr."""
    spin_briefly()
    # of multiprocessing's helper, after a kill: what it cleans up is no news to a user
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    warnings.showwarning = _warn
    die_with_launcher()
    try:
        app()
    except Exception as error:
        known = explain(error)
        if known is not None:
            print(f"error: {known}", file=sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())
        end_process(1 if known is None else known.exit_code)
    except SystemExit as leaving:
        end_process(leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code)))


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Say a warning in one line, as errors are said."""
    print(f"warning: {message}", file=sys.stderr)
