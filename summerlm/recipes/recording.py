"""What a run says of itself: at its start, after each step, and in its files.

Flow: `pretrain` prints `describe_run`, opens the recorder with `open_recorder`, and hangs a
`Record` on the loop.
"""

import resource
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import summerlm
from summerlm.core.console import ConsoleSink, Stopwatch
from summerlm.core.files import RunFolder
from summerlm.core.hardware import describe, peak_flops
from summerlm.core.record import (
    JsonLines,
    Recorder,
    Sink,
    TensorBoardSink,
    cut_rows,
    read_rows,
)
from summerlm.model.transformer import Transformer
from summerlm.optim.build import OptimizerSet
from summerlm.optim.groups import group_table
from summerlm.plan.count import flops_per_token, parameters
from summerlm.recipes.settings import Settings, derive
from summerlm.train.loop import Event


def open_recorder(
    settings: Settings,
    folder: RunFolder,
    console: Console,
    state: Mapping[str, Any] | None,
    resumed: bool,
) -> Recorder:
    """Open a run's records where its next step will write.

    Args:
        settings: The run's settings.
        folder: Its folder, held.
        console: Where a person reads along.
        state: The state the run goes on from, or None at its beginning.
        resumed: Whether the folder held a run before.

    Returns:
        The recorder; rows past the state's step are gone, but for incidents, which stay history.
    """
    done = state["step"] if state else 0
    for path in (folder.metrics, folder.samples):
        cut_rows(path, done)
    derived = derive(settings)
    sinks: list[Sink] = [
        ConsoleSink(console, derived.tokens, settings.run.log_every_steps),
        JsonLines(folder.metrics, lambda kind: kind != "sample"),
        JsonLines(folder.incidents, lambda kind: kind == "incident"),
        JsonLines(folder.samples, lambda kind: kind == "sample"),
    ]
    if settings.run.tensorboard:
        sinks.append(TensorBoardSink(folder.path / "tensorboard"))
    recorder = Recorder(sinks)
    if resumed:
        line = f"resuming after step {done} of {derived.steps}"
        recorder.write("resume", line=line, step=done, resumed_from=done)
    return recorder


class Record:
    """Writes one row for each step, and an incident for each step that was skipped.

    Args:
        recorder: Where the rows go.
        settings: The run's settings.
        device: Where it trains.
        elapsed_s: Seconds that earlier starts of the run spent on the steps before.
    """

    def __init__(
        self, recorder: Recorder, settings: Settings, device: torch.device, elapsed_s: float
    ) -> None:
        self._recorder = recorder
        self._peak_lr = settings.optim.peak_lr
        self._batch = settings.train.batch_tokens
        self._flops = flops_per_token(settings.model)
        self._peak_flops = peak_flops(device)
        self._device = device
        self._watch = Stopwatch()
        self._start = time.monotonic()
        self._elapsed = elapsed_s

    def __call__(self, event: Event) -> None:
        """Record one step.

        Args:
            event: The step.
        """
        speed = self._watch.tick(self._batch)
        self._recorder.write(
            "train",
            step=event.step,
            loss=event.loss,
            tokens=event.tokens,
            lr=event.rate * self._peak_lr,
            grad_norm=event.grad_norm,
            updated=event.ok,
            batch_sha=event.data.sha,
            loss_by_source=dict(event.source_loss),
            tokens_per_second=speed,
            data_wait_s=event.data_wait_s,
            memory_bytes=peak_memory(self._device),
            elapsed_s=self._elapsed + time.monotonic() - self._start,
            mfu=speed * self._flops / self._peak_flops if self._peak_flops else None,
        )
        if not event.ok:
            reason = "loss or gradient not finite; the step changed nothing"
            line = f"warning: step {event.step}: {reason}"
            self._recorder.write(
                "incident", line=line, step=event.step, reason=reason, batch_sha=event.data.sha
            )


def seconds_spent(folder: RunFolder) -> float:
    """Sum up the time a run's recorded steps took, over all its starts.

    Args:
        folder: Its folder, whose rows past the resumed step are gone.

    Returns:
        Seconds; 0 for a run that begins.
    """
    spent = [row["elapsed_s"] for row in read_rows(folder.metrics) if row["kind"] == "train"]
    return spent[-1] if spent else 0.0


def peak_memory(device: torch.device) -> int:
    """Give the most memory a run has used so far.

    Args:
        device: Where it trains.

    Returns:
        Bytes: of the allocator on a GPU, of the process elsewhere.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_run(
    console: Console,
    settings: Settings,
    model: Transformer,
    optimizer: OptimizerSet,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Print what follows from the settings, before the first step.

    Args:
        console: Where to print.
        settings: The run's settings.
        model: The model.
        optimizer: Its optimizer.
        device: Where it trains.
        dtype: Autocast's dtype, or None for float32.
    """
    derived = derive(settings)
    micro = settings.parallel.micro_batch_rows or derived.rows
    tokens = settings.data.tokens
    hands = f"{settings.data.workers} workers" if tokens is None else f"read from {tokens}"
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "parameters": f"{parameters(settings.model):,}",
        "FLOPs a token": f"{flops_per_token(settings.model):,}",
        "steps": f"{derived.steps:,} of {settings.train.batch_tokens:,} tokens",
        "tokens": f"{derived.tokens:,}",
        "a step": f"{derived.rows} rows of {settings.model.context}, {micro} at once",
        "data": f"{settings.data.lanes} lanes, {hands}",
        "device": f"{device}, matrix products in {dtype or torch.float32}",
        "attention": "causal scaled_dot_product_attention, biases as channels",
        "blocks": "compiled one by one" if settings.parallel.compile else "not compiled",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(group_table(optimizer.groups), markup=False, highlight=False, soft_wrap=True)
    if settings.optim.warmup_tokens > derived.tokens:
        console.print(
            f"note: the warm-up ({settings.optim.warmup_tokens:,} tokens) is longer than the run; "
            "the rate never reaches its peak",
            soft_wrap=True,
        )


def environment(device: torch.device) -> dict[str, Any]:
    """Collect what a reader of a run must know of where it was made.

    Args:
        device: Where it trains.

    Returns:
        Package version and commit, machine and versions.
    """
    return {
        "summerlm": summerlm.__version__,
        "commit": _commit(),
        "hardware": describe(device),
    }


def _commit() -> str | None:
    """Give the commit of the package's checkout, or None for an installed package."""
    root = Path(summerlm.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
