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
from summerlm.parallel.attention import choose_kernel
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


def settle_kernel(
    settings: Settings, folder: RunFolder, device: torch.device, dtype: torch.dtype | None
) -> Settings:
    """Put an attention kernel in place of "auto": for a run that goes on, that it began with.

    Two starts may measure kernels differently, and another kernel rounds differently. On a device
    of another kind the choice is made anew: what is fastest on CPUs keeps too much on GPUs.

    Args:
        settings: The run's settings.
        folder: Its folder; one without a manifest belongs to a run that begins.
        device: Where it trains.
        dtype: Autocast's dtype, or None for float32.

    Returns:
        The settings, with the manifest's kernel, if that one can still be had, or a new choice.

    Raises:
        UsageError: If the kernel that is asked for can't train this model here.
    """
    wish, manifest = settings.parallel.attention, folder.path / "manifest.json"
    if wish == "auto" and manifest.exists():
        began = read_json(manifest)
        kernel, numbers = began.get("attention"), dtype or torch.float32
        same = str(began["hardware"]["device"]).startswith(device.type)
        if same and kernel in KERNELS:
            wish = "auto" if obstacle(kernel, device, numbers, settings.model.dropout) else kernel
    kernel = choose_kernel(wish, settings.model, device, dtype)
    parallel = settings.parallel.model_copy(update={"attention": kernel})
    return settings.model_copy(update={"parallel": parallel})


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
