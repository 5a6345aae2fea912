"""A run's steps, dealt once and kept: text is read and tokenized once, on any machine.

Flow: the command `data tokenize` calls `tokenize`, which
    1. begins a folder, or verifies one that was begun and goes on after its last whole shard;
    2. deals the steps by the run's own `Loader`, so that they are those of training;
    3. writes them shard by shard; with `data.tokens` a run reads them (`open_run_data`).
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from rich.console import Console

import summerlm
from summerlm.core.files import RunFolder, write_json
from summerlm.core.progress import progress_bar
from summerlm.core.record import JsonLines
from summerlm.core.runtime import InterruptedWaitError, StopRequest
from summerlm.data.loader import Loader, Step
from summerlm.data.lock import write_lock
from summerlm.data.sources import Source
from summerlm.data.tokens.manifest import (
    HELD_OUT,
    LOCK,
    MANIFEST,
    Entry,
    Manifest,
    Shard,
    order_settings,
    verify_files,
    write_manifest,
)
from summerlm.data.tokens.writing import steps_per_shard, sweep, write_shard
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.data.locking import open_data, open_tokens
from summerlm.recipes.settings import Settings, derive
from summerlm.recipes.watching import longest_text
from summerlm.tokenizer.registry import load_tokenizer


def tokenize(
    settings: Settings, out: Path, steps: int | None, workers: int | None, console: Console
) -> int:
    """Write a run's steps to a folder; the same command goes on where it was stopped or killed.

    Args:
        settings: The run's settings.
        out: The folder; one that holds fewer steps of this run gets the rest.
        steps: How many steps the folder is to hold; None = all of the run's budget.
        workers: Worker processes that deal; None = as the settings say.
        console: Where a person reads along.

    Returns:
        The exit code: 0 when finished or stopped, 75 after SIGUSR1.

    Raises:
        UsageError: If a source has no licence, or its settings don't fit its files.
        DataChangedError: If the folder was begun with other settings or data.
        SourceDownError: If a source can't be read, or a file of the folder is damaged.
        SaveError: If the disk refuses; the folder holds the whole shards before.
        FolderHeldError: If another process writes to the folder.
    """
    wanted = steps or derive(settings).steps
    with RunFolder(out), StopRequest() as stop:
        try:
            with stop.interrupting():
                return _tokenize(settings, out, wanted, workers, console)
        except InterruptedWaitError:
            console.print(f"{out}: stopped; the same command goes on", soft_wrap=True)
            return stop.exit_code


def _tokenize(
    settings: Settings, out: Path, wanted: int, workers: int | None, console: Console
) -> int:
    begun = None
    if (out / MANIFEST).exists():
        begun = open_tokens(settings, out)
        with progress_bar() as progress:
            verify_files(out, begun.manifest, lambda *n: progress("verifying", *n))
        if begun.manifest.steps >= wanted:
            line = f"{out}: holds {begun.manifest.steps} steps, verified; nothing to do"
            console.print(line, soft_wrap=True)
            return 0
    tokenizer = load_tokenizer(settings.tokenizer.name)
    sources = open_data(settings, out / LOCK if begun else None, write=False)
    state = begun.state_before(len(begun.manifest.shards)) if begun else None
    loader = open_loader(settings, sources, tokenizer, state, workers=workers)
    assert isinstance(loader, Loader)
    try:
        if begun is not None:
            manifest = begun.manifest
        else:
            manifest = _begin(settings, out, sources, loader.identity, tokenizer.vocabulary)
        sweep(out, manifest)
        _write(out, manifest, loader, wanted, console)
    finally:
        loader.close()
    return 0


def _begin(
    settings: Settings,
    out: Path,
    sources: list[Source],
    identity: dict[str, Any],
    vocabulary: int,
) -> Manifest:
    """Write a folder of no steps."""
    characters = settings.validation.characters_per_source
    texts = {source.name: keep_held_out(source, characters) for source in sources}
    write_lock(out / LOCK, [source.lock() for source in sources])
    write_json(out / HELD_OUT, texts)
    files = {name: Entry.of((out / name).read_bytes()) for name in (LOCK, HELD_OUT)}
    manifest = Manifest(
        identity=identity,
        data=order_settings(settings.data),
        vocabulary=vocabulary,
        held_out_characters=characters,
        versions={"summerlm": summerlm.__version__},
        files=files,
    )
    write_manifest(out, manifest)
    return manifest


def keep_held_out(source: Source, characters: int) -> dict[str, Any]:
    """Take the texts from which `take_text` takes the same as from the source.

    Args:
        source: The source.
        characters: The most characters that validation will ask for.

    Returns:
        `texts` and `complete`, as `TokenSource` takes them.
    """
    longest = longest_text(characters)
    left = characters + longest  # cut shorter, the texts may have to be one more
    texts: list[str] = []
    for text in source.held_out() if characters else ():
        if left <= 0:
            return {"texts": texts, "complete": False}
        texts.append(text[:longest])
        left -= len(texts[-1])
    return {"texts": texts, "complete": characters > 0}


def _write(out: Path, manifest: Manifest, loader: Loader, wanted: int, console: Console) -> None:
    """Deal and write shard after shard."""
    size = manifest.row_type.itemsize * manifest.identity["rows"] * wanted / 1e9
    console.print(f"{out}: writing {wanted:,} steps, {size:,.2f} GB", soft_wrap=True)
    incidents = JsonLines(out / "incidents.jsonl", lambda kind: True)

    def steps() -> Generator[Step, None, None]:
        with progress_bar() as progress:
            for step in loader:
                for incident in step.incidents:
                    console.print(f"warning: {incident['reason']}", soft_wrap=True)
                    incidents.write("incident", {"step": step.number, **incident}, None)
                yield step
                progress("tokenizing", step.number, wanted)

    dealt = steps()
    try:
        while manifest.steps < wanted:
            last = min(manifest.steps + steps_per_shard(manifest), wanted)
            manifest = write_shard(out, manifest, Shard(manifest.steps + 1, last), dealt)
    finally:
        dealt.close()
        incidents.close()
    console.print(f"{out}: holds {wanted:,} steps; set data.tokens to it", soft_wrap=True)
