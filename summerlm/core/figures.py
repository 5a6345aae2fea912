"""Figures that someone measured: the spread of repeats, and where, when and how they were taken.

Flow: the recipe `benching` and the programs in `benchmarks/` write `circumstances` beside what they
measured; `docs/make_performance.py` reads both.
"""

import datetime
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from summerlm.core.hardware import describe

PACKAGES = ("summerlm", "numpy", "tokenizers", "pyarrow")  # beside Python and torch


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Sum up repeats of one figure.

    Args:
        values: The figure of each repeat, at least one.

    Returns:
        Median, lowest and highest value, and all of them in order.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'lowest': 1.0, 'highest': 3.0, 'all': [3.0, 1.0, 2.0]}
    """
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "all": list(values),
    }


def circumstances(device: str = "cpu", program: str = "python") -> dict[str, Any]:
    """Say where, when and how figures were taken, in JSON values.

    Args:
        device: What was measured: "cpu" or "cuda".
        program: What was called with this process's arguments: "python" with a file, "summerlm".

    Returns:
        Date, command, commit, hardware, and versions, None for packages that aren't installed.
    """
    words = sys.argv if program == "python" else sys.argv[1:]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([program, *words]),
        "commit": commit(),
        "hardware": {**describe(torch.device(device)), "cores": len(os.sched_getaffinity(0))},
        "versions": {package: _version(package) for package in PACKAGES},
    }


def commit() -> str | None:
    """Name the checkout's commit, with "+" where files differ from it; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    """Give an installed package's version; None where it runs from a checkout or isn't here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
