"""Globs over names, so that a store and the hub list what a folder of this machine would.

Flow: `files` and `remote` ask `pattern_of` for the glob that the settings mean, and `fits` for
names that lie in no folder of this machine.
"""

import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from summerlm.core.errors import UsageError
from summerlm.data.config import SourceConfig

EVERYTHING = "**/*"


def pattern_of(source: str, config: SourceConfig) -> str:
    """Give the glob below the folder or repository that the settings ask for.

    Args:
        source: The source's name, for messages.
        config: Its settings, of which `data_dir` and `files` count.

    Returns:
        The glob.

    Raises:
        UsageError: If it leads out of the folder.
    """
    for setting in (config.data_dir, config.files):
        if setting and (PurePosixPath(setting).is_absolute() or ".." in setting.split("/")):
            raise UsageError(f"source {source}: {setting!r} must stay below the source's folder")
    below = glob.escape(PurePosixPath(config.data_dir).as_posix()) + "/" if config.data_dir else ""
    return below + PurePosixPath(config.files or EVERYTHING).as_posix()


def fits(name: str, pattern: str) -> bool:
    """Tell whether a name matches a glob, as `glob.glob` of Python has it.

    Args:
        name: A path with `/`.
        pattern: The glob: `**` crosses folders, and a leading dot must be spelled out.

    Returns:
        Whether it matches.

    Example:
        >>> fits("data/en/0.parquet", "data/**/*.parquet"), fits("data/.0.parquet", "**/*")
        (True, False)
    """
    return _fits(name.split("/"), pattern.split("/"))


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not parts or not pattern:
        return not parts and not pattern
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        if len(pattern) == 1:
            return not any(part.startswith(".") for part in parts)
        return _fits(parts, pattern[1:]) or (not hidden and _fits(parts[1:], pattern))
    shown = not hidden or pattern[0].startswith(".")
    return shown and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
