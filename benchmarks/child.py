"""A program that answers questions, as the side of a comparison that waits for its turn."""

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Any


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
