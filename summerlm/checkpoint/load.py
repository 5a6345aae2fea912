"""A trained model from a path: a run folder, or one checkpoint of it.

Flow: `generate.engine`, `eval` and the command line call `load`; only verified checkpoints
are read, and a damaged newest one is passed over with a warning, never changed.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from summerlm.checkpoint.manifest import MANIFEST, DamagedError, read_manifest, verify
from summerlm.checkpoint.reading import fill
from summerlm.checkpoint.store import Store
from summerlm.core.config import validate
from summerlm.core.errors import NoCheckpointError, UsageError
from summerlm.core.files import read_json
from summerlm.core.parts import Part
from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Transformer
from summerlm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint gives to those who use the model.

    Attributes:
        model: In evaluation mode, on the device asked for, float32.
        tokenizer: The tokenizer that it was trained with.
        folder: The checkpoint that was read.
        state: The run's JSON state at that step, with `step` and `tokens`.
    """

    model: Transformer
    tokenizer: Tokenizer
    folder: Path
    state: dict[str, Any]


def load(path: Path, device: torch.device) -> Loaded:
    """Read the model and tokenizer of a run or checkpoint folder.

    Args:
        path: A run folder, of which the newest good checkpoint is taken, or a checkpoint.
        device: Where the weights go.

    Returns:
        The model in evaluation mode with its tokenizer and state.

    Raises:
        UsageError: If the path is neither.
        NoCheckpointError: If no checkpoint there can be trusted.
    """
    models: list[Transformer] = []
    folder = newest_good(path, lambda found: models.append(_read_model(found)))
    (model,) = models
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    state = read_json(folder / "state.json")
    check_tokenizer(tokenizer, state, folder)
    return Loaded(model.to(device).eval(), tokenizer, folder, state)


def _no_reading(folder: Path) -> None:
    """Read nothing of a checkpoint that verifies."""


def newest_good(path: Path, read: Callable[[Path], None] = _no_reading) -> Path:
    """Find the checkpoint that a path means, without changing anything on disk.

    Args:
        path: A run folder or a checkpoint folder.
        read: Takes what is needed of a checkpoint that verifies; raises DamagedError where that
            can't be trusted after all.

    Returns:
        The folder of a checkpoint that verifies.

    Raises:
        UsageError: If the path is neither.
        NoCheckpointError: If no checkpoint there can be trusted.
    """
    if (path / MANIFEST).is_file():
        candidates = [path]
    elif (path / "checkpoints").is_dir():
        store = Store(path / "checkpoints", warn=warnings.warn)
        candidates = [store.path(step) for step in reversed(store.steps())]
        if not candidates:
            raise NoCheckpointError(f"{path}: the run has no checkpoint yet")
    else:
        raise UsageError(f"{path}: neither a run folder nor a checkpoint")
    reasons = []
    for candidate in candidates:
        try:
            verify(candidate)
            read(candidate)
        except DamagedError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"checkpoint {reason}; taking {candidate.name}", stacklevel=2)
        return candidate
    raise NoCheckpointError("; ".join(reasons))


def check_tokenizer(tokenizer: Tokenizer, state: dict[str, Any], folder: Path) -> None:
    """Refuse a tokenizer that is not the one a checkpoint was trained with.

    Args:
        tokenizer: The tokenizer at hand.
        state: The checkpoint's JSON state.
        folder: The checkpoint, for the message.

    Raises:
        UsageError: If the fingerprints differ.
    """
    if tokenizer.fingerprint != state["tokenizer"]:
        raise UsageError(
            f"{folder}: was trained with tokenizer {state['tokenizer'][:12]}, "
            f"this one is {tokenizer.fingerprint[:12]}; set tokenizer.name to the run's own"
        )


def _read_model(folder: Path) -> Transformer:
    config = validate(ModelConfig, read_json(folder / "model.json"), str(folder / "model.json"))
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    parts = {name: Part.whole(weight.data) for name, weight in model.named_parameters()}
    fill(folder, read_manifest(folder), "model", parts)
    return model
