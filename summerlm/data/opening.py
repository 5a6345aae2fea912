"""The settings of the data, and its lock -> opened sources.

Flow: `recipes` call `open_sources`, which for each source
    1. lists its files (`find_files`, `library_files`) and holds them against the lock;
    2. opens them as shards, whose sizes the lock knows where there is one;
    3. sets rows aside by a rule of `heldout`, and makes a `Source`;
and then finds the rows to drop of those that ask for it (`drop_lists`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from summerlm.core.errors import DataChangedError
from summerlm.core.progress import Progress, silent
from summerlm.data.config import DataConfig
from summerlm.data.heldout import HeldOut, HeldOutFiles, HeldOutRows
from summerlm.data.hygiene import Evaluation, drop_lists, open_evaluation
from summerlm.data.lock import lock_differences
from summerlm.data.rules.catalogue import expand
from summerlm.data.shards.files import Listing, find_files
from summerlm.data.shards.formats import open_shards
from summerlm.data.shards.stdlib import library_files
from summerlm.data.shards.transfer import Transfer
from summerlm.data.sources import Source


def open_sources(
    config: DataConfig,
    lanes: int,
    lock: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress = silent,
) -> list[Source]:
    """Open all sources: find their files, learn their rows.

    Args:
        config: The settings of the data.
        lanes: Lanes that will share each source's units.
        lock: `Source.lock` of each source as it was; None = take the data as they are now.
        progress: Called while it lasts.

    Returns:
        The sources in the order of the settings.

    Raises:
        UsageError: If a source's settings don't fit its files, or it holds too little text.
        DataChangedError: If the data differ from the lock's.
        SourceDownError: If a file can't be read.
    """
    transfer = Transfer(config.stall_timeout_s, config.deadline_s)
    known = {entry["name"]: entry for entry in lock or ()}
    sources: list[Source] = []
    evaluation = None  # of the first source that asks for it, and then of all
    for name in config.sources:
        sources.append(
            open_source(name, config, lanes, transfer, known.get(name), progress, evaluation)
        )
        evaluation = evaluation or sources[-1].evaluation
    if (lists := drop_lists(sources, progress)) is not None:
        for source in sources:
            source.leave_out(lists)
    if lock is not None:
        refuse_changes(lock, [source.lock() for source in sources])
    return sources


def open_source(
    name: str,
    config: DataConfig,
    lanes: int,
    transfer: Transfer,
    pinned: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    evaluation: Evaluation | None = None,
) -> Source:
    """Open one source.

    Args:
        name: Its name in the settings.
        config: The settings of the data.
        lanes: Lanes that will share its units.
        transfer: Reads its files.
        pinned: Its `Source.lock` as it was; None = take it as it is now.
        progress: Called while it lasts.
        evaluation: The evaluation sets; None = they are opened where a rule asks for them.

    Returns:
        The source.

    Raises:
        UsageError: If its settings don't fit its files, or it holds too little text.
        DataChangedError: If its files differ from the pinned ones.
        SourceDownError: If a file can't be read.
    """
    source = config.sources[name]
    listing, rule = _find(name, config, transfer, pinned, progress)
    sizes = None
    if pinned is not None:
        entries = [file.pin() for file in listing.files]
        old = {**pinned, "files": [{k: f[k] for k in entries[0]} for f in pinned["files"]]}
        refuse_changes([old], [{**old, "files": entries}])
        sizes = {f["name"]: (tuple(f["rows"]), tuple(f["group_bytes"])) for f in pinned["files"]}
    shards = open_shards(name, source, listing.files, transfer, sizes, progress)
    rule = rule or HeldOutRows(
        name, config.held_out_fraction, {s.file.name: sum(s.groups) for s in shards}
    )
    if "contamination" not in expand(source.rules):
        evaluation = None
    elif evaluation is None:
        evaluation = open_evaluation(config, transfer, (pinned or {}).get("evaluation_sets"))
    revision = listing.revision if pinned is None else pinned["revision"]
    return Source(name, source, revision, shards, transfer, rule, evaluation, lanes)


def refuse_changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> None:
    """Refuse data that differ from a lock.

    Args:
        old: The lock.
        new: The same of the data as they are.

    Raises:
        DataChangedError: If they differ; the message names the first difference.
    """
    if found := lock_differences(old, new):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DataChangedError(
            f"the data differ from their lock: {found[0]}{more}; restore them, or choose another "
            "run.folder for a new run"
        )


def _find(
    name: str,
    config: DataConfig,
    transfer: Transfer,
    pinned: Mapping[str, Any] | None,
    progress: Progress,
) -> tuple[Listing, HeldOut | None]:
    """List a source's files; with the rule that holds some out, where they come with one."""
    source = config.sources[name]
    if source.python_stdlib:
        files, held_out = library_files()
        return Listing(None, files), HeldOutFiles(held_out)
    former = None if pinned is None else Listing.of_pin(pinned)
    return find_files(name, source, config.mirror, transfer, former, progress), None
