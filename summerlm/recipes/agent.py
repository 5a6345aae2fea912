"""torchrun's agent in our launcher: starts ranks, passes signals on, says which were killed.

Flow: `launching.make_agent` makes an `Agent`, whose `run` returns when the ranks have ended.
"""

import contextlib
import os
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from summerlm.checkpoint.store import Store
from summerlm.core.errors import (
    DataChangedError,
    DivergedError,
    FolderHeldError,
    NoCheckpointError,
    UsageError,
)
from summerlm.core.failing import INTERRUPTED
from summerlm.core.files import RunFolder
from summerlm.core.record import JsonLines
from summerlm.core.runtime import REQUEUE, STOP_SIGNALS

# what the same again would meet again, and a stop that was asked for
FINAL = {
    REQUEUE,
    INTERRUPTED,
    *(e.exit_code for e in (UsageError, NoCheckpointError, DataChangedError)),
    *(e.exit_code for e in (FolderHeldError, DivergedError)),
}
# SIGTERM is how the agent itself ends ranks whose peer has failed
KILLS = {-number for number in signal.Signals if number != signal.SIGTERM}


class Agent(LocalElasticAgent):
    """torchrun's agent, but that it passes on signals to stop and knows what not to start again.

    torchrun's own kills its ranks 30 seconds after a signal, however long a save takes, and starts
    ranks again that were asked to stop, or that would fail again.

    Args:
        spec: What to start.
        logs_specs: Where ranks print.
        run: The run's folder, which needn't be there yet.

    Attributes:
        received: The last signal that was passed on to the ranks, or that found none.
        started: Whether ranks were started.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs, run: RunFolder) -> None:
        super().__init__(spec, logs_specs)
        self.received: signal.Signals | None = None
        self.started = False
        self._run_folder = run
        self._failures: Mapping[int, ProcessFailure] = {}

    def listen(self) -> None:
        """Hear signals to stop from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)

    def outlook(self, what: str) -> str:
        """Say what comes next, and of ranks that were killed, what no rank could say or record.

        Args:
            what: The next thing that happens, without the step.

        Returns:
            A line for a person, which is in the run's incidents too if ranks were killed.
        """
        steps = Store(self._run_folder.checkpoints, warn=_ignore).steps()
        line = f"{what} from step {steps[-1]}" if steps else f"{what} from the beginning"
        killed = {rank: f for rank, f in self._failures.items() if f.exitcode in KILLS}
        if not killed:
            return line
        line = f"{name_killed(killed)}; {line}"
        if self._run_folder.settings.exists():
            incidents = JsonLines(self._run_folder.incidents, lambda kind: True)
            incidents.write("incident", {"reason": line, "ranks": sorted(killed)}, None)
            incidents.close()
        return line

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # ranks hold signals back from their first instruction on, until they can stop in order
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            workers = super()._start_workers(worker_group)
            self.started = True
            self.listen()  # torchrun's own handlers were set just now
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        return workers

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._remaining_restarts = 0
        told = 0
        for process in self._pcontext.pids().values() if self._pcontext else ():
            with contextlib.suppress(ProcessLookupError):  # has ended: the next look shows it
                os.kill(process, number)
                told += 1
        if not told:
            raise SignalException("asked to stop while no rank was running", self.received)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        self._failures = result.failures
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        most = worker_group.spec.max_restarts
        again = f"starting the ranks again ({most - self._remaining_restarts} of {most})"
        print(self.outlook(again), flush=True)
        super()._restart_workers(worker_group)


def name_killed(failures: Mapping[int, ProcessFailure]) -> str:
    """Say which ranks were killed, and by what."""
    words = (
        f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}"
        for rank, failure in sorted(failures.items())
    )
    return " and ".join(words)


def _ignore(line: str) -> None:
    """Drop what a store would tell a run."""
