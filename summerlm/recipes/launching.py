"""Starting a run's ranks on this machine, with torchrun's own agent inside this process.

Flow: `cli.train` calls `launch` for `--nproc`; the agent starts `python -m summerlm train` once a
rank. Environment variables that torchrun reads (PET_NNODES, PET_RDZV_ENDPOINT, ...) work here too:
the same command on several machines makes one job.
"""

import contextlib
import logging
import os
import signal
import tempfile
import uuid
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.run import config_from_args, get_args_parser

from summerlm.core.errors import (
    DataChangedError,
    DivergedError,
    FolderHeldError,
    NoCheckpointError,
    PeerLostError,
    UsageError,
)
from summerlm.core.failing import INTERRUPTED
from summerlm.core.runtime import LAUNCHER, REQUEUE, STOP_SIGNALS
from summerlm.recipes.settings import Settings

# what the same again would meet again, and a stop that was asked for
FINAL = {
    REQUEUE,
    INTERRUPTED,
    *(e.exit_code for e in (UsageError, NoCheckpointError, DataChangedError)),
    *(e.exit_code for e in (FolderHeldError, DivergedError)),
}


class Agent(LocalElasticAgent):
    """torchrun's agent, but that it passes on signals to stop and knows what not to start again.

    torchrun's own kills its ranks 30 seconds after a signal, however long a save takes, and starts
    ranks again that were asked to stop, or that would fail again.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs) -> None:
        super().__init__(spec, logs_specs)
        self.received: signal.Signals | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        workers = super()._start_workers(worker_group)
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)  # torchrun's own handlers were set just now
        if self.received is not None:
            raise SignalException("asked to stop while ranks were started", self.received)
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
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        most = worker_group.spec.max_restarts
        print(f"starting the ranks again ({most - self._remaining_restarts} of {most})", flush=True)
        super()._restart_workers(worker_group)


def launch(settings: Settings, arguments: list[str], nproc: int, max_restarts: int) -> int:
    """Run `summerlm train` as a job of several ranks.

    Args:
        settings: What the arguments mean; checked before anything is started.
        arguments: The command's own: the settings file and what it changes.
        nproc: Ranks to start here.
        max_restarts: How often ranks that failed are started again.

    Returns:
        The ranks' exit code, of those that differ the one that tells most.

    Raises:
        PeerLostError: If ranks were killed and none was left to say so, or if machines of the job
            didn't find one another.
        UsageError: If there are fewer GPUs than ranks, or no rank.
    """
    check_nproc(settings.run.device, nproc)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    os.environ[LAUNCHER] = str(os.getpid())
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun's: what failed, the ranks say in our own words
    with tempfile.TemporaryDirectory() as folder:
        agent = make_agent(arguments, nproc, max_restarts, folder)
        try:
            failures = agent.run().failures
        except SignalException as stop:
            return REQUEUE if stop.sigval is signal.SIGUSR1 else 0
        except RendezvousError as error:
            raise PeerLostError(f"the machines of the job don't meet: {error}") from error
        finally:
            for number in STOP_SIGNALS:  # the ranks have ended: nothing is left to stop but us
                signal.signal(number, signal.SIG_IGN)
            agent.get_worker_group().spec.rdzv_handler.shutdown()
    return exit_code(failures, agent.received)


def check_nproc(device: str, nproc: int) -> None:
    """Refuse what this machine can't start.

    Args:
        device: The setting `run.device`.
        nproc: Ranks asked for.

    Raises:
        UsageError: If there are fewer GPUs than ranks, or no rank.
    """
    if nproc < 1:
        raise UsageError(f"--nproc {nproc}: a job has at least one rank")
    gpus = torch.cuda.device_count()
    if (device == "cuda" or (device == "auto" and gpus)) and nproc > gpus:
        raise UsageError(
            f"--nproc {nproc}: torch sees {gpus} GPUs here, and each rank needs its own; "
            "ask for fewer ranks, or run.device=cpu"
        )


def make_agent(arguments: list[str], nproc: int, max_restarts: int, folder: str) -> Agent:
    """Make the agent that torchrun would make of the same arguments and variables.

    Args:
        arguments: Of `summerlm train`.
        nproc: Ranks to start here.
        max_restarts: How often ranks that failed are started again.
        folder: For the agent's own files.

    Returns:
        The agent, which has started nothing yet.
    """
    ours = ["--nproc-per-node", str(nproc), "--max-restarts", str(max_restarts)]
    ours += ["--log-dir", folder, "--module", "summerlm", "train"]
    args = get_args_parser().parse_args([*ours, *arguments])
    alone = args.nnodes in ("1", "1:1") and not args.rdzv_endpoint and args.master_port is None
    if alone:  # as torchrun does: a free port of this machine
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
        args.rdzv_id = str(uuid.uuid4())
    args.master_port = args.master_port or 29500  # torchrun's default
    config, command, words = config_from_args(args)
    address, port = None, None
    if config.rdzv_backend == "static":
        address, _, number = config.rdzv_endpoint.rpartition(":")
        port = int(number)
    handler = get_rendezvous_handler(
        RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr,
            **config.rdzv_configs,
        )
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(words),
        rdzv_handler=handler,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=address,
        master_port=port,
        local_addr=config.local_addr,
    )
    assert config.logs_specs is not None, "config_from_args makes one"
    return Agent(spec, config.logs_specs)


def exit_code(failures: dict[int, ProcessFailure], received: signal.Signals | None) -> int:
    """Turn what became of the ranks into the code of the whole.

    Args:
        failures: Of each rank that didn't end with 0.
        received: The last signal that was passed on to them.

    Returns:
        A cause that has a code of its own before one that hasn't, and 75 or 0 after a stop that
        reached ranks before they could listen.

    Raises:
        PeerLostError: If ranks were killed and none was left to say so.
    """
    codes = {failure.exitcode for failure in failures.values()}
    stopped = REQUEUE if received is signal.SIGUSR1 else 0
    if not failures or (received and codes == {-received}):
        return stopped
    for told in (*range(2, 10), REQUEUE, INTERRUPTED, 1):
        if told in codes:
            return told
    if said := [code for code in codes if code > 0]:
        return min(said)
    words = " and ".join(
        f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}"
        for rank, failure in sorted(failures.items())
    )
    raise PeerLostError(words)
