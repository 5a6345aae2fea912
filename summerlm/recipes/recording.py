"""What a run says of itself: at its start, after each step, and in its files.

Flow: `pretrain` prints `describe_run`, opens the recorder with `open_recorder`, and hangs a
`Record` on the loop.
"""

import time

import torch
from rich.console import Console
from rich.table import Table

from summerlm.core.console import ConsoleSink, Stopwatch
from summerlm.core.files import RunFolder
from summerlm.core.hardware import peak_flops, peak_memory
from summerlm.core.record import (
    JsonLines,
    Recorder,
    Sink,
    TensorBoardSink,
    cut_rows,
    read_rows,
)
from summerlm.data.ledger import Ledger
from summerlm.optim.groups import group_table
from summerlm.parallel.layout import Layout
from summerlm.plan.count import flops_per_token, parameters
from summerlm.recipes.opening import Run
from summerlm.recipes.settings import derive
from summerlm.train.guards import Verdict
from summerlm.train.loop import Event
from summerlm.train.probe import attention_logit_max


def open_recorder(run: Run, console: Console) -> Recorder:
    """Open a run's records where its next step will write.

    Args:
        run: The run.
        console: Where a person reads along.

    Returns:
        The recorder; rows past the run's step are gone, but for incidents, which stay history. On
        ranks that don't lead it writes nowhere.
    """
    if not run.ranks.leads:
        return Recorder([])
    settings, folder = run.settings, run.folder
    done = run.state["step"] if run.state else 0
    for path in (folder.metrics, folder.samples):
        cut_rows(path, done)
    derived = derive(settings)
    sinks: list[Sink] = [
        ConsoleSink(console, derived.tokens, settings.run.log_every_steps),
        JsonLines(folder.metrics, lambda kind: kind not in ("sample", "note")),
        JsonLines(folder.incidents, lambda kind: kind == "incident"),
        JsonLines(folder.samples, lambda kind: kind == "sample"),
    ]
    if settings.run.tensorboard:
        sinks.append(TensorBoardSink(folder.path / "tensorboard"))
    recorder = Recorder(sinks)
    if run.resumed:
        line = f"resuming after step {done} of {derived.steps}"
        recorder.write("resume", line=line, step=done, resumed_from=done)
    return recorder


class Record:
    """Writes one row for each step, and an incident for each step that was skipped.

    Every rank has one, for all look at the attention's scores together.

    Args:
        recorder: Where the rows go.
        run: The run.
        elapsed_s: Seconds that earlier starts of the run spent on the steps before.
    """

    def __init__(self, recorder: Recorder, run: Run, elapsed_s: float) -> None:
        settings = run.settings
        self._recorder, self._run = recorder, run
        self._peak_lr = settings.optim.peak_lr
        self._batch = settings.train.batch_tokens
        self._flops = flops_per_token(settings.model)
        peak = peak_flops(run.device)
        self._peak_flops = peak * run.ranks.world if peak else None
        self._watch = Stopwatch()
        self._start = time.monotonic()
        self._elapsed = elapsed_s

    def __call__(self, event: Event) -> None:
        """Record one step.

        Args:
            event: The step.
        """
        speed = self._watch.tick(self._batch)
        fed = event.data
        self._recorder.write(
            "train",
            step=event.step,
            loss=event.loss,
            tokens=event.tokens,
            lr=event.rate * self._peak_lr,
            grad_norm=event.grad_norm,
            update_norm=event.update_norm,
            updated=event.verdict is Verdict.FINE,
            batch_sha=fed.sha,
            loss_by_source=dict(event.source_loss),
            attention_logit_max=self._attention_logit_max(event),
            tokens_per_second=speed,
            data_wait_s=fed.wait_s,
            slowest_rank=fed.slowest_rank,
            slowest_excess_s=fed.slowest_excess_s,
            memory_bytes=peak_memory(self._run.device),
            elapsed_s=self._elapsed + time.monotonic() - self._start,
            mfu=speed * self._flops / self._peak_flops if self._peak_flops else None,
        )
        if event.verdict is not Verdict.FINE:
            self._record_skip(event)

    def _record_skip(self, event: Event) -> None:
        reason = {
            Verdict.NOT_FINITE: "loss or gradient not finite; the step changed nothing",
            Verdict.EMPTY: "all its rows are in quarantine; the step changed nothing",
            Verdict.SPIKE: f"a spike: loss {event.loss:.4g} (limit {event.limits.loss:.4g}), "
            f"gradient norm {event.grad_norm:.4g} (limit {event.limits.norm:.4g}); the step "
            "changed nothing",
        }[event.verdict]
        line = f"warning: step {event.step}: {reason}"
        sha = event.data.sha
        self._recorder.write("incident", line=line, step=event.step, reason=reason, batch_sha=sha)

    def _attention_logit_max(self, event: Event) -> float | None:
        """Look at one row of each rank, every so many steps; None at the others."""
        run, batch = self._run, event.data.batch
        if event.step != 1 and event.step % run.settings.run.log_every_steps:
            return None
        found = attention_logit_max(
            run.layout.model, batch.tokens[:1], batch.documents[:1], run.dtype
        )
        run.layout.rest()
        return max(run.ranks.exchange(found.item()))


def record_incidents(recorder: Recorder, event: Event) -> None:
    """Record what the data met and mended while a step's batch was made.

    Args:
        recorder: Where it goes.
        event: The step.
    """
    for incident in event.data.incidents:
        reason = incident["reason"]
        recorder.write("incident", line=f"warning: {reason}", step=event.step, reason=reason)


def write_ledger(run: Run, ledger: Ledger) -> None:
    """Write a run's account of its data, on the leading rank."""
    if run.ranks.leads:
        run.folder.write_json("ledger.json", ledger.report())


def seconds_spent(folder: RunFolder) -> float:
    """Sum up the time a run's recorded steps took, over all its starts.

    Args:
        folder: Its folder, whose rows past the resumed step are gone.

    Returns:
        Seconds; 0 for a run that begins.
    """
    spent = [row["elapsed_s"] for row in read_rows(folder.metrics) if row["kind"] == "train"]
    return spent[-1] if spent else 0.0


def describe_run(console: Console, run: Run) -> None:
    """Print what follows from the settings, before the first step.

    Args:
        console: Where to print.
        run: The run.
    """
    settings, derived = run.settings, derive(run.settings)
    own = derived.rows // run.ranks.world
    micro = min(settings.parallel.micro_batch_rows or own, own)
    tokens = settings.data.tokens
    workers = "1 worker" if settings.data.workers == 1 else f"{settings.data.workers} workers"
    hands = f"{workers} a rank" if tokens is None else f"read from {tokens}"
    fp8 = ", of blocks in fp8" if settings.parallel.float8 else ""
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "parameters": f"{parameters(settings.model):,}",
        "FLOPs a token": f"{flops_per_token(settings.model):,}",
        "steps": f"{derived.steps:,} of {settings.train.batch_tokens:,} tokens",
        "tokens": f"{derived.tokens:,}",
        "a step": f"{derived.rows} rows of {settings.model.context}, {micro} at once",
        "data": f"{settings.data.lanes} lanes, {hands}",
        "device": f"{run.device}, matrix products in {run.dtype or torch.float32}{fp8}",
        "ranks": describe_layout(run.layout),
        "attention": run.layout.model.positions.kernel,
        "blocks": "compiled one by one" if settings.parallel.compile else "not compiled",
        "recomputation": settings.parallel.recompute or "none",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if run.chosen is not None:
        console.print(run.chosen, markup=False, highlight=False, soft_wrap=True)
    groups = group_table(run.optimizer.groups)
    console.print(groups, markup=False, highlight=False, soft_wrap=True)
    if settings.optim.warmup_tokens > derived.tokens:
        console.print(
            f"note: the warm-up ({settings.optim.warmup_tokens:,} tokens) is longer than the run; "
            "the rate never reaches its peak",
            soft_wrap=True,
        )


def describe_layout(layout: Layout) -> str:
    """Say how a model lies over its ranks."""
    world = layout.ranks.world
    if world == 1:
        return "1"
    if layout.shards == 1:
        return f"{world}, each with a whole copy"
    if layout.replicas == 1:
        return f"{world}, which share one copy"
    return f"{world}: {layout.replicas} copies, each shared by {layout.shards}"
