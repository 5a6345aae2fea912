"""A rehearsal: the first steps of a run, in a process of its own and saved nowhere.

Flow: `probing` calls `in_child`, which starts `serve` as a process of its own, so that the peak of
its memory is that of a run. There `rehearse` opens the run as training does, in a folder that is
removed afterwards, and makes steps by its loop, with its workers and what hangs on every step.
Nothing is fetched for it: a run whose text is not on this machine is rehearsed on Python's library.
"""

import ctypes
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from summerlm.core.config import validate
from summerlm.core.errors import DeviceMemoryError, explain
from summerlm.core.files import RunFolder
from summerlm.core.hardware import peak_memory, pick_device
from summerlm.core.ranks import ALONE
from summerlm.core.record import Recorder
from summerlm.core.runtime import PR_SET_PDEATHSIG, StopRequest
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.opening import Run, open_run, open_tokenizer
from summerlm.recipes.pretrain import Equipment, equip, hooks_of_each_step, make_steps
from summerlm.recipes.recording import open_recorder
from summerlm.recipes.settings import Settings, derive
from summerlm.train.loop import Event

# of the child, where memory didn't last: its own word, and the kernel's, which kills it
OUT_OF_MEMORY = (DeviceMemoryError.exit_code, -signal.SIGKILL)
# the child has no main module with a file: workers would import it, and with it all of torch
CHILD = "from summerlm.recipes.rehearsing import serve; raise SystemExit(serve())"
LIBRARY = {"python_stdlib": True, "weight": 1.0, "licence": "PSF-2.0"}


@dataclass(frozen=True)
class Findings:
    """What rehearsed steps took.

    Attributes:
        seconds: Of each step, by the number of its micro-batches; the first one, which makes
            what later ones find, is left out.
        peak_bytes: Most memory of the process, or of the GPU's allocator.
        base_bytes: Memory of the process before it had a model; 0 on a GPU.
    """

    seconds: dict[int, list[float]]
    peak_bytes: int
    base_bytes: int

    def median(self, micro_batches: int) -> float:
        """Give the median seconds of a step of so many micro-batches."""
        return statistics.median(self.seconds[micro_batches])


def in_child(
    settings: Settings, rows: int, micro_batches: Sequence[int], steps: int
) -> Findings | None:
    """Do what `rehearse` does in a process of its own.

    Args:
        settings: The run's settings.
        rows: Rows of a micro-batch, B.
        micro_batches: Kinds of steps, by their micro-batches.
        steps: How many steps are made.

    Returns:
        What they took; None where memory didn't last.

    Raises:
        SystemExit: If the process met what a user can mend; its own words stand on stderr.
        RuntimeError: If it failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="summerlm-probe-") as folder:
        task = {
            "settings": settings.model_dump(mode="json"),
            "rows": rows,
            "micro_batches": list(micro_batches),
            "steps": steps,
            "folder": folder,
        }
        # of its own session: a Ctrl-C reaches this process alone, and `run` then kills the child
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    if child.returncode in OUT_OF_MEMORY:
        return None
    if child.returncode > 1:
        raise SystemExit(child.returncode)
    if child.returncode:
        raise RuntimeError(f"the rehearsal ended with exit code {child.returncode}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    found["seconds"] = {int(kind): took for kind, took in found["seconds"].items()}
    return Findings(**found)


def serve() -> int:
    """Be the child: a task on stdin, findings on stdout.

    Returns:
        The exit code.
    """
    if sys.platform == "linux":  # whoever waits for the findings may be killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    task = json.load(sys.stdin)
    settings = validate(Settings, task.pop("settings"), origin="settings")
    folder = Path(task.pop("folder"))
    try:
        print(json.dumps(asdict(rehearse(settings, folder=folder, **task))))
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code
    return 0


def rehearse(
    settings: Settings, rows: int, micro_batches: Sequence[int], steps: int, folder: Path
) -> Findings:
    """Make a run's steps here, and once what it does beside them: measure held-out text.

    The saver of a run holds room for a copy of its state from the start, and so does this one's.

    Args:
        settings: The run's settings.
        rows: Rows of a micro-batch, B.
        micro_batches: How many of them a step has: kinds of steps that take turns. Of a single
            kind the steps are the run's own, whose last micro-batch may have fewer rows.
        steps: How many steps are made of all kinds together, the first of each not counted.
        folder: An empty one, for what a run writes down.

    Returns:
        What they took.
    """
    whole = len(micro_batches) == 1
    kinds = {
        n: stand_in(settings, folder, rows, None if whole else n * rows, steps)
        for n in micro_batches
    }
    base = _memory_before(settings)
    with StopRequest() as stop, ExitStack() as held:
        run = open_run(next(iter(kinds.values())), RunFolder(folder), ALONE, lambda _: None, stop)
        recorder = open_recorder(run, Console(quiet=True))
        held.callback(recorder.close)
        gear = equip(run, recorder, stop)
        held.callback(gear.saver.close)
        gear.loader.close()  # each kind of step opens its own
        parts = {}
        for n, changed in kinds.items():  # a second saver would hold a second copy of the state
            parts[n] = Rehearsal(replace(run, settings=changed), gear, recorder, stop)
            held.callback(parts[n].close)
        seconds: dict[int, list[float]] = {n: [] for n in kinds}
        for number in range(steps + len(kinds)):
            kind = micro_batches[number % len(kinds)]
            took = parts[kind].step()
            if number >= len(kinds):
                seconds[kind].append(took)
            if number == len(kinds):
                gear.watch.validate(parts[kind].event)
        return Findings(seconds, peak_memory(run.device), base)


def stand_in(
    settings: Settings, folder: Path, rows: int, batch_rows: int | None, steps: int
) -> Settings:
    """Give the settings of a run like another one that evaluates nothing and fetches nothing.

    Args:
        settings: The other one's.
        folder: The run's folder.
        rows: Rows of a micro-batch, B.
        batch_rows: Rows of a step; None = as many as the other one has.
        steps: That it makes at least.

    Returns:
        The settings; the text is the other one's if it is on this machine, else Python's library.
    """
    values = settings.model_dump(mode="json")
    batch_rows = batch_rows or derive(settings).rows
    batch_tokens = batch_rows * settings.model.context
    budget = max(settings.train.budget_tokens, 2 * steps * batch_tokens)
    values["run"] |= {"folder": str(folder), "profile": False}
    values["train"] |= {"batch_tokens": batch_tokens, "budget_tokens": budget}
    values["parallel"]["micro_batch_rows"] = rows
    lanes = math.gcd(settings.data.lanes, batch_rows)
    sources = values["data"]["sources"] if has_text(settings) else {"library": LIBRARY}
    sources = {name: {**source, "max_epochs": None} for name, source in sources.items()}
    values["data"] |= {"sources": sources, "lanes": lanes}
    values["data"] |= {"tokens": None, "evaluation_sets": ()}
    del values["evaluation"]
    return validate(Settings, values, origin="settings of the rehearsal")


def has_text(settings: Settings) -> bool:
    """Tell whether all text of a run is in files of this machine, for which nothing is asked.

    Args:
        settings: The run's settings.

    Returns:
        Whether none of it is fetched.
    """
    data = settings.data
    paths = [source.path for source in data.sources.values() if not source.python_stdlib]
    return not data.evaluation_sets and all(path and "://" not in path for path in paths)


class Rehearsal:
    """Steps of one kind, as a run makes them.

    Args:
        run: The run; its model may be another rehearsal's, too.
        gear: What hangs on it; its data are opened anew, in rows of these steps.
        recorder: Where its events go.
        stop: Ends a wait for data.

    Attributes:
        event: The last step that was made.
    """

    event: Event

    def __init__(self, run: Run, gear: Equipment, recorder: Recorder, stop: StopRequest) -> None:
        self._loader = open_loader(
            run.settings, run.sources, run.tokenizer, run.state_of_data, rank=0, world=1
        )
        gear = replace(gear, loader=self._loader)
        self._steps = make_steps(run, gear, stop)
        self._hooks = hooks_of_each_step(run, recorder, gear)

    def step(self) -> float:
        """Make a step, and all that happens after each; gives its seconds."""
        began = time.perf_counter()
        self.event = next(self._steps)
        for hook in self._hooks:
            hook(self.event)
        return time.perf_counter() - began

    def close(self) -> None:
        """End its workers."""
        self._loader.close()


def _memory_before(settings: Settings) -> int:
    """Give the memory of this process with its tokenizer and no model; 0 where a GPU's counts."""
    device = pick_device(settings.run.device)
    open_tokenizer(settings)
    return 0 if device.type == "cuda" else peak_memory(device)
