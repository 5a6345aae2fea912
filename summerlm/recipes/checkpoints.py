"""Looking after the checkpoints of a run: what is there, what is whole, what stays.

Flow: `cli_checkpoint` calls one of these for each command. `list_checkpoints` and
`verify_checkpoints` only read; `prune_checkpoints` and `roll_back` hold the run folder meanwhile.
"""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from summerlm.checkpoint.best import Measured
from summerlm.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    check_file,
    read_manifest,
    verify,
)
from summerlm.checkpoint.reading import check_finite
from summerlm.checkpoint.store import ASIDE, DRAFTS, Store
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
        `checkpoints`: a list of `step`, `bytes`, `ranks` (that wrote it), `measured` (the figure
        that the run judges them by, or null) and `error` (null, or why its manifest can't be
        read), by step. `best`: `metric`, `value`, `step` and `checkpoint`, the path, of the one
        that measured best, or null. `aside`: `name`, `bytes` and `what` of each folder beside them
        that a start of the run doesn't read.
    """
    folder = _run(path)
    store = Store(folder.checkpoints, warn=_ignore)
    measured = store.best_first()
    values = {own.step: own.value for own in measured}
    found = []
    for step in store.steps():
        facts: dict[str, Any] = {"step": step, "bytes": None, "ranks": None, "error": None}
        facts["measured"] = values.get(step)
        try:
            manifest = read_manifest(store.path(step))
            facts["bytes"] = sum(entry["bytes"] for entry in manifest["files"].values())
            facts["ranks"] = manifest["world"]
        except (DamagedError, NoCheckpointError) as error:
            facts["error"] = str(error)
        found.append(facts)
    aside = [
        {"name": path.name, "bytes": _size(path), "what": _what(path)}
        for path in store.aside(*ASIDE)
    ]
    return {"checkpoints": found, "best": _best(store, measured), "aside": aside}


def _best(store: Store, measured: Sequence[Measured]) -> dict[str, Any] | None:
    """Name the first of the checkpoints that were measured, best first."""
    if not measured:
        return None
    best = measured[0]
    return {
        "metric": best.metric,
        "value": best.value,
        "step": best.step,
        "checkpoint": str(store.path(best.step)),
    }


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


def prune_checkpoints(path: Path, keep_last: int | None, leftovers: bool) -> list[str]:
    """Delete old checkpoints as the run itself would, and what killed processes left.

    Args:
        path: The run folder.
        keep_last: How many of the newest that verify stay; None = as the run's settings say.
        leftovers: Whether branches and damaged ones that were set aside go too.

    Returns:
        Lines for a person: what was deleted, what stays, and what is damaged.

    Raises:
        FolderHeldError: If the run is in progress.
    """
    with _run(path) as folder:
        settings = read_settings(Settings, folder.settings)
        store = Store(folder.checkpoints, warn=_ignore)
        before = {step: _size(store.path(step)) for step in store.steps()}
        lines = [f"warning: {note}" for note in store.prune(retention(settings, keep_last))]
        kept, bad, freed = store.steps(), store.untrusted(), 0
        for step in sorted(before.keys() - set(kept)):
            lines.append(f"deleted step {step}: {before[step]:,} bytes")
            freed += before[step]
        for entry in store.aside(*(ASIDE if leftovers else DRAFTS)):
            size = _size(entry)
            shutil.rmtree(entry, ignore_errors=True)
            size -= _size(entry)
            lines.append(f"deleted {entry.name}, {_what(entry)}: {size:,} bytes")
            freed += size
        lines.append(f"{freed:,} bytes freed" if freed else "nothing to delete")
        if good := [step for step in kept if step not in bad]:
            lines.append(f"kept: {_name(good)}")
        if bad:
            lines.append(f"damaged, and not counted: {_name(bad)}")
        if left := store.aside(*ASIDE):
            size = sum(map(_size, left))
            lines.append(f"left beside, to be deleted by --leftovers: {size:,} bytes")
    return lines


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
            there = f"there are {_name(steps)}" if steps else "there is none yet"
            raise UsageError(f"--to-step {step}: has no checkpoint; {there}")
        try:
            verify(store.path(step))
        except DamagedError as error:
            others = f"; there are {_name(steps)}" if len(steps) > 1 else ""
            raise NoCheckpointError(f"{error}; nothing is moved{others}") from None
        store.branch_off(step)
    config, same = (shlex.quote(str(words)) for words in (folder.settings, path))
    go_on = f"`summerlm train {config} run.folder={same}` goes on after step {step}"
    if not lines:
        return [f"step {step} is the last checkpoint already: nothing to move", go_on]
    delete = f"`summerlm checkpoint prune {same} --leftovers` deletes what was moved"
    return [*lines, go_on, delete]


def show_list(path: Path, facts: dict[str, Any], console: Console) -> None:
    """Print what `list_checkpoints` returns for a run folder."""
    name = shlex.quote(str(path))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    best = facts["best"]
    for heading in ("step", "bytes", "ranks", *([best["metric"]] if best else ())):
        table.add_column(heading, justify="right")
    table.add_column("manifest", overflow="fold")
    for row in facts["checkpoints"]:
        size = "" if row["bytes"] is None else f"{row['bytes']:,}"
        value = "" if row["measured"] is None else f"{row['measured']:.4f}"
        words = Text(row["error"], "red") if row["error"] else Text("whole")
        table.add_row(
            str(row["step"]), size, str(row["ranks"] or ""), *([value] if best else ()), words
        )
    if facts["checkpoints"]:
        console.print(table)
        _say(console, f"`summerlm checkpoint verify {name}` reads their files as well")
    else:
        _say(console, "no checkpoint yet")
    if best:
        _say(console, f"best by {best['metric']}: step {best['step']}, {best['checkpoint']}")
    for row in facts["aside"]:
        _say(console, f"beside: {row['name']}, {row['what']}: {row['bytes']:,} bytes")
    if facts["aside"]:
        _say(console, f"`summerlm checkpoint prune {name} --leftovers` deletes what lies beside")


def show_verified(facts: dict[str, Any], console: Console) -> None:
    """Print what `verify_checkpoints` returns, and how many files are whole."""
    for row in facts["files"]:
        if row["error"] is None:
            _say(console, f"whole    {row['checkpoint']}/{row['file']}")
        else:
            _say(console, f"damaged  {row['error']}", "red")
    files, checkpoints = len(facts["files"]), {row["checkpoint"] for row in facts["files"]}
    bad = [row["checkpoint"] for row in facts["files"] if row["error"] is not None]
    several = f"{len(checkpoints)} checkpoints"
    count = f"{files} files of {several if len(checkpoints) > 1 else 'a checkpoint'}"
    if bad:
        names = ", ".join(sorted(set(bad)))
        _say(console, f"{len(bad)} of {count} damaged, in {names}", "red")
        good = sorted(checkpoints - set(bad))
        goes = f"the newest whole one is {good[-1]}" if good else "no checkpoint is whole"
        _say(console, goes)
    else:
        _say(console, f"{count}: all whole")


def _name(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style), soft_wrap=True)


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where it is gone."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _what(folder: Path) -> str:
    """Say what a folder beside the checkpoints is."""
    return next(what for prefix, what in ASIDE.items() if folder.name.startswith(prefix))


def _run(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.settings.is_file() or (path / MANIFEST).exists():
        raise UsageError(f"{path}: not a run folder")
    return folder


def _ignore(line: str) -> None:
    """Drop what a store would tell a run."""
