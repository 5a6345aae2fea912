"""`plan --probe`: what a run's step really takes on this machine, and the plan corrected by it.

Flow: `planning` calls `probe`, which starts this module as a process of its own (`in_child`), so
that the peak of its memory is that of the steps. The child makes real steps (`rehearsing`) of the
run's own micro-batch, or of two smaller ones where that takes too long, and prints `Findings`;
`probe` extends them to the run's step.

Shapes: B rows of a micro-batch.
"""

import ctypes
import json
import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

# not only for what is used: what a run has in memory, the child has, too
import summerlm.recipes.pretrain  # noqa: F401
from summerlm.checkpoint.pieces import plan_pieces
from summerlm.checkpoint.snapshot import Snapshot
from summerlm.core.config import validate
from summerlm.core.errors import DeviceMemoryError, explain
from summerlm.core.hardware import device_type, peak_memory, pick_device
from summerlm.core.ranks import ALONE
from summerlm.core.runtime import PR_SET_PDEATHSIG
from summerlm.plan.count import flops_per_token
from summerlm.recipes.opening import open_tokenizer
from summerlm.recipes.rehearsing import first_stepper, make_up, time_step
from summerlm.recipes.settings import Settings, derive
from summerlm.train.config import compute_dtype
from summerlm.train.probe import attention_logit_max

# of the child, where memory didn't last: its own word, and the kernel's, which kills it
OUT_OF_MEMORY = (DeviceMemoryError.exit_code, -signal.SIGKILL)
STEPS = 20
MOST = 3  # micro-batches of a step that is made as it is; of a longer one, steps of 1 and 3
# that a micro-batch takes at most on a CPU, at a speed that any has: else smaller ones are made
LONGEST_S = 6.0
SLOW_FLOPS = 40e9  # of a thread


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


@dataclass(frozen=True)
class Probed:
    """A run's step on this machine, as a few real ones tell it.

    Attributes:
        seconds: Of a step.
        peak_bytes: Of the process, or of the GPU's allocator.
        base_bytes: Of the process before it had a model; 0 on a GPU.
        tokens: Of a step.
        rows_tried: Micro-batches that were made, in rows.
        flops: FLOP/s.
    """

    seconds: float
    peak_bytes: int
    base_bytes: int
    tokens: int
    rows_tried: tuple[int, ...]
    flops: float


def probe(settings: Settings, rows: int, predicted: Callable[[int], int]) -> Probed:
    """Make a run's steps here for a short while, and say what its own take.

    Args:
        settings: The run's settings.
        rows: Rows of its micro-batch, B.
        predicted: The bytes of tensors that a micro-batch of so many rows needs by `tracing`: what
            extends the peak from smaller micro-batches.

    Returns:
        What a step of the run takes.

    Raises:
        DeviceMemoryError: If memory doesn't last.
    """
    derived = derive(settings)
    micro_batches = derived.rows / rows  # the last one may have fewer rows
    tried = _rows_to_try(settings, rows)
    whole = tried == [rows] and micro_batches <= MOST
    kinds = [math.ceil(micro_batches)] if whole else [1, MOST]
    found = [_must(settings, size, kinds) for size in tried]

    first, last = found[0], found[-1]
    if whole:
        seconds = first.median(kinds[0])
    else:
        each = (first.median(MOST) - first.median(1)) / (MOST - 1)  # of a micro-batch
        seconds = first.median(1) - each + micro_batches * each * rows / tried[0]
    peak = float(first.peak_bytes)
    if len(found) > 1:
        seen = first.peak_bytes - last.peak_bytes
        expected = predicted(tried[0]) - predicted(tried[1])
        peak += (predicted(rows) - predicted(tried[0])) * (seen / expected if expected else 1.0)
    elif tried[0] < rows:
        peak += predicted(rows) - predicted(tried[0])
    tokens = settings.train.batch_tokens
    return Probed(
        seconds=seconds,
        peak_bytes=round(peak),
        base_bytes=first.base_bytes,
        tokens=tokens,
        rows_tried=tuple(tried),
        flops=tokens * flops_per_token(settings.model) / seconds,
    )


def _rows_to_try(settings: Settings, rows: int) -> list[int]:
    """Decide which micro-batches are made: the run's own, or two smaller ones."""
    if device_type(settings.run.device) == "cuda":
        return [rows]
    row_flops = flops_per_token(settings.model) * settings.model.context
    longest = max(1, int(LONGEST_S * SLOW_FLOPS * torch.get_num_threads() / row_flops))
    if rows <= longest:
        return [rows]
    return [longest, longest // 2] if longest > 1 else [longest]


def _must(settings: Settings, rows: int, kinds: Sequence[int]) -> Findings:
    found = in_child(settings, rows, kinds, STEPS)
    if found is None:
        raise DeviceMemoryError(
            f"--probe: a micro-batch of {rows} rows doesn't fit here; lower "
            "parallel.micro_batch_rows"
        )
    return found


def rehearse(settings: Settings, rows: int, micro_batches: Sequence[int], steps: int) -> Findings:
    """Make steps here, with what a run does between them: a copy for a checkpoint, a look.

    Args:
        settings: The run's settings.
        rows: Rows of a micro-batch, B.
        micro_batches: How many of them a step has: kinds of steps that take turns.
        steps: How many steps are made of all kinds together, the first of each not counted.

    Returns:
        What they took.
    """
    device = pick_device(settings.run.device)
    tokenizer = open_tokenizer(settings)  # held: a run has it in memory, too
    base = 0 if device.type == "cuda" else peak_memory(device)
    parallel = settings.parallel.model_copy(update={"micro_batch_rows": rows})
    dtype = compute_dtype(settings.train, device)
    stepper = first_stepper(
        settings.model_copy(update={"parallel": parallel}),
        ALONE,
        device,
        dtype,
    )
    tables = {"model": stepper.layout.parts, "optimizer": stepper.optimizer.parts()}
    snapshot = Snapshot(tables, plan_pieces(tables, ALONE), rank=0)
    most = derive(settings).rows if len(micro_batches) == 1 else math.inf  # a whole step's
    batches = {n: make_up(settings, int(min(n * rows, most)), device) for n in micro_batches}
    seconds: dict[int, list[float]] = {n: [] for n in micro_batches}
    for number in range(steps + len(batches)):
        kind = micro_batches[number % len(batches)]
        took = time_step(stepper, batches[kind], number + 1)
        if number >= len(batches):
            seconds[kind].append(took)
        if number == len(batches):  # what a run does beside its steps
            snapshot.take()
            snapshot.wait()
            batch = batches[kind]
            attention_logit_max(stepper.layout.model, batch.tokens[:1], batch.documents[:1], dtype)
    del tokenizer
    return Findings(seconds, peak_memory(device), base)


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
    task = {
        "settings": settings.model_dump(mode="json"),
        "rows": rows,
        "micro_batches": list(micro_batches),
        "steps": steps,
    }
    command = [sys.executable, "-m", "summerlm.recipes.probing"]
    # of its own session: a Ctrl-C reaches this process alone, and `run` then kills the child
    child = subprocess.run(
        command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, start_new_session=True
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


def _serve() -> int:
    """Be the child: a task on stdin, findings on stdout."""
    if sys.platform == "linux":  # whoever waits for the findings may be killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    task = json.load(sys.stdin)
    settings = validate(Settings, task.pop("settings"), origin="settings")
    try:
        print(json.dumps(asdict(rehearse(settings, **task))))
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(_serve())
