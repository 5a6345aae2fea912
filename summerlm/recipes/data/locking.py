"""The data of a run, pinned: opened by their lock, which is made where there is none.

Flow: what reads a run's sources calls `open_data`; what only wants its steps calls
`open_run_data`, which takes the tokenized ones where the settings name such a folder. The command
`data lock` calls `lock_data`, training makes the lock by itself before its first step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from summerlm.core.errors import UsageError
from summerlm.core.progress import progress_bar
from summerlm.data.lock import read_lock, require_licences, write_lock
from summerlm.data.opening import open_sources, refuse_changes
from summerlm.data.sources import Source
from summerlm.data.tokens.manifest import require_order
from summerlm.data.tokens.reading import Tokens
from summerlm.data.workers import prepare
from summerlm.recipes.settings import Settings, derive
from summerlm.tokenizer.registry import load_tokenizer

LOCK = "data.lock.json"

Sources = Sequence[Source] | Tokens  # to deal a run's steps from, or to read them


def lock_path(settings: Settings) -> Path:
    """Give the place of a run's lock."""
    return settings.run.folder / LOCK


def open_data(settings: Settings, lock: Path | None = None, *, write: bool = True) -> list[Source]:
    """Open a run's sources by its lock.

    Args:
        settings: The run's settings.
        lock: The lock file; None = the one in the run's folder.
        write: Whether to write the lock where there is none.

    Returns:
        The sources in the order of the settings.

    Raises:
        UsageError: If a source has no licence, or its settings don't fit its files.
        DataChangedError: If the data differ from the lock.
        SourceDownError: If a source can't be read.
    """
    path = lock or lock_path(settings)
    require_licences(settings.data)
    if settings.data.workers:
        prepare()
    pinned = read_lock(path) if path.exists() else None
    with progress_bar() as progress:
        sources = open_sources(settings.data, settings.data.lanes, pinned, progress)
    if pinned is None and write:
        write_lock(path, [source.lock() for source in sources])
    return sources


def open_run_data(settings: Settings, *, training: bool = True) -> Sources:
    """Open what a run's steps are made of: its sources, or the folder of its tokens.

    Args:
        settings: The run's settings.
        training: Whether the run is to train on them, and not only to be looked at: its lock is
            written where there is none, and tokens must last to its end.

    Returns:
        The sources in the order of the settings, for `open_loader`.

    Raises:
        UsageError: If a source has no licence, or its settings don't fit its files, or
            `data.tokens` holds too little.
        DataChangedError: If the data differ from the lock, or the tokens from the settings.
        SourceDownError: If a source can't be read, or the tokens are damaged.
    """
    if settings.data.tokens is None:
        return open_data(settings, write=training)
    tokens = open_tokens(settings, settings.data.tokens)
    if training:
        _require_enough(settings, tokens)
    path, lock = lock_path(settings), [source.lock() for source in tokens]
    if path.exists():
        refuse_changes(read_lock(path), lock)
    elif training:
        write_lock(path, lock)
    return tokens


def _require_enough(settings: Settings, tokens: Tokens) -> None:
    """Refuse a folder that can't feed a run to its end."""
    steps, wanted = tokens.manifest.steps, derive(settings).steps
    if steps < wanted:
        raise UsageError(
            f"{tokens.folder}: holds {steps} steps, the run makes {wanted}; "
            f"`summerlm data tokenize CONFIG --out {tokens.folder}` adds the rest"
        )
    kept, asked = tokens.manifest.held_out_characters, settings.validation.characters_per_source
    if asked > kept:
        raise UsageError(
            f"{tokens.folder}: keeps held-out texts for validation.characters_per_source = {kept}, "
            f"{asked} are asked for; ask for less, or tokenize with more"
        )


def open_tokens(settings: Settings, folder: Path) -> Tokens:
    """Open a folder of tokens that holds a run's steps, however many.

    Args:
        settings: The run's settings.
        folder: The folder.

    Returns:
        The opened folder.

    Raises:
        UsageError: If it is no such folder.
        DataChangedError: If it was made by other settings.
        DamagedDataError: If a file is missing or damaged.
    """
    tokens = Tokens(folder)
    require_order(
        folder,
        tokens.manifest,
        settings.data,
        seed=settings.run.seed,
        rows=derive(settings).rows,
        context=settings.model.context,
        tokenizer=load_tokenizer(settings.tokenizer.name).fingerprint,
    )
    return tokens


def lock_data(settings: Settings, out: Path | None) -> list[str]:
    """Pin a run's data, or find them as pinned.

    Args:
        settings: The run's settings.
        out: The lock file; None = the one in the run's folder. One that is there already stays.

    Returns:
        Lines for a person: the file, then each source.

    Raises:
        UsageError: If a source has no licence, or its settings don't fit its files.
        DataChangedError: If the data differ from the lock.
        SourceDownError: If a source can't be read.
    """
    path = out or lock_path(settings)
    found = path.exists()
    entries = [source.lock() for source in open_data(settings, path)]
    return [
        f"{path}: {'unchanged, the data are as pinned' if found else 'written'}",
        *map(_describe, entries),
    ]


def _describe(entry: Mapping[str, Any]) -> str:
    rows = sum(sum(file["rows"]) for file in entry["files"])
    revision = f" at {entry['revision'][:12]}" if entry["revision"] else ""
    return (
        f"{entry['name']}: {entry['origin']}{revision}, {len(entry['files'])} files, "
        f"{rows:,} rows; {entry['licence']}"
    )
