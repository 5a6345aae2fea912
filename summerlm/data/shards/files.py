"""The settings of a source -> its files, in the order that every machine sees.

Flow: `sources` opens what `find_files` lists. Names are relative to the source's folder, so
that moving the data changes nothing, and are sorted by code point, whatever the disk's order.
"""

import glob
import os
from pathlib import Path

from summerlm.core.errors import UsageError
from summerlm.data.config import SourceConfig

MIRROR_VARIABLE = "SUMMERLM_HUB_MIRROR"


def find_files(source: str, config: SourceConfig, mirror: Path | None) -> list[tuple[str, Path]]:
    """List the files of a source.

    Args:
        source: The source's name, for messages.
        config: Its settings, with `hub` or `path`.
        mirror: Folder that holds `owner/name/...`; None = the environment's.

    Returns:
        Name inside the source and path of each file, sorted by name; never empty.

    Raises:
        UsageError: If there is no mirror, no such folder, or no file that matches.
    """
    if config.hub is not None:
        return _matches(source, _hub_folder(source, config.hub, mirror), config.files or "**/*")
    assert config.path is not None
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _matches(source, path, config.files or "**/*")
    if config.files is not None:
        raise UsageError(f"source {source}: `files` goes with a folder, and {path} is none")
    if path.is_file():
        return [(path.name, path)]
    parts = path.parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    if wild is None:
        raise UsageError(f"source {source}: {path}: no such file or folder")
    return _matches(source, Path(*parts[:wild]), str(Path(*parts[wild:])))


def _hub_folder(source: str, repository: str, mirror: Path | None) -> Path:
    if mirror is None:
        from_environment = os.environ.get(MIRROR_VARIABLE)
        if not from_environment:
            raise UsageError(
                f"source {source}: reading {repository} from the hub itself comes in a later "
                f"version; download it into DIR/{repository} (`hf download {repository} "
                f"--repo-type dataset --local-dir DIR/{repository}`) and set data.mirror=DIR or "
                f"{MIRROR_VARIABLE}=DIR"
            )
        mirror = Path(from_environment)
    folder = mirror.expanduser() / repository
    if not folder.is_dir():
        raise UsageError(f"source {source}: the mirror has no folder {folder}")
    return folder


def _matches(source: str, folder: Path, pattern: str) -> list[tuple[str, Path]]:
    """Match files below a folder; hidden ones only where the pattern spells out their dot."""
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UsageError(f"source {source}: `files` must stay below its folder, not {pattern!r}")
    names = {
        Path(name).as_posix()
        for name in glob.iglob(pattern, root_dir=folder, recursive=True)
        if (folder / name).is_file()
    }
    if not names:
        raise UsageError(f"source {source}: no file matches {pattern!r} below {folder}")
    return [(name, folder / name) for name in sorted(names)]
