"""One run of the soak on its way through faults to its end.

Flow: `soak.py` makes a `Course` for each run; it starts the command by a `Plan`, strikes, watches
how the command ends and what it left, damages or moves what is stopped, and starts again.
"""

import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from soak_faults import (
    FAULTS,
    KILLED,
    MOVED,
    Plan,
    answers,
    damage,
    draw_plan,
)
from soak_runs import END_S, Bed, Lie, lies
from watched_job import Job, Row

AFTER_S = 75  # from a fault to the end of the command: `parallel.timeout_s`, dumps, a busy machine
LEFT_S = 10  # from the end of the command to the end of its processes
STEP_S = 0.03  # about: a fault comes within so many seconds a step of the run
OPENING_S = 8  # of what comes before them
DRAFT_S = 0.03  # for which a draft is there, about
DAMAGED, MOVING = 0.25, 0.7  # shares of the stops at which it happens
MOST_STARTS = 60  # of one run: it may be that faults never let it end


@dataclass
class Counts:
    """What was done and seen.

    Attributes:
        faults: How often what happened.
        starts: Of commands.
        restarts: Commands that went on with a run, and ranks that a launcher started again.
        steps: Made, twins left out.
        steps_again: Of these, made again.
        runs: Finished.
        start_s: Seconds from a command that goes on with a run to its next step.
        again_s: Seconds from a kill to the next step, where a launcher started ranks again.
        end_s: Seconds from a fault to the end of all processes.
        problems: What is wrong, in words.
    """

    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    restarts: int = 0
    steps: int = 0
    steps_again: int = 0
    runs: int = 0
    start_s: list[float] = field(default_factory=list)
    again_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Course:
    """A run through its faults.

    Args:
        bed: Where it lies.
        name: Of its folder.
        lie: How it lies over ranks at first.
        moves: Whether that changes on the way.
        draw: The soak's.
        counts: Added to.

    Attributes:
        made: Rows of all steps that it ever made.
    """

    def __init__(
        self, bed: Bed, name: str, lie: Lie, moves: bool, draw: random.Random, counts: Counts
    ) -> None:
        self.made: list[Row] = []
        self._bed, self._name, self._draw, self._counts = bed, name, draw, counts
        self._lie, self._widest, self._moves = lie, lie.world, moves
        # folder of a checkpoint that is, not its step: a good one of its step may follow
        self._damaged: int | None = None
        self._announced = 0  # the last step that was said to be saved, and wasn't damaged since
        self._full = False  # whether this start said that a save failed
        self._since, self._times = 0.0, [0.0]  # of ranks that make no steps yet
        self._stepping = self._resumed = False
        self._step, self._from = 0, (0, 0)  # the last one made; where the next start may stand

    def go(self, deadline: float) -> bool:
        """Start it, strike it and start it again, until it is finished.

        Args:
            deadline: After this moment nothing happens to it any more.

        Returns:
            Whether it was finished.
        """
        for start in range(MOST_STARTS):
            quiet = time.monotonic() > deadline
            damaged = self._damaged is not None
            plan = None if quiet else draw_plan(self._draw, self._lie, damaged)
            code = self._start(plan, start)
            if code == 0 and self._bed.finished(self._name):
                self._counts.runs += 1
                steps = {row["step"] for row in self.made}
                self._counts.steps += len(self.made)
                self._counts.steps_again += len(self.made) - len(steps)
                return True
            if quiet:
                break
            self._change()
        self._wrong("it doesn't come to its end")
        return False

    def _start(self, plan: Plan | None, number: int) -> int | None:
        """Start the command once and see it end; gives its exit code."""
        good = self._good()
        self._expect(good, good, time.monotonic(), self._counts.start_s if number else [])
        self._full = False
        with self._bed.start(
            self._name,
            self._lie,
            plan.launcher if plan else "summerlm",
            max_restarts=plan.max_restarts if plan else 0,
            failpoint=plan.failpoint if plan else "",
            workers=plan.workers if plan else 0,
            heed=self._heed,
        ) as job:
            self._counts.starts += 1
            self._counts.restarts += number > 0
            left = plan.max_restarts if plan else 0
            struck = False
            while plan is not None and (struck := self._strike(job, plan)):
                if not plan.what.ranks or not left or not self._is_started_again(job):
                    break
                left, struck = left - 1, False
                plan = draw_plan(self._draw, self._lie, False, plan.launcher)
            self._see_the_end(job, plan, struck)
            if self._damaged not in map(self._folder, self._bed.checkpoints(self._name)):
                self._damaged = None  # was set aside
            return job.code

    def _strike(self, job: Job, plan: Plan) -> bool:
        """Let a fault happen at its moment; whether the job still lived."""
        if plan.fault not in FAULTS:
            return False  # it happens inside
        drafts = self._bed.folder / self._name / "checkpoints"
        wait = OPENING_S * plan.delay
        if plan.moment != "opening":
            job.wait(lambda: self._stepping, END_S)
            wait = STEP_S * self._bed.steps * plan.delay
        moment = time.monotonic() + wait
        job.wait(lambda: time.monotonic() > moment, END_S)
        if plan.moment == "saving" and job.wait(lambda: any(drafts.glob("tmp-*")), END_S):
            time.sleep(DRAFT_S * self._draw.random())
        if plan.what.ranks:
            job.wait(lambda: bool(job.ranks()), END_S)  # which are started a little later
        if job.code is not None:
            return False
        self._struck_while_stepping, good = self._stepping, self._good()
        self._at, self._step_then = time.monotonic(), self._step
        plan.what.act(job, self._draw)
        self._counts.faults[plan.fault] += 1
        if plan.what.ranks:  # they may be started again, from here or from a later save
            self._expect(good, self._step, self._at, self._counts.again_s)
        return True

    def _is_started_again(self, job: Job) -> bool:
        """Wait for the next step, or the end; tell whether there was a step."""
        again = job.wait(lambda: self._stepping, END_S)
        self._counts.restarts += again
        if not again and not self._bed.finished(self._name):
            self._wrong(f"its launcher did not start ranks again: {_end_of(job)}")
        return again

    def _see_the_end(self, job: Job, plan: Plan | None, struck: bool) -> None:
        """Wait for the end and judge it."""
        ended = job.wait(lambda: job.code is not None, AFTER_S if struck else END_S)
        left = [] if job.wait_for_nothing_left(LEFT_S) else job.processes()
        if not ended:
            self._wrong(f"the command does not end; {plan}: {_end_of(job)}")
        elif left:
            self._wrong(f"processes are left {LEFT_S} s after the end; {plan}: {left}")
        job.kill(job.processes)
        job.wait(lambda: job.code is not None, AFTER_S)
        finished, code = self._bed.finished(self._name), job.code
        inside = plan is not None and plan.failpoint and (code != 0 or self._full)
        what = "no fault"
        if plan is not None and (struck or inside):
            what = f"{plan.fault} ({plan.failpoint or plan.moment})"
            if inside:
                self._counts.faults[plan.fault] += 1
            else:
                self._counts.end_s.append(time.monotonic() - self._at)
            self._judge(job, plan, inside or self._struck_while_stepping, finished)
        elif code != 0 or not finished:
            self._wrong(f"ended with {code} though nothing happened: {_end_of(job)}")
        newest = (self._bed.checkpoints(self._name)[-1:] or [0])[0]
        if newest < self._announced:
            self._wrong(f"step {self._announced} was said to be saved, the newest is {newest}")
        launcher = f"{plan.launcher}, {plan.max_restarts} restarts" if plan else "summerlm"
        print(
            f"{self._name} on {self._lie} by {launcher}: {what}; step {self._step}, saved "
            f"{newest}; exit code {code}",
            file=sys.stderr,
            flush=True,
        )

    def _judge(self, job: Job, plan: Plan, stepping: bool, finished: bool) -> None:
        """Hold the answer to a fault against what it must be."""
        if job.code not in (allowed := answers(plan, stepping, finished)):
            self._wrong(f"{plan} was answered by {job.code}, not {allowed}: {_end_of(job)}")
        if plan.fault in FAULTS and plan.what.code == KILLED and self._step > self._step_then + 2:
            self._wrong(f"{plan}: ranks went on to step {self._step} without their launcher")
        if plan.fault in FAULTS and plan.what.saves and stepping and not finished:
            newest = (self._bed.checkpoints(self._name)[-1:] or [0])[0]
            if newest != self._step:
                self._wrong(f"{plan}: step {self._step} was made, step {newest} saved")

    def _change(self) -> None:
        """Damage what was saved, and lay the run over other ranks."""
        steps = self._bed.checkpoints(self._name)
        if self._damaged is None and len(steps) > 1 and self._draw.random() < DAMAGED:
            self._damaged = self._folder(steps[-1])
            self._announced = min(self._announced, steps[-2])
            kind = damage(self._draw, self._bed.checkpoint(self._name, steps[-1]))
            self._counts.faults[kind] += 1
        if self._moves and self._draw.random() < MOVING:
            world = self._lie.world // 2 or self._widest
            self._lie = self._draw.choice(lies(world))
            self._counts.faults[MOVED] += 1

    def _folder(self, step: int) -> int | None:
        """The number that the file system gave to the folder of a checkpoint, if there is one."""
        try:
            return self._bed.checkpoint(self._name, step).stat().st_ino
        except FileNotFoundError:  # since it was listed
            return None

    def _good(self) -> int:
        """The newest checkpoint that can be trusted; 0 where there is none."""
        steps = self._bed.checkpoints(self._name)
        return max((s for s in steps if self._folder(s) not in (None, self._damaged)), default=0)

    def _expect(self, least: int, most: int, since: float, times: list[float]) -> None:
        """Note that ranks start now, and after which step they may go on."""
        self._from, self._since, self._times = (least, most), since, times
        self._stepping = self._resumed = False
        # of a new command nothing earlier can still be written; a new run resumes nothing
        self._fresh = times is not self._counts.again_s or not self.made

    def _heed(self, row: Row) -> None:
        """Take note of a row of the record."""
        if row["kind"] == "resume":
            self._resumed = True
        elif row["kind"] == "save":
            self._announced = max(self._announced, row["step"])
        elif row["kind"] == "incident" and "not saved" in row["reason"]:
            self._full = True
        elif row["kind"] == "train":
            self.made.append(row)
            before, self._step = self._step, row["step"]
            # ranks that are about to die may still write a row; those after them have resumed
            if self._stepping or not (self._resumed or self._fresh):
                if row["step"] != before + 1:
                    self._wrong(f"step {row['step']} came after {before}")
                return
            self._stepping = True
            self._times.append(time.monotonic() - self._since)
            least, most = self._from
            if not least <= row["step"] - 1 <= max(least, most):
                self._wrong(f"went on after {row['step'] - 1}, not {least} to {most}")

    def _wrong(self, words: str) -> None:
        self._counts.problems.append(f"{self._name}: {words}")
        print(f"WRONG {self._counts.problems[-1]}", file=sys.stderr, flush=True)


def _end_of(job: Job) -> str:
    return "\n" + "\n".join(job.words.splitlines()[-30:])
