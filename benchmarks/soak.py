"""Does a run that is killed, stopped, damaged and moved end as one to which nothing happened?

    python benchmarks/soak.py --minutes 20 --json benchmarks/results/soak.json

A small run on Python's standard library is trained by the real commands, `summerlm train` and
`torchrun -m summerlm train`, float32, on up to `--nproc` gloo ranks. First its twins: the same
settings, uninterrupted, one for each way to lay it over all ranks (replicated, sharded, hybrid).
Then, for so many minutes, runs to which things happen at moments drawn from a printed seed:

    one rank, all ranks, launcher, all killed   SIGKILL: while data are opened, in a step, in a save
    killed in a save        SIGKILL of one rank at a named line of the saving protocol
    SIGTERM, SIGUSR1        to the launcher or to one rank: the run is saved
    one rank stopped        SIGSTOP: the job must end by itself
    disk full in a save     ENOSPC at a named line: the run goes on
    byte flipped, file truncated   in the newest checkpoint, while the run is stopped
    layout changed          every other run goes on with other ranks and shards, 4 -> 2 -> 1 -> 4

After each the same command goes on, or the launcher has started the ranks again by itself, until
the run is finished. Then all is held against the twin: each step once and with the twin's batch;
tokens without a gap; the losses of every step that was ever made, also of those that a kill undid;
ledger, state, final weights and moments. Bit for bit where the layout stayed, losses within 1e-5
where it changed. On the way: exit codes; what was said to be saved is there; the run goes on from
the newest good checkpoint; a signal undoes no step; processes of a job are gone soon after it.

Seconds to the next step count from the command, or from the kill where a launcher starts ranks
again; they mean something only on a machine that does nothing else. The exit code is 1 where
anything is wrong; the runs' folder is kept then. Linux only.
"""

import argparse
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from measuring import circumstances, spread
from rich.console import Console
from rich.table import Table
from soak_course import Counts, Course
from soak_runs import BATCH, Bed, lies
from soak_twins import Findings, compare

from summerlm.core.files import write_json

STEPS = 160
MOST_PROBLEMS = 20


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, leave)  # so that jobs are killed on the way out
    folder = Path(tempfile.mkdtemp(prefix="summerlm-soak-"))
    print(f"seed {arguments.seed}; runs in {folder}", flush=True)
    figures = {**circumstances(), "seed": arguments.seed, **soak(arguments, folder)}
    Console().print(table(figures))
    for problem in figures["problems"]:
        print(f"wrong: {problem}")
    if arguments.json:
        write_json(arguments.json, figures)
    if figures["problems"]:
        raise SystemExit(f"{len(figures['problems'])} things are wrong; see {folder}")
    shutil.rmtree(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hurt runs; see the file's head.")
    parser.add_argument("--minutes", type=float, default=20, help="of faults; twins come before")
    parser.add_argument("--nproc", type=int, default=4, choices=(2, 4, 8), help="most ranks")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    return parser.parse_args()


def leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the twins, then run after run until the time is over."""
    bed, draw = Bed(folder, arguments.steps), random.Random(arguments.seed)
    bed.learn_tokenizer()
    ways = lies(arguments.nproc)
    twins = {}
    for lie in ways:
        print(f"the twin on {lie} ...", file=sys.stderr, flush=True)
        twins[lie] = bed.make_twin(lie)
    counts, found = Counts(), Findings()
    began = time.monotonic()
    deadline = began + 60 * arguments.minutes
    courses = [course for lie in ways for course in ((lie, False), (ways[0], True))]
    for number, (lie, moves) in enumerate(itertools.cycle(courses)):
        problems = [*counts.problems, *found.problems]
        if (time.monotonic() > deadline and number) or len(problems) > MOST_PROBLEMS:
            break
        name = f"run-{number:03d}"
        course = Course(bed, name, lie, moves, draw, counts)
        if course.go(deadline):
            compare(bed, name, twins[lie], course.made, moves, found)
            if not [p for p in counts.problems + found.problems if p.startswith(name)]:
                shutil.rmtree(folder / name)
    return {
        "minutes": (time.monotonic() - began) / 60,
        "nproc": arguments.nproc,
        "steps_of_a_run": arguments.steps,
        "tokens_of_a_step": BATCH,
        "faults": dict(counts.faults.most_common()),
        "starts": counts.starts,
        "restarts": counts.restarts,
        "runs": {"finished": counts.runs, **found.compared_runs},
        "steps": counts.steps,
        "steps_made_again": counts.steps_again,
        "lost_tokens": found.lost_tokens,
        "repeated_tokens": found.repeated_tokens,
        "steps_compared": found.compared_rows,
        "wrong_losses": found.wrong_losses,
        "largest_deviation": {"loss": found.deviation, "weight": found.weight_deviation},
        "seconds": {
            "command to next step": spread(counts.start_s) if counts.start_s else None,
            "kill to next step": spread(counts.again_s) if counts.again_s else None,
            "fault to the end of all": spread(counts.end_s) if counts.end_s else None,
        },
        "problems": [*counts.problems, *found.problems],
    }


def table(figures: dict[str, Any]) -> Table:
    """Lay the figures out for a person."""
    result = Table(box=None, pad_edge=False)
    result.add_column(figures["hardware"]["processor"], no_wrap=True)
    for name in ("figure", "median", "most"):
        result.add_column(name, justify="right")
    for name, value in lines(figures):
        if isinstance(value, dict):
            result.add_row(name, "", f"{value['median']:.1f}", f"{value['highest']:.1f}")
        else:
            result.add_row(name, f"{value:.2g}" if isinstance(value, float) else str(value))
    return result


def lines(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value, or spread of values, of each line of the table."""
    for name, count in figures["faults"].items():
        yield f"fault: {name}", count
    yield "faults", sum(figures["faults"].values())
    for name in ("restarts", "steps", "steps_made_again", "steps_compared"):
        yield name.replace("_", " "), figures[name]
    for name, count in figures["runs"].items():
        yield f"runs, {name}", count
    for name in ("lost_tokens", "repeated_tokens", "wrong_losses"):
        yield name.replace("_", " "), figures[name]
    for name, value in figures["largest_deviation"].items():
        yield f"largest deviation of a {name}, layout changed", value
    for name, values in figures["seconds"].items():
        if values is not None:
            yield f"{name}: s", values
    yield "things that are wrong", len(figures["problems"])


if __name__ == "__main__":
    main()
