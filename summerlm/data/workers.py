"""Worker processes that deal lanes ahead of training.

Flow: `loader` starts a `Share` of lanes in K processes, each of which deals every K-th of the
lanes, and receives their parts of each step in turn; with K = 0 it deals them itself.

Workers come from a fork server: a fork of the trainer would copy locks held by its threads
(OpenMP, the CUDA driver, writers), and a spawn would import torch for each worker. The server
imports once, in about two seconds, while the model is being built.

Shapes: T targets a row, J rows a lane and step, n lanes dealt by one worker.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from summerlm.core.errors import SummerError
from summerlm.core.runtime import STOP_SIGNALS, holding_signals
from summerlm.data.lanes import DataOrder, Lane
from summerlm.data.ledger import Counts
from summerlm.data.mixture import Mixture


@dataclass(frozen=True)
class Part:
    """What some lanes give to one step.

    Args:
        ids: Their rows, (J, n, T + 1), int32.
        sources: Index of the source of each row, (J, n), int64.
        counts: What each source gave.
        states: State of each lane after the step.
        incidents: What went wrong and was mended on the way.
    """

    ids: np.ndarray
    sources: np.ndarray
    counts: list[Counts]
    states: dict[int, dict[str, Any]]
    incidents: list[dict[str, Any]]


class Share(IterableDataset[Part | SummerError]):
    """The parts of all steps from some lanes; in a worker, from its share of these.

    What goes wrong for a reason that a user can mend is handed over as a part, at its step: the
    exception itself would arrive early, as a traceback.

    Args:
        order: All that decides the batches.
        lanes: The lanes.
        states: State of each lane by its number as text; None = all at the start.
    """

    def __init__(
        self, order: DataOrder, lanes: range, states: dict[str, dict[str, Any]] | None
    ) -> None:
        self._order, self._lanes, self._states = order, lanes, states

    def __iter__(self) -> Iterator[Part | SummerError]:
        """Deal step by step, without end; after an error, that error again and again."""
        order = self._order
        worker = get_worker_info()
        numbers = self._lanes[worker.id :: worker.num_workers] if worker else self._lanes
        mixture = Mixture(order.weights, order.lanes, order.seed)
        states = self._states
        lanes = [Lane(order, n, mixture, states[str(n)] if states else None) for n in numbers]
        try:
            while True:
                yield _deal(lanes, order)
        except SummerError as error:
            while True:
                yield error


def _deal(lanes: list[Lane], order: DataOrder) -> Part:
    """Let lanes deal their rows of one step."""
    J = order.rows // order.lanes
    ids = np.empty((J, len(lanes), order.context + 1), np.int32)
    sources = np.empty((J, len(lanes)), np.int64)
    counts = [Counts()] * len(order.sources)
    for j in range(J):
        for n, lane in enumerate(lanes):
            source, ids[j, n], count = lane.next()
            sources[j, n] = source
            counts[source] += count
    incidents = [incident for source in order.sources for incident in source.take_incidents()]
    return Part(ids, sources, counts, {lane.number: lane.state() for lane in lanes}, incidents)


def prepare() -> None:
    """Start the server that workers are forked from ahead of need: its imports take seconds."""
    multiprocessing.set_forkserver_preload([__name__, "summerlm.data.sources"])
    with holding_signals():
        forkserver.ensure_running()


def start(
    share: Share, workers: int, prefetch_steps: int
) -> tuple[Iterator[Part | SummerError], list[BaseProcess]]:
    """Begin to deal.

    Args:
        share: What to deal.
        workers: K, at most the number of lanes; 0 = no process is started.
        prefetch_steps: Parts that each worker is ahead.

    Returns:
        The parts, step by step and worker by worker, and the processes. They outlive signals:
        who started them must `end` them; when the interpreter ends, they are.
    """
    if not workers:
        return iter(share), []
    prepare()
    context = multiprocessing.get_context("forkserver")
    loader = DataLoader(
        share,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch_steps,
        multiprocessing_context=context,
        worker_init_fn=_settle,
    )
    others = multiprocessing.active_children()
    try:
        with holding_signals(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # they mostly wait
            parts = iter(loader)
    finally:
        started = [child for child in multiprocessing.active_children() if child not in others]
        atexit.register(end, started)  # multiprocessing would wait for them for ever
    return parts, started


def end(workers: list[BaseProcess]) -> None:
    """End processes that ignore signals; they hold nothing worth saving.

    Args:
        workers: Processes that `start` gave; some may have ended.
    """
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join()


def _as_it_is(part: Any) -> Any:
    """Keep arrays: tensors would travel through shared memory, of which containers have little."""
    return part


def _settle(worker: int) -> None:
    """Prepare a worker, in which torch has set itself to one thread already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # in case another's fork server was running
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End this process when the trainer has gone, whatever killed it.

    Linux's PR_SET_PDEATHSIG doesn't serve: a worker's parent is the fork server, which lives on
    as long as its workers.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
