"""The state of a run as tables of tensors, and back, with every mismatch named.

Flow: `train`'s saving hook takes `model_tensors`; `load` and `recipes` give them back through
`restore`, which copies nothing before everything fits.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from summerlm.checkpoint.store import DamagedError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name a model's parameters; a shared one stands once, buffers are made anew on loading.

    Args:
        model: The model, compiled or not.

    Returns:
        Parameters by name, not copied.
    """
    return dict(model.named_parameters())


def restore(into: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Copy saved tensors into existing ones of the same names, shapes and dtypes.

    Args:
        into: The tensors to fill, in place.
        saved: What the file holds.
        path: The file, for the message.

    Raises:
        DamagedError: If a name is missing or extra, a shape or dtype differs, or a value is not
            finite; nothing has been copied then.
    """
    if missing := sorted(into.keys() - saved.keys()):
        raise DamagedError(f"{path}: has no tensor {missing[0]}")
    if extra := sorted(saved.keys() - into.keys()):
        raise DamagedError(f"{path}: tensor {extra[0]} is not part of this model")
    for name, tensor in saved.items():
        wanted = into[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise DamagedError(
                f"{path}: tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"this model wants {tuple(wanted.shape)} {wanted.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise DamagedError(f"{path}: tensor {name} holds a value that is not finite")
    with torch.no_grad():
        for name, tensor in saved.items():
            into[name].copy_(tensor)
