"""What the soak does to a run: who is hit when, and what the command must answer.

Flow: `soak_course.py` draws a `Plan` for each start of a run and strikes by it; while the run is
stopped it may `damage` the newest checkpoint. All is drawn from the soak's seed; what happens at a
drawn moment still depends on the machine's pace.
"""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soak_runs import Lie
from watched_job import Job

from summerlm.core.errors import SaveError
from summerlm.core.failpoints import POINTS
from summerlm.core.runtime import REQUEUE

KILLED = -signal.SIGKILL
BY_ANY_RANK = [p for p in POINTS if p.startswith(("save.", "write."))]
BY_THE_FIRST = [p for p in POINTS if p.startswith(("publish.", "prune."))]
# where a disk may refuse, before the checkpoint is there
ON_A_DISK = [p for p in POINTS if p.startswith("write.")] + BY_THE_FIRST[:4]

Act = Callable[[Job, random.Random], object]


def _to_ranks(number: signal.Signals, one: bool = True) -> Act:
    def act(job: Job, draw: random.Random) -> None:
        ranks = job.ranks()
        chosen = [draw.choice(ranks)] if one and ranks else ranks
        job.kill(lambda: chosen, number)

    return act


def _to_launcher(number: signal.Signals) -> Act:
    return lambda job, _: job.kill(job.launcher, number)


@dataclass(frozen=True)
class Fault:
    """Something that happens to a running job.

    Args:
        act: Does it.
        weight: How often, relative to the others.
        code: What our launcher ends with, if no restart is left.
        ranks: Whether only ranks are hit, which a launcher may start again.
        saves: Whether the run is saved, so that no step is made twice.
        early: Whether it may come before the first step, and what else may be the answer then.
    """

    act: Act
    weight: float
    code: int
    ranks: bool = False
    saves: bool = False
    early: tuple[int, ...] | None = None


FAULTS = {
    "one rank killed": Fault(_to_ranks(signal.SIGKILL), 4, 1, ranks=True, early=()),
    "all ranks killed": Fault(_to_ranks(signal.SIGKILL, one=False), 1, 1, ranks=True, early=()),
    "launcher killed": Fault(_to_launcher(signal.SIGKILL), 2, KILLED, early=()),
    "all killed": Fault(lambda job, _: job.kill(job.processes), 2, KILLED, early=()),
    "SIGTERM": Fault(_to_launcher(signal.SIGTERM), 2, 0, saves=True, early=(-signal.SIGTERM,)),
    "SIGUSR1": Fault(
        _to_launcher(signal.SIGUSR1), 2, REQUEUE, saves=True, early=(-signal.SIGUSR1,)
    ),
    "SIGTERM to one rank": Fault(_to_ranks(signal.SIGTERM), 1, 0, saves=True),
    "SIGUSR1 to one rank": Fault(_to_ranks(signal.SIGUSR1), 1, REQUEUE, saves=True),
    "one rank stopped": Fault(_to_ranks(signal.SIGSTOP), 0.5, 1, ranks=True),
}
KILLED_IN_A_SAVE, DISK_FULL = "killed in a save", "disk full in a save"
FLIPPED, TRUNCATED, MOVED = "byte flipped", "file truncated", "layout changed"
DRAWN = {name: fault.weight for name, fault in FAULTS.items()} | {KILLED_IN_A_SAVE: 4, DISK_FULL: 1}


@dataclass(frozen=True)
class Plan:
    """How a run is started, and what happens to it.

    Args:
        launcher: See `watched_job.command`.
        max_restarts: How often it starts ranks again.
        workers: Data workers of a rank.
        fault: Name of the fault.
        moment: "opening", "steps" or "saving".
        delay: Where in it, as a share.
        failpoint: What a fault in a save is made by.
    """

    launcher: str
    max_restarts: int
    workers: int
    fault: str
    moment: str
    delay: float
    failpoint: str = ""

    @property
    def what(self) -> Fault:
        """The fault, of those that are done from outside."""
        return FAULTS[self.fault]


def draw_plan(draw: random.Random, lie: Lie, damaged: bool, launcher: str | None = None) -> Plan:
    """Draw a plan.

    Args:
        draw: The soak's.
        lie: How the run lies over ranks.
        damaged: Whether its newest checkpoint is.
        launcher: The one that runs already, if it does; then nothing of the start can be chosen.

    Returns:
        The plan.
    """
    choices = ["summerlm", "summerlm", "torchrun"]
    chosen = launcher or draw.choice([*choices, "alone"] if lie.world == 1 else choices)
    names = {name: weight for name, weight in DRAWN.items() if name in FAULTS or launcher is None}
    if lie.world == 1:
        del names["one rank stopped"]  # nobody is left to notice
    if chosen == "torchrun":  # its own answers to signals aren't ours
        names = {name: weight for name, weight in names.items() if not name.startswith("SIG")}
    fault = draw.choices(list(names), list(names.values()))[0]
    if damaged and draw.random() < 0.3:
        fault, failpoint = KILLED_IN_A_SAVE, "aside.moved@0:kill"
    else:
        failpoint = _draw_failpoint(draw, lie, fault)
    early = fault in FAULTS and FAULTS[fault].early is not None
    moments = {"opening": 1 if early and launcher is None else 0, "steps": 3, "saving": 2}
    by_ranks = fault in FAULTS and FAULTS[fault].ranks
    restarts = draw.choice([0, 2] if by_ranks else [0, 0, 2])
    if chosen == "alone" or failpoint:
        restarts = 0
    return Plan(
        launcher=chosen,
        max_restarts=restarts,
        workers=draw.choice([0, 0, 0, 1]),
        fault=fault,
        moment=draw.choices(list(moments), list(moments.values()))[0],
        delay=draw.random(),
        failpoint=failpoint,
    )


def _draw_failpoint(draw: random.Random, lie: Lie, fault: str) -> str:
    if fault not in (KILLED_IN_A_SAVE, DISK_FULL):
        return ""
    points = ON_A_DISK if fault == DISK_FULL else [*BY_ANY_RANK, *BY_THE_FIRST]
    point = draw.choice(points)
    rank = 0 if point in BY_THE_FIRST else draw.randrange(lie.world)
    action = "enospc" if fault == DISK_FULL else "kill"
    return f"{point}@{rank}#{draw.randint(1, 3)}:{action}"


def answers(plan: Plan, stepping: bool, finished: bool) -> set[int]:
    """Say what the command may end with.

    Args:
        plan: What happened to it.
        stepping: Whether steps were made when it happened.
        finished: Whether the run's last checkpoint is there.

    Returns:
        Exit codes.
    """
    allowed = {0} if finished else set()
    if plan.fault == DISK_FULL:
        return {0, SaveError.exit_code}
    if plan.fault == KILLED_IN_A_SAVE:
        return allowed | {KILLED if plan.launcher == "alone" else 1}
    fault = plan.what
    allowed.add(KILLED if plan.launcher == "alone" and fault.code == 1 else fault.code)
    if not stepping:
        allowed.update(fault.early or ())
    if plan.launcher == "torchrun" and fault.saves:
        allowed.update({0, 1})  # it has its own words for 75
    return allowed


def damage(draw: random.Random, checkpoint: Path) -> str:
    """Flip a bit of a file of a checkpoint, or cut it short.

    Args:
        draw: The soak's.
        checkpoint: Its folder.

    Returns:
        What was done, as it is counted.
    """
    path = draw.choice(sorted(path for path in checkpoint.iterdir() if path.stat().st_size))
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    kind = draw.choice([FLIPPED, TRUNCATED])
    if kind == FLIPPED:
        data[place] ^= 1 << draw.randrange(8)
    else:
        del data[place:]
    path.write_bytes(data)
    return kind
