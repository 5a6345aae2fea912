"""Looking after the checkpoints of a run: what is there, what is whole, what stays.

Flow: `cli_checkpoint` calls one of these for each command. `list_checkpoints` and
`verify_checkpoints` only read; `prune_checkpoints` and `roll_back` hold the run folder meanwhile.
"""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from summerlm.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    check_file,
    read_manifest,
    verify,
)
from summerlm.checkpoint.reading import check_finite
from summerlm.checkpoint.store import Store
from summerlm.core.config import read_settings
from summerlm.core.errors import NoCheckpointError, UsageError
from summerlm.core.files import RunFolder
from summerlm.recipes.settings import Settings
from summerlm.recipes.storing import retention


def list_checkpoints(path: Path) -> dict[str, Any]:
    """Tell what checkpoints a run has, by their manifests alone.

    Args:
        path: The run folder.

    Returns:
        `checkpoints`: a list of `step`, `bytes`, `ranks` (that wrote it) and `error` (null, or why
        its manifest can't be read), by step. `aside`: names of folders that are no checkpoints
        any more: damaged ones, branches, drafts.
    """
    folder = _run(path)
    store = Store(folder.checkpoints, warn=_ignore)
    found = []
    for step in store.steps():
        facts: dict[str, Any] = {"step": step, "bytes": None, "ranks": None, "error": None}
        try:
            manifest = read_manifest(store.path(step))
            facts["bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
            facts["ranks"] = manifest["world"]
        except (DamagedError, NoCheckpointError) as error:
            facts["error"] = str(error)
        found.append(facts)
    known = {store.path(step).name for step in store.steps()}
    names = (entry.name for entry in folder.checkpoints.iterdir()) if found else ()
    return {"checkpoints": found, "aside": sorted(set(names) - known)}


def verify_checkpoints(path: Path) -> dict[str, Any]:
    """Read every byte of every checkpoint.

    Args:
        path: A run folder, or one checkpoint.

    Returns:
        `files`: a list of `step`, `file` and `error`, null where it is what the manifest says and
        all its values are finite. `exit_code`: 3 where any is damaged, else 0.

    Raises:
        NoCheckpointError: If there is no checkpoint.
    """
    if (path / MANIFEST).is_file():
        folders = [path]
    else:
        store = Store(_run(path).checkpoints, warn=_ignore)
        folders = [store.path(step) for step in store.steps()]
    if not folders:
        raise NoCheckpointError(f"{path}: the run has no checkpoint yet")
    files = [row for folder in folders for row in _verify_files(folder)]
    bad = any(row["error"] is not None for row in files)
    return {"files": files, "exit_code": NoCheckpointError.exit_code if bad else 0}


def _verify_files(folder: Path) -> list[dict[str, Any]]:
    rows: dict[str, str | None] = {MANIFEST: None}
    try:
        manifest = read_manifest(folder)
    except (DamagedError, NoCheckpointError) as error:
        return [{"checkpoint": folder.name, "file": MANIFEST, "error": str(error)}]
    for name in manifest["files"]:
        rows[name] = None
        try:
            check_file(folder, name, manifest)
            if name.endswith(".safetensors"):
                check_finite(folder / name)
        except DamagedError as error:
            rows[name] = str(error)
    for entry in sorted(folder.iterdir()):
        rows.setdefault(entry.name, f"{entry}: does not belong here")
    return [
        {"checkpoint": folder.name, "file": name, "error": error} for name, error in rows.items()
    ]


def prune_checkpoints(path: Path, keep_last: int | None) -> list[str]:
    """Delete old checkpoints as the run itself would, and what killed processes left.

    Args:
        path: The run folder.
        keep_last: How many of the newest that verify stay; None = as the run's settings say.

    Returns:
        Lines for a person: what was deleted, and what is damaged.

    Raises:
        FolderHeldError: If the run is in progress.
    """
    with _run(path) as folder:
        settings = read_settings(Settings, folder.settings)
        store = Store(folder.checkpoints, warn=_ignore)
        before = store.steps()
        notes = store.prune(retention(settings, keep_last))
        store.clear_drafts()
        gone = sorted(set(before) - set(store.steps()))
    words = f"deleted steps {', '.join(map(str, gone))}" if gone else "nothing to delete"
    left = ", ".join(map(str, store.steps())) or "none"
    return [*(f"warning: {note}" for note in notes), f"{words}; there are steps {left}"]


def roll_back(path: Path, step: int) -> list[str]:
    """Let a run go on from an earlier checkpoint: later ones move to a branch folder.

    Args:
        path: The run folder.
        step: The step to go on after.

    Returns:
        Lines for a person: what was moved.

    Raises:
        UsageError: If the step has no checkpoint.
        NoCheckpointError: If that checkpoint is damaged; nothing is moved then.
        FolderHeldError: If the run is in progress.
    """
    with _run(path) as folder:
        lines: list[str] = []
        store = Store(folder.checkpoints, lines.append)
        steps = store.steps()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UsageError(f"--to-step {step}: has no checkpoint; there are steps {there}")
        try:
            verify(store.path(step))
        except DamagedError as error:
            raise NoCheckpointError(f"{error}; nothing is moved") from None
        store.branch_off(step)
    return lines or [f"step {step} is the last checkpoint already; nothing to move"]


def show_list(facts: dict[str, Any], console: Console) -> None:
    """Print what `list_checkpoints` returns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "bytes", "ranks"):
        table.add_column(heading, justify="right")
    table.add_column("manifest", overflow="fold")
    for row in facts["checkpoints"]:
        size = "" if row["bytes"] is None else f"{row['bytes']:,}"
        words = Text(row["error"], "red") if row["error"] else Text("whole")
        table.add_row(str(row["step"]), size, str(row["ranks"] or ""), words)
    console.print(table if facts["checkpoints"] else "no checkpoint yet")
    for name in facts["aside"]:
        console.print(f"not a checkpoint: {name}", soft_wrap=True, highlight=False)


def show_verified(facts: dict[str, Any], console: Console) -> None:
    """Print what `verify_checkpoints` returns."""
    for row in facts["files"]:
        if row["error"] is None:
            line = Text(f"whole    {row['checkpoint']}/{row['file']}")
        else:
            line = Text(f"damaged  {row['error']}", "red")
        console.print(line, soft_wrap=True)


def _run(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.settings.is_file() or (path / MANIFEST).exists():
        raise UsageError(f"{path}: not a run folder")
    return folder


def _ignore(line: str) -> None:
    """Drop what a store would tell a run."""
