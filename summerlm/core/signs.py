"""Signs of life: what a rank says of itself, and what all of them together say of a job.

Flow: `liveness.Liveness` makes a `Sign` of its rank by `position`, reads those of the others, and
asks `blame` for whom the job waits.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        step: The step it is in.
        place: How many phases it has begun in all, the same ones as the other ranks.
        phase: What it does.
        seconds: For how long.
        frame: Where its main thread stands: file, line and function.
        waits: The collective that its main thread waits in, or None.
        number: Counts its signs.
    """

    step: int
    place: int
    phase: str
    seconds: float
    frame: str
    waits: str | None
    number: int


NEVER = Sign(0, 0, "start", 0.0, "an unknown place", None, 0)  # of a rank that gave no sign yet


def blame(
    signs: Mapping[int, Sign], allowance: Mapping[str, float | None], limit_s: float
) -> list[int]:
    """Find the ranks for which the others wait, if they had their time.

    Args:
        signs: The last sign of each rank.
        allowance: Seconds that certain phases may take; None is no limit.
        limit_s: Seconds that any other phase may take.

    Returns:
        Those furthest behind; of those the ones that don't wait in a collective, where others do,
        and that don't stand where most do. None of them where one is still within its time.
    """
    behind = min(sign.place for sign in signs.values())
    last = {rank: sign for rank, sign in signs.items() if sign.place == behind}
    chosen = {rank: sign for rank, sign in last.items() if sign.waits is None} or last
    frame, count = Counter(sign.frame for sign in chosen.values()).most_common(1)[0]
    if len(signs) < 2 * count < 2 * len(chosen):
        chosen = {rank: sign for rank, sign in chosen.items() if sign.frame != frame}
    for sign in chosen.values():
        most = allowance.get(sign.phase, limit_s)
        if most is None or sign.seconds <= most:
            return []
    return sorted(chosen)


def position(thread: int | None) -> tuple[str, str | None]:
    """Find where a thread stands.

    Args:
        thread: Its identifier.

    Returns:
        The innermost line outside of torch's own waiting, and what it waits in, or None.
    """
    frame = sys._current_frames().get(thread or 0)
    innermost, waits = "", None
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "torch/distributed" in path or "_engine_run_backward" in name:
            waits = waits if name == "wrapper" else name  # the outermost: what was called
        elif not innermost:
            innermost = f"{os.path.basename(path)}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return innermost, waits
