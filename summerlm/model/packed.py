"""Weights laid out anew for fast float32 products, while a model is only read on a CPU.

torch multiplies float32 matrices with MKL, which leaves the AVX-512 of other makers' processors
idle: on an AMD EPYC oneDNN is 2.3 times as fast, once weights are in its own order (LOG.md). The
results are float32's, as before.

Flow: `generate` reads a model inside of `packed`, and `eval` inside of `scoring`.

Shapes: D inputs of a linear, whatever stands before them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from summerlm.model.transformer import Transformer


@contextmanager
def scoring(model: nn.Module, precision: torch.dtype | None) -> Iterator[None]:
    """Read a model for its scores alone: without dropout, gradients and compilation, `packed`.

    Args:
        model: The model; afterwards, also after an error, it trains if it trained before.
        precision: Autocast's dtype; None = the weights' own.

    Yields:
        Nothing.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    autocast = torch.autocast(device.type, precision, precision is not None)
    try:
        # a compiled block would be compiled anew for each shape of a batch
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast, packed(model):
            yield
    finally:
        model.train(was_training)


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Keep copies of a model's matrices in oneDNN's order, and multiply with these.

    Models on other devices, sharded ones, in other dtypes, or under autocast stay as they are; so
    does one that is packed already, and what is no `Transformer`.

    Args:
        model: The model; its weights may not change meanwhile, nor may gradients be wanted.

    Yields:
        Nothing.
    """
    if not isinstance(model, Transformer) or not _can_pack(model):
        yield
        return
    linears = [module for module in model.blocks.modules() if type(module) is nn.Linear]
    for linear in linears:
        setattr(linear, "forward", _product(linear.weight, linear.bias))  # noqa: B010
    setattr(model, "unembed", _product(model.head_weight, None))  # noqa: B010
    try:
        yield
    finally:
        delattr(model, "unembed")
        for linear in linears:
            delattr(linear, "forward")


def _can_pack(model: Transformer) -> bool:
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    whole = all(type(w) is nn.Parameter and w.dtype == torch.float32 for w in weights)
    here = model.head_weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    taken = torch.is_autocast_enabled("cpu") or "unembed" in vars(model)
    return whole and here and not taken


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Make the product of anything, (..., D), with a weight, (outputs, D)."""
    ready = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, ready, bias, "none", [], "")
