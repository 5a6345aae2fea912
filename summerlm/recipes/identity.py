"""What a run is made of, written into its folder when it begins.

Flow: `opening` calls `write_identity` as the last thing before a run can make steps.
"""

from typing import Any

import torch

import summerlm
from summerlm.core.config import dump_toml
from summerlm.core.figures import commit
from summerlm.core.files import RunFolder, read_json, write_atomically
from summerlm.core.hardware import describe
from summerlm.model.kernels import KERNELS, obstacle
from summerlm.parallel.config import ParallelConfig
from summerlm.recipes.data.locking import Sources
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.tokenizer import Tokenizer


def write_identity(
    settings: Settings,
    folder: RunFolder,
    tokenizer: Tokenizer,
    sources: Sources,
    device: torch.device,
    kernel: str,
) -> None:
    """Write down what the run is made of; the settings last, for they mark a run as begun.

    Args:
        settings: The run's settings.
        folder: Its folder, held.
        tokenizer: Its tokenizer.
        sources: Its data.
        device: Where it trains.
        kernel: The attention kernel that it began with.
    """
    if not folder.settings.exists():
        lock = [source.lock() for source in sources]
        tokenizer.save(folder.path)
        facts = {
            **environment(device),
            "tokenizer": tokenizer.fingerprint,
            "attention": kernel,
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


def keep_kernel(
    settings: Settings, folder: RunFolder, device: torch.device, dtype: torch.dtype | None
) -> ParallelConfig:
    """Let a run that goes on attend as it began, where its settings leave the choice.

    Two starts may measure kernels differently, and another kernel rounds differently. On a device
    of another kind the choice is made anew: what is fastest on CPUs keeps too much on GPUs.

    Args:
        settings: The run's settings.
        folder: Its folder; one without a manifest belongs to a run that begins.
        device: Where it trains.
        dtype: Autocast's dtype, or None for float32.

    Returns:
        How the run is executed: with the manifest's kernel, if that one can still be had.
    """
    parallel, manifest = settings.parallel, folder.path / "manifest.json"
    if parallel.attention != "auto" or not manifest.exists():
        return parallel
    began = read_json(manifest)
    kernel = began.get("attention", "auto")
    if not str(began["hardware"]["device"]).startswith(device.type):
        return parallel
    dtype = dtype or torch.float32
    if kernel not in KERNELS or obstacle(kernel, device, dtype, settings.model.dropout):
        return parallel
    return parallel.model_copy(update={"attention": kernel})


def environment(device: torch.device) -> dict[str, Any]:
    """Collect what a reader of a run must know of where it was made.

    Args:
        device: Where it trains.

    Returns:
        Package version and commit, machine and versions.
    """
    return {
        "summerlm": summerlm.__version__,
        "commit": commit(),
        "hardware": describe(device),
    }
