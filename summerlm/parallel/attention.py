"""Which attention kernel a run takes: decided once, and told.

Flow: `layout.lay_out` asks `choose_kernel` on the leading rank and hands the answer to the model's
`Positions`; the run's folder keeps it, so that a restart computes the same bits.

On CPUs a rule decides, from figures of `benchmarks/attention.py`; it never changes from start to
start. GPUs are told apart by measuring every kernel that can do the shape.

Shapes: T context, H query heads, K key/value heads, C channels a head.
"""

import statistics
import time

import torch

from summerlm.core.errors import UsageError
from summerlm.model.config import ModelConfig
from summerlm.model.kernels import KERNELS, Memory, install, obstacle
from summerlm.model.transformer import Positions

PLAIN_CONTEXT = 2048  # of CPUs: longer rows keep too much, T^2 / 2 probabilities a head
REPEATS = 5


def choose_kernel(
    wish: str, config: ModelConfig, device: torch.device, dtype: torch.dtype | None
) -> str:
    """Decide how whole rows attend.

    Args:
        wish: `parallel.attention`: "auto" or one of `kernels.KERNELS`.
        config: The model's settings.
        device: Where the model runs.
        dtype: Autocast's dtype, or None for float32.

    Returns:
        One of `kernels.KERNELS`.

    Raises:
        UsageError: If the kernel that is wished for can't train this model here.
    """
    numbers = dtype or torch.float32
    if wish != "auto":
        if (why := obstacle(wish, device, numbers, config.dropout)) is not None:
            raise UsageError(f"parallel.attention = {wish!r}: {why}")
        if device.type == "cuda" and wish not in measure_kernels(
            config, device, numbers, only=wish
        ):
            raise UsageError(
                f"parallel.attention = {wish!r}: torch has no such kernel here for heads of "
                f"{config.head_dim} channels and 8 more for biases; 'auto' finds one"
            )
        return wish
    if device.type == "cpu":
        return "plain" if config.context <= PLAIN_CONTEXT else "sdpa"
    seconds = measure_kernels(config, device, numbers)
    return min(seconds, key=seconds.__getitem__)


def measure_kernels(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    rows: int = 1,
    *,
    only: str | None = None,
) -> dict[str, float]:
    """Time every kernel that can train a model here, forward and backward.

    Args:
        config: The model's settings, of which the attention's shape, biases and dropout count.
        device: Where to measure.
        dtype: Dtype of queries, keys and values.
        rows: Rows of a whole context.
        only: The one kernel to time; None for all.

    Returns:
        Median seconds of a layer's attention by kernel; those with an obstacle are left out, those
        that torch refuses for this shape, and, of all on GPUs, "plain", which keeps too much.
    """
    seconds = {}
    for name in KERNELS if only is None else (only,):
        if only is None and name == "plain" and device.type != "cpu":
            continue
        if obstacle(name, device, dtype, config.dropout) is not None:
            continue
        try:
            install(name)
            seconds[name] = _seconds(name, config, device, dtype, rows)
        except RuntimeError as error:
            # cuDNN and flash attention take some sizes of heads on some GPUs alone
            if name == "sdpa" or isinstance(error, torch.OutOfMemoryError):
                raise
    return seconds


def _seconds(
    name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, rows: int
) -> float:
    T, C = config.context, config.head_dim
    with device:
        positions = Positions(config)
    positions.kernel = name
    shapes = [(rows, T, heads, C) for heads in (config.heads, config.kv_heads, config.kv_heads)]
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    tokens = torch.zeros(rows, T, dtype=torch.int64, device=device)
    taken = []
    for _ in range(1 + REPEATS):
        _wait(device)
        began = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            frame = positions(tokens, None)
            y = frame.attend(q, k, v, Memory(), config.dropout)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
        _wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])  # the first one looks for algorithms


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
