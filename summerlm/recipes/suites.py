"""Tasks measured while a run trains, within a share of its time.

Flow: `pretrain` makes one `Rounds` for each start of a run.
    1. `find_tasks` reads the data of all tasks before the first step;
    2. every so many tokens, and after the last step, `Rounds` measures them on all ranks;
    3. `Allowance`, on the leading rank, puts off a round that would take too much of its time;
    4. each figure is a row of kind "evaluation", and is shown to `Best.see`.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial

from summerlm.checkpoint.best import Measured
from summerlm.core.console import format_seconds, format_value
from summerlm.core.errors import SummerError, UsageError
from summerlm.core.files import RunFolder
from summerlm.core.record import Recorder, read_rows
from summerlm.core.runtime import StopRequest
from summerlm.eval.definition import Task
from summerlm.eval.items import Where
from summerlm.eval.plans import FIGURES, PROTOCOLS
from summerlm.eval.preparing import look
from summerlm.eval.results import Figure, TaskResult
from summerlm.eval.running import run_task
from summerlm.eval.task import expand
from summerlm.generate.engine import LanguageModel
from summerlm.recipes.opening import Run
from summerlm.recipes.recording import seconds_spent
from summerlm.recipes.settings import EvaluationConfig, derive
from summerlm.recipes.watching import evaluating, follow_leader
from summerlm.train.hooks import Hook
from summerlm.train.loop import Event

See = Callable[[Measured], None]


class Allowance:
    """How much of a run's time rounds have taken, and may take; by the leading rank's clock.

    Args:
        folder: The run's folder, whose rows past the resumed step are gone.
        share: Most of the run's time that rounds may take.
    """

    def __init__(self, folder: RunFolder, share: float) -> None:
        rows = read_rows(folder.metrics)
        measured = [row for row in rows if row["kind"] == "evaluation"]
        last = max((row["step"] for row in rows if row["kind"] == "train"), default=0)
        # a task has a row for each figure, and each says how long the whole of it took
        took = {(row["step"], row["task"]): row["seconds"] for row in measured}
        self._costs = {task: seconds for (_, task), seconds in took.items()}
        self._taken_s = sum(took.values())
        # a step's row is written before the rounds that follow it
        after_last = sum(seconds for (step, _), seconds in took.items() if step == last)
        self._before_s = seconds_spent(folder) + after_last
        self._share, self._start = share, time.monotonic()

    def add(self, task: str, seconds: float) -> None:
        """Take note of what a task took.

        Args:
            task: Its name.
            seconds: How long it was measured.
        """
        self._costs[task] = seconds
        self._taken_s += seconds

    def refusal(self, tasks: Iterable[str]) -> str | None:
        """Tell whether a round would take too much by now.

        Args:
            tasks: What is to be measured. One that never was costs nothing yet: only measuring it
                tells what it costs.

        Returns:
            Why it has to wait; None where it fits.
        """
        cost = sum(self._costs.get(task, 0.0) for task in tasks)
        run_s = self._before_s + time.monotonic() - self._start
        if self._taken_s + cost <= self._share * (run_s + cost):
            return None
        return (
            f"it takes about {format_seconds(cost)}, and rounds have taken "
            f"{format_seconds(self._taken_s)} of {format_seconds(run_s)}; "
            f"evaluation.time_share is {self._share:g}"
        )


def find_tasks(config: EvaluationConfig, where: Where) -> list[Task]:
    """Read the data of all tasks once, so that what is wrong is known before the first step.

    Args:
        config: The settings of evaluation.
        where: Where the data are read.

    Returns:
        The tasks.

    Raises:
        UsageError: If a set can't be found, read or used, or `evaluation.metric` is no figure of
            theirs.
        SourceDownError: If one can't be fetched.
    """
    tasks = expand(config.tasks)
    for task in tasks:
        name, _, figure = (config.metric or "").rpartition("/")
        known = figure_names(task)
        if task.name == name and figure not in known:
            raise UsageError(
                f"evaluation.metric = {config.metric!r}: {name} has {' and '.join(known)}"
            )
        look(task, where, None, config.items)
    return tasks


def figure_names(task: Task) -> list[str]:
    """List the figures that a task may have; a text has some of its protocols' only."""
    if task.kind == "text":
        return [f"{protocol}_{figure}" for protocol in PROTOCOLS for figure in FIGURES]
    if task.generation is not None:
        return [f"exact_match_{name}" for name in task.generation.extract]
    groups = [f"{m}_{group}" for m in task.metrics for group in task.parts if len(task.parts) > 1]
    return [*task.metrics, *groups]


def describe(name: str, figure: Figure) -> str:
    """Say a figure in a few words, for whoever reads along."""
    error = "" if figure.error is None else f" ± {format_value(figure.error)}"
    chance = "" if figure.chance is None else f" (chance {format_value(figure.chance)})"
    return f"{name} {format_value(figure.value)}{error}{chance}"


class Rounds:
    """Measures a run's tasks every so many tokens; every rank has one.

    Args:
        run: The run.
        recorder: Takes the figures.
        stop: Ends a wait for data, and a round between two tasks.
        settle: Called before a round: waits for the save in flight.
        see: Shown each figure.

    Raises:
        UsageError: If a task is unknown, its data can't be found or read, or the figure that
            checkpoints are judged by is none of theirs.
        InterruptedWaitError: If a request to stop came while data were fetched.
    """

    def __init__(
        self, run: Run, recorder: Recorder, stop: StopRequest, settle: Hook, see: See
    ) -> None:
        self._run, self._recorder, self._stop = run, recorder, stop
        self._settle, self._see = settle, see
        self._config: EvaluationConfig = run.settings.evaluation
        self._batch = run.settings.train.batch_tokens
        self._last_step = derive(run.settings).steps
        data = run.settings.data
        self._where = Where(
            data.mirror,
            self._config.bundle,
            stall_timeout_s=data.stall_timeout_s,
            deadline_s=data.deadline_s,
            kept={},
        )

        def find() -> list[Task]:
            with stop.interrupting():
                return find_tasks(self._config, self._where)

        self._tasks = {task.name: task for task in run.ranks.lead_first(find)}
        self._allowance = (
            Allowance(run.folder, self._config.time_share) if run.ranks.leads else None
        )
        self._waiting: list[str] = run.ranks.lead(self._recall)

    def __call__(self, event: Event) -> None:
        """Measure what is due, or has waited, and fits.

        Args:
            event: The step.
        """
        due = event.step == self._last_step or event.step == self._due(event.step)
        if due:
            self._waiting = list(self._tasks)
        if not self._waiting:
            return
        if event.step != self._last_step:
            # clocks differ: the leading rank's decides. While a round waits, it is asked each step
            refusal = self._run.ranks.lead(self._refusal)
            if refusal is not None:
                if due:
                    self._put_off(event, refusal)
                return
        self._settle(event)
        self._measure(event)

    def _measure(self, event: Event) -> None:
        run, ranks = self._run, self._run.ranks
        names = ", ".join(self._waiting)
        self._recorder.write("note", line=f"step {event.step}: measuring {names} ...")
        with evaluating(run.layout):
            agree = partial(follow_leader, ranks)
            lm = LanguageModel(run.layout.model, run.tokenizer, agree)
            for name in tuple(self._waiting):
                # the last step is saved after its round, so a run that left now would count as done
                asked = ranks.exchange(self._stop.received is not None)
                if any(asked) and event.step != self._last_step:
                    self._put_off(event, "the run is asked to stop")
                    return
                ranks.phase("evaluate", event.step)
                began = time.monotonic()
                self._waiting.remove(name)
                try:
                    result = run_task(
                        lm,
                        self._tasks[name],
                        self._where,
                        limit=self._config.items,
                        precision=run.dtype,
                        ranks=ranks,
                    )
                except SummerError as error:  # the same on all ranks, and no reason not to train on
                    self._spend(name, time.monotonic() - began)
                    self._incident(event, f"{name} can't be measured: {error}")
                    continue
                self._record(event, result, time.monotonic() - began)

    def _record(self, event: Event, result: TaskResult, seconds: float) -> None:
        self._spend(result.task, seconds)
        task, _, wanted = (self._config.metric or "").rpartition("/")
        if task == result.task and wanted not in result.figures:
            known = ", ".join(result.figures)
            self._incident(event, f"no checkpoint is the best: {task} has no {wanted}, but {known}")
        words = ", ".join(describe(name, figure) for name, figure in result.figures.items())
        line: str | None = f"step {event.step}: {result.task}: {words}; {result.items:,} items"
        for name, figure in result.figures.items():
            better = figure.higher_is_better
            self._see(Measured(event.step, f"{result.task}/{name}", figure.value, better))
            self._recorder.write(
                "evaluation",
                line=line,
                step=event.step,
                tokens=event.tokens,
                task=result.task,
                metric=name,
                value=figure.value,
                error=figure.error,
                chance=figure.chance,
                higher_is_better=better,
                protocol=result.protocol,
                items=result.items,
                few_shot=result.few_shot,
                seconds=seconds,
            )
            line = None

    def _spend(self, task: str, seconds: float) -> None:
        if self._allowance is not None:
            self._allowance.add(task, seconds)

    def _put_off(self, event: Event, reason: str) -> None:
        self._incident(event, f"measuring {', '.join(self._waiting)} is put off: {reason}")

    def _incident(self, event: Event, reason: str) -> None:
        line = f"warning: step {event.step}: {reason}"
        self._recorder.write("incident", line=line, step=event.step, reason=reason)

    def _refusal(self) -> str | None:
        assert self._allowance is not None, "the leading rank has one"
        return self._allowance.refusal(self._waiting)

    def _due(self, step: int) -> int | None:
        """Tell the last step, up to one, after which a round was due."""
        every = self._config.every_tokens
        if every is None or not (rounds := step * self._batch // every):
            return None
        return -(-rounds * every // self._batch)

    def _recall(self) -> list[str]:
        """List the tasks that a round before this start of the run has left to be measured."""
        due = self._due(self._run.state["step"]) if self._run.state else None
        if due is None:
            return []
        rows = read_rows(self._run.folder.metrics)
        done = {row["task"] for row in rows if row["kind"] == "evaluation" and row["step"] >= due}
        return [name for name in self._tasks if name not in done]
