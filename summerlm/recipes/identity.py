"""What a run is made of, written into its folder when it begins.

Flow: `opening` calls `write_identity` as the last thing before a run can make steps.
"""

import subprocess
from pathlib import Path
from typing import Any

import torch

import summerlm
from summerlm.core.config import dump_toml
from summerlm.core.files import RunFolder, write_atomically
from summerlm.core.hardware import describe
from summerlm.recipes.data.locking import Sources
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.tokenizer import Tokenizer


def write_identity(
    settings: Settings,
    folder: RunFolder,
    tokenizer: Tokenizer,
    sources: Sources,
    device: torch.device,
) -> None:
    """Write down what the run is made of; the settings last, for they mark a run as begun.

    Args:
        settings: The run's settings.
        folder: Its folder, held.
        tokenizer: Its tokenizer.
        sources: Its data.
        device: Where it trains.
    """
    if not folder.settings.exists():
        lock = [source.lock() for source in sources]
        tokenizer.save(folder.path)
        facts = {
            **environment(device),
            "tokenizer": tokenizer.fingerprint,
            "data": {
                entry["name"]: {
                    "revision": entry["revision"],
                    "files": [file["name"] for file in entry["files"]],
                }
                for entry in lock
            },
        }
        folder.write_json("manifest.json", facts)
    write_atomically(folder.settings, dump_toml(settings).encode())


def environment(device: torch.device) -> dict[str, Any]:
    """Collect what a reader of a run must know of where it was made.

    Args:
        device: Where it trains.

    Returns:
        Package version and commit, machine and versions.
    """
    return {
        "summerlm": summerlm.__version__,
        "commit": _commit(),
        "hardware": describe(device),
    }


def _commit() -> str | None:
    """Give the commit of the package's checkout, or None for an installed package."""
    root = Path(summerlm.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
