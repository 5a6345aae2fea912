"""One start of the training command, watched from outside: its processes, its record, its end.

Flow: `soak.py` and `parallel.py` start a `Job`, wait for rows of its record or for its end, and
leave it, upon which nothing of it is alive. Every process of a job, whatever its group or parent,
carries a variable of the job's own in its environment, by which it is found in /proc. Linux only.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from summerlm.core.runtime import PR_SET_PDEATHSIG

MARK = "SUMMERLM_WATCHED_JOB"
POLL_S = 0.01
BIN = Path(sys.executable).parent

Row = dict[str, Any]  # of metrics.jsonl


def command(config: Path, world: int, launcher: str, max_restarts: int = 0) -> list[str]:
    """Write the command that trains a run.

    Args:
        config: The run's settings file.
        world: Ranks.
        launcher: "alone" (one process, no launcher), "summerlm" (`--nproc`) or "torchrun".
        max_restarts: How often the launcher starts ranks again.

    Returns:
        The program and its arguments; overrides of settings may follow.
    """
    if launcher == "alone":
        assert (world, max_restarts) == (1, 0), "nobody is there to start more"
        return [str(BIN / "summerlm"), "train", str(config)]
    restarts = ["--max-restarts", str(max_restarts)]
    if launcher == "torchrun":
        ranks = ["--standalone", "--nproc-per-node", str(world), *restarts]
        return [str(BIN / "torchrun"), *ranks, "-m", "summerlm", "train", str(config)]
    ranks = ["--nproc", str(world), *restarts]
    return [str(BIN / "summerlm"), "train", str(config), *ranks]


class Tail:
    """Reads the rows of a record as they come, over cuts by runs that go on.

    Args:
        path: The record; may be missing yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # held open: else its number could be given to the file that takes its place
        self._file: BinaryIO | None = None
        self._offset = 0
        self._known: Counter[bytes] = Counter()  # lines of the file as it is now
        self.read()  # what earlier starts wrote is no news

    def read(self) -> list[Row]:
        """Give the rows that are new; what is being written stays for later."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        cut = self._file is None or not os.path.sameopenfile(file.fileno(), self._file.fileno())
        if self._file is not None:
            self._file.close()
        self._file = file
        file.seek(0 if cut else self._offset)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset = len(whole) + (0 if cut else self._offset)
        lines = Counter(whole.splitlines())
        # a cut leaves some of the lines that were there; whatever else is there was added
        new = lines - self._known if cut else lines
        self._known = lines if cut else self._known + lines
        return [json.loads(line) for line in whole.splitlines() if _take(new, line)]


def _take(lines: Counter[bytes], line: bytes) -> bool:
    lines[line] -= 1
    return lines[line] >= 0


class Job:
    """A start of the command; a context manager after which none of its processes is alive.

    Args:
        words: The program and its arguments.
        run: The run's folder.
        log: What it prints is appended to this file.
        environment: Variables beside this process's own.
        heed: Called with each new row of the record.
    """

    def __init__(
        self,
        words: Sequence[str],
        run: Path,
        log: Path,
        environment: dict[str, str],
        heed: Callable[[Row], object] = lambda _: None,
    ) -> None:
        self._alone = not {"--nproc", "--nproc-per-node"} & set(words)
        self._mark, self._heed = secrets.token_hex(8), heed
        self._tail = Tail(run / "metrics.jsonl")
        self._log, self._logged = log, log.stat().st_size if log.exists() else 0
        self.began = time.monotonic()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **environment, MARK: self._mark},
                start_new_session=True,  # a Ctrl-C is for whoever watches
                preexec_fn=die_with_parent,  # however that one dies
            )

    def __enter__(self) -> "Job":
        """Give the job itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill what is left of it."""
        self.kill(self.processes)
        self._process.wait()

    @property
    def code(self) -> int | None:
        """What the launcher ended with; None while it lives."""
        return self._process.poll()

    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.began

    @property
    def words(self) -> str:
        """What this start printed so far."""
        with self._log.open("rb") as file:
            file.seek(self._logged)
            return file.read().decode(errors="replace")

    def wait(self, done: Callable[[], bool], deadline_s: float) -> bool:
        """Read on in the record until something is so, or the launcher has ended.

        Args:
            done: What is waited for.
            deadline_s: How long at most.

        Returns:
            Whether it is so.
        """
        end = time.monotonic() + deadline_s
        while True:
            last = self.code is not None or time.monotonic() > end
            for row in self._tail.read():
                self._heed(row)
            if done() or last:
                return done()
            time.sleep(POLL_S)

    def wait_for_nothing_left(self, deadline_s: float) -> bool:
        """Wait until all processes of the job are gone; tell whether they are."""
        end = time.monotonic() + deadline_s
        while self.code is None or self.processes():
            if time.monotonic() > end:
                return False
            time.sleep(5 * POLL_S)
        return True

    def processes(self) -> list[int]:
        """List the job's processes that live."""
        return [pid for pid in _pids() if self._mark.encode() in _environment(pid)]

    def ranks(self) -> list[int]:
        """List the processes that are ranks, in their order; without a launcher, the only one."""
        launcher = self._process.pid
        found = {}
        for pid in self.processes():
            variables = dict(v.partition(b"=")[::2] for v in _environment(pid).split(b"\0"))
            if b"RANK" in variables and _parent(pid) == launcher:
                found[int(variables[b"RANK"])] = pid
        return self.launcher() if self._alone else [found[rank] for rank in sorted(found)]

    def launcher(self) -> list[int]:
        """Give the process that was started, in a list, which is empty when it has ended."""
        return [self._process.pid] if self.code is None else []

    def kill(self, whom: Callable[[], list[int]], number: int = signal.SIGKILL) -> int:
        """Send a signal; SIGKILL until nobody is found, for processes are born meanwhile.

        Args:
            whom: Lists the processes.
            number: The signal.

        Returns:
            How many got it.
        """
        told: set[int] = set()
        while new := [pid for pid in whom() if pid not in told]:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            told.update(new)
            if number != signal.SIGKILL:
                break
        return len(told)


def die_with_parent() -> None:
    """Let the kernel kill this process when the one dies that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> bytes:
    """The variables a process was started with; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return b""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
