"""Which attention kernel is fastest for a shape?

    python benchmarks/attention.py --device cuda --json benchmarks/results/attention.json
    python benchmarks/attention.py --shape 8,512,8,8,32 --dtype float32

Every kernel of `summerlm.model.kernels` that can train on this device makes forward and backward
passes on the same queries, keys and values, all in turn, with the product's own framing: what a
kernel needs for ALiBi and borders between documents is part of its time. "default" is torch's
scaled_dot_product_attention without any of it: what a model without biases would pay. A ratio is
the default's seconds over the kernel's, taken round by round.

Shapes: B rows, T positions, H query heads, K key/value heads, C channels a head.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from summerlm.core.figures import circumstances, spread
from summerlm.core.files import write_json
from summerlm.model.config import ModelConfig
from summerlm.model.kernels import KERNELS, Memory, obstacle
from summerlm.model.transformer import Positions


class Rows(NamedTuple):
    """Shape of what is attended over."""

    B: int
    T: int
    H: int
    K: int
    C: int


SHAPES = {
    "cpu": [Rows(8, 512, 8, 8, 32)],
    # the 4.58B recipes, 350M, 125M
    "cuda": [
        Rows(4, 4096, 24, 8, 120),
        Rows(4, 4096, 32, 32, 96),
        Rows(12, 2048, 8, 4, 120),
        Rows(16, 2048, 12, 6, 56),
    ],
}


def main() -> None:
    arguments = parse()
    dtype = getattr(torch, arguments.dtype)
    figures = {
        **circumstances(arguments.device),
        "toy": arguments.toy,
        "dtype": arguments.dtype,
        "shapes": [],
    }
    for shape in arguments.shape or SHAPES[arguments.device]:
        kernels, refused = passes(shape, torch.device(arguments.device), dtype, arguments.alibi)
        found = compare(kernels, arguments.rounds, arguments.device == "cuda")
        figures["shapes"].append({"shape": shape._asdict(), "kernels": found, "refused": refused})
        print(*lines_of(figures["shapes"][-1]), sep="\n", flush=True)
        if arguments.json:
            write_json(arguments.json, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare kernels; see the file's head.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape",
        type=lambda text: Rows(*map(int, text.split(","))),
        action="append",
        metavar="B,T,H,K,C",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--alibi", action="store_true", help="with ALiBi's slopes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--toy", action="store_true", help="see that it runs; no figures to use")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.shape, arguments.rounds = [Rows(2, 32, 4, 2, 8)], 2
    return arguments


def passes(
    shape: Rows, device: torch.device, dtype: torch.dtype, alibi: bool
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Make one pass forward and backward of each kernel.

    Args:
        shape: Of the rows.
        device: Where.
        dtype: Of queries, keys and values.
        alibi: Whether keys lose by distance.

    Returns:
        The passes by name, and why the others aren't among them.
    """
    B, T, H, K, C = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, T, heads, C, device=device, dtype=dtype, requires_grad=True)
        for heads in (H, K, K)
    )
    upstream = torch.randn(B, T, H, C, device=device, dtype=dtype)
    config = ModelConfig(
        vocabulary=1,
        width=H * C,
        layers=1,
        heads=H,
        kv_heads=K,
        head_dim=C,
        mlp_hidden=1,
        alibi=alibi,
        context=T,
    )
    tokens = torch.zeros(B, T, dtype=torch.int64, device=device)

    def differentiate(y: Tensor) -> None:
        torch.autograd.grad(y, (q, k, v), upstream)

    def default() -> None:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        differentiate(y.transpose(1, 2))

    def by(name: str) -> Callable[[], None]:
        positions = Positions(config).to(device)
        positions.kernel = name

        def once() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                frame = positions(tokens, None)
                y = frame.attend(q, k, v, Memory(), 0.0)
            differentiate(y)

        return once

    refused = {name: obstacle(name, device, dtype, 0.0) for name in KERNELS}
    usable = {name: by(name) for name in KERNELS if refused[name] is None}
    return {"default": default} | usable, {name: why for name, why in refused.items() if why}


def compare(
    kernels: dict[str, Callable[[], None]], rounds: int, cuda: bool = False
) -> dict[str, Any]:
    """Time passes in turn.

    Args:
        kernels: Passes by name, "default" among them.
        rounds: Passes of each that count.
        cuda: Whether they run on a GPU.

    Returns:
        By name: seconds, and the default's over these; or what went wrong.
    """
    failed: dict[str, Any] = {}
    for name, once in kernels.items():
        try:
            for _ in range(2):
                seconds(once, cuda)
        except (RuntimeError, torch.OutOfMemoryError) as error:  # no such kernel for this shape
            failed[name] = {"failed": str(error).splitlines()[0]}
    left = {name: once for name, once in kernels.items() if name not in failed}
    taken = [{name: seconds(once, cuda) for name, once in left.items()} for _ in range(rounds)]
    measured = {
        name: {
            "seconds": spread([turn[name] for turn in taken]),
            "ratio": spread([turn["default"] / turn[name] for turn in taken]),
        }
        for name in left
    }
    return measured | failed


def seconds(once: Callable[[], None], cuda: bool) -> float:
    """Time one pass, on the device."""
    if not cuda:
        began = time.perf_counter()
        once()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    once()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Lay the figures out for people.

    Args:
        figures: What was written as JSON.

    Yields:
        A line a shape, and below it one a kernel.
    """
    for found in figures["shapes"]:
        yield from lines_of(found)


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} = {size}" for name, size in found["shape"].items())
    for name, row in found["kernels"].items():
        if "failed" in row:
            yield f"  {name}: failed: {row['failed']}"
        else:
            ms, ratio = row["seconds"]["median"] * 1e3, row["ratio"]
            told = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
            yield f"  {name}: {ms:.3g} ms, {told} times the default's speed"
    for name, why in found["refused"].items():
        yield f"  {name}: not here: {why}"


if __name__ == "__main__":
    main()
