"""Starting a run's ranks on this machine, with torchrun's own agent inside this process.

Flow: `cli.train` calls `launch` for `--nproc`; its `agent.Agent` starts `python -m summerlm train`
once a rank. Environment variables that torchrun reads (PET_NNODES, PET_RDZV_ENDPOINT, ...) work
here too: the same command on several machines makes one job.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.run import config_from_args, get_args_parser

from summerlm.core.errors import PeerLostError, UsageError
from summerlm.core.failing import INTERRUPTED
from summerlm.core.files import RunFolder
from summerlm.core.runtime import LAUNCHER, REQUEUE, STOP_SIGNALS
from summerlm.data.loader import refuse_world
from summerlm.recipes.agent import FINAL, Agent
from summerlm.recipes.settings import Settings


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
        PeerLostError: If all ranks were killed, or if machines of the job didn't find one another.
        UsageError: If there are fewer GPUs than ranks, no rank, or ranks that can't share the
            work.
    """
    check_nproc(settings.run.device, nproc)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    os.environ[LAUNCHER] = str(os.getpid())
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun's: what failed, the ranks say in our own words
    with tempfile.TemporaryDirectory() as folder:
        agent = make_agent(settings, arguments, nproc, max_restarts, folder)
        agent.listen()
        try:
            failures = agent.run().failures
        except SignalException as stop:
            when = "while no rank was running" if agent.started else "before the run began"
            print(f"interrupted {when}", file=sys.stderr)
            return {signal.SIGUSR1: REQUEUE, signal.SIGINT: INTERRUPTED}.get(stop.sigval, 0)
        except RendezvousError as error:
            raise PeerLostError(f"the machines of the job don't meet: {error}") from error
        finally:
            for number in STOP_SIGNALS:  # the ranks have ended: nothing is left to stop but us
                signal.signal(number, signal.SIG_IGN)
            agent.get_worker_group().spec.rdzv_handler.shutdown()
    code = exit_code(failures, agent.received)
    if code in {0, *FINAL}:
        return code
    words = agent.outlook("the same command goes on")
    if all(failure.exitcode < 0 for failure in failures.values()):  # none was left to say so
        raise PeerLostError(words)
    print(words)
    return code


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


def check_world(settings: Settings, world: int) -> None:
    """Refuse what the ranks would refuse, before they start.

    Args:
        settings: The run's settings.
        world: Ranks of the job.

    Raises:
        UsageError: If lanes or shards can't be dealt to so many.
    """
    if settings.data.lanes % world:
        raise refuse_world(world, settings.data.lanes)
    settings.parallel.shards(world)


def make_agent(
    settings: Settings, arguments: list[str], nproc: int, max_restarts: int, folder: str
) -> Agent:
    """Make the agent that torchrun would make of the same arguments and variables.

    Args:
        settings: What the arguments mean.
        arguments: Of `summerlm train`.
        nproc: Ranks to start here.
        max_restarts: How often ranks that failed are started again.
        folder: For the agent's own files.

    Returns:
        The agent, which has started nothing yet.

    Raises:
        UsageError: If the job's ranks can't share the work.
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
    if config.min_nodes == config.max_nodes:  # else the ranks themselves have to say it
        check_world(settings, config.nproc_per_node * config.min_nodes)
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
    return Agent(spec, config.logs_specs, RunFolder(settings.run.folder))


def exit_code(failures: Mapping[int, ProcessFailure], received: signal.Signals | None) -> int:
    """Turn what became of the ranks into the code of the whole.

    Args:
        failures: Of each rank that didn't end with 0.
        received: The last signal that was passed on to them.

    Returns:
        A cause that has a code of its own before one that hasn't; 1 where all were killed; and 75
        or 0 after a stop that reached ranks before they could listen.
    """
    codes = {failure.exitcode for failure in failures.values()}
    stopped = REQUEUE if received is signal.SIGUSR1 else 0
    if not failures or (received and codes == {-received}):
        return stopped
    for told in (*range(2, 10), REQUEUE, INTERRUPTED, 1):
        if told in codes:
            return told
    return min((code for code in codes if code > 0), default=PeerLostError.exit_code)
