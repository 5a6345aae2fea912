"""What benchmarks share: children on chosen cores, spread of repeats, origin of figures.

Flow: a benchmark starts each side of a comparison as a `Child`, asks it for slices of work in
turn, sums up with `spread`, and writes one object with `circumstances` beside its figures.
"""

import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

import torch

from summerlm.core.hardware import describe

# one thread of everything, for all sides alike: the unit is a core
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

ONE_CORE = {max(os.sched_getaffinity(0))}  # where single-core figures are taken


class Child:
    """A program that prints a line of JSON for each line that it reads, until leaving.

    Args:
        command: The program and its arguments.
        cores: Cores that it may run on; None = all.
        environment: Variables beside this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        cores: set[int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._command = command
        here = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores or here)  # a child inherits it
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        os.sched_setaffinity(0, here)

    def __enter__(self) -> "Child":
        """Give the child itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the program end as it reads no more, or kill it."""
        try:
            self._process.communicate(timeout=10 if kind is None else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def answer(self, question: object = None) -> dict[str, Any]:
        """Wait for the program's next line.

        Args:
            question: What is written to it before; None = nothing.

        Returns:
            The object that it printed.

        Raises:
            SystemExit: If the program has ended; it has told why on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if question is not None:
                print(question, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            program = shlex.join(self._command[:2])
            raise SystemExit(f"{program} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


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


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """Say where, when and how figures were taken, in JSON values.

    Args:
        device: What was measured: "cpu" or "cuda".

    Returns:
        Date, command, commit, hardware, and versions, None for packages that aren't installed.
    """
    packages = ("summerlm", "numpy", "tokenizers", "pyarrow")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "hardware": {**describe(torch.device(device)), "cores": len(os.sched_getaffinity(0))},
        "versions": {package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    """Give an installed package's version; None where it runs from a checkout or isn't here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Name the checkout's commit, with "+" where files differ from it; None without git."""
    try:
        command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty=+"]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
